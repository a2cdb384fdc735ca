from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bigray.errors import DeployError
from bigray.serve.release.record import (
    HISTORY_LENGTH,
    LATENCY_BOUNDS_S,
    ChannelState,
    Comparison,
    Release,
    ReplicaReport,
    Rollout,
    VersionStats,
    abort,
    beat,
    bring_back,
    finish,
    fraction_of,
    in_no_replica,
    initial,
    is_live,
    is_same,
    latency_bucket,
    promote,
    propose,
    roll_back,
    routes_to_candidate,
    what_to_hold,
    withdraw,
)

A, B, C = (Release(version=letter * 12, bundle=f"/bundles/{letter}") for letter in "abc")
T0, T1, T2 = (f"2026-05-01T10:00:0{second}+00:00" for second in range(3))


def canary(release: Release, share: float = 0.1) -> Rollout:
    return Rollout(kind="canary", release=release, share=share)


def load(release: Release) -> Rollout:
    return Rollout(kind="load", release=release)


def shadow(release: Release) -> Rollout:
    return Rollout(kind="shadow", release=release, share=1.0)


def stats_of(seconds: list[float], errors: int = 0) -> VersionStats:
    counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
    for each in seconds:
        counts[latency_bucket(each)] += 1
    return VersionStats(
        requests=len(seconds), errors=errors, rows=len(seconds), seconds=sum(seconds), latency=tuple(counts)
    )


@pytest.fixture
def first() -> ChannelState:
    return initial(A, T0)


@pytest.fixture
def second(first: ChannelState) -> ChannelState:
    """B is live, A is the previous one."""
    return promote(propose(first, load(B)), T1, "gate passed")


def told(state: ChannelState) -> list[tuple[str, str, str]]:
    return [(entry.at, entry.version, entry.action) for entry in state.history]


def test_a_channel_begins_with_one_release(first: ChannelState) -> None:
    assert (first.revision, first.live, first.previous, first.rollout) == (1, A, None, None)
    assert told(first) == [(T0, A.version, "deployed")]


def test_each_step_makes_a_new_revision_and_leaves_the_old_state_as_it_was(first: ChannelState) -> None:
    before = first.model_dump()

    assert [propose(first, canary(B)).revision, beat(propose(first, canary(B))).revision] == [2, 3]
    assert first.model_dump() == before


def test_promoting_makes_the_candidate_live_and_holds_what_was_live(first: ChannelState) -> None:
    state = promote(propose(first, canary(B)), T1, "nothing wrong")

    assert (state.live, state.previous, state.rollout) == (B, A, None)
    assert told(state)[-1] == (T1, B.version, "promoted")


@pytest.mark.parametrize(
    ("rollout", "is_forced", "action"),
    [(load(B), False, "deployed"), (canary(B), False, "promoted"), (load(B), True, "forced")],
)
def test_the_history_tells_how_a_version_came_to_be_live(
    first: ChannelState, rollout: Rollout, is_forced: bool, action: str
) -> None:
    assert promote(propose(first, rollout), T1, "why", is_forced=is_forced).history[-1].action == action


@pytest.mark.parametrize(
    ("rollout", "action"), [(load(B), "refused"), (canary(B), "rolled back"), (shadow(B), "rolled back")]
)
def test_an_aborted_rollout_is_gone_and_its_reason_stays(first: ChannelState, rollout: Rollout, action: str) -> None:
    state = abort(propose(first, rollout), T1, "p95 40 ms")

    assert (state.live, state.previous, state.rollout) == (A, None, None)
    assert told(state)[-1] == (T1, B.version, action)
    assert state.history[-1].why == "p95 40 ms"


def test_a_shadow_ends_without_anything_held_against_it(first: ChannelState) -> None:
    state = finish(propose(first, shadow(B)), T1, "0 of 500 rows differ")

    assert (state.live, state.rollout) == (A, None)
    assert told(state)[-1] == (T1, B.version, "compared")


def test_only_a_shadow_ends_without_a_decision(first: ChannelState) -> None:
    with pytest.raises(DeployError, match=r"b{12} is a canary"):
        finish(propose(first, canary(B)), T1, "")


def test_rolling_back_twice_returns_to_where_it_began(second: ChannelState) -> None:
    once = roll_back(second, T2, "wrong answers")
    twice = roll_back(once, T2, "not its fault")

    assert (once.live, once.previous) == (A, B)
    assert (twice.live, twice.previous) == (B, A)
    assert told(once)[-1] == (T2, B.version, "rolled back")


