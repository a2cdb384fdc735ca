from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from bigray.inference import Predictions, Predictor
from bigray.serve.batching import Batcher, is_slow


class Recorder:
    """A model that doubles its one feature; keeps the batch sizes it saw and refuses negative rows."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, rows):
        self.gate.wait(5)
        self.sizes.append(len(rows))
        self.threads.add(threading.current_thread().name)
        if (rows < 0).any():
            raise ValueError("negative")
        return Predictions(labels=None, probabilities=None, values=rows.reshape(-1) * 2)


def rows(*values: float):
    return np.array(values, np.float32).reshape(-1, 1)


async def submit_all(batcher: Batcher, *requests):
    return await asyncio.gather(*(batcher.submit(request) for request in requests), return_exceptions=True)


def values(answers):
    return [answer.values.tolist() for answer in answers]


@pytest.fixture(params=[False, True], ids=["on-loop", "in-thread"])
def use_thread(request) -> bool:
    return request.param


def test_requests_that_arrive_together_share_a_batch(use_thread):
    model = Recorder()
    answers = asyncio.run(submit_all(Batcher(model, 64, use_thread=use_thread), rows(1), rows(2, 3), rows(4)))
    assert values(answers) == [[2], [4, 6], [8]]
    assert model.sizes == [4]


def test_batches_hold_at_most_max_rows(use_thread):
    model = Recorder()
    answers = asyncio.run(submit_all(Batcher(model, 4, use_thread=use_thread), *(rows(i) for i in range(10))))
    assert values(answers) == [[2 * i] for i in range(10)]
    assert model.sizes == [4, 4, 2]


def test_a_request_larger_than_a_batch_runs_whole(use_thread):
    model = Recorder()
    answers = asyncio.run(submit_all(Batcher(model, 2, use_thread=use_thread), rows(1), rows(2, 3, 4, 5), rows(6)))
    assert values(answers) == [[2], [4, 6, 8, 10], [12]]
    assert model.sizes == [1, 4, 1]


def test_a_failing_request_fails_alone(use_thread):
    answers = asyncio.run(submit_all(Batcher(Recorder(), 64, use_thread=use_thread), rows(1), rows(-1), rows(2)))
    assert isinstance(answers[1], ValueError)
    assert values([answers[0], answers[2]]) == [[2], [4]]


def test_the_batcher_goes_on_after_a_failure(use_thread):
    async def story():
        batcher = Batcher(Recorder(), 64, use_thread=use_thread)
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit(rows(-1))
        return await batcher.submit(rows(3))

    assert asyncio.run(story()).values.tolist() == [6]


def test_requests_gather_while_the_model_works():
    model = Recorder()

    async def story():
        batcher = Batcher(model, 64, use_thread=True)
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(rows(1)))
        await asyncio.sleep(0.02)
        others = [asyncio.create_task(batcher.submit(rows(i))) for i in range(5)]
        await asyncio.sleep(0.02)
        model.gate.set()
        return await asyncio.gather(first, *others)

    asyncio.run(story())
    assert model.sizes == [1, 5]
    assert all(name.startswith("bigray-model") for name in model.threads)


def test_callers_that_went_away_are_not_computed():
    model = Recorder()

    async def story():
        batcher = Batcher(model, 64, use_thread=True)
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(rows(1)))
        await asyncio.sleep(0.02)
        gone, stays = asyncio.create_task(batcher.submit(rows(2))), asyncio.create_task(batcher.submit(rows(3)))
        await asyncio.sleep(0.02)
        gone.cancel()
        model.gate.set()
        await asyncio.gather(first, stays)
        return stays.result()

    assert asyncio.run(story()).values.tolist() == [6]
    assert model.sizes == [1, 1]


def test_company_does_not_change_an_answer(predictor: Predictor):
    images = np.random.default_rng(1).normal(size=(40, 2, 3)).astype(np.float32)
    alone = np.concatenate([predictor.run(images[i : i + 1]).probabilities for i in range(40)])
    together = asyncio.run(
        submit_all(Batcher(predictor.run, 64, use_thread=False), *(images[i : i + 1] for i in range(40)))
    )
    assert np.allclose(np.concatenate([one.probabilities for one in together]), alone, atol=1e-6)


def test_a_quick_model_is_not_called_slow(predictor: Predictor):
    assert not is_slow(predictor.run, np.zeros((1, 2, 3), np.float32), 8)
