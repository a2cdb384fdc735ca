from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bigray.cross_validation import of_fold
from bigray.errors import StorageError
from bigray.paths import RUN_FILE
from bigray.report import LEDGER_PARTS, RunReport, read_report
from bigray.results import Ledger
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import MANIFEST

LEDGER = Ledger(0.5, 0.25, 2.0, 0.5, 0.25, 0.125, 0.375, cpu_s=6.0, peak_rss_bytes=300 * 2**20)

WriteRun = Callable[..., Path]
Line = tuple[str, str, dict[str, Any]]


def _trial(trial_id: str, lr: float = 0.01) -> TrialSpec:
    return TrialSpec(
        trial_id=trial_id,
        model_name="mlp",
        model=ModelSpec(factory="bigray.models:mlp"),
        training=TrainingSpec(task="classification", lr=lr, weight_decay=0.5, epochs=9),
        seed=0,
    )


def _state(trial_id: str, value: float, ended: str | None = "finished", **more: Any) -> Line:
    metrics = {"val_accuracy": value, "val_loss": 1 - value}
    best = {"best_epoch": 9, "best_step": 90, "best_metrics": metrics, "num_parameters": 850}
    values = {"epoch": 9, "step": 90, "ended": ended, **best, "ledger": asdict(LEDGER), "waited_s": 0.5}
    return ("state", trial_id, {**values, **more})


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """A run's folder with one journal file for each list of events; a second goes by from each event to the next."""

    def write(
        *attempts: list[Line], trials: tuple[str, ...] = ("0", "1"), search: Mapping[str, Any] | None = None
    ) -> Path:
        folder = tmp_path / "runs" / "digits-1a2b3c"
        (folder / "journal").mkdir(parents=True)
        (folder / "bundle").mkdir()
        (folder / "bundle" / MANIFEST).write_text("{}")
        specs = [_trial(name, 0.01 * (number + 1)) for number, name in enumerate(trials)]
        document = {
            "run": "digits-1a2b3c",
            "job": {"name": "digits"},
            "search": search or {"space": {"lr": {}, "weight_decay": {}}, "trials": len(trials)},
            "trials": [spec.model_dump(mode="json") for spec in specs],
        }
        (folder / RUN_FILE).write_text(json.dumps(document))
        for number, events in enumerate(attempts, start=1):
            start_s = 1000.0 * number
            lines = [
                json.dumps({"time": start_s + second, "attempt": number, "kind": kind, "trial": trial, **values})
                for second, (kind, trial, values) in enumerate(events)
            ]
            (folder / "journal" / f"{number:04d}.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return write


ATTEMPT: Line = ("attempt", "", {"plan": {"groups": 2}})
STARTED: Line = ("started", "0", {"group": 0})
COMPLETED: Line = ("completed", "0", {})


def _whole(write_run: WriteRun) -> RunReport:
    events = [ATTEMPT, STARTED, _state("0", 0.9), _state("1", 0.8), ("bundle", "0", {}), COMPLETED]
    return read_report(write_run(events))


def test_a_complete_run_tells_its_trials_best_first_and_its_winner(write_run: WriteRun) -> None:
    report = _whole(write_run)

    assert (report.status, report.winner, report.job) == ("complete", "0", "digits")
    assert [trial.trial_id for trial in report.trials] == ["0", "1"]
    assert report.counts == {"finished": 2}
    assert report.trials[0].config == {"lr": 0.01, "global_batch_size": 64, "weight_decay": 0.5}


def test_a_training_with_folds_tells_each_model_with_its_mean_also_before_it_is_complete(write_run: WriteRun) -> None:
    folder = write_run([ATTEMPT, STARTED, _state("mlp-fold1", 0.9), _state("mlp-fold2", 0.8)])
    document = json.loads((folder / RUN_FILE).read_text())
    trials = [of_fold(_trial("mlp"), number).model_dump(mode="json") for number in range(3)]
    document |= {"search": None, "trials": trials, "job": {"name": "digits", "data": {"k_folds": 3}}}
    (folder / RUN_FILE).write_text(json.dumps(document))
    report = read_report(folder)

    (found,) = report.cross_validation
    assert (found.model_name, found.values, found.num_folds) == ("mlp", (0.9, 0.8), 3)
    assert found.mean == pytest.approx(0.85)
    assert report.to_json()["cross_validation"][0]["low"] == found.low


def test_the_parts_of_a_ledger_add_up_to_its_wall(write_run: WriteRun) -> None:
    document = _whole(write_run).to_json()

    for ledger in (document["trials"][0]["ledger"], document["totals"]):
        assert ledger["wall_s"] == sum(ledger[part] for part in LEDGER_PARTS)
    assert document["totals"]["wall_s"] == 8.0
    assert document["totals"]["waiting_s"] == 1.0


def test_efficiency_is_compute_over_the_wall_of_all_groups(write_run: WriteRun) -> None:
    totals = _whole(write_run).totals

    assert (totals.training_wall_s, totals.slots) == (2.0, 2)
    assert totals.efficiency == (2.0 + 2.0) / (2.0 * 2)


def test_what_lies_between_two_attempts_is_no_training_time(write_run: WriteRun) -> None:
    first = [ATTEMPT, STARTED, _state("0", 0.5, None)]
    report = read_report(write_run(first, [ATTEMPT, STARTED, _state("0", 0.9)]))

    assert report.totals.training_wall_s == 2.0
    assert report.trials[0].ledger.compute_s == 4.0


def test_a_run_whose_newest_attempt_did_not_end_is_not_complete(write_run: WriteRun) -> None:
    report = read_report(write_run([ATTEMPT, _state("0", 0.9), COMPLETED], [ATTEMPT, _state("1", 0.5, None)]))

    assert report.status == "not complete"
    assert report.statuses == {"0": "finished", "1": "paused"}


def test_a_budget_that_is_used_up_is_told(write_run: WriteRun) -> None:
    report = read_report(write_run([ATTEMPT, _state("0", 0.9, None), ("budget", "", {"text": "10m"}), COMPLETED]))

    assert (report.status, report.budget) == ("budget used up", "10m")


def test_a_run_that_was_killed_before_any_trial_began_can_be_shown(write_run: WriteRun) -> None:
    report = read_report(write_run([ATTEMPT]))

    assert (report.trials, report.counts, report.totals.efficiency) == ((), {"waiting": 2}, None)


def test_trials_that_were_proposed_on_the_way_count(write_run: WriteRun) -> None:
    proposed = ("proposed", "", {"trials": [_trial("2").model_dump(mode="json")]})
    search = {"space": {"lr": {}}, "search": "tpe", "trials": 5}
    report = read_report(write_run([ATTEMPT, proposed, _state("2", 0.7)], trials=(), search=search))

    assert [trial.trial_id for trial in report.trials] == ["2"]
    assert (report.num_planned, report.counts) == (5, {"finished": 1, "waiting": 4})


def test_what_happened_on_the_way_is_counted(write_run: WriteRun) -> None:
    probe = {"model": "mlp", "batch": 64, "alone_step_s": 1e-3, "stacked_step_s": 1e-4, "is_stacked": True}
    events: list[Line] = [
        ATTEMPT,
        ("probe", "0", {**probe, "why_not": None}),
        ("retried", "0", {"error": "no memory", "micro_batch_size": 16}),
        ("recycled", "", {"rank": 1, "pid": 7, "why": "2 GB"}),
        _state("0", 0.9),
    ]
    report = read_report(write_run(events))

    assert report.events == {"retried": 1, "recycled": 1, "lost": 0, "promoted": 0, "exploited": 0}
    assert report.probes == ({**probe, "why_not": None},)
    assert report.trials[0].micro_batch_size == 16


def test_finalists_are_judged_by_their_seeds(write_run: WriteRun) -> None:
    seeds = {"0-seed1": 0.90, "0-seed2": 0.92, "1-seed1": 0.70, "1-seed2": 0.71}
    events: list[Line] = [
        ATTEMPT,
        _state("0", 0.9),
        _state("1", 0.95),
        ("finalists", "", {"trials": ["1", "0"], "seeds": 2}),
        ("proposed", "", {"trials": [_trial(name).model_dump(mode="json") for name in seeds]}),
        *[_state(name, value) for name, value in seeds.items()],
    ]
    report = read_report(write_run(events))

    assert [finalist.trial_id for finalist in report.finalists] == ["0", "1"]
    assert report.finalists[0].best_seed_trial == "0-seed2"
    assert report.why is not None
    assert report.why.startswith("0: ")


def test_no_finalists_are_told_before_a_seed_has_been_trained(write_run: WriteRun) -> None:
    events: list[Line] = [ATTEMPT, _state("0", 0.9), ("finalists", "", {"trials": ["0"], "seeds": 2})]

    assert read_report(write_run(events)).finalists == ()


def test_the_report_is_json(write_run: WriteRun) -> None:
    document = json.loads(json.dumps(_whole(write_run).to_json(), allow_nan=False))

    assert document["trials"][0]["trial_id"] == "0"
    assert document["winner"] == "0"


def test_a_run_that_is_not_there_is_told_with_near_names(write_run: WriteRun) -> None:
    folder = write_run([ATTEMPT])

    for asked in ("digits", "digits-1a2b3d"):
        with pytest.raises(StorageError, match=rf"{asked}: no run here; did you mean .*/runs/digits-1a2b3c\?$"):
            read_report(folder.parent / asked)
    with pytest.raises(StorageError, match=r"runs: no run here; did you mean .*/runs/digits-1a2b3c\?$"):
        read_report(folder.parent)
    with pytest.raises(StorageError, match=r"other: no run here$"):
        read_report(folder.parent / "other")


def test_a_damaged_run_file_is_told(write_run: WriteRun) -> None:
    folder = write_run([ATTEMPT])
    (folder / RUN_FILE).write_text("{")

    with pytest.raises(StorageError, match=r"run\.json: not valid JSON"):
        read_report(folder)