def test_an_operators_way_back_ends_the_rollout_first_and_then_the_live_version(second: ChannelState) -> None:
    without = withdraw(propose(second, canary(C)), T2, "asked for")

    assert (without.live, without.rollout) == (B, None)
    assert withdraw(without, T2, "asked for").live == A


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda s: propose(s, load(B)), r"version b{12} is live already: there is nothing to deploy"),
        (lambda s: propose(propose(s, canary(C)), load(A)), r"another rollout is under way, canary of version c{12}"),
        (lambda s: promote(s, T2, ""), r"no rollout to promote; version b{12} is live"),
        (lambda s: abort(s, T2, ""), "no rollout to abort"),
        (lambda s: finish(s, T2, ""), "no rollout to finish"),
        (lambda s: beat(s), r"ended from elsewhere; version b{12} is live"),
        (lambda s: roll_back(propose(s, canary(C)), T2, ""), r"rollout is under way, canary of version c{12}"),
        (lambda _: roll_back(initial(A, T0), T1, ""), r"no version before a{12} to go back to"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused_in_one_line(
    second: ChannelState, step: Callable[[ChannelState], object], message: str
) -> None:
    with pytest.raises(DeployError, match=message) as caught:
        step(second)
    assert "\n" not in str(caught.value)


def test_going_back_to_a_version_that_was_replaced_with_its_replicas_tells_where_it_lies(first: ChannelState) -> None:
    alone = first.model_copy(update={"replaced": B})

    with pytest.raises(DeployError, match=r"b{12} is not in memory any more; deploy it again: /bundles/b"):
        roll_back(alone, T2, "")
    assert promote(propose(alone, canary(C)), T2, "").replaced is None


def test_a_version_that_was_replaced_with_its_replicas_can_be_brought_back_and_away_again(first: ChannelState) -> None:
    surged = first.model_copy(update={"live": B, "replaced": A})
    assert in_no_replica(surged) == A
    back = bring_back(surged, T1, "asked for")
    assert (back.revision, back.live, back.previous, back.replaced) == (surged.revision + 1, A, None, B)
    assert (back.history[-1].version, back.history[-1].action) == (B.version, "rolled back")
    assert bring_back(back, T2, "and again").live == B


@pytest.mark.parametrize(
    "changes", [{"replaced": None}, {"previous": C}, {"rollout": canary(C)}], ids=["none", "in memory", "under way"]
)
def test_nothing_is_brought_back_where_there_is_another_way_back(
    first: ChannelState, changes: dict[str, object]
) -> None:
    state = first.model_copy(update={"replaced": B, **changes})
    assert in_no_replica(state) is None
    with pytest.raises(DeployError, match="there is none to bring back"):
        bring_back(state, T1, "asked for")


def test_a_rollout_is_the_same_however_often_it_was_heard_of(first: ChannelState) -> None:
    begun = propose(first, canary(B))
    assert is_same(beat(beat(begun)).rollout, canary(B))
    another_deployers = canary(B).model_copy(update={"id": "another deployer's"})
    others = (None, load(B), canary(C), canary(B, 0.2), another_deployers)
    assert not any(is_same(other, canary(B)) for other in others)


def test_a_rollout_that_was_stored_before_they_had_ids_is_read() -> None:
    stored = canary(B).model_dump(exclude={"id"})
    assert Rollout.model_validate(stored) == canary(B)


def test_that_a_version_is_live_can_be_asked_before_it_is_proposed(second: ChannelState) -> None:
    assert is_live(second, B.version)
    assert not is_live(second, A.version)


def test_a_beat_counts_up_and_touches_nothing_else(first: ChannelState) -> None:
    state = propose(first, canary(B))
    after = beat(beat(state))

    assert after.rollout == Rollout(kind="canary", release=B, share=0.1, beat=2)
    assert (after.live, after.history) == (state.live, state.history)


def test_only_the_newest_history_is_kept(first: ChannelState) -> None:
    state = first
    for number in range(HISTORY_LENGTH + 5):
        state = abort(propose(state, load(B)), T1, str(number))

    assert len(state.history) == HISTORY_LENGTH
    assert (state.history[0].why, state.history[-1].why) == ("5", str(HISTORY_LENGTH + 4))


def test_what_is_held_is_each_version_once_the_live_one_first(first: ChannelState, second: ChannelState) -> None:
    assert what_to_hold(first) == (A,)
    assert what_to_hold(propose(second, canary(C))) == (B, C, A)
    assert what_to_hold(propose(second, canary(A))) == (B, A)


def test_a_state_survives_the_store(second: ChannelState) -> None:
    state = propose(second, canary(C, 0.25))

    assert ChannelState.from_bytes(state.to_bytes()) == state


def test_a_report_survives_the_store() -> None:
    comparison = Comparison(live=stats_of([0.001]), candidate=stats_of([0.002], errors=1), compared_rows=3)
    report = ReplicaReport(
        replica="r1", node="n1", pid=7, sequence=3, at=1.5, revision=2, live=A.version, loaded=(A.version, B.version),
        candidate="ready", telemetry={"requests": 4, "by_route": {"/predict": [1, 2]}}, comparison=comparison,
    )  # fmt: skip

    assert ReplicaReport.from_bytes(report.to_bytes()) == report


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"revision": 1, "live": {}, "extra": 1}'])
def test_what_is_no_state_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the kind is what callers rely on
        ChannelState.from_bytes(data)


