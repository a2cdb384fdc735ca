from __future__ import annotations

import pytest

from bigray.serve.protect.keys import Key
from bigray.serve.protect.limits import RateLimits, TokenBucket


def make_key(rate_per_s: float | None, id: str = "0a0a0a0a") -> Key:
    return Key(id=id, name="anna", sha256="0" * 64, scopes={"predict"}, rate_per_s=rate_per_s, created="")


def allowed(limits: RateLimits, key: Key, now: float, tries: int = 1000) -> int:
    return sum(limits.take(key, now) == 0.0 for _ in range(tries))


def test_a_full_bucket_grants_its_rate_at_once():
    bucket = TokenBucket(10, now=0)
    assert [bucket.take(0) for _ in range(10)] == [0.0] * 10
    assert bucket.take(0) > 0


def test_a_slow_key_may_still_send_one():
    bucket = TokenBucket(0.1, now=0)
    assert bucket.take(0) == 0.0
    assert bucket.take(0) == pytest.approx(10)


@pytest.mark.parametrize("rate", [0.03, 0.1, 1, 3, 7, 1e3, 1e6])
def test_after_the_time_that_was_told_there_is_a_token(rate):
    bucket, now = TokenBucket(rate, now=0), 0.0
    for _ in range(1000):
        now += bucket.take(now)
    for _ in range(200):
        wait_s = bucket.take(now)
        if wait_s > 0:
            now += wait_s
            assert bucket.take(now) == 0.0


def test_refused_requests_cost_nothing():
    bucket = TokenBucket(1, now=0)
    bucket.take(0)
    assert all(bucket.take(0.5) == pytest.approx(0.5) for _ in range(100))
    assert bucket.take(1) == 0.0


def test_over_a_long_time_the_rate_is_kept():
    bucket = TokenBucket(5, now=0)
    granted = sum(bucket.take(step / 1000) == 0.0 for step in range(100_000))
    assert granted == pytest.approx(5 * 100 + 5, abs=1)


def test_a_rest_saves_no_more_than_a_full_bucket():
    limits = RateLimits()
    key = make_key(10)
    assert allowed(limits, key, 0) == 10
    assert allowed(limits, key, 1e9) == 10


def test_a_key_without_a_rate_is_never_refused():
    assert allowed(RateLimits(), make_key(None), 0) == 1000


def test_each_key_has_its_own_tokens():
    limits = RateLimits()
    assert allowed(limits, make_key(5, "0a0a0a0a"), 0) == 5
    assert allowed(limits, make_key(5, "0b0b0b0b"), 0) == 5


def test_replicas_share_a_rate():
    limits = RateLimits(replicas=4)
    assert allowed(limits, make_key(20), 0) == 5
    assert allowed(limits, make_key(20), 1) == 5


def test_a_new_number_of_replicas_counts_from_then_on_and_grants_nothing_twice():
    limits = RateLimits()
    key = make_key(20)
    assert allowed(limits, key, 0, tries=10) == 10
    limits.set_replicas(4)
    assert allowed(limits, key, 0) == 5
    limits.set_replicas(1)
    assert allowed(limits, key, 0) == 0
    assert allowed(limits, key, 1) == 20


def test_no_replicas_count_as_one():
    limits = RateLimits()
    limits.set_replicas(0)
    assert allowed(limits, make_key(20), 0) == 20


def test_a_rate_that_was_changed_counts():
    limits = RateLimits()
    assert allowed(limits, make_key(20), 0) == 20
    assert allowed(limits, make_key(2), 10) == 2


def test_buckets_of_keys_that_are_gone_are_dropped():
    limits = RateLimits()
    for number in range(10):
        limits.take(make_key(1, f"{number:08}"), 0)
    limits.keep(["00000003", "never seen"])
    assert list(limits._buckets) == ["00000003"]
    assert limits.take(make_key(1, "00000003"), 0) > 0
