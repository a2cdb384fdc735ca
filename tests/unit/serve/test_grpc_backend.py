from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from bigray.serve.assembly import Endpoint, assemble
from bigray.serve.compare import SideBySide
from bigray.serve.config import BundleArgs
from bigray.serve.grpc_backend import GrpcBackend
from bigray.serve.http import Refusal
from bigray.serve.protect.keys import create_key
from bigray.serve.release.record import Release, Rollout
from bigray.serve.store import ModelStore, View

A, B = "a" * 12, "b" * 12
ROWS = np.zeros((2, 2, 3), np.float32)


@pytest.fixture
def endpoint(release) -> Endpoint:
    return assemble(release.bundle, BundleArgs(bundle=release.bundle), num_threads=1)


def with_store(endpoint: Endpoint, store: ModelStore) -> GrpcBackend:
    return GrpcBackend(replace(endpoint, store=store))


def canary_store(live, candidate, share: float) -> ModelStore:
    store = ModelStore(live)
    rollout = Rollout(kind="canary", release=Release(version=candidate.version, bundle="/b"), share=share)
    held = {live.version: live, candidate.version: candidate}
    store.set_view(View(live, held, rollout, SideBySide("canary", live, candidate)))
    return store


def series_of(endpoint: Endpoint) -> dict:
    (series,) = endpoint.telemetry.snapshot()["requests"]
    return series


def test_a_call_is_answered_and_counted_as_over_http(endpoint, release):
    model = GrpcBackend(endpoint).find("animals", release.version, "")
    assert (model.name, model.version, model.backend) == ("animals", release.version, "torch")
    assert model.manifest.name == "animals"

    predictions = asyncio.run(model.submit(ROWS))

    assert len(predictions.labels) == 2
    series = series_of(endpoint)
    assert (series["route"], series["version"], series["statuses"]) == ("grpc", release.version, {"200": 1})
    assert (series["rows"], series["bytes"]) == (2, ROWS.nbytes)
    snapshot = endpoint.telemetry.snapshot()
    assert snapshot["total"]["requests"] == 1, "it is traffic"
    assert snapshot["load"]["ongoing"] == 0


@pytest.mark.parametrize(("name", "version"), [("stones", None), ("animals", "0" * 12)])
def test_what_is_not_served_is_404(endpoint, name, version):
    with pytest.raises(Refusal) as refused:
        GrpcBackend(endpoint).find(name, version, "")
    assert refused.value.status == 404


def test_all_models_are_named(release, regression_location):
    args = BundleArgs.model_validate(
        {"bundle": release.bundle, "models": [{"name": "area", "bundle": regression_location}]}
    )
    assert GrpcBackend(assemble(release.bundle, args, num_threads=1)).names() == ("animals", "area")


def test_keys_count_as_over_http(release, tmp_path):
    keys = str(tmp_path / "keys.json")
    secret = create_key(keys, "anna")
    backend = GrpcBackend(assemble(release.bundle, BundleArgs(bundle=release.bundle, keys=keys), num_threads=1))
    assert backend.authorize({b"x-api-key": secret.encode()}, "predict").name == "anna"
    with pytest.raises(Refusal) as refused:
        backend.authorize({}, "predict")
    assert refused.value.status == 401


def test_a_caller_stays_on_its_side_of_a_canary_and_others_are_spread(endpoint, make_model):
    backend = with_store(endpoint, canary_store(make_model(A), make_model(B), 0.5))
    sides = [backend.find(None, None, f"caller {number}").version for number in range(100)]
    assert sides == [backend.find(None, None, f"caller {number}").version for number in range(100)]
    assert set(sides) == {A, B} == {backend.find(None, None, "").version for _ in range(200)}


def test_what_a_canary_fails_is_answered_and_counted_as_the_live_version(endpoint, make_model):
    def broken(rows):
        raise RuntimeError("broken")

    backend = with_store(endpoint, canary_store(make_model(A, "cat"), make_model(B, run=broken), 1.0))
    model = backend.find(None, None, "x")
    assert model.version == B
    assert asyncio.run(model.submit(ROWS)).labels == ["cat", "cat"]
    assert model.version == A
    series = series_of(endpoint)
    assert (series["version"], series["statuses"]) == (A, {"200": 1})


def test_a_failure_is_counted_and_passed_on(endpoint, make_model):
    def broken(rows):
        raise RuntimeError("broken")

    model = with_store(endpoint, ModelStore(make_model(A, run=broken))).find(None, None, "")
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(model.submit(ROWS))
    assert series_of(endpoint)["statuses"] == {"500": 1}
    assert endpoint.telemetry.snapshot()["load"]["ongoing"] == 0


@pytest.mark.parametrize(("status", "shed"), [(503, {"animals": 1}), (504, {})], ids=["full queue", "hanging"])
def test_only_a_full_queue_counts_as_shed(endpoint, make_model, status, shed):
    def refuse(rows):
        raise Refusal(status, "no")

    model = with_store(endpoint, ModelStore(make_model(A, run=refuse))).find(None, None, "")
    with pytest.raises(Refusal):
        asyncio.run(model.submit(ROWS))
    snapshot = endpoint.telemetry.snapshot()
    assert (snapshot["shed"], snapshot["requests"][0]["statuses"]) == (shed, {str(status): 1})


def test_another_model_is_loaded_while_its_first_caller_is_told_to_come_back(release, regression_location):
    args = BundleArgs.model_validate(
        {"bundle": release.bundle, "models": [{"name": "area", "bundle": regression_location}]}
    )
    endpoint = assemble(release.bundle, args, num_threads=1)
    backend = GrpcBackend(endpoint)

    async def story():
        with pytest.raises(Refusal) as refused:
            backend.find("area", None, "")
        while not endpoint.store.is_loaded("area"):
            await asyncio.sleep(0.001)
        return refused.value.status, backend.find("area", None, "").name

    assert asyncio.run(story()) == (503, "area")


def test_a_model_that_cannot_be_loaded_disturbs_no_other(release, tmp_path):
    args = BundleArgs.model_validate(
        {"bundle": release.bundle, "models": [{"name": "area", "bundle": str(tmp_path / "nothing")}]}
    )
    endpoint = assemble(release.bundle, args, num_threads=1)
    backend = GrpcBackend(endpoint)

    async def story():
        for _ in range(2):
            with pytest.raises(Refusal):
                backend.find("area", None, "")
            with pytest.raises(Refusal) as refused:
                await endpoint.store.load("area")
        return refused.value.status, len((await backend.find(None, None, "").submit(ROWS)).labels)

    assert asyncio.run(story()) == (503, 2)


def test_a_call_that_is_refused_before_it_is_decoded_counts_as_offered_and_as_shed(endpoint, make_model):
    def full() -> None:
        raise Refusal(503, "full")

    loaded = make_model(A)
    loaded.batcher.check_room = full
    model = with_store(endpoint, ModelStore(loaded)).find(None, None, "")
    with pytest.raises(Refusal):
        model.check_room()
    assert endpoint.telemetry.snapshot()["shed"] == {"animals": 1}
    series = series_of(endpoint)
    assert (series["route"], series["version"], series["statuses"]) == ("grpc", A, {"503": 1})