def test_documents_are_frozen_and_refuse_what_they_do_not_know(first: ChannelState) -> None:
    with pytest.raises(ValidationError):
        first.revision = 9  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Release(version="a", bundle="b", size=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_canary_without_a_sensible_share_is_refused(share: float) -> None:
    with pytest.raises(ValidationError):
        canary(B, share)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_a_canary_answers_its_share_of_the_callers(share: float) -> None:
    callers = [f"10.{number // 62500}.{number // 250 % 250}.{number % 250}" for number in range(20_000)]
    answered = sum(routes_to_candidate(canary(B, share), caller) for caller in callers)

    assert answered / len(callers) == pytest.approx(share, abs=0.01)


def test_a_caller_stays_with_the_candidate_while_its_share_grows() -> None:
    callers = [str(number) for number in range(300)]
    small, large = (
        {caller for caller in callers if routes_to_candidate(canary(B, share), caller)} for share in (0.1, 0.3)
    )

    assert small < large


def test_another_candidate_is_tried_on_other_callers() -> None:
    callers = [str(number) for number in range(1000)]
    first, second = (
        {caller for caller in callers if routes_to_candidate(canary(release, 0.2), caller)} for release in (B, C)
    )

    assert len(first & second) < 0.4 * len(first)


@pytest.mark.parametrize("rollout", [None, load(B), shadow(B)])
def test_only_a_canary_answers_callers(rollout: Rollout | None) -> None:
    assert not any(routes_to_candidate(rollout, str(number)) for number in range(100))


@pytest.mark.parametrize("sticky", ["", "ä", "\udc80\ud800", "\x00\n", "x" * 10_000])
def test_any_sticky_text_has_a_place_below_one(sticky: str) -> None:
    assert 0 <= fraction_of("abc", sticky) < 1


def test_the_place_of_a_caller_is_the_same_on_every_machine() -> None:
    # written down, so that a change of the hash is noticed: replicas of two releases of bigray have to agree
    assert fraction_of("a1b2c3d4e5f6", "10.0.0.1") == pytest.approx(0.083889097, abs=1e-8)


def test_the_bounds_rise_evenly_from_a_quarter_millisecond_to_half_a_minute() -> None:
    ratios = np.diff(np.log(LATENCY_BOUNDS_S))

    assert (LATENCY_BOUNDS_S[0], LATENCY_BOUNDS_S[-1]) == (0.00025, 30.0)
    assert np.exp(ratios) == pytest.approx(1.22, abs=0.01)


@given(st.floats(min_value=0, max_value=1e4, allow_nan=False))
def test_every_latency_has_a_bucket_that_holds_it(seconds: float) -> None:
    bounds = (0.0, *LATENCY_BOUNDS_S, float("inf"))
    bucket = latency_bucket(seconds)

    assert bounds[bucket] <= seconds <= bounds[bucket + 1]


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_a_quantile_is_that_of_the_latencies_to_within_a_bucket(q: float) -> None:
    seconds = np.random.default_rng(0).lognormal(np.log(0.01), 0.8, 5000)

    assert stats_of(list(seconds)).quantile(q) == pytest.approx(np.quantile(seconds, q), rel=0.1)


def test_quantiles_at_the_edges() -> None:
    assert VersionStats().quantile(0.95) is None
    assert stats_of([100.0]).quantile(0.5) == LATENCY_BOUNDS_S[-1]
    assert stats_of([0.001, 0.5]).quantile(0.0) == pytest.approx(0.001, rel=0.25)
    assert stats_of([0.001, 0.5]).quantile(1.0) == pytest.approx(0.5, rel=0.25)


_latencies = st.lists(st.floats(min_value=0, max_value=60), max_size=20)


@given(_latencies, st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise_with_their_share(seconds: list[float], one: float, other: float) -> None:
    low, high = (stats_of(seconds).quantile(q) for q in sorted((one, other)))

    assert low == high or (low is not None and high is not None and low <= high)


@given(_latencies, _latencies)
def test_what_came_since_is_what_was_added(before: list[float], since: list[float]) -> None:
    start, more = stats_of(before), stats_of(since)
    difference = start.plus(more).minus(start)

    assert difference.model_copy(update={"seconds": 0.0}) == more.model_copy(update={"seconds": 0.0})
    assert difference.seconds == pytest.approx(more.seconds)


def test_a_replica_that_counts_from_zero_again_takes_nothing_away() -> None:
    assert stats_of([0.1]).minus(stats_of([0.2, 0.2], errors=1)).errors == 0
    assert stats_of([0.1]).minus(stats_of([0.2, 0.2])).requests == 0


def test_comparisons_add_up_over_replicas() -> None:
    one = Comparison(live=stats_of([0.1]), candidate=stats_of([0.2], errors=1), compared_rows=5, disagreeing_rows=1)
    both = one.plus(one)

    assert (both.live.requests, both.candidate.errors, both.compared_rows, both.disagreeing_rows) == (2, 2, 10, 2)
    assert both.minus(one) == one


def test_counts_of_another_version_of_the_buckets_are_refused() -> None:
    with pytest.raises(ValidationError, match="latency needs"):
        VersionStats(latency=(1, 2, 3))
