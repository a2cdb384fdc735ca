"""`bigray train` that is told to end: one line, a checkpoint at the step it had reached, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigray.journal import read_journal
from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.storage import open_storage
from bigray.training.checkpoint import committed_steps, read_checkpoint
from bigray.training.runner import training_trials
from tests.e2e.conftest import BIGRAY, Run, only_json, ray_processes
from tests.integration.jobs import write_blobs
from tests.waiting import wait_until

PATIENCE_S = 120.0
SIGNALS = {signal.SIGTERM: (143, "told to end (SIGTERM)"), signal.SIGINT: (130, "interrupted")}
pytestmark = pytest.mark.timeout(500)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A model whose pace is read from a file; no checkpoint is due by the clock before the run ends."""
    (tmp_path / "pace").write_text("0.05")
    file = tmp_path / "job.toml"
    file.write_text(f"""
name    = "ending"
storage = "{tmp_path}/runs"
data    = {{ source = "{write_blobs(tmp_path / "blobs.npz")}", target = "label", normalize = "standard" }}

[models.paced]
factory = "tests.integration.user_models:paced_mlp"
params  = {{ pace_file = "{tmp_path}/pace" }}

[training]
task              = "classification"
epochs            = 200
global_batch_size = 32
lr                = 0.05
checkpoint_every_s = 3600.0

[scaling]
num_workers = 2
""")
    return file


def paths_of(job: Path) -> RunPaths:
    """The one run of the job."""
    (run,) = (job.parent / "runs").glob("ending-*")
    return RunPaths(open_storage(str(run)), run.name)


def events_of(job: Path, *kinds: str) -> list[dict[str, Any]]:
    if not list(job.parent.glob("runs/ending-*")):
        return []
    return [event for event in read_journal(paths_of(job)) if event["kind"] in kinds]


def test_what_is_told_to_end_goes_on_at_the_step_it_had_reached(bigray: Run, job: Path) -> None:
    """By SIGTERM, and when it has gone on, by Ctrl-C."""
    before = ray_processes()
    stopped_at = []
    for told in SIGNALS:
        check_that_it_ends(job, told, before)
        stopped_at.append(check_the_checkpoint(job))

    (job.parent / "pace").write_text("0")
    finished = bigray("train", str(job), "--json")
    assert finished.returncode == 0, finished.stderr
    board = only_json(finished.stdout)["leaderboard"]
    assert board["trials"][0]["status"] == "finished"
    assert (board["samples_lost"], board["samples_repeated"]) == (0, 0)
    assert [event["step"] for event in events_of(job, "resumed")] == stopped_at
    assert not events_of(job, "failed")


def check_that_it_ends(job: Path, told: signal.Signals, before: set[int]) -> None:
    """Told so once it has trained five epochs of its own."""
    exit_code, line = SIGNALS[told]
    num_epochs = len(events_of(job, "epoch")) + 5
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen([BIGRAY, "train", str(job), "--json"], env=clean, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(
            lambda: len(events_of(job, "epoch")) >= num_epochs or process.poll() is not None, timeout_s=PATIENCE_S
        )
        process.send_signal(told)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == exit_code, errors
    assert errors.splitlines()[-1] == f"{line}; the same command goes on where it stopped"
    assert "Traceback" not in errors
    wait_until(lambda: not ray_processes() - before, timeout_s=PATIENCE_S)


def check_the_checkpoint(job: Path) -> int:
    """The step of the newest checkpoint, which verifies and is not behind what the run had told."""
    paths, (trial,) = paths_of(job), training_trials(load_job(job))
    newest = committed_steps(paths, trial.trial_id)[0]
    told = max(event["step"] for event in events_of(job, "epoch", "resumed"))
    assert read_checkpoint(paths, trial, newest).progress.step == newest >= told
    return newest
