from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from bigray.inference import Predictions
from bigray.serve.compare import MOST_MIRRORED, SideBySide, count_disagreements
from bigray.serve.http import Refusal

A, B = "a" * 12, "b" * 12
ROWS = np.zeros((2, 2, 3), np.float32)


def failing(rows):
    raise ValueError("broken")


def refusing(status: int):
    def run(rows):
        raise Refusal(status, "no")

    return run


async def ask(beside: SideBySide, chosen, times: int = 1):
    """The labels and the version of each answer, once all comparisons are made."""
    answers = [await beside.answer(chosen, ROWS) for _ in range(times)]
    while beside._mirrored:
        await asyncio.sleep(0.001)
    return [(predictions.labels, by.version) for predictions, by in answers]


def test_a_canary_answers_itself_and_is_compared_with_the_live_version(make_model):
    live, candidate = make_model(A, "cat"), make_model(B, "dog")
    beside = SideBySide("canary", live, candidate)

    assert asyncio.run(ask(beside, candidate, 3)) == [(["dog", "dog"], B)] * 3

    seen = beside.comparison()
    assert (seen.compared_rows, seen.disagreeing_rows) == (6, 6)
    assert (seen.candidate.requests, seen.candidate.rows, seen.candidate.errors) == (3, 6, 0)
    assert seen.live.requests == 0, "only its own traffic is its measure"
    assert sum(seen.candidate.latency) == 3


def test_the_live_traffic_of_a_canary_goes_on_as_it_was(make_model):
    live, candidate = make_model(A, "cat"), make_model(B, run=failing)
    beside = SideBySide("canary", live, candidate)

    assert asyncio.run(ask(beside, live, 3)) == [(["cat", "cat"], A)] * 3

    seen = beside.comparison()
    assert (seen.live.requests, seen.candidate.requests, seen.compared_rows) == (3, 0, 0)


def test_what_a_canary_fails_is_answered_by_the_live_version_and_counted(make_model):
    live, candidate = make_model(A, "cat"), make_model(B, run=failing)
    beside = SideBySide("canary", live, candidate)

    assert asyncio.run(ask(beside, candidate, 4)) == [(["cat", "cat"], A)] * 4

    seen = beside.comparison()
    assert (seen.candidate.requests, seen.candidate.errors) == (4, 4)
    assert (seen.live.requests, seen.live.errors) == (4, 0)
    assert seen.compared_rows == 0


def test_what_the_live_version_fails_is_its_own_error(make_model):
    beside = SideBySide("canary", make_model(A, run=failing), make_model(B))
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(ask(beside, beside.live))
    assert beside.comparison().live.errors == 1


def test_where_both_fail_the_caller_is_told(make_model):
    beside = SideBySide("canary", make_model(A, run=failing), make_model(B, run=failing))
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(ask(beside, beside.candidate))
    seen = beside.comparison()
    assert (seen.live.errors, seen.candidate.errors) == (1, 1)


def test_a_version_that_hangs_is_blamed_for_it(make_model):
    beside = SideBySide("canary", make_model(A), make_model(B, run=refusing(504)))
    with pytest.raises(Refusal) as refused:
        asyncio.run(ask(beside, beside.candidate))
    assert refused.value.status == 504
    seen = beside.comparison()
    assert (seen.candidate.requests, seen.candidate.errors, seen.live.requests) == (1, 1, 0)


def test_where_a_canarys_queue_is_full_the_live_version_answers_and_nobody_is_blamed(make_model):
    beside = SideBySide("canary", make_model(A, "cat"), make_model(B, run=refusing(503)))
    assert asyncio.run(ask(beside, beside.candidate)) == [(["cat", "cat"], A)]
    seen = beside.comparison()
    assert (seen.candidate.requests, seen.candidate.errors, seen.live.requests) == (0, 0, 1)


def test_where_the_live_versions_queue_is_full_the_caller_is_told(make_model):
    beside = SideBySide("canary", make_model(A, run=refusing(503)), make_model(B))
    with pytest.raises(Refusal) as refused:
        asyncio.run(ask(beside, beside.live))
    assert refused.value.status == 503


def test_a_shadows_answers_are_the_live_ones_and_disagreement_is_counted(make_model):
    def half(rows):
        return Predictions(["cat", "dog"], np.zeros((2, 3), np.float32), None)

    beside = SideBySide("shadow", make_model(A, "cat"), make_model(B, run=half))

    assert asyncio.run(ask(beside, beside.live, 5)) == [(["cat", "cat"], A)] * 5

    seen = beside.comparison()
    assert (seen.compared_rows, seen.disagreeing_rows) == (10, 5)
    assert (seen.live.requests, seen.candidate.requests) == (5, 5)


def test_a_shadow_that_fails_is_counted_and_nobody_sees_it(make_model):
    beside = SideBySide("shadow", make_model(A, "cat"), make_model(B, run=failing))
    assert asyncio.run(ask(beside, beside.live, 3)) == [(["cat", "cat"], A)] * 3
    seen = beside.comparison()
    assert (seen.candidate.requests, seen.candidate.errors, seen.compared_rows) == (3, 3, 0)


def test_only_so_many_requests_are_mirrored_at_once_and_all_are_answered(make_model):
    gate = threading.Event()

    def slow(rows):
        gate.wait(20)
        return Predictions(["cat"] * len(rows), None, None)

    beside = SideBySide("shadow", make_model(A, "cat"), make_model(B, run=slow, is_slow=True))

    async def story():
        answers = [await beside.answer(beside.live, ROWS) for _ in range(MOST_MIRRORED + 20)]
        under_way = len(beside._mirrored)
        gate.set()
        await ask(beside, beside.live, 0)
        return len(answers), under_way

    assert asyncio.run(story()) == (MOST_MIRRORED + 20, MOST_MIRRORED)
    seen = beside.comparison()
    assert (seen.live.requests, seen.candidate.requests) == (MOST_MIRRORED + 20, MOST_MIRRORED)


def values(*numbers: float) -> Predictions:
    return Predictions(None, None, np.array(numbers, np.float32))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (values(1, 2, 3), values(1, 2, 3), 0),
        (values(1, 2, 3), values(1.005, 2, 2.99), 0),
        (values(1, 2, 3), values(1.02, 2, 2.9), 2),
        (values(0, -5), values(0, 5), 1),
        (Predictions(["a", "b"], None, None), Predictions(["a", "b"], None, None), 0),
        (Predictions(["a", 1], None, None), Predictions(["b", "1"], None, None), 2),
    ],
)
def test_rows_disagree_by_their_label_or_by_a_hundredth_of_their_value(first, second, expected):
    assert count_disagreements(first, second) == expected


def test_a_value_that_is_no_number_disagrees():
    assert count_disagreements(values(1.0), values(float("nan"))) == 1
