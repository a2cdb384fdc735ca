from __future__ import annotations

import asyncio
import logging
import threading

import numpy as np
import pytest

from bigray.errors import DeployError
from bigray.serve.batching import QueueLimits
from bigray.serve.compare import SideBySide
from bigray.serve.http import Refusal
from bigray.serve.release.record import Release, Rollout
from bigray.serve.store import ModelStore, OtherModel, View

A, B, C = (letter * 12 for letter in "abc")
ROWS = np.zeros((1, 2, 3), np.float32)


def rollout(kind, version=B, share=0.3) -> Rollout:
    return Rollout(kind=kind, release=Release(version=version, bundle="/b"), share=share)


def trying(live, candidate, kind, share=0.3) -> View:
    """A view of a replica that tries a candidate beside the live version."""
    held = {live.version: live, candidate.version: candidate}
    return View(live, held, rollout(kind, candidate.version, share), SideBySide(kind, live, candidate))


def refusal(call) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value


class Loads:
    """Loads other models, and counts how often; fails with `faults` first."""

    def __init__(self, make_model, *faults: Exception, **sizes: int) -> None:
        self._make_model, self._faults, self._sizes = make_model, list(faults), sizes
        self.loaded: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def other(self, name: str) -> OtherModel:
        return OtherModel(name, f"/bundles/{name}", lambda: self._load(name))

    def _load(self, name: str):
        self.gate.wait(20)
        self.loaded.append(name)
        if self._faults:
            raise self._faults.pop(0)
        return self._make_model("e" * 12, "fox", name=name, nbytes=self._sizes.get(name, 100))


def make_store(make_model, loads: Loads, *names: str, memory_bytes: int | None = None) -> ModelStore:
    return ModelStore(make_model(A), {name: loads.other(name) for name in names}, memory_bytes)


# ----- versions of the channel's model


def test_the_live_version_answers_where_nothing_else_is_asked_for(make_model):
    store = ModelStore(make_model(A))
    assert store.find() is store.find("animals") is store.find(None, A) is store.view.live


def test_every_version_in_memory_can_be_asked_by_name(make_model):
    live, previous = make_model(A), make_model(B)
    store = ModelStore(live)
    store.set_view(View(live, {A: live, B: previous}))
    assert store.find(version=B) is store.find("animals", B) is previous
    assert store.find() is live


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        (None, C, f"model 'animals': version '{C}' is not served"),
        ("animals", C, f"model 'animals': version '{C}' is not served"),
        ("plants", None, "model 'plants' is not served here; GET /v2/repository/index lists the models"),
        (None, "x" * 5000, f"model 'animals': version '{'x' * 40}' is not served"),
        ("y" * 5000, None, f"model '{'y' * 80}' is not served here; GET /v2/repository/index lists the models"),
    ],
)
def test_what_is_not_served_is_404_and_long_names_are_cut(make_model, name, version, message):
    found = refusal(lambda: ModelStore(make_model(A)).find(name, version))
    assert (found.status, found.message) == (404, message)


def test_a_version_that_is_let_go_still_answers_who_had_found_it(make_model, release):
    live, previous = make_model(A, "cat"), make_model(B, "dog", is_slow=True)
    store = ModelStore(live)
    store.set_view(View(live, {A: live, B: previous}))
    found = store.find(version=B)
    store.set_view(View(live, {A: live}))

    assert asyncio.run(found.submit(ROWS)).labels == ["dog"]
    assert refusal(lambda: store.find(version=B)).status == 404


def test_who_waits_for_a_version_that_was_let_go_can_still_be_given_up(make_model):
    gate = threading.Event()

    async def story():
        live, hanging = make_model(A), make_model(B, run=lambda rows: gate.wait(20), is_slow=True)
        store = ModelStore(live)
        store.set_view(View(live, {A: live, B: hanging}))
        task = asyncio.create_task(hanging.submit(ROWS))
        await asyncio.sleep(0.01)
        store.set_view(View(live, {A: live}))
        assert store.loaded() == (live, hanging)
        for model in store.loaded():
            model.batcher.expire(0.0)
        found = (await asyncio.gather(task, return_exceptions=True))[0]
        gate.set()
        while not hanging.batcher.is_idle:
            await asyncio.sleep(0.001)
        return found, store.loaded() == (live,)

    found, is_gone = asyncio.run(story())
    assert (found.status, is_gone) == (504, True)


# ----- a canary


