from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from bigray.storage_retry import PATIENCE, Patience, is_transient, keep_trying, waits_s

BUSY = OSError(
    "When uploading part for key 'a' in bucket 'b': AWS Error SLOW_DOWN during UploadPart operation: Please reduce"
)
DENIED = OSError("When reading information for key 'a' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject")


@dataclass
class Clock:
    """Goes on by what is slept, and by what each call takes."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_each_wait_is_twice_the_last_up_to_a_limit() -> None:
    assert list(itertools.islice(waits_s(Patience(60, 0.5, 3)), 5)) == [0.5, 1, 2, 3, 3]


def test_the_first_answer_is_the_one_and_only_the_first_failure_is_told() -> None:
    clock, told = Clock(), list[OSError]()
    answers = iter([BUSY, BUSY, "there"])

    def call() -> str:
        if isinstance(answer := next(answers), OSError):
            raise answer
        return answer

    assert keep_trying(call, PATIENCE, told.append, clock=clock, sleep=clock.sleep) == "there"
    assert told == [BUSY]
    assert 0.25 <= clock.slept[0] <= 0.5 <= clock.slept[1] <= 1


@pytest.mark.parametrize("takes_s", [0.0, 7.0, 500.0])
def test_an_end_is_made_when_the_time_is_up(takes_s: float) -> None:
    clock, begun = Clock(), list[float]()

    def call() -> None:
        begun.append(clock.now)
        clock.now += takes_s
        raise BUSY

    with pytest.raises(OSError, match="SLOW_DOWN"):
        keep_trying(call, Patience(60.0), clock=clock, sleep=clock.sleep)

    assert begun[-1] <= begun[0] + takes_s + 60.0
    assert sum(clock.slept) <= 60.0
    assert all(wait <= 10.0 for wait in clock.slept)


def test_what_no_waiting_mends_is_raised_at_once() -> None:
    def call() -> None:
        raise DENIED

    with pytest.raises(OSError, match="ACCESS_DENIED"):
        keep_trying(call, PATIENCE, sleep=lambda _: pytest.fail("slept"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Couldn't connect to server", True),
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 28, Timeout was reached", True),
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate", False),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.", True),
        ("AWS Error UNKNOWN (HTTP status 429) during PutObject operation: x", True),
        ("AWS Error UNKNOWN (HTTP status 400) during PutObject operation: x", False),
        ("AWS Error SERVICE_UNAVAILABLE during PutObject operation: x", True),
        ("AWS Error INTERNAL_FAILURE during CompleteMultipartUpload operation: x", True),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation: x", False),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: x", False),
        ("No space left on device", False),
        ("Path does not exist 'bucket/SLOW_DOWN'", False),
    ],
)
def test_what_may_pass_is_told_apart_from_what_stays(text: str, expected: bool) -> None:
    assert is_transient(OSError(text)) == expected
