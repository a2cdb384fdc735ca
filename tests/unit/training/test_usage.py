"""What a process uses, and that it does not grow with the number of trials it has trained."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bigray.training.usage import Meter, Usage, private_rss_bytes

MB = 2**20
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def test_processor_time_is_of_the_command_alone() -> None:
    meter = Meter(CPU)
    sum(number * number for number in range(300_000))
    busy_s = meter.read().cpu_s
    meter.reset()
    assert meter.read().cpu_s < busy_s


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_is_of_the_command_alone() -> None:
    meter = Meter(CPU)
    block = bytearray(80 * MB)
    block[::4096] = b"x" * len(block[::4096])
    high = meter.read().peak_rss_bytes
    del block
    gc.collect()
    meter.reset()

    assert high - meter.read().peak_rss_bytes > 40 * MB


def test_a_group_has_the_processor_time_of_all_and_the_memory_of_the_largest() -> None:
    ranks = [Usage(1.0, 300, 5, 200), Usage(2.0, 100, 7, 90)]
    assert Usage.of_group(ranks) == Usage(3.0, 300, 7, 200)


TRIALS = """
    import gc
    import numpy as np
    import torch
    from bigray.data.dataset import TrainingArrays
    from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
    from bigray.training.allocator import keep_freed_memory
    from bigray.training.isolation import CleanState
    from bigray.training.loop import TrialTraining, Worker
    from bigray.training.usage import private_rss_bytes
    from tests.loop_hooks import RecordingHooks

    keep_freed_memory()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(256, 16)).astype(np.float32), np.arange(256) % 4
    data, worker = TrainingArrays(x, y, x[:64], y[:64]), Worker(0, 1, torch.device("cpu"))
    models = ("bigray.models:mlp", {"hidden": [64]}), ("bigray.models:mlp", {"hidden": [128, 32], "dropout": 0.2})
    clean = CleanState()
    gc.collect()
    gc.freeze()
    for number in range(70):
        factory, params = models[number % 2]
        settings = {"task": "classification", "epochs": 1, "global_batch_size": (16, 64, 128)[number % 3]}
        training = TrainingSpec.model_validate({**settings, "optimizer": ("adamw", "sgd")[number % 2]})
        trial = TrialSpec(
            trial_id=f"{number:03d}-net", model_name="net", model=ModelSpec(factory=factory, params=params),
            training=training, seed=number,
        )
        live = TrialTraining(trial, data, 4, worker, RecordingHooks())
        live.train_to(1)
        del live
        gc.collect()
        clean.restore()
        if number == 19:
            before = private_rss_bytes()
    print(private_rss_bytes() - before)
"""


def test_fifty_trials_more_leave_next_to_nothing_in_their_process() -> None:
    """In a process of its own, with the worker's own steps between two trials."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRIALS)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8 * MB  # 0.1 seen; 600 trials of this growth would be 100 MB


def test_memory_that_other_processes_share_does_not_count() -> None:
    import mmap

    before = private_rss_bytes()
    with mmap.mmap(-1, 60 * MB) as shared:  # anonymous and shared, as the object store's
        for place in range(0, len(shared), 4096):
            shared[place] = 1
        assert private_rss_bytes() - before < 20 * MB
