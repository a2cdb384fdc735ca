"""What Ray Train's controller is told of workers that were lost with their nodes; the cluster is a stand-in here."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState

from bigray.training import survivors
from bigray.training.survivors import GoOnWithoutLost, without_given_up


@dataclass
class Board:
    """Notes what it is told."""

    told: list[tuple[int, list[int], list[str]]] = field(default_factory=list)
    num_starts: int = 0
    is_broken: bool = False

    @property
    def go_on_without(self) -> Any:
        return SimpleNamespace(remote=self._tell)

    def _tell(self, *arguments: Any) -> None:
        if self.is_broken:
            raise ray.exceptions.RayError("it does not answer")
        self.told.append(arguments)

    @property
    def starts_whole(self) -> Any:
        return SimpleNamespace(remote=self._start)

    def _start(self, group: int) -> None:
        self.num_starts += 1


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The nodes that are gone."""
    names: set[str] = set()
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(survivors, "draining_nodes", frozenset)
    monkeypatch.setattr(survivors, "gone_among", lambda nodes: frozenset(names & set(nodes)))
    monkeypatch.setattr(survivors, "NODE_FOLLOWS_S", 0.0)
    return names


WORKERS = [
    SimpleNamespace(metadata=SimpleNamespace(node_id=node), placement_group_bundle_index=bundle)
    for node, bundle in (("a", 2), ("b", 0), ("c", 1))
]


@dataclass
class Places:
    """Notes what it is given back."""

    given_back: list[int] = field(default_factory=list)

    def let_go(self, bundle: int) -> None:
        self.given_back.append(bundle)


def watching(
    board: Board, min_workers: int = 1, places: Places | None = None, workers: list[SimpleNamespace] = WORKERS
) -> GoOnWithoutLost:
    callback = GoOnWithoutLost(board, 7, min_workers)
    start(callback, places or Places(), workers)
    return callback


def start(callback: GoOnWithoutLost, places: Places, workers: list[SimpleNamespace]) -> None:
    state = WorkerGroupState(0.0, places, workers, None)
    callback.after_worker_group_start(SimpleNamespace(get_worker_group_state=lambda: state))


def poll(callback: GoOnWithoutLost, *failed: int, workers: list[SimpleNamespace] = WORKERS) -> WorkerGroupPollStatus:
    statuses = {
        rank: WorkerStatus(running=rank not in failed, error=OSError("it died") if rank in failed else None)
        for rank in range(len(workers))
    }
    status = WorkerGroupPollStatus(statuses)
    callback.after_worker_group_poll_status(status)
    return status


def test_a_worker_lost_with_its_node_is_no_error_and_the_others_are_seated_without_it(gone: set[str]) -> None:
    board, places = Board(), Places()
    callback = watching(board, places=places)
    gone.add("b")
    for _ in range(2):  # it is told once, and stays no error
        status = poll(callback, 1)
        assert not status.errors
        assert not status.finished
    assert board.told == [(7, [1], ["b"])]
    assert set(places.given_back) == {0}, "Ray would look for another without a pause"


def test_a_group_without_the_lost_is_of_the_size_that_is_left(gone: set[str]) -> None:
    callback = watching(Board())
    gone.add("b")
    state = WorkerGroupState(0.0, None, WORKERS, None)
    assert without_given_up(state, poll(callback)).num_workers == 3
    assert without_given_up(state, poll(callback, 1)).workers == [WORKERS[0], WORKERS[2]]


def test_a_worker_that_dies_on_a_node_that_stays_is_ray_trains_matter(gone: set[str]) -> None:
    board = Board()
    assert set(poll(watching(board), 1).errors) == {1}
    assert board.told == []


def test_so_is_one_that_dies_with_one_that_is_lost(gone: set[str]) -> None:
    board = Board()
    gone.add("b")
    assert set(poll(watching(board), 1, 2).errors) == {1, 2}
    assert board.told == []


def test_with_too_few_left_ray_train_waits_for_places(gone: set[str]) -> None:
    board = Board()
    callback = watching(board, min_workers=2)
    gone.update("bc")
    assert not poll(callback, 1).errors
    assert set(poll(callback, 1, 2).errors) == {2}
    assert board.told == [(7, [1], ["b"])]


def test_a_node_that_is_being_drained_is_given_up_whole_and_each_worker_keeps_its_place_until_it_ends(
    gone: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them may still be saving; the size of a group is counted by nodes."""
    board, places = Board(), Places()
    monkeypatch.setattr(survivors, "draining_nodes", lambda: frozenset({"b"}))
    workers = [*WORKERS, SimpleNamespace(metadata=SimpleNamespace(node_id="b"), placement_group_bundle_index=3)]
    callback = watching(board, places=places, workers=workers)
    status = poll(callback, 1, workers=workers)
    assert not status.errors
    assert board.told == [(7, [1, 3], [])]
    assert places.given_back == [0]
    assert without_given_up(WorkerGroupState(0.0, None, workers, None), status).workers == [workers[0], workers[2]]

    poll(callback, 1, 3, workers=workers)
    assert set(places.given_back) == {0, 3}


def test_where_the_switchboard_does_not_answer_ray_train_starts_the_group_again(gone: set[str]) -> None:
    board = Board(is_broken=True)
    gone.add("b")
    assert set(poll(watching(board), 1).errors) == {1}


def test_a_group_that_is_started_again_is_whole(gone: set[str]) -> None:
    board = Board()
    callback = watching(board)
    gone.add("b")
    poll(callback, 1)
    start(callback, Places(), WORKERS)
    assert board.num_starts == 2
    gone.clear()
    assert set(poll(callback, 1).errors) == {1}


def test_the_group_has_finished_when_all_that_are_left_have(gone: set[str]) -> None:
    callback = watching(Board())
    gone.add("b")
    poll(callback, 1)
    status = WorkerGroupPollStatus({rank: WorkerStatus(running=False) for rank in range(3)})
    callback.after_worker_group_poll_status(status)
    assert status.finished
    assert not status.errors
