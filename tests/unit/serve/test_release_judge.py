from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigray.serve.release.judge import JudgeLimits, describe, find_faults, judge, wilson
from bigray.serve.release.record import LATENCY_BOUNDS_S, Comparison, VersionStats, latency_bucket

LIMITS = JudgeLimits()
KINDS: tuple[Literal["canary", "shadow"], ...] = ("canary", "shadow")


def stats(requests: int, errors: int = 0, fast_s: float = 0.010, slow_s: float | None = None, slow: int = 0):
    """`slow` of the requests take `slow_s`, all others `fast_s`."""
    counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
    counts[latency_bucket(fast_s)] += requests - slow
    if slow_s is not None:
        counts[latency_bucket(slow_s)] += slow
    return VersionStats(requests=requests, errors=errors, rows=requests, latency=tuple(counts))


LIVE = stats(2000)


def compared(candidate: VersionStats, live: VersionStats = LIVE, rows: int = 0, differing: int = 0) -> Comparison:
    return Comparison(live=live, candidate=candidate, compared_rows=rows, disagreeing_rows=differing)


def test_a_canary_that_answered_enough_and_has_no_fault_is_promoted() -> None:
    verdict = judge("canary", compared(stats(200)), LIMITS, 30)

    assert verdict.action == "promote"
    assert verdict.why.startswith("200 requests, errors 0.00% (live 0.00%), p95 ")


def test_before_it_has_answered_enough_it_is_waited_for() -> None:
    verdict = judge("canary", compared(stats(199)), LIMITS, 30)

    assert (verdict.action, verdict.why) == ("wait", "199 of 200 requests in 30 s")


def test_a_canary_that_too_few_requests_reach_is_given_up_when_the_time_is_over() -> None:
    assert judge("canary", compared(stats(12)), LIMITS, 599).action == "wait"

    verdict = judge("canary", compared(stats(12)), LIMITS, 600)
    assert verdict.action == "roll back"
    assert verdict.why.startswith("only 12 of 200 requests in 600 s")


def test_a_canary_that_nothing_reached_is_given_up_too() -> None:
    assert judge("canary", Comparison(), LIMITS, 600).action == "roll back"
    assert judge("canary", Comparison(), LIMITS, 0).action == "wait"


@pytest.mark.parametrize("kind", KINDS)
def test_more_errors_than_the_live_version_end_it_at_once(kind: Literal["canary", "shadow"]) -> None:
    verdict = judge(kind, compared(stats(40, errors=5)), LIMITS, 2)

    assert verdict.action == "roll back"
    assert verdict.why == "errors: 5 of 40 requests, 12.50%; live 0.00%"


def test_a_handful_of_errors_alone_ends_nothing_but_is_waited_on() -> None:
    few = compared(stats(200, errors=4))

    assert judge("canary", few, LIMITS, 30).action == "wait"
    assert "not clear yet: errors: 4 of 200" in judge("canary", few, LIMITS, 30).why
    assert judge("canary", few, LIMITS, 600).action == "roll back"


def test_errors_that_the_live_version_makes_as_well_are_not_held_against_it() -> None:
    assert judge("canary", compared(stats(300, errors=30), stats(3000, errors=290)), LIMITS, 30).action == "promote"


@pytest.mark.parametrize("kind", KINDS)
def test_a_much_slower_candidate_ends_it_at_once(kind: Literal["canary", "shadow"]) -> None:
    verdict = judge(kind, compared(stats(50, fast_s=0.040)), LIMITS, 3)

    assert verdict.action == "roll back"
    assert "latency: p95 " in verdict.why
    assert "of live (limit 1.5)" in verdict.why


def test_the_latency_of_few_requests_says_nothing() -> None:
    assert judge("canary", compared(stats(49, fast_s=0.5)), LIMITS, 3).action == "wait"
    assert judge("canary", compared(stats(300, fast_s=0.5), stats(49)), LIMITS, 3).action == "promote"


def test_three_times_as_slow_is_no_fault_where_it_is_less_than_two_milliseconds() -> None:
    fast = compared(stats(300, fast_s=0.0015), stats(3000, fast_s=0.0005))

    assert judge("canary", fast, LIMITS, 30).action == "promote"


def test_a_slow_tail_that_chance_may_have_made_is_waited_on() -> None:
    tail = compared(stats(60, slow_s=0.2, slow=4))

    verdict = judge("canary", tail, LIMITS, 3)

    assert verdict.action == "wait"
    assert "not clear yet: latency: p95" in verdict.why
    assert judge("canary", compared(stats(600, slow_s=0.2, slow=60)), LIMITS, 3).action == "roll back"


def test_two_latencies_on_either_side_of_a_buckets_bound_are_no_fault() -> None:
    bound = next(bound for bound in LATENCY_BOUNDS_S if bound > 0.02)

    near = compared(stats(5000, fast_s=bound * 1.001), stats(5000, fast_s=bound * 0.999))

    assert find_faults(near, LIMITS) == ()


