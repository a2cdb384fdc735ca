"""What goes wrong in one model costs that model, and no more: one run of one group, its models one after another."""

import os
import signal
from collections.abc import Iterator

import pytest

from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.results import Leaderboard
from bigray.specs import JobSpec
from bigray.storage import open_storage
from bigray.training.commands import Event
from bigray.training.runner import train
from tests.integration.jobs import last_weights, make_job
from tests.processes import worker_pids

pytestmark = [pytest.mark.usefixtures("four_cpu_ray"), pytest.mark.timeout(300)]

USER = "tests.integration.user_models"
MODELS = {
    "before": {"factory": "bigray.models:mlp"},
    "raises": {"factory": f"{USER}:raises_in_forward"},
    "after": {"factory": "bigray.models:mlp"},
    "stopped": {"factory": f"{USER}:slow_mlp"},
    "loops": {"factory": f"{USER}:loops_for_ever"},
    "exits": {"factory": f"{USER}:exits"},
    "last": {"factory": f"{USER}:slow_mlp"},
}
EPOCHS = 12
STOPPED_AFTER = 8
"""Epochs, two seconds: a worker that is stopped has told where it is by then."""
MAX_FAILURES = 1


class Listener:
    """Stops a worker of the model "stopped" with SIGSTOP, and notes which processes are workers as models go by."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.pids: dict[str, list[int]] = {}
        self.stopped: int | None = None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "epoch":
            self.pids.setdefault(event.trial_id, worker_pids())
        is_due = event.kind == "epoch" and event.trial_id == "stopped" and event.values["epoch"] == STOPPED_AFTER
        if is_due and self.stopped is None:
            self.stopped = worker_pids()[-1]
            os.kill(self.stopped, signal.SIGSTOP)

    def of(self, kind: str, trial_id: str) -> list[Event]:
        return [event for event in self.events if (event.kind, event.trial_id) == (kind, trial_id)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """Two CPUs for each of two workers: one group, which trains one model after the other."""
    folder = tmp_path_factory.mktemp("recovery")
    job = make_job(
        folder, models=MODELS, max_failures=MAX_FAILURES, epochs=EPOCHS, checkpoint_every_s=0.1, hang_timeout_s=1
    )
    return job.model_copy(update={"scaling": job.scaling.model_copy(update={"cpus_per_worker": 2.0})})


@pytest.fixture(scope="module")
def told() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def board(job: JobSpec, told: Listener, four_cpu_ray: None) -> Iterator[Leaderboard]:
    """The run, once for all tests."""
    yield train(job, listener=told)
    if told.stopped is not None and told.stopped in worker_pids():
        os.kill(told.stopped, signal.SIGKILL)


def status(board: Leaderboard, name: str) -> str:
    return next(trial.status for trial in board.trials if trial.model_name == name)


def error(board: Leaderboard, name: str) -> str:
    return next(trial.error for trial in board.trials if trial.model_name == name) or ""


def test_a_model_that_raises_costs_no_process(board: Leaderboard, told: Listener) -> None:
    assert "no forward today" in error(board, "raises")
    assert told.pids["before"] == told.pids["after"] != []
    assert not told.of("lost", "raises")


def test_a_stopped_worker_is_named_with_its_stack_and_replaced(board: Leaderboard, told: Listener) -> None:
    (hang,) = told.of("hang", "stopped")
    assert hang.values["pid"] == told.stopped
    assert f"rank {hang.values['rank']} (pid {told.stopped} on " in hang.values["text"]
    assert "has not been heard" in hang.values["text"]
    assert ".py:" in hang.values["text"], "the stack of its last beat"
    assert told.of("regrouped", "stopped")[0].values["replaced"] == [hang.values["rank"]]
    assert told.stopped not in worker_pids()
    assert status(board, "stopped") == "finished"


def test_what_was_trained_around_the_stopped_worker_is_what_an_undisturbed_model_is(board: Leaderboard) -> None:
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    stopped, undisturbed = last_weights(paths, "stopped"), last_weights(paths, "last")
    assert stopped.keys() == undisturbed.keys()
    assert all((stopped[name] == undisturbed[name]).all() for name in stopped)
    assert (board.samples_lost, board.samples_repeated) == (0, 0)


def test_a_rank_that_loops_for_ever_is_named_with_the_users_function(board: Leaderboard, told: Listener) -> None:
    hangs = told.of("hang", "loops")
    assert len(hangs) == MAX_FAILURES + 1
    for hang in hangs:
        assert hang.values["rank"] == 1
        assert "makes no progress" in hang.values["text"]
        assert "user_models.py" in hang.values["text"]
        assert hang.values["text"].endswith("wait_for_godot")
    assert f"more than scaling.max_failures = {MAX_FAILURES}" in error(board, "loops")
    assert error(board, "loops").endswith("wait_for_godot")


def test_a_process_that_exits_costs_its_model_alone(board: Leaderboard, told: Listener) -> None:
    assert f"more than scaling.max_failures = {MAX_FAILURES}" in error(board, "exits")
    assert len(told.of("lost", "exits")) == MAX_FAILURES + 1
    assert status(board, "last") == "finished"
    assert board.winner.status == "finished"


def test_everything_is_in_the_journal(board: Leaderboard, told: Listener) -> None:
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    kinds = {(event["kind"], event["trial"]) for event in read_journal(paths)}
    assert {("hang", "stopped"), ("hang", "loops"), ("lost", "exits"), ("failed", "raises")} <= kinds
