"""A sweep whose worker, Tune actor, controller and driver are killed, one after another, finds what it would have.

With BIGRAY_FULL=1 at other moments too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.storage import open_storage
from tests.e2e.conftest import BIGRAY, Run, only_json
from tests.full_size import IS_FULL
from tests.integration.jobs import write_blobs
from tests.processes import descendants

SEEDS = range(5) if IS_FULL else range(1)
TITLES = {"worker": b"RayTrainWorker", "tune": b"ray::LegTrial", "controller": b"TrainController"}
TRIALS = 12
pytestmark = pytest.mark.timeout(900 if len(SEEDS) > 1 else 400)


def write_files(folder: Path) -> tuple[str, str]:
    folder.mkdir()
    job, search = folder / "job.toml", folder / "search.toml"
    job.write_text(f"""
name    = "killed"
storage = "{folder}/runs"
data    = {{ source = "{write_blobs(folder / "blobs.npz")}", target = "label", normalize = "standard" }}

[models.slow]
factory = "tests.integration.user_models:slow_mlp"

[training]
task              = "classification"
epochs            = 4
global_batch_size = 32

[scaling]
num_workers = 2
""")
    search.write_text(f"""
search    = "random"
trials    = {TRIALS}
scheduler = "asha"
asha      = {{ grace_epochs = 1, reduction_factor = 2 }}
stack     = "off"

[space]
lr = {{ log_uniform = [1e-3, 0.3] }}
""")
    return str(job), str(search)


def events_of(folder: Path) -> list[dict[str, Any]]:
    runs = [run for run in folder.glob("runs/killed-*") if (run / "journal").exists()]
    if not runs:
        return []
    return list(read_journal(RunPaths(open_storage(str(runs[0])), runs[0].name)))


def count(folder: Path, kind: str) -> int:
    return sum(event["kind"] == kind for event in events_of(folder))


def kill_one(what: str) -> bool:
    """One process of that kind, started by this test; whether there was one."""
    found = sorted(pid for pid, title in descendants() if TITLES[what] in title.split(b"\0")[0])
    if found:
        os.kill(found[-1], signal.SIGKILL)
    return bool(found)


def run_and_kill(command: list[str], folder: Path, seed: int) -> list[str]:
    """Run until all but the driver were killed once each, at random moments, and then kill the driver."""
    moments = random.Random(seed)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed: list[str] = []
    order = moments.sample(sorted(TITLES), len(TITLES))
    deadline = time.monotonic() + 200
    while process.poll() is None and len(killed) < len(order):
        assert time.monotonic() < deadline, f"killed {killed}, but the sweep does not go on"
        # each kill after another leg: what came before was survived
        if count(folder, "leg") > len(killed):
            time.sleep(moments.uniform(0, 0.3))
            if kill_one(order[len(killed)]):
                killed.append(order[len(killed)])
        time.sleep(0.1)
    while process.poll() is None and count(folder, "leg") < len(killed) + 2:
        assert time.monotonic() < deadline, "after the kills the sweep does not go on"
        time.sleep(0.1)
    assert process.poll() is None, "the sweep was over before everything was killed"
    process.kill()
    process.wait()
    return [*killed, "driver"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sweep_in_which_everything_is_killed_finds_what_it_would_have(bigray: Run, tmp_path: Path, seed: int) -> None:
    quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
    job, search = write_files(quiet)
    expected = bigray("tune", job, "--search", search, "--json")
    assert expected.returncode == 0, expected.stderr

    job, search = write_files(disturbed)
    killed = run_and_kill([BIGRAY, "tune", job, "--search", search, "--json"], disturbed, seed)
    assert sorted(killed) == ["controller", "driver", "tune", "worker"]
    before = events_of(disturbed)
    found = bigray("tune", job, "--search", search, "--json")
    assert found.returncode == 0, found.stderr

    one, other = (only_json(done.stdout)["leaderboard"] for done in (expected, found))
    assert _outcomes(other) == _outcomes(one)
    assert other["winner"]["trial_id"] == one["winner"]["trial_id"]
    assert (other["samples_lost"], other["samples_repeated"]) == (0, 0)

    everything = events_of(disturbed)
    legs = Counter(event["number"] for event in everything if event["kind"] == "leg")
    assert set(legs.values()) == {1}, "each is counted once"
    had_ended = {event["trial"] for event in before if event["kind"] == "state" and event["ended"]}
    retrained = {event["trial"] for event in everything[len(before) :] if event["kind"] == "epoch"}
    assert not had_ended & retrained, "what had ended is not repeated"


def _outcomes(board: dict[str, Any]) -> dict[str, Any]:
    names = ("config", "status", "epochs", "best_epoch", "metrics")
    return {trial["trial_id"]: json.dumps([trial[name] for name in names]) for trial in board["trials"]}
