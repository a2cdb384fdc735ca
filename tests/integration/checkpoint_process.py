"""One change to the checkpoints of a run, in a process of its own for `test_kill_points`.

    python checkpoint_process.py <run folder> save <step> | trim

Starts without torch, and does all its work in the main thread, where the faults to inject are counted. Prints the kind
of error where there is one, and exits as bigray does.
"""

import os
import secrets
import sys

import numpy as np
import safetensors.numpy

from bigray import storage
from bigray.errors import BigrayError
from bigray.paths import RunPaths
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.training.checkpoint import Progress
from bigray.training.checkpoint_writer import save_checkpoint, trim_trial

CHUNK_BYTES = 1024
"""Small, so that one save has many writes."""
TRIAL = TrialSpec(
    trial_id="0-net",
    model_name="net",
    model=ModelSpec(factory="bigray.models:mlp"),
    training=TrainingSpec(task="classification"),
    seed=0,
)


def paths_of(folder: str) -> RunPaths:
    return RunPaths(storage.open_storage(folder), "run")


def files_of(step: int, attempt: int) -> dict[str, bytes]:
    """Other bytes for each step and attempt, so that a mixture would be seen."""
    generator = np.random.default_rng([step, attempt])
    return {
        f"{stem}.safetensors": safetensors.numpy.save({"w": generator.normal(size=chunks * CHUNK_BYTES // 8)})
        for stem, chunks in (("model", 40), ("optimizer", 80))
    }


def save(folder: str, step: int, attempt: int) -> None:
    progress = Progress(step=step, ended="finished")
    save_checkpoint(paths_of(folder), TRIAL, attempt, progress, files_of(step, attempt))


def main(folder: str, action: str, *step: str) -> None:
    storage.CHUNK_BYTES = CHUNK_BYTES
    # file names that are the same in each run, since strace is told which paths to strike at
    os.getpid = lambda: 1
    secrets.token_hex = lambda _: "0" * 8
    attempt = max(paths_of(folder).attempts())
    if action == "trim":
        trim_trial(paths_of(folder), TRIAL.trial_id, attempt)
    else:
        save(folder, int(step[0]), attempt)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BigrayError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
