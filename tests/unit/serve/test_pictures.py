"""The desk that decodes pictures, with decoders that take as long as the test likes."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from bigray.serve.desk import Desk
from bigray.serve.http import Refusal
from bigray.serve.pictures import picture_desk


def slow(seconds: float) -> str:
    time.sleep(seconds)
    return "decoded"


async def refusal_of(desk: Desk, *arguments: object) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await desk.run(*arguments)
    return refused.value


async def decoded_at_last(desk: Desk) -> str:
    while True:
        try:
            return await desk.run(slow, 0.0)
        except Refusal:
            await asyncio.sleep(0.001)


def test_a_picture_that_takes_too_long_is_given_up_with_504_and_still_counts_while_it_holds_the_thread():
    desk, gate, begun = picture_desk(timeout_s=0.05, max_queue_s=0.0), threading.Event(), []

    def hang() -> None:
        assert gate.wait(10)

    async def story():
        late = await refusal_of(desk, hang)
        full = await refusal_of(desk, begun.append, 1)
        gate.set()
        return late, full, await decoded_at_last(desk)

    late, full, later = asyncio.run(story())
    assert (late.status, late.message) == (504, "no answer within 0.05 s")
    assert (full.status, later, begun) == (503, "decoded", [])


def test_a_picture_that_was_given_up_before_its_turn_is_never_decoded():
    desk, gate, begun = picture_desk(timeout_s=0.05, max_queue_s=60.0), threading.Event(), []

    def hang() -> None:
        assert gate.wait(10)

    async def story():
        statuses = [one.status for one in await asyncio.gather(refusal_of(desk, hang), refusal_of(desk, begun.append))]
        gate.set()
        return statuses, await decoded_at_last(desk)

    assert asyncio.run(story()) == ([504, 504], "decoded")
    assert begun == []


def test_as_many_pictures_wait_as_can_be_decoded_in_the_time_allowed():
    desk, gate = picture_desk(timeout_s=60.0, max_queue_s=1.0), threading.Event()

    def hang() -> None:
        assert gate.wait(10)

    async def story():
        await desk.run(slow, 0.35)  # so the third would have more than a second of work before it
        tasks = [asyncio.create_task(desk.run(hang)) for _ in range(5)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(Refusal) as refused:
            desk.check_room()
        gate.set()
        await asyncio.wait(tasks)
        return [one.exception() for one in tasks], refused.value

    outcomes, unread = asyncio.run(story())
    assert [getattr(one, "status", 200) for one in outcomes] == [200, 200, 200, 503, 503]
    assert (unread.status, unread.headers) == (503, ((b"retry-after", b"2"),))


def test_an_idle_desk_takes_a_picture_however_long_the_last_one_took():
    desk = picture_desk(timeout_s=60.0, max_queue_s=0.0)

    async def story():
        return [await desk.run(slow, 0.01) for _ in range(3)]

    assert asyncio.run(story()) == ["decoded"] * 3
