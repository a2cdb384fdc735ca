"""The switchboard as a plain object: Ray only carries its calls, so nothing of Ray is started here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

from bigray.errors import DiskFull, GroupLost, OutOfMemory, Preempted, TrainingFailed
from bigray.specs import TrialSpec
from bigray.training import hangs
from bigray.training import switchboard as module
from bigray.training.commands import Event, Lane, ProbeStack, Stop, TrainStack, TrainTo, Wish
from bigray.training.heartbeat import Beat
from bigray.training.membership import Member, Place
from bigray.training.switchboard import Switchboard

Scenario = Callable[[Switchboard], Coroutine[Any, Any, None]]
Seat = tuple[int, Place] | None
HERE = "switchboards-node"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundredths of a second where a run waits seconds."""
    monkeypatch.setattr(module, "GRACE_S", 0.02)
    monkeypatch.setattr(module, "WATCH_EVERY_S", 0.02)


@pytest.fixture
def command(make_trial: Callable[..., TrialSpec]) -> TrainTo:
    return TrainTo(make_trial(), epoch=2)


def _play(scenario: Scenario, groups: int = 1, max_failures: int = 3) -> None:
    async def run() -> None:
        async with asyncio.timeout(20):  # a lost wake-up fails the test instead of hanging it
            await scenario(Switchboard(groups, max_failures, HERE))

    asyncio.run(run())


async def _let_others_run() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


def _worker(slot: int, pid: int | None = None, size: int = 2, node: str = "a") -> Member:
    return Member(node, "10.0.0.1", slot + 100 if pid is None else pid, slot, size)


def _spare(pid: int = 900) -> Member:
    return Member("b", "10.0.0.2", pid)


def _joining(board: Switchboard, member: Member, group: int | None = 0) -> asyncio.Task[Seat]:
    return asyncio.create_task(board.join(group, member))


async def _seat_pair(board: Switchboard, group: int = 0, pid: int = 100) -> tuple[Member, Member]:
    """Two workers in a group's first generation."""
    first, second = _worker(0, pid), _worker(1, pid + 1)
    seats = await asyncio.gather(board.join(group, first), board.join(group, second))
    assert [seat and (seat[0], seat[1].rank) for seat in seats] == [(group, 0), (group, 1)]
    return first, second


async def _seat_all(board: Switchboard) -> None:
    for group in range(len(board._groups)):
        await _seat_pair(board, group, pid=100 + 10 * group)


async def _replace(board: Switchboard, survivor: Member, slot: int, pid: int) -> Member:
    """A worker dies unseen, the other comes back, and Ray Train's replacement arrives; both get a seat."""
    replacement = _worker(slot, pid)
    seats = await asyncio.gather(board.join(0, survivor), board.join(0, replacement))
    assert all(seats)
    return replacement


async def _kinds(board: Switchboard) -> list[str]:
    return [event.kind for event in await board.take_events(0.0)]


@contextlib.asynccontextmanager
async def _heard(board: Switchboard, *members: Member, beat: Beat | None = None) -> AsyncIterator[list[Wish]]:
    """These members' heartbeats in the background; gives what they were last asked to do."""
    wishes: list[Wish] = []

    async def go_on() -> None:
        while True:
            wishes[:] = [await board.beat(0, member, beat or Beat(1, 0, "forward", 0.0, "here")) for member in members]
            await asyncio.sleep(0.002)

    task = asyncio.create_task(go_on())
    try:
        yield wishes
    finally:
        task.cancel()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


# leases


def test_every_group_is_lent_once() -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        assert sorted([await board.take(), await board.take(), await board.take()]) == [0, 1, 2]

    _play(scenario, groups=3)


def test_a_lease_waits_until_a_group_is_given_back() -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        group = await board.take()
        waiting = asyncio.create_task(board.take())
        await _let_others_run()
        assert not waiting.done()

        await board.release(group)
        assert await waiting == group

    _play(scenario)


def test_a_group_given_back_twice_is_lent_once() -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        group = await board.take()
        await board.release(group)
        await board.release(group)
        await board.take()
        waiting = asyncio.create_task(board.take())
        await _let_others_run()
        assert not waiting.done()
        waiting.cancel()

    _play(scenario)


def test_who_waits_for_a_group_is_told_when_the_last_one_has_ended() -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        await board.take()
        await board.take()
        waiting = asyncio.create_task(board.take())
        await board.group_ended(0, "gone")
        await _let_others_run()
        assert not waiting.done()
        await board.group_ended(1, "gone too")
        with pytest.raises(TrainingFailed, match="no worker group is left"):
            await waiting

    _play(scenario, groups=2)


def test_an_ended_group_is_not_lent_again() -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        await board.group_ended(0, "gone")
        held = await board.take()
        assert held == 1
        await board.group_ended(held, "gone too")
        await board.release(held)
        with pytest.raises(TrainingFailed):
            await board.take()

    _play(scenario, groups=2)


# commands


