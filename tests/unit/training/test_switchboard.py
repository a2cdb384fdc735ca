"""The switchboard as a plain object: Ray only carries its calls, so nothing of Ray is started here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bigray.errors import TrainingFailed
from bigray.specs import TrialSpec
from bigray.training import switchboard as module
from bigray.training.commands import Event, Stop, TrainTo
from bigray.training.switchboard import Switchboard

Scenario = Callable[[Switchboard], Coroutine[Any, Any, None]]


@pytest.fixture
def command(make_trial: Callable[..., TrialSpec]) -> TrainTo:
    return TrainTo(make_trial(), epoch=2)


def _play(scenario: Scenario, groups: int = 1) -> None:
    async def run() -> None:
        async with asyncio.timeout(20):  # a lost wake-up fails the test instead of hanging it
            await scenario(Switchboard(groups))

    asyncio.run(run())


async def _let_others_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_every_group_is_lent_once() -> None:
    async def scenario(board: Switchboard) -> None:
        assert sorted([await board.lease(), await board.lease(), await board.lease()]) == [0, 1, 2]

    _play(scenario, groups=3)


def test_a_lease_waits_until_a_group_is_given_back() -> None:
    async def scenario(board: Switchboard) -> None:
        group = await board.lease()
        waiting = asyncio.create_task(board.lease())
        await _let_others_run()
        assert not waiting.done()

        await board.release(group)
        assert await waiting == group

    _play(scenario)


def test_a_group_given_back_twice_is_lent_once() -> None:
    async def scenario(board: Switchboard) -> None:
        group = await board.lease()
        await board.release(group)
        await board.release(group)
        await board.lease()
        waiting = asyncio.create_task(board.lease())
        await _let_others_run()
        assert not waiting.done()
        waiting.cancel()

    _play(scenario)


def test_a_command_returns_what_its_group_made_of_it(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        assert (await board.next_command(0) or ())[1:] == (command,)
        await board.complete(0, 1, "the result")
        assert await result == "the result"

    _play(scenario)


def test_a_group_that_asked_first_is_woken_by_its_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        asking = asyncio.create_task(board.next_command(1))
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
            serial, received = await board.next_command(group) or (0, None)
            assert received == TrainTo(command.trial, group)
            await board.complete(group, serial, group)
        assert await asyncio.gather(*results) == [0, 1]

    _play(scenario, groups=2)


def test_a_failure_is_raised_where_the_command_came_from(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0)
        await board.fail(0, 1, "ValueError: boom")
        with pytest.raises(TrainingFailed, match="ValueError: boom"):
            await result

    _play(scenario)


def test_restarted_workers_get_the_same_unfinished_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        assert (await board.next_command(0) or ())[1:] == (command,)
        assert (await board.next_command(0) or ())[1:] == (command,)  # the first workers died without a word
        await board.complete(0, 1, "done")
        assert await result == "done"

    _play(scenario)


@pytest.mark.parametrize("ending", ["complete", "fail"])
def test_a_settled_command_is_not_handed_out_again(
    command: TrainTo, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)

    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0)
        await getattr(board, ending)(0, 1, "settled")
        assert await board.next_command(0) is None
        await asyncio.gather(result, return_exceptions=True)

    _play(scenario)


def test_a_failure_told_by_every_rank_is_one_failure(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0)
        await board.fail(0, 1, "rank 1")
        await board.fail(0, 1, "rank 0")
        with pytest.raises(TrainingFailed, match="rank 1"):
            await result

    _play(scenario)


def test_a_late_word_about_the_last_command_does_not_touch_the_next_one(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        first = asyncio.create_task(board.execute(0, command))
        await board.next_command(0)
        await board.fail(0, 1, "rank 0")
        with pytest.raises(TrainingFailed, match="rank 0"):
            await first
        second = asyncio.create_task(board.execute(0, command))
        await _let_others_run()
        await board.fail(0, 1, "rank 1, of the first command")
        await _let_others_run()
        assert not second.done()
        await board.complete(0, 2, "done")
        assert await second == "done"

    _play(scenario)


def test_the_end_of_a_group_is_told_to_who_waits_for_its_result(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        await board.next_command(0)
        await board.group_ended(0, "workers died too often")
        with pytest.raises(TrainingFailed, match="died too often"):
            await result
        with pytest.raises(TrainingFailed, match="died too often"):
            await board.execute(0, command)

    _play(scenario)


def test_who_waits_for_a_group_is_told_when_the_last_one_has_ended() -> None:
    async def scenario(board: Switchboard) -> None:
        await board.lease()
        await board.lease()
        waiting = asyncio.create_task(board.lease())
        await board.group_ended(0, "gone")
        await _let_others_run()
        assert not waiting.done()
        await board.group_ended(1, "gone too")
        with pytest.raises(TrainingFailed, match="no worker group is left"):
            await waiting

    _play(scenario, groups=2)


def test_an_ended_group_is_not_lent_again() -> None:
    async def scenario(board: Switchboard) -> None:
        await board.group_ended(0, "gone")
        held = await board.lease()
        assert held == 1
        await board.group_ended(held, "gone too")
        await board.release(held)
        with pytest.raises(TrainingFailed):
            await board.lease()

    _play(scenario, groups=2)


def test_every_group_is_told_to_stop_even_in_the_middle_of_a_command(command: TrainTo) -> None:
    async def scenario(board: Switchboard) -> None:
        result = asyncio.create_task(board.execute(0, command))
        asking = asyncio.create_task(board.next_command(1))
        await _let_others_run()
        await board.stop_all()
        assert isinstance((await asking or ())[1], Stop)
        await board.complete(0, 1, "done")
        assert await result == "done"
        assert isinstance((await board.next_command(0) or ())[1], Stop)
        assert isinstance((await board.next_command(0) or ())[1], Stop)

    _play(scenario, groups=2)


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
        await board.push(Event("epoch", "0-mlp"))
        assert await waiting == [Event("epoch", "0-mlp")]

    _play(scenario)
