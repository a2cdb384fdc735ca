"""Workers, Ray Train's controller, the command and raylets are killed, and the run does not tell.

With BIGRAY_FULL=1 that is 60 faults; by default one of each kind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.journal import read_journal
from bigray.loading import load_job
from bigray.training.checkpoint import read_checkpoint
from bigray.training.runner import training_trials
from tests.e2e.faults import Fault, paths_of, read_faults, table_of
from tests.full_size import IS_FULL
from tests.integration.jobs import last_weights, weights_of_one_process

NUM_FAULTS = 60 if IS_FULL else 4
SEED = 3
pytestmark = pytest.mark.timeout(4800 if IS_FULL else 400)


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a soak that has run."""
    folder = tmp_path_factory.mktemp("soak")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.e2e.faults", str(folder), f"--faults={NUM_FAULTS}", f"--seed={SEED}"]
    process = subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-5000:]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it ends its cluster
            process.wait(60)
    print(f"\n{output}")
    return folder


@pytest.fixture(scope="module")
def board(soak: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((soak / "board.json").read_text())
    return document["leaderboard"]


def test_the_weights_are_those_of_an_undisturbed_run(soak: Path, board: dict[str, Any]) -> None:
    undisturbed = weights_of_one_process(load_job(soak / "job.toml"))
    disturbed = last_weights(paths_of(soak), "paced")
    assert len(read_faults(soak)) == NUM_FAULTS
    assert disturbed.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert np.array_equal(disturbed[name], tensor.numpy()), name


def test_no_sample_is_lost_or_repeated(board: dict[str, Any]) -> None:
    assert (board["samples_lost"], board["samples_repeated"]) == (0, 0)


def test_training_never_goes_on_before_a_committed_checkpoint(soak: Path) -> None:
    """That is how it would show that one was lost: each that was told of is there, or a newer one is."""
    committed = 0
    for event in read_journal(paths_of(soak)):
        if event["kind"] == "checkpoint":
            committed = max(committed, event["step"])
        elif event["kind"] == "resumed":
            assert event["step"] >= committed, event
    assert committed > 0


def test_the_checkpoints_that_are_kept_verify(soak: Path) -> None:
    paths, job = paths_of(soak), load_job(soak / "job.toml")
    (trial,) = training_trials(job)
    told = {event["step"] for event in read_journal(paths) if event["kind"] == "checkpoint"}
    newest = sorted(told)[-job.training.keep.last :]
    assert set(newest) <= set(paths.checkpoint_steps("paced"))
    for step in paths.checkpoint_steps("paced"):
        assert read_checkpoint(paths, trial, step).progress.step == step


def test_the_table_names_each_fault() -> None:
    fault = Fault(1, "raylet", pid=7, step=30, committed=25, resumed=28, recovery_s=2.5)
    assert table_of([fault]).splitlines()[1].split() == ["1", "raylet", "30", "2.5", "2"]
