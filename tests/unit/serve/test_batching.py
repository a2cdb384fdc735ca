from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from bigray.inference import Predictions, Predictor
from bigray.serve import batching
from bigray.serve.batching import WARM_UP_S, Batcher, Capacity, QueueLimits, measure_capacity
from bigray.serve.http import Refusal


class Recorder:
    """A model that doubles its one feature; keeps the batch sizes it saw and refuses negative rows."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, rows):
        self.entered.set()
        self.gate.wait(20)
        self.sizes.append(len(rows))
        self.threads.add(threading.current_thread())
        if (rows < 0).any():
            raise ValueError("negative")
        return Predictions(labels=None, probabilities=None, values=rows.reshape(-1) * 2)

    async def hang(self, batcher: Batcher, request) -> asyncio.Task:
        """A request that the model has begun with and does not answer until the gate is opened."""
        self.gate.clear()
        self.entered.clear()
        task = asyncio.create_task(batcher.submit(request))
        await asyncio.to_thread(self.entered.wait, 20)
        return task


class Clock:
    """What `time` is to the batcher."""

    def __init__(self) -> None:
        self.now = 0.0
        self.monotonic = self.perf_counter = lambda: self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=clock.monotonic, perf_counter=clock.perf_counter))
    return clock


def rows(*values: float):
    return np.array(values, np.float32).reshape(-1, 1)


def make_batcher(model, max_rows: int = 64, *, is_slow: bool = True, seconds_per_row: float = 1e-4, **limits):
    return Batcher(model, Capacity(max_rows, seconds_per_row, is_slow), QueueLimits(**limits))


async def submit_all(batcher: Batcher, *requests):
    return await asyncio.gather(*(batcher.submit(request) for request in requests), return_exceptions=True)


async def begin(batcher: Batcher, *requests) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)
    return tasks


def values(answers):
    return [answer.values.tolist() for answer in answers]


@pytest.fixture(params=[False, True], ids=["on-loop", "in-thread"])
def is_slow(request) -> bool:
    return request.param


def test_requests_that_arrive_together_share_a_batch(is_slow):
    model = Recorder()
    answers = asyncio.run(submit_all(make_batcher(model, is_slow=is_slow), rows(1), rows(2, 3), rows(4)))
    assert values(answers) == [[2], [4, 6], [8]]
    assert model.sizes == [4]


def test_batches_hold_at_most_max_rows(is_slow):
    model = Recorder()
    answers = asyncio.run(submit_all(make_batcher(model, 4, is_slow=is_slow), *(rows(i) for i in range(10))))
    assert values(answers) == [[2 * i] for i in range(10)]
    assert model.sizes == [4, 4, 2]


def test_a_request_larger_than_a_batch_runs_whole(is_slow):
    model = Recorder()
    answers = asyncio.run(submit_all(make_batcher(model, 2, is_slow=is_slow), rows(1), rows(2, 3, 4, 5), rows(6)))
    assert values(answers) == [[2], [4, 6, 8, 10], [12]]
    assert model.sizes == [1, 4, 1]


def test_a_failing_request_fails_alone(is_slow):
    answers = asyncio.run(submit_all(make_batcher(Recorder(), is_slow=is_slow), rows(1), rows(-1), rows(2)))
    assert isinstance(answers[1], ValueError)
    assert values([answers[0], answers[2]]) == [[2], [4]]


def test_the_batcher_goes_on_after_a_failure(is_slow):
    async def story():
        batcher = make_batcher(Recorder(), is_slow=is_slow)
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit(rows(-1))
        return await batcher.submit(rows(3))

    assert asyncio.run(story()).values.tolist() == [6]


def test_a_slow_model_runs_in_its_own_thread_and_a_quick_one_on_the_loop(is_slow):
    model = Recorder()
    asyncio.run(make_batcher(model, is_slow=is_slow).submit(rows(1)))
    (thread,) = model.threads
    assert thread.name.startswith("bigray-model") == is_slow


def test_requests_gather_while_the_model_works():
    model = Recorder()

    async def story():
        batcher = make_batcher(model)
        first = await model.hang(batcher, rows(1))
        others = await begin(batcher, *(rows(i) for i in range(5)))
        assert batcher.num_queued == 5
        model.gate.set()
        return await asyncio.gather(first, *others)

    asyncio.run(story())
    assert model.sizes == [1, 5]


def test_callers_that_went_away_are_not_computed():
    model = Recorder()

    async def story():
        batcher = make_batcher(model)
        first = await model.hang(batcher, rows(1))
        gone, stays = await begin(batcher, rows(2), rows(3))
        gone.cancel()
        model.gate.set()
        await asyncio.gather(first, stays)
        return stays.result()

    assert asyncio.run(story()).values.tolist() == [6]
    assert model.sizes == [1, 1]


def test_company_does_not_change_an_answer(predictor: Predictor):
    images = np.random.default_rng(1).normal(size=(40, 2, 3)).astype(np.float32)
    alone = np.concatenate([predictor.run(images[i : i + 1]).probabilities for i in range(40)])
    batcher = make_batcher(predictor.run, is_slow=False)
    together = asyncio.run(submit_all(batcher, *(images[i : i + 1] for i in range(40))))
    assert np.allclose(np.concatenate([one.probabilities for one in together]), alone, atol=1e-6)


# ----- a bounded queue


@pytest.mark.parametrize(
    ("seconds_per_row", "limits", "retry_after"),
    [(10.0, {"max_queue_s": 15.0}, b"20"), (0.001, {"max_requests": 2}, b"1")],
    ids=["in seconds", "in requests"],
)
def test_what_waits_too_long_already_is_refused_with_the_time_to_come_back(seconds_per_row, limits, retry_after):
    model = Recorder()

    async def story():
        batcher = make_batcher(model, 1, seconds_per_row=seconds_per_row, **limits)
        first = await model.hang(batcher, rows(1))
        waiting = await begin(batcher, rows(2), rows(3))
        with pytest.raises(Refusal, match="overloaded: 2 requests wait") as refused:
            await batcher.submit(rows(4))
        with pytest.raises(Refusal):
            batcher.check_room()
        model.gate.set()
        await asyncio.gather(first, *waiting)
        batcher.check_room()
        return refused.value, await batcher.submit(rows(5))

    refusal, later = asyncio.run(story())
    assert (refusal.status, refusal.headers) == (503, ((b"retry-after", retry_after),))
    assert later.values.tolist() == [10], "once there is room, it is taken again"
    assert 4 not in model.sizes


def test_a_request_that_is_more_than_may_wait_is_taken_where_nothing_waits(is_slow):
    batcher = make_batcher(Recorder(), seconds_per_row=1.0, max_queue_s=0.5, is_slow=is_slow)
    answer = asyncio.run(batcher.submit(rows(*range(1000))))
    assert len(answer.values) == 1000


def test_the_age_of_the_queue_is_that_of_its_oldest_request(clock: Clock):
    model = Recorder()

    async def story():
        batcher = make_batcher(model)
        assert batcher.oldest_age_s() == 0.0
        first = await model.hang(batcher, rows(1))
        assert batcher.oldest_age_s() == 0.0, "what the model has does not wait any more"
        clock.now = 1.0
        waiting = await begin(batcher, rows(2))
        clock.now = 4.0
        age_s = batcher.oldest_age_s()
        model.gate.set()
        await asyncio.gather(first, *waiting)
        return age_s

    assert asyncio.run(story()) == 3.0


# ----- what waits too long


def test_what_has_waited_too_long_is_given_up_in_the_queue_and_in_a_model_that_hangs(clock: Clock):
    model = Recorder()

    async def story():
        batcher = make_batcher(model)
        in_model = await model.hang(batcher, rows(1))
        (in_queue,) = await begin(batcher, rows(2))
        clock.now = 9.0
        (young,) = await begin(batcher, rows(3))
        clock.now = 10.0
        batcher.expire(5.0)
        given_up = await asyncio.gather(in_model, in_queue, return_exceptions=True)
        assert not young.done()
        model.gate.set()
        return given_up, await young, await batcher.submit(rows(4))

    given_up, young, later = asyncio.run(story())
    assert [(one.status, one.message) for one in given_up] == [(504, "no answer within 5 s")] * 2
    assert values([young, later]) == [[6], [8]]
    assert model.sizes == [1, 1, 1], "what was given up in the queue is not computed"


def test_nobody_is_given_up_in_time(clock: Clock):
    model = Recorder()

    async def story():
        batcher = make_batcher(model)
        task = await model.hang(batcher, rows(1))
        clock.now = 4.9
        batcher.expire(5.0)
        model.gate.set()
        return await task

    assert asyncio.run(story()).values.tolist() == [2]


# ----- a model that is let go


def test_a_batcher_that_is_closed_still_answers_what_waits_and_who_had_found_it():
    model = Recorder()

    async def story():
        batcher = make_batcher(model, 1)
        first = await model.hang(batcher, rows(1))
        waiting = await begin(batcher, rows(2), rows(3))
        batcher.close()
        model.gate.set()
        answers = await asyncio.wait_for(asyncio.gather(first, *waiting), 20)
        return [*answers, await asyncio.wait_for(batcher.submit(rows(4)), 20)]

    assert values(asyncio.run(story())) == [[2], [4], [6], [8]]
    for thread in model.threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in model.threads)


def test_a_batcher_is_idle_when_nobody_waits(is_slow):
    model = Recorder()

    async def story():
        batcher = make_batcher(model, is_slow=is_slow)
        before = batcher.is_idle
        tasks = await begin(batcher, rows(1))
        meanwhile = batcher.is_idle
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)
        return before, meanwhile, batcher.is_idle

    assert asyncio.run(story()) == (True, False, True)


# ----- what it measures


def test_each_batch_is_told_with_its_rows_its_time_and_how_long_its_oldest_request_waited(clock: Clock):
    told: list[tuple[int, float, float]] = []
    begun: list[float] = []

    def run(batch):
        clock.now += 0.5 * len(batch)
        return Predictions(labels=None, probabilities=None, values=batch.reshape(-1))

    async def story():
        capacity = Capacity(2, 0.5, True)
        batcher = Batcher(run, capacity, None, lambda *facts: told.append(facts), lambda: begun.append(clock.now))
        await submit_all(batcher, rows(1), rows(2), rows(3))

    asyncio.run(story())
    assert told == [(2, 1.0, 0.0), (1, 0.5, 1.0)]
    assert begun == [0.0, 1.0]


def test_the_measure_of_a_row_follows_what_batches_take(clock: Clock):
    def run(batch):
        clock.now += 1.0 * len(batch)
        return Predictions(labels=None, probabilities=None, values=batch.reshape(-1))

    async def story():
        batcher = make_batcher(run, is_slow=False, seconds_per_row=0.001, max_rows=2)
        seen = [batcher.seconds_per_row]
        for _ in range(40):
            await batcher.submit(rows(1, 2))
            seen.append(batcher.seconds_per_row)
        return seen

    seen = asyncio.run(story())
    assert seen == sorted(seen)
    assert 0.9 < seen[-1] <= 1.0


def timed(clock: Clock, seconds_per_row: float):
    def run(batch):
        clock.now += seconds_per_row * len(batch)

    return run


@pytest.mark.parametrize(
    ("slo_ms", "max_rows"), [(None, 64), (1000.0, 64), (50.0, 16), (10.0, 4), (1.0, 1)], ids=lambda value: str(value)
)
def test_a_tight_slo_makes_smaller_batches(clock: Clock, slo_ms, max_rows):
    """A millisecond a row, and a batch may take half of the SLO."""
    capacity = measure_capacity(timed(clock, 0.001), rows(1), 64, slo_ms)
    assert (capacity.max_rows, capacity.seconds_per_row) == (max_rows, pytest.approx(0.001))


def test_a_model_is_slow_by_what_its_batch_takes(clock: Clock):
    assert measure_capacity(timed(clock, 1e-4), rows(1), 64).is_slow
    assert not measure_capacity(timed(clock, 1e-4), rows(1), 4).is_slow


def test_warming_up_a_very_slow_model_does_not_go_on_for_ever(clock: Clock):
    capacity = measure_capacity(timed(clock, 1.0), rows(1), 4096)
    assert capacity.max_rows == 1
    assert clock.now < 3 * WARM_UP_S


def test_a_quick_model_is_not_called_slow(predictor: Predictor):
    capacity = measure_capacity(predictor.run, np.zeros((1, 2, 3), np.float32), 1)
    assert capacity.max_rows == 1
    assert 0 < capacity.seconds_per_row < 1


def test_one_row_that_took_long_does_not_have_the_next_hundred_refused(clock: Clock):
    """Found under load: a single row that met a busy processor made the backlog look like seconds."""
    slow_ones = [0.5]

    def run(batch):
        clock.now += slow_ones.pop() if slow_ones else 0.0
        return Predictions(labels=None, probabilities=None, values=batch.reshape(-1))

    async def story():
        batcher = make_batcher(run, is_slow=False, seconds_per_row=0.0001, max_rows=64)
        await batcher.submit(rows(1))
        return await submit_all(batcher, *(rows(number) for number in range(100)))

    assert all(isinstance(answer, Predictions) for answer in asyncio.run(story()))
