from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bigray.training import reporting
from bigray.training.commands import Event
from bigray.training.reporting import Reporter

LIMIT_S = 10.0


class _Receiver:
    """Takes batches; while `is_open` is unset, a call is held until it is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.is_open, self.has_call = threading.Event(), threading.Event()
        self.is_open.set()

    def __call__(self, events: list[Event]) -> None:
        self.has_call.set()
        assert self.is_open.wait(LIMIT_S)
        self.batches.append([event.values["step"] for event in events])

    @property
    def steps(self) -> list[int]:
        return [step for batch in self.batches for step in batch]


@pytest.fixture
def receiver() -> Iterator[_Receiver]:
    receiver = _Receiver()
    yield receiver
    receiver.is_open.set()


def _event(step: int) -> Event:
    return Event("epoch", "mlp", {"step": step})


def _push(reporter: Reporter, steps: range) -> None:
    for step in steps:
        reporter.push(_event(step))


def test_every_event_arrives_once_and_in_order(receiver: _Receiver) -> None:
    reporter = Reporter(receiver, max_wait_s=0.0)
    for start in range(0, 20_000, 500):
        _push(reporter, range(start, start + 500))
        if start % 2000 == 0:
            reporter.flush()
    reporter.flush()

    assert receiver.steps == list(range(20_000))


def test_an_event_arrives_without_a_flush(receiver: _Receiver) -> None:
    reporter = Reporter(receiver)
    reporter.push(_event(1))

    assert receiver.has_call.wait(LIMIT_S)
    reporter.close()
    assert receiver.steps == [1]


def test_pushing_goes_on_while_the_receiver_does_not_answer_and_one_call_is_under_way(receiver: _Receiver) -> None:
    reporter = Reporter(receiver, max_wait_s=0.0)
    receiver.is_open.clear()
    reporter.push(_event(0))
    assert receiver.has_call.wait(LIMIT_S)
    _push(reporter, range(1, 1001))
    assert receiver.batches == [], "the first call has not returned"
    receiver.is_open.set()
    reporter.flush()

    assert receiver.batches == [[0], list(range(1, 1001))]


def test_a_long_queue_goes_out_in_bounded_calls(receiver: _Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "LARGEST_BATCH", 10)
    reporter = Reporter(receiver, max_wait_s=0.0)
    receiver.is_open.clear()
    reporter.push(_event(0))
    assert receiver.has_call.wait(LIMIT_S)
    _push(reporter, range(1, 35))
    receiver.is_open.set()
    reporter.flush()

    assert receiver.steps == list(range(35))
    assert max(len(batch) for batch in receiver.batches) == 10


def test_events_that_come_close_together_share_a_call(receiver: _Receiver) -> None:
    reporter = Reporter(receiver, max_wait_s=LIMIT_S)
    reporter.push(_event(0))
    assert receiver.has_call.wait(LIMIT_S)
    _push(reporter, range(1, 100))
    reporter.flush()  # does not wait for the rest of `max_wait_s`, which would end this test

    assert receiver.batches == [[0], list(range(1, 100))]


def test_a_flush_returns_only_when_all_was_received(receiver: _Receiver) -> None:
    reporter = Reporter(receiver)
    receiver.is_open.clear()
    _push(reporter, range(5))
    flushing = threading.Thread(target=reporter.flush)
    flushing.start()
    flushing.join(0.05)
    assert flushing.is_alive()
    receiver.is_open.set()
    flushing.join(LIMIT_S)

    assert receiver.steps == list(range(5))


def test_a_failed_call_is_raised_by_the_next_flush_and_by_no_other() -> None:
    received: list[Event] = []

    def fail_once(events: list[Event]) -> None:
        if not received:
            received.extend(events)
            raise ConnectionError("the switchboard is gone")
        received.extend(events)

    reporter = Reporter(fail_once)
    reporter.push(_event(1))
    with pytest.raises(ConnectionError, match="the switchboard is gone"):
        reporter.flush()
    reporter.push(_event(2))
    reporter.flush()

    assert received == [_event(1), _event(2)]


def test_threads_that_push_at_once_lose_nothing(receiver: _Receiver) -> None:
    reporter = Reporter(receiver, max_wait_s=0.0)
    threads = [threading.Thread(target=_push, args=(reporter, range(n * 1000, n * 1000 + 1000))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reporter.flush()

    assert sorted(receiver.steps) == list(range(4000))


def test_closing_sends_what_is_left_and_ends_the_thread(receiver: _Receiver) -> None:
    before = threading.active_count()
    reporter = Reporter(receiver, max_wait_s=LIMIT_S)
    _push(reporter, range(100))
    reporter.close()

    assert receiver.steps == list(range(100))
    assert threading.active_count() == before


def test_what_is_pushed_after_closing_goes_with_a_flush(receiver: _Receiver) -> None:
    reporter = Reporter(receiver)
    reporter.close()
    reporter.push(_event(1))
    reporter.flush()
    reporter.close()

    assert receiver.steps == [1]