def test_a_caller_stays_on_its_side_of_a_canary_in_every_replica(make_model):
    stores = []
    for _ in range(2):
        live, candidate = make_model(A), make_model(B)
        store = ModelStore(live)
        store.set_view(trying(live, candidate, "canary"))
        stores.append(store)
    callers = [f"caller {number}" for number in range(2000)]
    sides = [[store.find(sticky=caller).version for caller in callers] for store in (*stores, stores[0])]

    assert sides[0] == sides[1] == sides[2]
    assert set(sides[0]) == {A, B}
    assert 0.25 < sides[0].count(B) / len(callers) < 0.35


def test_a_canary_of_all_traffic_leaves_none_to_the_live_version(make_model):
    live, candidate = make_model(A), make_model(B)
    store = ModelStore(live)
    store.set_view(trying(live, candidate, "canary", share=1.0))
    assert {store.find(sticky=str(number)).version for number in range(100)} == {B}
    assert store.find(version=A) is live, "a version that is named is the version that answers"


def test_a_canary_whose_queue_is_full_leaves_its_callers_to_the_live_version(make_model):
    gate = threading.Event()

    def slow(rows):
        gate.wait(20)
        raise ValueError("late")

    live = make_model(A)
    candidate = make_model(B, run=slow, is_slow=True, max_rows=1, limits=QueueLimits(max_requests=1))
    store = ModelStore(live)
    store.set_view(trying(live, candidate, "canary", share=1.0))

    async def story():
        asked = []
        for _ in range(2):  # one in the model, one in the queue
            asked.append(asyncio.create_task(candidate.submit(ROWS)))
            await asyncio.sleep(0.02)
        found = store.find(sticky="x")
        gate.set()
        await asyncio.gather(*asked, return_exceptions=True)
        return found

    assert asyncio.run(story()) is live
    assert store.find(sticky="x") is candidate


@pytest.mark.parametrize("kind", ["shadow", "load"])
def test_a_candidate_that_is_no_canary_answers_nobody(make_model, kind):
    live, candidate = make_model(A), make_model(B)
    store = ModelStore(live)
    beside = SideBySide("shadow", live, candidate) if kind == "shadow" else None
    store.set_view(View(live, {A: live, B: candidate}, rollout(kind, share=1.0), beside))
    assert {store.find(sticky=str(number)).version for number in range(100)} == {A}


def test_predictions_come_with_the_version_that_made_them(make_model):
    def fail(rows):
        raise ValueError("broken")

    live, good, broken = make_model(A, "cat"), make_model(B, "dog"), make_model(C, run=fail)

    async def ask(candidate):
        store = ModelStore(live)
        store.set_view(trying(live, candidate, "canary", share=1.0))
        predictions, by = await store.predict(store.find(sticky="x"), ROWS)
        return predictions.labels, by.version

    assert asyncio.run(ask(good)) == (["dog"], B)
    assert asyncio.run(ask(broken)) == (["cat"], A)


def test_a_version_beside_a_rollout_is_asked_by_itself(make_model):
    live, candidate, previous = make_model(A), make_model(B), make_model(C, "fox")
    store = ModelStore(live)
    view = trying(live, candidate, "canary", share=1.0)
    store.set_view(View(live, {**view.held, C: previous}, view.rollout, view.side_by_side))

    predictions, by = asyncio.run(store.predict(store.find(version=C), ROWS))

    assert (predictions.labels, by) == (["fox"], previous)
    assert view.side_by_side.comparison().candidate.requests == 0


# ----- other models


def test_another_model_is_loaded_when_it_is_asked_for(make_model):
    loads = Loads(make_model)
    store = make_store(make_model, loads, "plants")
    assert store.names() == ("animals", "plants")
    assert store.knows("plants")
    assert not store.is_loaded("plants")
    early = refusal(lambda: store.find("plants"))
    assert (early.status, early.headers) == (503, ((b"retry-after", b"1"),))

    asyncio.run(store.load("plants"))

    assert store.is_loaded("plants")
    assert store.find("plants").name == "plants"
    assert store.find("plants", "e" * 12) in store.loaded()
    assert refusal(lambda: store.find("plants", A)).status == 404


def test_however_many_ask_at_once_a_model_is_loaded_once(make_model):
    loads = Loads(make_model)
    store = make_store(make_model, loads, "plants", "stones")

    async def story():
        await asyncio.gather(*(store.load(name) for name in ["plants", "stones"] * 20))
        await store.load("plants")

    asyncio.run(story())
    assert sorted(loads.loaded) == ["plants", "stones"]


