"""`tune` against a real Ray: stacked, cut off by a budget, extended, and a population that copies weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigray.bundle import ModelBundle
from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.results import Leaderboard
from bigray.specs import JobSpec, SearchSpec
from bigray.storage import open_storage
from bigray.training.checkpoint import load_epoch_end, weights_sha256
from bigray.training.commands import Event
from bigray.training.session import known_trials
from bigray.tuning.budget import parse_budget
from bigray.tuning.runner import tune, tune_request
from bigray.workflow import Asked, extend_request, request_of
from tests.integration.jobs import make_job

pytestmark = [pytest.mark.usefixtures("four_cpu_ray"), pytest.mark.timeout(300)]

MODELS = {
    "linear": {"factory": "bigray.models:linear"},
    "mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [16]}},
    "broken": {"factory": "tests.integration.user_models:raises_in_forward"},
}


def make_search(**changes: Any) -> SearchSpec:
    return SearchSpec.model_validate(
        {
            "trials": 24,
            "space": {"lr": {"log_uniform": [1e-4, 0.3]}},
            "scheduler": "asha",
            "asha": {"grace_epochs": 1, "reduction_factor": 2},
            **changes,
        }
    )


def one_group(job: JobSpec) -> JobSpec:
    """Two CPUs for each of two workers: half as many processes to start."""
    return job.model_copy(update={"scaling": job.scaling.model_copy(update={"cpus_per_worker": 2.0})})


def of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def epochs_trained(events: Sequence[Event]) -> list[tuple[str, int]]:
    return [(event.trial_id, event.values["epoch"]) for event in of_kind(events, "epoch")]


def curves(events: Sequence[Event]) -> dict[tuple[str, int], float]:
    found = {}
    for event in of_kind(events, "epoch"):
        found[event.trial_id, event.values["epoch"]] = event.values["metrics"].get("val_loss", float("nan"))
    return found


def paths_of(board: Leaderboard) -> RunPaths:
    return RunPaths(open_storage(board.run_uri), board.run_id)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return make_job(tmp_path_factory.mktemp("sweep"), models=MODELS)


@pytest.fixture(scope="module")
def whole(job: JobSpec, four_cpu_ray: None) -> tuple[Leaderboard, list[Event]]:
    """A sweep over three models, one of which cannot be trained, from its start to its end."""
    events: list[Event] = []
    return tune(job, make_search(), listener=events.append), events


def test_every_trial_runs_once_and_the_winner_is_exported(whole: tuple[Leaderboard, list[Event]]) -> None:
    board, events = whole
    epochs = epochs_trained(events)
    assert len(board.trials) == 24
    assert len(epochs) == len(set(epochs)), "no epoch was trained twice"
    assert board.winner.metrics["val_accuracy"] == max(t.metrics["val_accuracy"] for t in board.trials if t.metrics)
    assert board.winner.status == "finished"
    origin = ModelBundle.load(board.bundle).manifest.origin
    assert (origin.trial, origin.step) == (board.winner.trial_id, board.winner.best_step)
    groups = {event.values["group"] for event in of_kind(events, "started")}
    assert groups == {0, 1}, "four CPUs hold two groups of two workers, and both were used"


def test_a_model_that_raises_costs_its_own_trials_only(whole: tuple[Leaderboard, list[Event]]) -> None:
    board, _ = whole
    failed = {trial.trial_id for trial in board.trials if trial.status == "failed"}
    assert failed == {trial.trial_id for trial in board.trials if trial.model_name == "broken"}
    assert all("no forward today" in (trial.error or "") for trial in board.trials if trial.trial_id in failed)


def test_a_probe_decides_for_each_model_whether_its_trials_are_stacked(whole: tuple[Leaderboard, list[Event]]) -> None:
    _, events = whole
    probes = {event.values["model"]: event.values for event in of_kind(events, "probe")}
    assert set(probes) == set(MODELS)
    for name in ("linear", "mlp"):
        assert probes[name]["stacked_step_s"] > 0
        assert probes[name]["alone_step_s"] > 0
    assert not probes["broken"]["is_stacked"]
    assert probes["broken"]["why_not"]


def test_the_ledger_of_every_trial_adds_up(whole: tuple[Leaderboard, list[Event]]) -> None:
    board, _ = whole
    for trial in board.trials:
        if trial.status != "failed":
            ledger = trial.ledger
            assert ledger.wall_s > 0
            assert ledger.compute_s > 0
            assert ledger.cpu_s > 0
            assert ledger.peak_rss_bytes > 10 * 2**20
            assert trial.num_parameters > 0
    assert board.efficiency is not None
    assert 0 < board.efficiency < 1


def test_nothing_of_the_stacks_stays_on_disk(whole: tuple[Leaderboard, list[Event]]) -> None:
    paths = paths_of(whole[0])
    assert not paths.storage.exists("stacks")
    with_weights = [name for name in paths.storage.list_names("trials") if paths.checkpoint_steps(name)]
    assert whole[0].winner.trial_id in with_weights


def test_trials_by_themselves_take_the_same_course(
    whole: tuple[Leaderboard, list[Event]], job: JobSpec, four_cpu_ray: None
) -> None:
    events: list[Event] = []
    board = tune(job, make_search(stack="off"), listener=events.append)
    stacked, alone = curves(whole[1]), curves(events)
    assert not of_kind(events, "probe")
    common = set(stacked) & set(alone)
    assert len(common) >= 16
    assert max(abs(stacked[key] - alone[key]) for key in common) < 1e-4
    assert board.winner.config == whole[0].winner.config


def test_a_budget_ends_a_sweep_and_the_same_call_goes_on_to_the_end(tmp_path: Path, four_cpu_ray: None) -> None:
    models = {"slow": {"factory": "tests.integration.user_models:slow_mlp"}}
    search = make_search(trials=12)
    request = request_of(Asked(one_group(make_job(tmp_path, models=models)), search, None))
    first: list[Event] = []
    part = tune_request(request, search, listener=first.append, budget=parse_budget("1.5s"))
    assert len(of_kind(first, "budget")) == 1
    assert part.winner.metrics
    assert len(part.trials) < 12

    second: list[Event] = []
    board = tune_request(request, search, listener=second.append)
    assert second[0].kind == "resuming"
    assert not set(epochs_trained(first)) & set(epochs_trained(second)), "nothing is trained twice"
    assert len(board.trials) == 12
    assert board.winner.status == "finished"


def test_a_finished_sweep_is_extended_by_trials_that_are_new(
    whole: tuple[Leaderboard, list[Event]], four_cpu_ray: None
) -> None:
    before = whole[0]
    request, search = extend_request(before.run_uri, 6)
    events: list[Event] = []
    board = tune_request(request, search, listener=events.append)
    assert board.run_id == before.run_id
    assert len(board.trials) == 30
    earlier = {trial.trial_id: trial for trial in before.trials}
    new = {trial.trial_id for trial in board.trials} - set(earlier)
    assert sorted(new) == [t.trial_id for t in known_trials(request, ()) if t.trial_id not in earlier]
    finished = {name for name, trial in earlier.items() if trial.status in ("finished", "failed")}
    assert not finished & {event.trial_id for event in of_kind(events, "epoch")}, "none of them is repeated"
    again = [(t.trial_id, t.metrics) for t in board.trials if t.trial_id in finished]
    assert again == [(t.trial_id, t.metrics) for t in before.trials if t.trial_id in finished]


def test_the_worst_of_a_population_go_on_with_the_weights_of_the_best(tmp_path: Path, four_cpu_ray: None) -> None:
    models = {"mlp": MODELS["mlp"]}
    job = one_group(make_job(tmp_path, models=models, epochs=4, keep={"last": 9, "best": 9}))
    search = make_search(trials=4, scheduler="pbt", pbt={"interval_epochs": 1, "quantile": 0.25})
    events: list[Event] = []
    board = tune(job, search, listener=events.append)
    exploits = of_kind(events, "exploited")
    paths, request = paths_of(board), request_of(Asked(job, search, None))
    trials = {trial.trial_id: trial for trial in known_trials(request, list(read_journal(paths)))}
    assert len(exploits) == 3, "one of four, at the end of each interval but the last"
    for event in exploits:
        source = trials[event.values["source"]]
        checkpoint = load_epoch_end(paths, source, event.values["epoch"])
        weights = checkpoint.tensors("model")
        assert weights is not None
        assert event.values["sha256"] == weights_sha256(weights), "what was loaded is what the source had written"
        assert trials[event.trial_id].training.lr != source.training.lr
    assert {e.trial_id for e in exploits} <= {t.trial_id for t in board.trials if t.epochs > 1}


def test_finalists_are_judged_by_several_seeds(tmp_path: Path, four_cpu_ray: None) -> None:
    models = {name: MODELS[name] for name in ("linear", "mlp")}
    job = one_group(make_job(tmp_path, models=models))
    events: list[Event] = []
    board = tune(job, make_search(trials=6, finalists=2, seeds=3, search="tpe"), listener=events.append)
    assert len(board.finalists) == 2
    for finalist in board.finalists:
        assert len(finalist.values) == 3
        assert finalist.low <= finalist.mean <= finalist.high
    winner = board.finalists[0]
    assert board.winner.trial_id == winner.best_seed_trial
    assert ModelBundle.load(board.bundle).manifest.origin.trial == winner.best_seed_trial
    assert len(board.trials) == 6 + 2 * 3
    again = replace(board, wall_s=0.0)
    assert tune(job, make_search(trials=6, finalists=2, seeds=3, search="tpe")).finalists == again.finalists
