from __future__ import annotations

import asyncio

from bigray.serve import under_way
from bigray.serve.under_way import Attended, UnderWay


async def never() -> dict:
    await asyncio.Event().wait()
    raise AssertionError("nothing comes")


async def gone() -> dict:
    return {"type": "http.disconnect"}


async def outcome(way: UnderWay, receive, *, is_reading: bool) -> Attended:
    """A request that waits for ever, looked after until it is given up or has had its chances."""
    started: asyncio.Future[Attended] = asyncio.get_running_loop().create_future()

    async def request() -> None:
        attended = way.begin(receive)
        attended.is_reading = is_reading
        started.set_result(attended)
        try:
            await asyncio.Event().wait()
        finally:
            way.end(attended)

    task = asyncio.create_task(request())
    attended = await started
    for _ in range(10):
        way.look_after()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return attended


def test_a_body_that_does_not_come_is_a_408():
    attended = asyncio.run(outcome(UnderWay(body_timeout_s=0.0), never, is_reading=True))
    assert attended.fault is not None
    assert (attended.fault.status, attended.fault.message) == (408, "body: not complete within 0 s")


def test_of_many_late_bodies_a_few_are_given_up_at_each_look(monkeypatch):
    monkeypatch.setattr(under_way, "GIVEN_UP_AT_ONCE", 3)

    async def story():
        way = UnderWay(body_timeout_s=0.0)

        async def stall():
            attended = way.begin(never)
            try:
                await asyncio.Event().wait()
            finally:
                way.end(attended)

        tasks = [asyncio.create_task(stall()) for _ in range(7)]
        await asyncio.sleep(0.01)
        left = []
        for _ in range(3):
            way.look_after()
            await asyncio.gather(*(asyncio.sleep(0) for _ in range(3)))
            left.append(sum(not task.done() for task in tasks))
        return left

    assert asyncio.run(story()) == [4, 1, 0]


def test_a_body_that_still_has_time_is_waited_for():
    assert asyncio.run(outcome(UnderWay(body_timeout_s=60.0), never, is_reading=True)).fault is None


def test_the_work_for_a_caller_that_has_gone_is_given_up(monkeypatch):
    monkeypatch.setattr(under_way, "WATCHED_AFTER_S", 0.0)
    attended = asyncio.run(outcome(UnderWay(body_timeout_s=60.0), gone, is_reading=False))
    assert attended.fault is not None
    assert attended.fault.status == 499


def test_a_caller_that_waits_is_not_given_up(monkeypatch):
    monkeypatch.setattr(under_way, "WATCHED_AFTER_S", 0.0)
    attended = asyncio.run(outcome(UnderWay(body_timeout_s=60.0), never, is_reading=False))
    assert attended.fault is None
    assert attended.watcher is not None
    assert attended.watcher.cancelled(), "nobody watches a request that is over"
