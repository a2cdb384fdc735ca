"""Process groups that are formed again among live processes, over gloo and without Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from bigray.training.membership import Member, Place
from bigray.training.worker import is_about_a_peer
from tests.integration import process_group_ranks

FAR_BELOW_THE_COLLECTIVE_TIMEOUT_S = 120.0


class Processes:
    """Processes that sit down in generations as they are told."""

    def __init__(self, number: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([process_group_ranks.__name__])  # torch is imported once for all of them
        self.generation = 0
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for _ in range(number):
            here, there = context.Pipe()
            process = context.Process(target=process_group_ranks.serve, args=(there, str(folder)), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def form(self, who: Sequence[int], actions: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Have these processes form a generation and act; returns what each rank told, until it left or died."""
        self.generation += 1
        members = tuple(Member("node", "127.0.0.1", self._pid(number), slot, 3) for slot, number in enumerate(who))
        for rank, (number, action) in enumerate(zip(who, actions, strict=True)):
            self._connections[number].send((Place(self.generation, rank, members), action))
        return [self._told(number) for number in who]

    def end(self) -> None:
        """End what is left of them."""
        for process in self._processes:
            process.kill()
            process.join()

    def _pid(self, number: int) -> int:
        pid = self._processes[number].pid
        assert pid is not None
        return pid

    def _told(self, number: int) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        while not told or "sum" in told[-1]:
            assert self._connections[number].poll(FAR_BELOW_THE_COLLECTIVE_TIMEOUT_S), f"process {number} is stuck"
            try:
                told.append(self._connections[number].recv())
            except EOFError:  # it is dead
                break
        return told


Story = dict[str, list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """One life of a group, which these tests look at; starting the processes is what takes the time."""
    processes = Processes(4, tmp_path_factory.mktemp("addresses"))
    try:
        yield {
            "first": processes.form([0, 1, 2], ["leave"] * 3),
            "rank 1 raises": processes.form([0, 1, 2], ["reduce", "raise", "reduce"]),
            "rank 0 raises": processes.form([0, 1, 2], ["raise", "train", "train"]),
            "rank 2 dies": processes.form([0, 1, 2], ["train", "reduce", "die"]),
            "replaced": processes.form([0, 1, 3], ["leave"] * 3),
            "smaller": processes.form([1, 0], ["train", "train"]),
            "again": processes.form([0, 1, 3], ["leave"] * 3),
            "and again": processes.form([0, 1, 3], ["leave"] * 3),
            "last": processes.form([0, 1, 3], ["leave"] * 3),
        }
    finally:
        processes.end()


@pytest.mark.parametrize("name", ["first", "rank 1 raises", "rank 0 raises", "rank 2 dies", "replaced", "last"])
def test_each_generation_works_whatever_ended_the_one_before(story: Story, name: str) -> None:
    for rank, told in enumerate(story[name]):
        assert told[0]["sum"] == 3.0
        assert told[0]["environment"] == {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}


def test_a_generation_may_be_smaller_and_in_another_order(story: Story) -> None:
    assert [told[0]["environment"]["RANK"] for told in story["smaller"]] == ["0", "1"]
    assert all("num_sockets" in told[1] for told in story["smaller"])


@pytest.mark.parametrize(("name", "rank"), [("rank 1 raises", 1), ("rank 0 raises", 0)])
def test_those_inside_a_collective_with_a_rank_that_raises_are_told_that_a_peer_went(
    story: Story, name: str, rank: int
) -> None:
    errors = [told[1]["error"] for told in story[name]]
    assert isinstance(errors[rank], ValueError)
    assert [is_about_a_peer(error) for error in errors] == [other != rank for other in range(3)], errors


def test_those_inside_a_collective_with_a_rank_that_is_killed_are_told_that_a_peer_went(story: Story) -> None:
    *survivors, dead = story["rank 2 dies"]
    assert len(dead) == 1
    assert all(is_about_a_peer(told[1]["error"]) for told in survivors), survivors


def test_generations_do_not_pile_up_sockets(story: Story) -> None:
    """Those of the one before may live on until Python collects its cycles."""
    counts = [[told[-1]["num_sockets"] for told in story[name]] for name in ("again", "and again", "last")]
    assert counts[0] == counts[1] == counts[2]
