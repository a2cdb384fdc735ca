"""`tune` against a real Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigray.bundle import ModelBundle
from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.specs import SearchSpec
from bigray.storage import open_storage
from bigray.training.commands import Event
from bigray.tuning.runner import tune
from tests.integration.jobs import make_job

pytestmark = pytest.mark.usefixtures("four_cpu_ray")


def make_search(**changes: Any) -> SearchSpec:
    return SearchSpec.model_validate(
        {
            "trials": 8,
            "space": {"lr": {"log_uniform": [1e-4, 0.3]}, "global_batch_size": {"choice": [16, 32]}},
            "scheduler": "asha",
            "asha": {"grace_epochs": 1, "reduction_factor": 2},
            **changes,
        }
    )


def test_a_sweep_runs_every_trial_once_survives_one_that_raises_and_exports_the_winner(tmp_path: Path) -> None:
    models = {
        "linear": {"factory": "bigray.models:linear"},
        "mlp": {"factory": "bigray.models:mlp"},
        "broken": {"factory": "tests.integration.user_models:raises_in_forward"},
    }
    events: list[Event] = []
    board = tune(make_job(tmp_path, models=models), make_search(trials=6), listener=events.append)
    started = {event.trial_id for event in events if event.kind == "started"}
    epochs = [(event.trial_id, event.values["epoch"]) for event in events if event.kind == "epoch"]
    status = {trial.trial_id: trial.status for trial in board.trials}
    assert started == set(status)
    assert len(started) == 6
    assert len(epochs) == len(set(epochs)), "no epoch was trained twice"
    assert {name for name in status if "broken" in name} == {n for n, found in status.items() if found == "failed"}
    assert board.winner.metrics["val_accuracy"] == max(t.metrics["val_accuracy"] for t in board.trials if t.metrics)
    origin = ModelBundle.load(board.bundle).manifest.origin
    assert (origin.trial, origin.step) == (board.winner.trial_id, board.winner.best_step)
    groups = {event.values["group"] for event in events if event.kind == "started"}
    assert groups == {0, 1}, "four CPUs hold two groups of two workers, and both were used"


def test_a_sweep_that_was_cut_off_goes_on_without_training_its_finished_trials_again(tmp_path: Path) -> None:
    space = {"lr": {"choice": [0.003, 0.1]}, "global_batch_size": {"choice": [16, 64]}}
    search, job = make_search(search="grid", trials=None, scheduler="none", space=space), make_job(tmp_path)

    first_events: list[Event] = []
    whole = tune(job, search, listener=first_events.append)
    ended = [event.trial_id for event in first_events if event.kind == "state"]
    paths = RunPaths(open_storage(whole.run_uri), whole.run_id)
    remove_completion(paths, keep_states_of=set(ended[:2]))
    events: list[Event] = []
    again = tune(job, search, listener=events.append)
    trained = {event.trial_id for event in events if event.kind == "epoch"}
    assert events[0].kind == "resuming"
    assert trained == set(ended[2:])
    assert again.trials == whole.trials


def remove_completion(paths: RunPaths, keep_states_of: set[str]) -> None:
    """Bring a run folder back to where a kill in the middle of the sweep would have left it."""
    events = [e for e in read_journal(paths) if e["trial"] in keep_states_of or e["kind"] == "attempt"]
    text = "".join(json.dumps(event) + "\n" for event in events if event["kind"] != "completed")
    paths.storage.write_bytes(paths.journal_file(1), text.encode())
    for name in paths.storage.list_names("trials"):
        if name not in keep_states_of:
            paths.storage.delete_folder(paths.trial(name))
