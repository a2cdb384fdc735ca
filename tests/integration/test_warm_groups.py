"""Trials of all kinds pass through the same live processes, and each is what it is alone.

One run on one group for most of it, and one with fresh processes for each trial.
"""

from __future__ import annotations

import pytest

from bigray.paths import RunPaths
from bigray.results import Leaderboard
from bigray.specs import JobSpec
from bigray.storage import open_storage
from bigray.training.commands import Event
from bigray.training.runner import train
from tests.integration.jobs import last_weights, make_job, weights_of_one_process
from tests.integration.warm_models import EPOCHS
from tests.processes import worker_pids

pytestmark = [pytest.mark.usefixtures("four_cpu_ray"), pytest.mark.timeout(300)]

WARM = "tests.integration.warm_models"
MODELS = {
    "misbehaves": {"factory": f"{WARM}:misbehaves"},
    "unseeded": {"factory": f"{WARM}:draws_unseeded"},
    "mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [16]}},
    "greedy": {"factory": f"{WARM}:greedy"},
    "after": {"factory": "bigray.models:linear"},
    "leaks": {"factory": f"{WARM}:leaks"},
    "thin": {"factory": "bigray.models:linear"},
    "segfaults": {"factory": f"{WARM}:segfaults"},
    "last": {"factory": "bigray.models:linear"},
}
MAX_RSS_GB = 1.2


class Listener:
    """Notes which processes are workers while each model reports."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.pids: dict[str, list[int]] = {}

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "epoch":
            self.pids.setdefault(event.trial_id, worker_pids())

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def _job(folder: str, tmp_path_factory: pytest.TempPathFactory, **more: object) -> JobSpec:
    settings = {"epochs": EPOCHS, "exact": True}
    models = more.pop("models", MODELS)
    job = make_job(tmp_path_factory.mktemp(folder), models=models, max_failures=0, **settings)  # type: ignore[arg-type]
    return job.model_copy(update={"scaling": job.scaling.model_copy(update={"cpus_per_worker": 2.0, **more})})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """Two workers with two CPUs each: one group, which trains one model after the other."""
    return _job("warm", tmp_path_factory, max_rss_gb=MAX_RSS_GB)


@pytest.fixture(scope="module")
def told() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def board(job: JobSpec, told: Listener, four_cpu_ray: None) -> Leaderboard:
    """The run, once for all tests."""
    return train(job, listener=told)


def _status(board: Leaderboard, name: str) -> str:
    return next(trial.status for trial in board.trials if trial.model_name == name)


def _error(board: Leaderboard, name: str) -> str:
    return next(trial.error for trial in board.trials if trial.model_name == name) or ""


@pytest.mark.parametrize("name", ["mlp"])
def test_a_model_after_one_that_misbehaves_has_the_weights_it_has_alone(
    board: Leaderboard, told: Listener, job: JobSpec, name: str
) -> None:
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    alone = weights_of_one_process(job.model_copy(update={"models": {name: job.models[name]}}))
    found = last_weights(paths, name)

    assert _status(board, "misbehaves") == "finished"
    assert told.pids[name] == told.pids["misbehaves"], "the same processes"
    assert found.keys() == alone.keys()
    assert all((found[key] == alone[key].numpy()).all() for key in found)


def test_the_thread_that_was_left_running_is_named_once_by_each_worker(board: Leaderboard, told: Listener) -> None:
    texts = [event.values["text"] for event in told.of("warning") if "left-by-a-trial" in event.values["text"]]
    assert len(texts) == 2
    assert len(set(texts)) == 2


def test_no_memory_costs_no_process_and_half_the_rows_will_do(board: Leaderboard, told: Listener) -> None:
    (retried,) = told.of("retried")
    assert "out of memory in a forward pass of up to 8 rows" in retried.values["error"]
    trial = next(trial for trial in board.trials if trial.model_name == "greedy")
    assert (trial.status, trial.micro_batch_size) == ("finished", 4)
    assert told.pids["mlp"] == told.pids["after"]
    assert not [event for event in told.of("lost") if event.trial_id == "greedy"]


def test_a_worker_above_its_limit_makes_room_for_a_fresh_one(board: Leaderboard, told: Listener) -> None:
    (recycled,) = told.of("recycled")
    before, after = told.pids["leaks"], told.pids["thin"]

    assert recycled.values["rank"] == 1
    assert recycled.values["pid"] in before
    assert recycled.values["pid"] not in after
    assert set(before) & set(after), "the other stays"
    assert (_status(board, "leaks"), _status(board, "thin")) == ("finished", "finished")


def test_a_segmentation_fault_costs_its_model_alone(board: Leaderboard, told: Listener) -> None:
    assert "more than scaling.max_failures = 0" in _error(board, "segfaults")
    assert {event.trial_id for event in told.of("lost")} == {"segfaults"}
    assert _status(board, "last") == "finished"


def test_every_trial_has_a_ledger_whose_parts_are_its_wall_time(board: Leaderboard, told: Listener) -> None:
    states = {event.trial_id: event.values for event in told.of("state")}
    for name in ("misbehaves", "mlp", "last"):
        ledger = states[name]["ledger"]
        parts = [value for key, value in ledger.items() if key.endswith("_s") and key not in ("cpu_s", "gpu_s")]
        assert ledger["other_s"] < 0.02 * sum(parts), name
        assert ledger["cpu_s"] > 0
        assert ledger["peak_rss_bytes"] > 50_000_000
        assert min(ledger["start_s"], ledger["data_s"], ledger["compute_s"], ledger["evaluation_s"]) > 0
        assert states[name]["num_parameters"] > 0


def test_with_isolate_each_trial_has_processes_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    told = Listener()
    linear = {"factory": "bigray.models:linear"}
    models = {"first": {"factory": f"{WARM}:misbehaves"}, "second": linear}
    board = train(_job("isolated", tmp_path_factory, models=models, isolate=True), listener=told)

    assert [trial.status for trial in board.trials] == ["finished"] * 2
    assert not set(told.pids["first"]) & set(told.pids["second"])
    assert len(told.of("recycled")) >= 2
    assert {event.values["why"] for event in told.of("recycled")} == {"scaling.isolate"}
    assert not told.of("lost")