def test_a_caller_that_goes_away_does_not_end_the_load_for_the_others(make_model):
    loads = Loads(make_model)
    store = make_store(make_model, loads, "plants")

    async def story():
        loads.gate.clear()
        gone, stays = (asyncio.create_task(store.load("plants")) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        loads.gate.set()
        await stays

    asyncio.run(story())
    assert store.is_loaded("plants")
    assert loads.loaded == ["plants"]


def test_a_model_that_nobody_named_is_not_loaded(make_model):
    store = make_store(make_model, Loads(make_model), "plants")
    with pytest.raises(Refusal) as refused:
        asyncio.run(store.load("stones"))
    assert refused.value.status == 404


@pytest.mark.parametrize("fault", [DeployError("/secret/place: no"), ValueError("code of a user")])
def test_a_model_that_cannot_be_loaded_is_503_and_tried_again_later(make_model, fault, caplog):
    loads = Loads(make_model, fault)
    store = make_store(make_model, loads, "plants")

    async def story():
        answers = await asyncio.gather(*(store.load("plants") for _ in range(3)), return_exceptions=True)
        assert not store.is_loaded("plants")
        await store.load("plants")
        return answers

    with caplog.at_level(logging.WARNING, "ray.serve"):
        answers = asyncio.run(story())
    assert [one.status for one in answers] == [503] * 3
    assert answers[0].message == "model 'plants': cannot be loaded; the replica's log has the reason"
    assert dict(answers[0].headers)[b"retry-after"].isdigit()
    assert loads.loaded == ["plants", "plants"]
    assert store.is_loaded("plants")
    assert str(fault) in caplog.text


def test_over_the_memory_budget_the_least_recently_used_model_is_let_go(make_model):
    loads = Loads(make_model)
    store = make_store(make_model, loads, "one", "two", "three", memory_bytes=200)

    async def story():
        await store.load("one")
        await store.load("two")
        await store.predict(store.find("one"), ROWS)
        await store.load("three")
        first = [name for name in store.names() if store.is_loaded(name)]
        await store.load("two")
        return first, [name for name in store.names() if store.is_loaded(name)]

    assert asyncio.run(story()) == (["animals", "one", "three"], ["animals", "two", "three"])
    assert loads.loaded == ["one", "two", "three", "two"]


def test_to_be_looked_at_keeps_no_model_in_memory(make_model):
    store = make_store(make_model, Loads(make_model), "one", "two", "three", memory_bytes=200)

    async def story():
        for name in ("one", "two"):
            await store.load(name)
        store.find("one"), store.is_loaded("one")  # as whoever asks whether it is ready
        await store.load("three")

    asyncio.run(story())
    assert [name for name in store.names() if store.is_loaded(name)] == ["animals", "two", "three"]


def test_a_model_larger_than_the_budget_is_held_alone(make_model):
    store = make_store(make_model, Loads(make_model, huge=1000), "one", "huge", "two", memory_bytes=200)

    async def story():
        held = []
        for name in ("one", "huge", "two"):
            await store.load(name)
            held.append([other for other in store.names()[1:] if store.is_loaded(other)])
        return held

    assert asyncio.run(story()) == [["one"], ["huge"], ["two"]]


def test_without_a_budget_all_models_stay(make_model):
    names = [f"model-{number}" for number in range(20)]
    store = make_store(make_model, Loads(make_model), *names)

    async def story():
        for name in names:
            await store.load(name)

    asyncio.run(story())
    assert all(store.is_loaded(name) for name in names)


def test_who_waits_for_a_model_that_is_let_go_is_answered(make_model):
    gate = threading.Event()

    def run(rows):
        gate.wait(20)
        return np.zeros(0)

    slow = make_model("f" * 12, name="slow", run=run, is_slow=True, max_rows=1)
    loads = Loads(make_model)
    others = {"slow": OtherModel("slow", "/slow", lambda: slow), "one": loads.other("one")}
    store = ModelStore(make_model(A), others, memory_bytes=100)

    async def story():
        await store.load("slow")
        tasks = [asyncio.create_task(store.find("slow").submit(ROWS)) for _ in range(3)]
        await asyncio.sleep(0.01)
        await store.load("one")
        assert not store.is_loaded("slow")
        assert slow in store.loaded(), "until nobody waits for it"
        gate.set()
        return len(await asyncio.wait_for(asyncio.gather(*tasks), 20))

    assert asyncio.run(story()) == 3
    assert slow not in store.loaded()
