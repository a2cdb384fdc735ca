"""Ranks that learn of a wish at different moments act on it at the same step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigray.training import consensus as module
from bigray.training.commands import Wish
from bigray.training.consensus import Consensus


def test_a_single_rank_does_at_once_what_it_wishes() -> None:
    wishes = iter([Wish(), Wish(save=True), Wish(stop=True)])
    consensus = Consensus(1, None, lambda: next(wishes))
    assert [consensus.at_step() for _ in range(3)] == [Wish(), Wish(save=True), Wish(stop=True)]


class Ranks:
    """Ranks in one process that take each step in turn; a collective is done when all have entered it."""

    def __init__(self, wishes: list[Callable[[], Wish]], monkeypatch: pytest.MonkeyPatch) -> None:
        self._entered: list[torch.Tensor] = []
        self.num_collectives = 0
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)
        self._consensus = [Consensus(len(wishes), None, wish) for wish in wishes]

    def step(self) -> list[Wish]:
        """What each rank does after the next step."""
        done = [consensus.at_step() for consensus in self._consensus]
        assert len(self._entered) in (0, len(self._consensus)), "not all ranks are in the collective"
        if self._entered:
            self.num_collectives += 1
            largest = torch.stack(self._entered).amax(dim=0)
            for tensor in self._entered:
                tensor.copy_(largest)
            self._entered = []
        return done

    def _all_reduce(self, tensor: torch.Tensor, op: Any, *, group: Any, async_op: bool) -> Any:
        assert op == dist.ReduceOp.MAX
        assert async_op
        self._entered.append(tensor)
        return self

    def wait(self) -> None:
        """The collective's handle; by the step after it, all have entered."""
        assert not self._entered


@pytest.mark.parametrize("wish", [Wish(save=True), Wish(stop=True), Wish(rest=True), Wish(save=True, stop=True)])
def test_one_ranks_wish_is_carried_out_by_all_at_the_same_step(wish: Wish, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([Wish, lambda: wish, Wish], monkeypatch)
    assert ranks.step() == [Wish()] * 3
    assert ranks.step() == [wish] * 3


def test_different_wishes_are_all_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([lambda: Wish(save=True), lambda: Wish(stop=True)], monkeypatch)
    ranks.step()
    assert ranks.step() == [Wish(save=True, stop=True)] * 2


def test_a_wish_that_comes_after_an_exchange_has_begun_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXCHANGE_EVERY_S", 0.0)  # an exchange as often as can be
    wish = Wish()
    ranks = Ranks([lambda: wish, Wish], monkeypatch)
    ranks.step()
    wish = Wish(save=True)
    assert ranks.step() == [Wish()] * 2
    assert ranks.step() == [Wish()] * 2
    assert ranks.step() == [Wish(save=True)] * 2


def test_fast_steps_are_mostly_free(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    ranks = Ranks([Wish, Wish], monkeypatch)
    for _ in range(1000):
        now += 0.001
        ranks.step()
    assert 3 <= ranks.num_collectives <= 8


def test_the_slowest_rank_rules_how_often_they_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of one rank a step takes a second, by the other's a millisecond."""
    clocks = {0: 0.0, 1: 0.0}
    asking = iter([0, 1])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clocks[next(asking)]))
    ranks = Ranks([Wish, Wish], monkeypatch)
    for step in range(1, 21):
        clocks = {0: step * 1.0, 1: step * 0.001}
        asking = iter([0, 1])
        ranks.step()
    assert ranks.num_collectives == 10