def test_a_command_returns_what_its_group_made_of_it(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        assert (await board.next_command(0, board._groups[0].roster.generation) or ())[1:] == (command,)
        await board.complete(0, 1, "the result")
        assert await result == "the result"

    _play(scenario)


def test_a_group_that_asked_first_is_woken_by_its_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        asking = asyncio.create_task(board.next_command(1, board._groups[1].roster.generation))
        await _let_others_run()
        result = asyncio.create_task(board.execute(1, command))
        serial, received = await asking or (0, None)
        assert received == command
        await board.complete(1, serial, 7)
        assert await result == 7

    _play(scenario, groups=2)


def test_commands_go_to_their_own_group(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        results = [asyncio.create_task(board.execute(group, TrainTo(command.trial, group))) for group in (0, 1)]
        for group in (1, 0):
            serial, received = await board.next_command(group, board._groups[group].roster.generation) or (0, None)
            assert received == TrainTo(command.trial, group)
            await board.complete(group, serial, group)
        assert await asyncio.gather(*results) == [0, 1]

    _play(scenario, groups=2)


def test_a_failure_is_raised_where_the_command_came_from(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0, board._groups[0].roster.generation)
        await board.fail(0, 1, TrainingFailed("ValueError: boom"))
        with pytest.raises(TrainingFailed, match="ValueError: boom"):
            await result

    _play(scenario)


@pytest.mark.parametrize("ending", ["complete", "fail"])
def test_a_settled_command_is_not_handed_out_again(
    command: TrainTo, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)

    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0, board._groups[0].roster.generation)
        await getattr(board, ending)(0, 1, TrainingFailed("settled"))
        assert await board.next_command(0, board._groups[0].roster.generation) is None
        await asyncio.gather(result, return_exceptions=True)

    _play(scenario)


def test_storage_that_fails_one_trial_is_not_tried_by_the_next(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        await board.check_storage()
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0, board._groups[0].roster.generation)
        await board.fail(0, 1, DiskFull("runs/x: no space left"))
        with pytest.raises(DiskFull):
            await result
        with pytest.raises(DiskFull, match="no space left"):
            await board.take()

    _play(scenario)


def test_a_failure_told_by_every_rank_is_one_failure(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0, board._groups[0].roster.generation)
        await board.fail(0, 1, TrainingFailed("rank 1"))
        await board.fail(0, 1, TrainingFailed("rank 0"))
        with pytest.raises(TrainingFailed, match="rank 1"):
            await result

    _play(scenario)


def test_a_late_word_about_the_last_command_does_not_touch_the_next_one(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first = asyncio.create_task(board.execute(0, command))
        await board.next_command(0, board._groups[0].roster.generation)
        await board.fail(0, 1, TrainingFailed("rank 0"))
        with pytest.raises(TrainingFailed, match="rank 0"):
            await first
        second = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.fail(0, 1, TrainingFailed("rank 1, of the first command"))
        await _let_others_run()
        assert not second.done()
        await board.complete(0, 2, "done")
        assert await second == "done"

    _play(scenario)


def test_the_end_of_a_group_is_told_to_who_waits_for_its_result(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0, board._groups[0].roster.generation)
        await board.group_ended(0, "workers died too often")
        with pytest.raises(TrainingFailed, match="died too often"):
            await result
        with pytest.raises(TrainingFailed, match="died too often"):
            await board.execute(0, command)

    _play(scenario)


def test_why_a_worker_gave_its_group_up_is_not_covered_by_the_end_that_follows(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await board.group_ended(0, "torch.cuda sees no GPU")
        await board.group_ended(0, "the worker group was stopped")
        with pytest.raises(TrainingFailed, match=r"torch\.cuda sees no GPU"):
            await board.execute(0, command)

    _play(scenario)


def test_every_group_is_told_to_stop_even_in_the_middle_of_a_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        asking = asyncio.create_task(board.next_command(1, board._groups[1].roster.generation))
        await _let_others_run()
        await board.stop_all()
        assert isinstance((await asking or ())[1], Stop)
        await board.complete(0, 1, "done")
        assert await result == "done"
        assert isinstance((await board.next_command(0, board._groups[0].roster.generation) or ())[1], Stop)
        assert isinstance((await board.next_command(0, board._groups[0].roster.generation) or ())[1], Stop)

    _play(scenario, groups=2)


def test_a_group_that_has_no_place_yet_can_see_that_the_run_is_over() -> None:
    async def scenario(board: Switchboard) -> None:
        await board.group_ended(0, "its node is gone")
        assert not await board.is_over()
        await board.stop_all()
        assert await board.is_over()

    _play(scenario, groups=2)


def test_a_group_that_was_told_to_stop_takes_no_further_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await board.stop_all()
        with pytest.raises(TrainingFailed, match="being stopped"):
            await board.execute(0, command)
        assert isinstance((await board.next_command(0, board._groups[0].roster.generation) or ())[1], Stop)

    _play(scenario)


# work


def _trial(command: TrainTo, name: str) -> TrainTo:
    return TrainTo(command.trial.model_copy(update={"trial_id": name}), command.epoch)


async def _finish(board: Switchboard, group: int, result: Any) -> None:
    """What a group's rank 0 does with its command."""
    serial, _ = await board.next_command(group, board._groups[group].roster.generation) or (0, None)
    await board.complete(group, serial, result)


def test_work_is_done_by_a_free_group_which_is_free_again_after_it(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        for number in range(3):
            working = asyncio.create_task(board.work(f"leg-{number}", command))
            await _let_others_run()
            await _finish(board, 0, number)
            group, waited_s, result = await working
            assert (group, result) == (0, number)
            assert waited_s >= 0.0

    _play(scenario)


def test_work_waits_until_its_group_is_up_and_counts_that_as_waiting(
    command: TrainTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(board: Switchboard) -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", time := _Clock(asyncio.get_running_loop().time))
        working = asyncio.create_task(board.work("leg", command))
        await _let_others_run()
        assert await board.take_events(0.0) == []
        time.ahead_s = 9.0
        await _seat_pair(board)
        await _let_others_run()
        assert [event.kind for event in await board.take_events(0.0)] == ["started"]
        await _finish(board, 0, "done")
        assert (await working)[1] >= 9.0

    _play(scenario)


def test_work_goes_to_a_group_that_is_up_where_another_is_not(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        working = asyncio.create_task(board.work("leg", command))
        await _let_others_run()
        await _seat_pair(board, 1)
        await _let_others_run()
        await _finish(board, 1, "done")
        assert (await working)[::2] == (1, "done")

    _play(scenario, groups=2)


def test_work_that_was_waiting_when_the_budget_was_used_up_rests_too(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        under_way = asyncio.create_task(board.work("leg-1", command))
        waiting = asyncio.create_task(board.work("leg-2", _trial(command, "waiting")))
        await _let_others_run()
        await board.rest_all()
        await _finish(board, 0, "rested")
        await _let_others_run()
        assigned = await board.next_command(0, 1)
        assert assigned is not None
        assert (await board.beat(0, first, _beat_of(assigned[0]))).rest
        await _finish(board, 0, "rested too")
        assert [(await task)[2] for task in (under_way, waiting)] == ["rested", "rested too"]

    _play(scenario)


def test_work_ends_where_the_run_is_being_stopped(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_pair(board)
        await board.stop_all()
        with pytest.raises(GroupLost, match="being stopped"):
            await board.work("leg", command)

    _play(scenario)


def test_what_a_group_was_at_when_it_ended_is_done_by_another(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        working = asyncio.create_task(board.work("leg", command))
        await _let_others_run()
        await board.group_ended(0, "it cannot be placed")
        await _let_others_run()
        await _finish(board, 1, "done")
        assert (await working)[::2] == (1, "done")

    _play(scenario, groups=2)


def test_where_the_last_group_has_ended_nobody_is_blamed(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        working = asyncio.create_task(board.work("leg", command))
        await _let_others_run()
        await board.group_ended(0, "it cannot be placed")
        with pytest.raises(GroupLost, match="cannot be placed"):
            await working

    _play(scenario)


def test_work_waits_for_a_group_and_says_how_long(command: TrainTo, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", time := _Clock(asyncio.get_running_loop().time))
        first = asyncio.create_task(board.work("first", command))
        await _let_others_run()
        second = asyncio.create_task(board.work("second", _trial(command, "second")))
        await _let_others_run()
        time.ahead_s = 7.0
        await _finish(board, 0, "done")
        await first
        await _let_others_run()
        await _finish(board, 0, "done too")
        _, waited_s, result = await second
        assert result == "done too"
        assert 7.0 <= waited_s < 10.0

    _play(scenario)


class _Clock:
    """The loop's own, and ahead of it where a test says so."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time, self.ahead_s = time, 0.0

    def __call__(self) -> float:
        return self._time() + self.ahead_s


def test_who_asks_again_for_the_same_work_joins_it_and_gets_the_same_outcome(command: TrainTo) -> None:
    """As an actor that was killed and started again; the first call's task may be gone by then."""

    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        first = asyncio.create_task(board.work("leg", command))
        await _let_others_run()
        first.cancel()
        again = asyncio.create_task(board.work("leg", command))
        await _let_others_run()
        await _finish(board, 0, "done")
        outcome = await again
        assert outcome[2] == "done"
        assert await board.work("leg", command) == outcome
        assert board._groups[0].command is None
        assert await board.take() == 0

    _play(scenario)


def test_a_failure_of_work_is_raised_and_frees_the_group(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        working = asyncio.create_task(board.work("leg", command))
        await _let_others_run()
        serial, _ = await board.next_command(0, board._groups[0].roster.generation) or (0, None)
        await board.fail(0, serial, OutOfMemory("no memory", rows=16))
        for _ in range(2):
            with pytest.raises(OutOfMemory) as caught:
                await asyncio.gather(working)
            assert caught.value.rows == 16
            working = asyncio.create_task(board.work("leg", command))
        await asyncio.gather(working, return_exceptions=True)
        assert await board.take() == 0

    _play(scenario)


def test_work_goes_to_the_group_that_has_its_trial_in_memory(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        names = ("a", "b", "c")
        working = [asyncio.create_task(board.work(f"{name}-1", _trial(command, name))) for name in names]
        await _let_others_run()
        for group in (2, 0, 1):
            await _finish(board, group, group)
        for group, task in zip((0, 1, 2), working, strict=True):
            assert (await task)[0] == group
        for group, name in ((1, "b"), (0, "a"), (2, "c")):
            going_on = asyncio.create_task(board.work(f"{name}-2", _trial(command, name)))
            await _let_others_run()
            await _finish(board, group, name)
            assert (await going_on)[::2] == (group, name)

    _play(scenario, groups=3)


def test_work_is_refused_once_storage_has_failed(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_all(board)
        working = asyncio.create_task(board.work("first", command))
        await _let_others_run()
        serial, _ = await board.next_command(0, board._groups[0].roster.generation) or (0, None)
        await board.fail(0, serial, DiskFull("full"))
        for key in ("first", "second"):
            with pytest.raises(DiskFull):
                await board.work(key, command)
        await asyncio.gather(working, return_exceptions=True)

    _play(scenario)


# rest


def test_all_that_is_trained_is_asked_to_rest_until_its_command_ends(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        assert not (await board.beat(0, first, _beat_of(1))).rest
        assert await board.rest_all() == 1
        assert (await board.beat(0, first, _beat_of(1))).rest
        await board.complete(0, 1, "rested")
        await result

        following = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        assert not (await board.beat(0, first, _beat_of(1))).rest, "a beat of the command before"
        assert (await board.beat(0, first, _beat_of(2))).rest, "the run is about to end"
        following.cancel()

    _play(scenario, groups=2)


def _beat_of(command: int) -> Beat:
    return Beat(1, 0, "forward", 0.0, "here", command)


def test_a_wish_to_rest_outlives_a_worker(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.rest_all()
        await _replace(board, first, 1, pid=150)
        assert (await board.beat(0, first, _beat_of(1))).rest
        result.cancel()

    _play(scenario)


# recycled workers


def test_a_worker_that_makes_room_is_told_of_and_costs_its_trial_nothing(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.recycle(0, second, "its memory is 3 GB")
        await board._lost_everywhere(second, "its process ended")  # the kernel's word
        await _replace(board, first, 1, pid=150)
        events = await board.take_events(0.0)
        assert [event.kind for event in events] == ["recycled", "regrouped"]
        assert events[0].values == {"rank": 1, "pid": second.pid, "why": "its memory is 3 GB"}
        assert not result.done()
        result.cancel()

    _play(scenario, max_failures=0)


def test_all_workers_of_a_group_can_make_room_at_once(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        members = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        for member in members:
            await board.recycle(0, member, "scaling.isolate")
        fresh = [_joining(board, _worker(slot, 150 + slot)) for slot in (0, 1)]
        seats = await asyncio.gather(*fresh)
        assert [seat and seat[1].generation for seat in seats] == [2, 2]
        assert (await board.next_command(0, 2) or ())[1:] == (command,)
        assert await _kinds(board) == ["recycled", "recycled", "regrouped"]
        result.cancel()

    _play(scenario, max_failures=0)


# stacks


def test_deaths_count_under_the_name_of_a_stack(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        stack = TrainStack("leg-000003", (Lane(command.trial), Lane(_trial(command, "other").trial)), 2)
        first, _ = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, stack))
        await _let_others_run()
        await _replace(board, first, 1, pid=150)
        assert board._num_deaths == {"leg-000003": 1}
        await _replace(board, first, 1, pid=160)
        with pytest.raises(TrainingFailed, match="died 2 times"):
            await result
        alone = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await _replace(board, first, 1, pid=170)
        assert not alone.done()
        probe = asyncio.create_task(board.execute(0, ProbeStack(command.trial, 4)))
        await _let_others_run()
        await _replace(board, first, 1, pid=180)
        assert board._num_deaths[command.trial.trial_id] == 1
        alone.cancel()
        probe.cancel()

    _play(scenario, max_failures=1)


# seats


def test_workers_are_seated_when_all_have_come() -> None:
    async def scenario(board: Switchboard) -> None:
        seated = asyncio.create_task(board.all_seated())
        early = _joining(board, _worker(1))
        await _let_others_run()
        assert not early.done()
        assert not seated.done()
        late = _joining(board, _worker(0))
        assert await early == (0, Place(1, 1, (_worker(0), _worker(1))))
        assert await late == (0, Place(1, 0, (_worker(0), _worker(1))))
        await seated

    _play(scenario)


def test_stopping_wakes_who_waits_for_a_seat() -> None:
    async def scenario(board: Switchboard) -> None:
        waiting = [_joining(board, _worker(0)), _joining(board, _spare(), None)]
        await _let_others_run()
        await board.stop_all()
        assert await asyncio.gather(*waiting) == [None, None]

    _play(scenario)


def test_the_end_of_its_group_wakes_who_waits_for_a_seat() -> None:
    async def scenario(board: Switchboard) -> None:
        waiting = _joining(board, _worker(0))
        await _let_others_run()
        await board.group_ended(0, "gone")
        assert await waiting is None

    _play(scenario)


def test_a_spare_sits_down_in_the_group_that_lacks_a_member_and_in_no_other() -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_pair(board, 0)
        first, second = await _seat_pair(board, 1, pid=200)
        spare = _joining(board, _spare(), None)
        await _let_others_run()
        assert not spare.done()

        await board._lost_everywhere(second, "test")
        seat, taken = await asyncio.gather(_joining(board, first, 1), spare)
        assert seat is not None
        assert taken == (1, Place(2, 1, (first, _spare())))

        await board._lost_everywhere(_worker(1), "test")  # of the other group, which has to do without
        survivor = _joining(board, _worker(0))
        await _let_others_run()
        assert not survivor.done()
        survivor.cancel()

    _play(scenario, groups=2)


def test_a_spare_that_comes_where_two_groups_lack_a_member_has_one_seat() -> None:
    async def scenario(board: Switchboard) -> None:
        survivors = []
        for group, pid in ((0, 100), (1, 200)):
            first, second = await _seat_pair(board, group, pid)
            await board._lost_everywhere(second, "test")
            survivors.append(_joining(board, first, group))
        await _let_others_run()

        assert await board.join(None, _spare()) == await _shifted(survivors[0])
        await _let_others_run()
        assert not survivors[1].done()
        survivors[1].cancel()

    async def _shifted(survivor: asyncio.Task[Seat]) -> Seat:
        seat = await survivor
        return seat and (seat[0], Place(seat[1].generation, 1, seat[1].members))

    _play(scenario, groups=2)


def test_a_spare_that_comes_back_from_a_generation_is_still_one_of_its_members() -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = await _seat_pair(board, 0)
        others = await _seat_pair(board, 1, pid=200)
        await board._lost_everywhere(second, "test")
        await asyncio.gather(board.join(0, first), board.join(None, _spare()))

        await board._lost_everywhere(others[1], "test")
        needs_one = _joining(board, others[0], 1)
        await _let_others_run()
        seats = await asyncio.gather(board.join(None, _spare()), board.join(0, first))
        assert [seat and (seat[0], seat[1].generation) for seat in seats] == [(0, 3), (0, 3)]
        assert not needs_one.done()
        needs_one.cancel()

    _play(scenario, groups=2)


def test_a_spare_whose_seat_is_filled_again_is_there_for_every_group() -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = await _seat_pair(board, 0)
        others = await _seat_pair(board, 1, pid=200)
        await board._lost_everywhere(second, "test")
        await asyncio.gather(board.join(0, first), board.join(None, _spare()))
        replacement = _joining(board, _worker(1, pid=150))
        await _let_others_run()

        spare = _joining(board, _spare(), None)
        await board.join(0, first)
        await replacement
        assert not spare.done()
        await board._lost_everywhere(others[1], "test")
        await board.join(1, others[0])
        assert (await spare or ())[0] == 1

    _play(scenario, groups=2)


def test_the_kernel_tells_of_the_death_of_a_process_on_this_node(sleeper: subprocess.Popen[bytes]) -> None:
    async def scenario(board: Switchboard) -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        first, second = _worker(0), _worker(1, sleeper.pid, node=HERE)
        await asyncio.gather(board.join(0, first), board.join(0, second))
        sleeper.kill()
        (lost,) = await board.take_events(20.0)
        assert (lost.kind, lost.values["rank"], lost.values["pid"]) == ("lost", 1, sleeper.pid)
        assert lost.values["how"] == "its process ended"
        await _replace(board, first, 1, pid=150)
        assert len(os.listdir("/proc/self/fd")) == descriptors

    _play(scenario)


def test_a_process_that_dies_while_it_waits_gets_no_seat(sleeper: subprocess.Popen[bytes]) -> None:
    async def scenario(board: Switchboard) -> None:
        ghost = _joining(board, _worker(1, sleeper.pid, node=HERE))
        await _let_others_run()
        sleeper.kill()
        while board._watched:
            await asyncio.sleep(0.001)
        await _let_others_run()
        first = _joining(board, _worker(0))
        await _let_others_run()
        assert not first.done()
        await board.join(0, _worker(1, 150))
        assert await first == (0, Place(1, 0, (_worker(0), _worker(1, 150))))
        ghost.cancel()

    _play(scenario)


def test_a_member_that_neither_comes_back_nor_is_heard_is_given_up_on() -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = await _seat_pair(board)
        spare = _joining(board, _spare(), None)
        assert await board.join(0, first) == (0, Place(2, 0, (first, _spare())))
        assert (await spare or ())[0] == 0
        events = await board.take_events(0.0)
        assert [event.kind for event in events] == ["lost", "regrouped"]
        assert events[0].values["pid"] == second.pid
        assert events[1].values == {"generation": 2, "workers": 2, "replaced": [1]}

    _play(scenario)


def test_a_member_in_a_long_step_is_waited_for_while_it_is_heard() -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = await _seat_pair(board)
        spare = _joining(board, _spare(), None)
        async with _heard(board, second):
            back = _joining(board, first)
            await asyncio.sleep(10 * module.GRACE_S)
            assert not back.done()
        await asyncio.gather(board.join(0, second), back)
        assert not spare.done()
        spare.cancel()

    _play(scenario)


def test_a_stopped_process_that_was_given_up_on_is_ended(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STAYS_AWAY_S", 0.02)

    async def scenario(board: Switchboard) -> None:
        sleeper.send_signal(signal.SIGSTOP)
        first, second = _worker(0), _worker(1, sleeper.pid, node=HERE)
        await asyncio.gather(board.join(0, first), board.join(0, second))
        back = _joining(board, first)
        assert await asyncio.to_thread(sleeper.wait, 20) == -signal.SIGKILL
        back.cancel()

    _play(scenario)


# the budget of failures


def test_deaths_beyond_max_failures_end_the_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await _replace(board, first, 1, pid=150)
        assert (await board.next_command(0, board._groups[0].roster.generation) or ())[
            1
        ] == command  # handed to the next generation
        await _replace(board, first, 1, pid=151)
        assert not result.done()
        await _replace(board, first, 1, pid=152)
        with pytest.raises(TrainingFailed, match=r"died 3 times, more than scaling.max_failures = 2"):
            await result
        assert await _kinds(board) == ["lost", "regrouped"] * 3

    _play(scenario, max_failures=2)


def test_deaths_are_counted_over_all_commands_of_a_trial_but_not_over_trials(
    command: TrainTo, make_trial: Callable[..., TrialSpec]
) -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)

        async def train_with_a_death(trial: TrialSpec, pid: int) -> None:
            result = asyncio.create_task(board.execute(0, TrainTo(trial, epoch=2)))
            await _let_others_run()
            await _replace(board, first, 1, pid)
            if not result.done():
                serial, _ = await board.next_command(0, board._groups[0].roster.generation) or (0, None)
                await board.complete(0, serial, "done")
            assert await result == "done"

        await train_with_a_death(command.trial, pid=150)
        with pytest.raises(TrainingFailed, match="died 2 times"):
            await train_with_a_death(command.trial, pid=151)
        await train_with_a_death(make_trial().model_copy(update={"trial_id": "1-net"}), pid=152)

    _play(scenario, max_failures=1)


def test_a_commands_own_error_is_no_death(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        members = await _seat_pair(board)
        first = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.fail(0, 1, TrainingFailed("ValueError: boom"))
        with pytest.raises(TrainingFailed, match="boom"):
            await first
        second = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await asyncio.gather(*[board.join(0, member) for member in members])
        await board.complete(0, 2, "done")
        assert await second == "done"

    _play(scenario, max_failures=0)


def test_a_death_without_a_command_is_nobodys(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        await _replace(board, first, 1, pid=150)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.complete(0, 1, "done")
        assert await result == "done"

    _play(scenario, max_failures=0)


def test_an_idle_group_notices_at_once_that_its_generation_is_broken() -> None:
    async def scenario(board: Switchboard) -> None:
        _, second = await _seat_pair(board)
        asking = asyncio.create_task(board.next_command(0, board._groups[0].roster.generation))
        await _let_others_run()
        await board._lost_everywhere(second, "test")
        assert await asking is None

    _play(scenario)


# the store of a generation


def test_the_others_wait_for_the_address_of_the_store() -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_pair(board)
        looking = asyncio.create_task(board.look_up(0, 1))
        await _let_others_run()
        assert not looking.done()
        await board.publish(0, 1, "address")
        assert await looking == "address"
        assert await board.look_up(0, 1) == "address"

    _play(scenario)


def test_a_broken_generation_has_no_store(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        _, second = await _seat_pair(board)
        await board.publish(0, 1, "address")
        await board._lost_everywhere(second, "test")
        assert await board.look_up(0, 1) is None

    _play(scenario)


def test_who_waits_for_a_store_is_woken_when_its_rank_0_comes_back_without_one() -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        looking = asyncio.create_task(board.look_up(0, 1))
        await _let_others_run()
        back = _joining(board, first)
        assert await looking is None
        back.cancel()

    _play(scenario)


def test_who_waits_for_a_store_that_does_not_come_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMING_TIMEOUT_S", 0.01)

    async def scenario(board: Switchboard) -> None:
        await _seat_pair(board)
        assert await board.look_up(0, 1) is None

    _play(scenario)


def test_an_address_that_comes_too_late_does_not_hide_that_of_the_next_generation() -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        await _replace(board, first, 1, pid=150)
        await board.publish(0, 2, "of the second")
        await board.publish(0, 1, "of the first")
        assert await board.look_up(0, 2) == "of the second"

    _play(scenario)


# hold and drain


def test_a_held_group_is_asked_to_stop_and_says_when_its_checkpoint_is_committed(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        members = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        async with _heard(board, *members) as wishes:
            holding = asyncio.create_task(board.hold(0))
            await asyncio.sleep(0.02)
            assert wishes == [Wish(save=True, stop=True)] * 2
            back = [_joining(board, members[1])]  # leaves before rank 0, which still writes
            await _let_others_run()
            assert not holding.done()
            await board.yielded(0)
            assert await holding is True
        back.append(_joining(board, members[0]))
        await _let_others_run()
        assert not any(task.done() for task in back)  # nobody sits down until Ray Train has replaced them

        restarted = await asyncio.gather(*[board.join(0, _worker(slot, 300 + slot)) for slot in (0, 1)])
        assert [seat and seat[1].generation for seat in restarted] == [2, 2]
        assert await board.beat(0, restarted[0][1].members[0], Beat(0, 0, "idle", 0.0, "")) == Wish()  # type: ignore[index]
        assert not result.done()  # no death
        for task in (*back, result):
            task.cancel()

    _play(scenario, max_failures=0)


def test_a_group_that_starts_again_at_another_size_is_charged_nothing(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        holding = asyncio.create_task(board.hold(0))
        await _let_others_run()
        await board.yielded(0)
        assert await holding
        restarted = [_worker(slot, 300 + slot, size=3) for slot in range(3)]
        seats = await asyncio.gather(*[board.join(0, member) for member in restarted])
        assert [seat and seat[1].world_size for seat in seats] == [3, 3, 3]
        assert not result.done()
        result.cancel()

    _play(scenario, max_failures=0)


def test_a_spare_does_not_end_a_hold(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        members = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        holding = asyncio.create_task(board.hold(0))
        await _let_others_run()
        await board.yielded(0)
        await holding
        waiting = [_joining(board, _spare(), None), *[_joining(board, member) for member in members]]
        await _let_others_run()
        assert not any(task.done() for task in waiting)
        for task in (*waiting, result):
            task.cancel()

    _play(scenario)


def test_an_idle_group_is_not_waited_for_when_it_is_to_be_held() -> None:
    async def scenario(board: Switchboard) -> None:
        assert await board.hold(0) is False  # before its first generation
        await _seat_pair(board)
        assert await board.hold(0) is False

    _play(scenario)


def test_a_hold_before_the_first_generation_waits_for_nobody(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        assert await board.hold(0) is False
        await _seat_pair(board)
        result.cancel()

    _play(scenario)


@pytest.mark.parametrize("ending", ["complete", "fail"])
def test_a_hold_ends_when_the_command_does(command: TrainTo, ending: str) -> None:
    async def scenario(board: Switchboard) -> None:
        await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        holding = asyncio.create_task(board.hold(0))
        await _let_others_run()
        await getattr(board, ending)(0, 1, TrainingFailed("done"))
        assert await holding is False
        await asyncio.gather(result, return_exceptions=True)

    _play(scenario)


def test_a_hold_ends_when_rank_0_is_lost_or_takes_too_long(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, _ = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        assert await board.hold(0, timeout_s=0.01) is False
        assert await board.beat(0, first, Beat(1, 0, "forward", 0.0, "")) == Wish()  # nobody waits for it any more
        holding = asyncio.create_task(board.hold(0))
        await _let_others_run()
        await board._lost_everywhere(first, "test")
        assert await holding is False
        result.cancel()

    _play(scenario)


def test_all_groups_are_held_side_by_side(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        for group, pid in ((0, 100), (1, 200), (2, 300)):
            await _seat_pair(board, group, pid)
        results = [asyncio.create_task(board.execute(group, command)) for group in (0, 1)]
        await _let_others_run()
        holding = asyncio.create_task(board.hold_all(60.0))
        await _let_others_run()
        await board.yielded(1)
        await board.yielded(0)
        assert await holding == 2
        for result in results:
            result.cancel()

    _play(scenario, groups=3)


def test_a_group_with_a_worker_on_a_draining_node_saves_and_goes_on_without_it(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, leaving = _worker(0), _worker(1, node="leaving-node")
        await asyncio.gather(board.join(0, first), board.join(0, leaving))
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.drain(["leaving-node"])
        await _let_others_run()
        assert (await board.beat(0, first, Beat(1, 0, "forward", 0.0, ""))).stop
        await board.yielded(0)
        with pytest.raises(Preempted, match="leaving-"):
            await board.join(0, leaving)

        replacement = _worker(1, pid=150)
        seats = await asyncio.gather(board.join(0, first), board.join(0, replacement))
        assert [seat and seat[1].members for seat in seats] == [(first, replacement)] * 2
        events = await board.take_events(0.0)
        assert [(event.kind, event.values.get("how")) for event in events] == [
            ("lost", "its node is being drained"),
            ("regrouped", None),
        ]
        assert not result.done()  # a preemption is no death
        result.cancel()

    _play(scenario, max_failures=0)


def test_a_group_with_a_worker_on_a_node_that_is_gone_is_not_waited_for(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        await asyncio.gather(board.join(0, _worker(0)), board.join(0, _worker(1, node="silent-node")))
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.nodes_gone(["silent-node", "another"])
        assert await asyncio.wait_for(board.hold(0, 30.0), 1.0) is False
        events = await board.take_events(0.0)
        assert [(event.kind, event.values.get("how")) for event in events] == [("lost", "its node cannot be reached")]
        result.cancel()

    _play(scenario)


def test_who_waits_on_a_draining_node_is_told_and_gets_no_seat() -> None:
    async def scenario(board: Switchboard) -> None:
        waiting = _joining(board, _worker(0, node="leaving-node"))
        await _let_others_run()
        await board.drain(["leaving-node"])
        with pytest.raises(Preempted):
            await waiting
        second = _joining(board, _worker(1))
        await _let_others_run()
        assert not second.done()
        await board.join(0, _worker(0, 150))
        await second

    _play(scenario)


def test_the_rank_0_of_an_idle_group_leaves_a_draining_node_before_the_next_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        alone = _worker(0, size=1, node="leaving-node")
        await board.join(0, alone)
        asking = asyncio.create_task(board.next_command(0, board._groups[0].roster.generation))
        await _let_others_run()
        await board.drain(["leaving-node"])
        with pytest.raises(Preempted):
            await asking

    _play(scenario)


# hangs


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_worker_that_hangs_is_told_once_ended_and_replaced(
    command: TrainTo, is_silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Member] = []
    monkeypatch.setattr(module, "kill_process", lambda member, here: ended.append(member))
    if is_silent:
        monkeypatch.setattr(hangs, "SILENT_AFTER_S", 0.1)

    async def scenario(board: Switchboard) -> None:
        first, second = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        stuck = Beat(3, 1, "forward", 0.0 if is_silent else 700.0, "model.py:7 forward")
        await board.beat(0, second, stuck)
        async with _heard(board, first, beat=Beat(3, 2, "backward", 0.0 if is_silent else 700.0, "loop.py:1 step")):
            events = await board.take_events(20.0)
            while len(events) < 2:
                events += await board.take_events(20.0)
            hang, lost = events
            assert (hang.kind, hang.trial_id, hang.values["rank"]) == ("hang", command.trial.trial_id, 1)
            assert "in forward, at model.py:7 forward" in hang.values["text"]
            assert (lost.kind, lost.values["pid"]) == ("lost", second.pid)
        assert ended == [second]
        await _replace(board, first, 1, pid=150)
        assert await _kinds(board) == ["regrouped"]
        result.cancel()

    _play(scenario)


def test_a_worker_that_makes_no_progress_yet_is_named_and_left_alive(
    command: TrainTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Member] = []
    monkeypatch.setattr(module, "kill_process", lambda member, here: ended.append(member))

    async def scenario(board: Switchboard) -> None:
        members = await _seat_pair(board)
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        async with _heard(board, *members, beat=Beat(3, 1, "forward", 30.0, "model.py:7 forward")):
            await asyncio.sleep(10 * module.WATCH_EVERY_S)
        events = await board.take_events(20.0)
        assert sorted(event.values["rank"] for event in events) == [0, 1]  # nobody knows which; each told once
        assert not ended
        result.cancel()

    _play(scenario)


# events


def test_events_are_taken_once_and_in_order() -> None:
    async def scenario(board: Switchboard) -> None:
        for number in range(5):
            await board.push(Event("epoch", "0-mlp", {"epoch": number}))
        assert [event.values["epoch"] for event in await board.take_events(0.0)] == [0, 1, 2, 3, 4]
        assert await board.take_events(0.0) == []

    _play(scenario)


def test_who_waits_for_events_is_woken_by_the_first() -> None:
    async def scenario(board: Switchboard) -> None:
        waiting = asyncio.create_task(board.take_events(600.0))
        await _let_others_run()
        await board.push_all([Event("epoch", "0-mlp"), Event("epoch", "1-mlp")])
        assert await waiting == [Event("epoch", "0-mlp"), Event("epoch", "1-mlp")]

    _play(scenario)


def test_what_became_of_an_offer_is_told_once_though_its_actor_dies_before_it_has_returned() -> None:
    async def scenario(board: Switchboard) -> None:
        assert await board.conclude(7, "first", [Event("leg", "", {"number": 7})]) == "first"
        assert await board.conclude(7, "second", [Event("leg", "", {"number": 7})]) == "first"
        assert await board.conclude(8, "other", [Event("leg", "", {"number": 8})]) == "other"
        assert [event.values["number"] for event in await board.take_events(0.01)] == [7, 8]

    _play(scenario)


def test_a_groups_members_are_told_by_rank_but_not_between_two_generations() -> None:
    async def scenario(board: Switchboard) -> None:
        assert await board.members(0) == ()
        first, second = await _seat_pair(board)
        assert await board.members(0) == (first, second)

        back = _joining(board, first)
        await _let_others_run()
        assert await board.members(0) == ()
        third = _worker(1, 300)
        await asyncio.gather(back, board.join(0, third))
        assert await board.members(0) == (first, third)

    _play(scenario)


def test_a_spare_that_waits_on_a_node_that_is_gone_gets_no_seat_of_one_that_was_lost_there() -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = _worker(0), _worker(1, node="b")
        await asyncio.gather(board.join(0, first), board.join(0, second))
        spare = _joining(board, _spare(), None)  # on node b
        survivor = _joining(board, first)  # its connection to the other broke
        await _let_others_run()

        await board.nodes_gone(["b"])
        await _let_others_run()
        assert not survivor.done(), "it would wait for a process that is not there"
        replacement = await board.join(0, _worker(1, 300, node="c"))
        assert replacement is not None
        assert replacement[1].members == (first, _worker(1, 300, node="c"))
        spare.cancel()

    _play(scenario)


def test_an_elastic_group_goes_on_without_those_lost_with_their_node(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = _worker(0, node="b"), _worker(1)
        await asyncio.gather(board.join(0, first), board.join(0, second))
        result = asyncio.create_task(board.execute(0, command))
        survivor = _joining(board, second)  # its connection to the other broke
        await _let_others_run()
        await board.go_on_without(0, [0], ["b"])

        seat = await asyncio.wait_for(survivor, 1.0)
        assert seat is not None
        assert (seat[1].rank, seat[1].members) == (0, (second,))
        events = await board.take_events(0.0)
        assert [(event.kind, event.values.get("how")) for event in events] == [
            ("lost", "its node cannot be reached"),
            ("regrouped", None),
        ]
        assert events[1].values["workers"] == 1
        result.cancel()

    _play(scenario)


def test_a_whole_group_that_comes_again_takes_the_place_of_who_went_on(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = _worker(0), _worker(1, node="b")
        await asyncio.gather(board.join(0, first), board.join(0, second))
        survivor = _joining(board, first)
        await board.go_on_without(0, [1], ["b"])
        await survivor

        await board.starts_whole(0)
        again = [_worker(slot, 300 + slot, node=node) for slot, node in enumerate("ac")]
        seats = await asyncio.gather(*(board.join(0, member) for member in again))
        assert all(seat is not None and seat[1].members == tuple(again) for seat in seats)

    _play(scenario)


def test_a_worker_lost_before_it_came_is_not_waited_for_by_the_first_who_comes() -> None:
    async def scenario(board: Switchboard) -> None:
        await board.starts_whole(0)
        await board.go_on_without(0, [1], ["b"])
        seat = await asyncio.wait_for(board.join(0, _worker(0)), 1.0)
        assert seat is not None
        assert seat[1].members == (_worker(0),)

    _play(scenario)


def test_who_is_being_drained_leaves_its_seat_by_itself_and_the_others_save_before(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first, second = _worker(0), _worker(1, node="b")
        await asyncio.gather(board.join(0, first), board.join(0, second))
        result = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.drain(["b"])
        await board.go_on_without(0, [1], [])  # its process has ended, and rank 0 is still writing
        await _let_others_run()
        assert not [event for event in await board.take_events(0.0) if event.kind == "lost"]

        await board.yielded(0)
        survivor = _joining(board, first)
        seat = await asyncio.wait_for(survivor, 1.0)
        assert seat is not None
        assert seat[1].members == (first,)
        result.cancel()

    _play(scenario)