def test_a_candidate_over_the_latency_that_was_promised_ends_it() -> None:
    verdict = judge("canary", compared(stats(60, fast_s=0.012)), JudgeLimits(slo_ms=11), 3)

    assert verdict.action == "roll back"
    assert "the limit is 11 ms" in verdict.why


def test_a_promise_that_the_live_version_breaks_by_more_is_no_reason_to_keep_it() -> None:
    better = compared(stats(300, fast_s=0.012), stats(3000, fast_s=0.050))

    assert judge("canary", better, JudgeLimits(slo_ms=11), 3).action == "promote"


@pytest.mark.parametrize("kind", KINDS)
def test_other_answers_than_the_live_version_gives_end_it(kind: Literal["canary", "shadow"]) -> None:
    verdict = judge(kind, compared(stats(100), rows=100, differing=20), LIMITS, 3)

    assert verdict.action == "roll back"
    assert verdict.why.startswith("answers: 20 of 100 compared rows differ, 20.0% (95 % interval 13.3% to 28.9%")


def test_one_of_ten_rows_ends_nothing() -> None:
    assert judge("canary", compared(stats(10), rows=10, differing=1), LIMITS, 3).action == "wait"
    assert judge("canary", compared(stats(300), rows=10, differing=10), LIMITS, 3).action == "promote"


def test_a_share_of_other_answers_that_chance_may_have_made_is_waited_on() -> None:
    doubtful = compared(stats(300), rows=100, differing=7)

    assert judge("canary", doubtful, LIMITS, 3).action == "wait"
    over = judge("canary", doubtful, LIMITS, 600)
    assert over.action == "roll back"
    assert over.why.startswith("not clear after 600 s and 300 requests: answers: 7 of 100")


def test_every_fault_is_told() -> None:
    bad = compared(stats(100, errors=20, fast_s=0.3), rows=100, differing=50)

    why = judge("canary", bad, JudgeLimits(slo_ms=100), 3).why

    assert [word in why for word in ("errors: 20", "times the", "limit is 100 ms", "answers: 50")] == [True] * 4


def test_a_shadow_is_never_promoted_but_done() -> None:
    verdict = judge("shadow", compared(stats(200), rows=800, differing=8), LIMITS, 30)

    assert verdict.action == "done"
    assert verdict.why.endswith("1.0% of 800 compared rows differ")
    assert judge("shadow", compared(stats(10)), LIMITS, 30).action == "wait"


def test_a_shadow_that_few_requests_reached_says_so_in_the_end() -> None:
    verdict = judge("shadow", compared(stats(12), rows=12), LIMITS, 600)

    assert verdict.action == "done"
    assert verdict.why.startswith("only 12 of 200 requests in 600 s; 12 requests")


def test_what_is_described_has_a_dash_where_nothing_was_seen() -> None:
    assert describe(Comparison()) == "0 requests, errors - (live -)"
    assert "(live -)" in describe(compared(stats(3), VersionStats()))


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert wilson(1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_holds_the_share_that_was_seen(seen: tuple[int, int]) -> None:
    hits, total = seen
    low, high = wilson(hits, total)

    assert 0 <= low <= high <= 1
    assert total == 0 or low - 1e-12 <= hits / total <= high + 1e-12


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    def some() -> VersionStats:
        requests = draw(st.integers(0, 400))
        slow = draw(st.integers(0, requests))
        return stats(requests, draw(st.integers(0, requests)), draw(_seconds), draw(_seconds), slow)

    rows = draw(st.integers(0, 400))
    return compared(some(), some(), rows, draw(st.integers(0, rows)))


_seconds = st.sampled_from([0.001, 0.01, 0.1, 1.0, 100.0])


@settings(max_examples=300)
@given(st.sampled_from(KINDS), comparisons(), st.floats(0, 1200))
def test_a_verdict_is_always_one_line_and_in_keeping_with_what_was_seen(
    kind: Literal["canary", "shadow"], comparison: Comparison, elapsed_s: float
) -> None:
    limits = JudgeLimits(slo_ms=50)
    verdict = judge(kind, comparison, limits, elapsed_s)

    assert verdict.why
    assert "\n" not in verdict.why
    if elapsed_s >= limits.max_seconds:
        assert verdict.action != "wait"
    if verdict.action == "promote":
        assert kind == "canary"
        assert comparison.candidate.requests >= limits.min_requests
        assert find_faults(comparison, limits) == ()


@given(comparisons())
def test_a_version_is_never_worse_than_itself(comparison: Comparison) -> None:
    same = Comparison(live=comparison.live, candidate=comparison.live)

    assert find_faults(same, JudgeLimits()) == ()
