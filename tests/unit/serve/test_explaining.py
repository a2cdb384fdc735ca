"""`POST /explain` as a caller sees it: real bundles, and where time matters an explainer that waits to be let."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from bigray.bundle import ModelBundle, OutputSchema
from bigray.data.features import Column
from bigray.errors import DeployError
from bigray.serve import explaining
from bigray.serve.asgi import ModelApp
from bigray.serve.assembly import assemble
from bigray.serve.config import BundleArgs
from bigray.serve.explaining import MOST_KEPT, MOST_ROWS, ExplanationDesk
from bigray.serve.http import Refusal
from bigray.serve.loaded import LoadedModel, ModelSettings, load_model
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.protect.keys import create_key
from bigray.serve.routes import Router
from bigray.serve.sample import write_sample_bundle
from bigray.serve.standalone import standalone_app
from bigray.serve.store import ModelStore
from bigray.serve.wire.openapi import openapi_document
from tests.unit.serve.test_asgi import GOOD, IMAGE, STALLS, ask, call, canary_store, make_app, no_numbers

pytest.importorskip("captum")
from bigray.explanation.integrated_gradients import Explainer

ALLOWED = ("bigray.models:*",)
ROWS = np.array([[1.0, 2.0], [-3.0, 0.5]], np.float32)
RECORDS = json.dumps({"records": [{"width": 1.0, "height": 2.0}, {"width": -3.0, "height": 0.5}]}).encode()
PNG = [("accept", "image/png")]


@pytest.fixture(scope="module")
def table_app(regression_location: str) -> ModelApp:
    return standalone_app(regression_location, allow_factories=ALLOWED)


def app_with(desk: ExplanationDesk, store: ModelStore, **options: Any) -> ModelApp:
    app = make_app(store, **options)
    app._router = Router(store, 10_000, no_numbers, no_numbers, desk)
    return app


def arrow_of(columns: dict[str, Any]) -> bytes:
    table, sink = pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def npy_of(rows: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, rows)
    return sink.getvalue()


# ----- answers


def test_each_column_has_what_it_adds_as_the_explainer_says(table_app, regression_bundle: ModelBundle):
    answer = call(table_app, "POST", "/explain", RECORDS)
    assert (answer.status, answer.headers["x-bigray-version"]) == (200, regression_bundle.version)
    assert (answer.document["model"], answer.document["version"]) == ("area", regression_bundle.version)
    expected = Explainer(regression_bundle).explain(ROWS)
    for i, found in enumerate(answer.document["explanations"]):
        assert list(found["attributions"]) == ["width", "height"]
        assert np.allclose(list(found["attributions"].values()), expected.attributions[i], rtol=1e-3, atol=1e-5)
        assert np.isclose(found["output"] - found["base"], sum(found["attributions"].values()), atol=0.02)
        assert "label" not in found


@pytest.mark.parametrize(
    ("kind", "body", "headers"),
    [
        ("text/csv", b"height,width\n2,1\n0.5,-3\n", []),
        ("application/vnd.apache.arrow.stream", arrow_of({"width": ROWS[:, 0], "height": ROWS[:, 1]}), []),
        ("application/x-npy", npy_of(ROWS), []),
        ("application/json", gzip.compress(RECORDS), [("content-encoding", "gzip")]),
    ],
)
def test_rows_come_in_every_form_that_predictions_take(table_app, kind, body, headers):
    answer = call(table_app, "POST", "/explain", body, [("content-type", kind), *headers])
    assert answer.status == 200
    assert answer.document == call(table_app, "POST", "/explain", RECORDS).document


def test_of_an_image_each_pixel_has_its_share_and_by_accept_it_is_a_picture(tmp_path: Path):
    columns = (Column(name="photo", kind="image", shape=(3, 6, 8)),)
    location = write_sample_bundle(
        str(tmp_path), columns=columns, class_names=("a", "b"), params={"hidden": [4]}, onnx=False
    )
    app = standalone_app(location, allow_factories=ALLOWED)
    sink = io.BytesIO()
    Image.fromarray(np.arange(144, dtype=np.uint8).reshape(6, 8, 3)).save(sink, "PNG")
    sent = ("POST", "/explain", sink.getvalue())
    (found,) = call(app, *sent, [("content-type", "image/png")]).document["explanations"]
    assert np.array(found["attributions"]).shape == (6, 8)
    assert found["label"] in ("a", "b")
    drawn = call(app, *sent, [("content-type", "image/png"), *PNG])
    assert (drawn.status, drawn.headers["content-type"]) == (200, "image/png")
    assert min(Image.open(io.BytesIO(drawn.body)).size) >= 256


def test_of_a_table_the_picture_has_bars(table_app):
    body = b"width,height\n1,2\n"
    drawn = call(table_app, "POST", "/explain", body, [("content-type", "text/csv"), *PNG])
    assert Image.open(io.BytesIO(drawn.body)).format == "PNG"
    preferred = [("content-type", "text/csv"), ("accept", "image/png;q=0.5, application/json")]
    assert call(table_app, "POST", "/explain", body, preferred).headers["content-type"] == "application/json"


# ----- which model


def test_a_caller_on_the_candidates_side_is_told_why_the_candidate_answers(a, b):
    live, candidate = (load_model(one.bundle, ModelSettings()) for one in (a, b))
    app = app_with(ExplanationDesk(ALLOWED, 30.0), canary_store(live, candidate, share=1.0))
    answer = call(app, "POST", "/explain", GOOD)
    assert (answer.status, answer.document["version"]) == (200, b.version)
    assert answer.headers["x-bigray-version"] == b.version
    path = f"/v2/models/animals/versions/{a.version}/explain"
    assert call(app, "POST", path, GOOD).document["version"] == a.version
    assert call(app, "POST", "/v2/models/animals/versions/0123456789ab/explain", GOOD).status == 404


def test_other_models_of_the_file_are_explained_by_name(release, regression_location, regression_bundle):
    settings = {"bundle": release.bundle, "models": [{"name": "area", "bundle": regression_location}]}
    app = assemble(release.bundle, BundleArgs.model_validate(settings), num_threads=1).app
    answer = call(app, "POST", "/v2/models/area/explain", RECORDS)
    assert (answer.status, answer.document["model"]) == (200, "area")
    assert answer.document["version"] == regression_bundle.version


def test_modules_of_the_last_versions_alone_stay_in_memory(a, b, c):
    desk, row = ExplanationDesk(ALLOWED, 30.0), np.array([IMAGE], np.float32)
    for one in (a, b, c, c):
        asyncio.run(desk.answer(load_model(one.bundle, ModelSettings()), row, ""))
    assert [version for _, version in desk._explainers] == [b.version, c.version]
    assert len(desk._explainers) == MOST_KEPT


def test_where_it_is_offered_it_is_listed_and_described(table_app, make_model, regression_bundle: ModelBundle):
    assert {"POST /explain", "POST /v2/models/area/explain"} <= set(call(table_app, "GET", "/").document["routes"])
    assert call(table_app, "GET", "/card").document["explains"] is True
    paths = call(table_app, "GET", "/openapi.json").document["paths"]
    for path in ("/explain", "/v2/models/area/explain", "/v2/models/area/versions/{version}/explain"):
        content = paths[path]["post"]["requestBody"]["content"]
        body = json.dumps(content["application/json"]["example"]).encode()
        assert call(table_app, "POST", path.format(version=regression_bundle.version), body).status == 200
        assert set(content) == set(paths["/predict"]["post"]["requestBody"]["content"])
    model = make_model()
    assert "/explain" not in openapi_document(model.manifest, "abc")["paths"]
    without = make_app(ModelStore(model))
    assert call(without, "POST", "/explain", GOOD).status == 404
    assert call(without, "GET", "/card").document["explains"] is False


# ----- refusals


@pytest.mark.parametrize(
    ("shape", "body", "headers", "status", "fault"),
    [
        ((6,), {"records": [{"signal": [1.0] * 6}] * (MOST_ROWS + 1)}, [], 413, "explain: 17 rows, at most 16"),
        ((6,), {"records": [{"signal": [1.0] * 5}]}, [], 400, "wrong shape"),
        ((6,), {"records": [{"signal": [1.0] * 6}]}, PNG, 406, r"rows of shape \(6,\) are no picture"),
        ((1, 200), {"records": [{"signal": [[1.0] * 200]}]}, PNG, 406, "are no picture"),
        ((2, 3), {"records": [{"signal": IMAGE}] * 2}, PNG, 400, "a picture is of one row, 2 came"),
    ],
)
def test_what_is_not_explained_is_refused(tmp_path: Path, shape, body, headers, status, fault):
    columns = (Column(name="signal", shape=shape),)
    app = standalone_app(
        write_sample_bundle(str(tmp_path), columns=columns, params={"hidden": [2]}, onnx=False), allow_factories=ALLOWED
    )
    answer = call(app, "POST", "/explain", json.dumps(body).encode(), headers)
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(answer.document["error"])
    assert answer.status == status


def test_a_model_that_would_need_a_factory_of_its_own_says_so(make_model):
    app = app_with(ExplanationDesk(("my_project.*",), 30.0), ModelStore(make_model()))
    answer = call(app, "POST", "/explain", GOOD)
    assert answer.status == 501
    assert "rebuilt by a factory that is not allowed" in answer.document["error"]
    assert "POST /explain" not in call(app, "GET", "/").document["routes"]
    assert call(app, "GET", "/card").document["explains"] is False


def test_text_is_not_explained(make_model):
    model = make_model()
    outputs = OutputSchema(task="language", num_outputs=3, target="next", class_names=("a", "b", "c"))
    writer = replace(model, manifest=model.manifest.model_copy(update={"outputs": outputs}))
    answer = call(app_with(ExplanationDesk(ALLOWED, 30.0), ModelStore(writer)), "POST", "/explain", GOOD)
    assert (answer.status, answer.document["error"].endswith("not for text")) == (501, True)


def test_it_takes_the_key_that_predictions_take_and_counts_as_traffic(a, tmp_path: Path):
    path = str(tmp_path / "keys.json")
    secret, telemetry = create_key(path, "someone"), Telemetry()
    store = ModelStore(load_model(a.bundle, ModelSettings()))
    app = app_with(ExplanationDesk(ALLOWED, 30.0), store, guard=Guard(path), telemetry=telemetry)
    assert call(app, "POST", "/explain", GOOD).status == 401
    assert call(app, "POST", "/explain", GOOD, [("x-api-key", secret)]).status == 200
    told = telemetry.snapshot()
    assert [(one["route"], one["version"], one["rows"]) for one in told["requests"] if one["model"]] == [
        ("explain", a.version, 1)
    ]
    assert told["load"]["ongoing"] == 0


def test_a_bundle_that_is_gone_or_replaced_is_a_503(a, b, tmp_path: Path):
    place = tmp_path / "bundle"
    shutil.copytree(a.bundle, place)
    app = standalone_app(str(place), allow_factories=ALLOWED)
    shutil.rmtree(place)
    gone = call(app, "POST", "/explain", GOOD)
    shutil.copytree(b.bundle, place)
    replaced = call(app, "POST", "/explain", GOOD)
    assert (gone.status, "cannot be read" in gone.document["error"]) == (503, True)
    assert (replaced.status, "replaced by another" in replaced.document["error"]) == (503, True)
    assert str(tmp_path) not in gone.document["error"] + replaced.document["error"]


def test_a_module_that_cannot_be_rebuilt_is_told_without_its_name(a, monkeypatch):
    def fails(*_: Any) -> None:
        raise DeployError("the factory 'secret.module:make' fails")

    monkeypatch.setattr(explaining, "Explainer", fails)
    answer = call(standalone_app(a.bundle, allow_factories=ALLOWED), "POST", "/explain", GOOD)
    assert (answer.status, "secret" in answer.document["error"]) == (500, False)


# ----- beside the event loop


class Gated:
    """An explainer that explains a row when it is let."""

    def __init__(self) -> None:
        self.open, self.begun, self.rows = threading.Event(), threading.Event(), 0

    def explain(self, rows: np.ndarray) -> Any:
        self.rows += len(rows)
        self.begun.set()
        assert self.open.wait(20)
        return self

    def to_records(self) -> list[dict[str, Any]]:
        return [{"output": 1.0}]


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    explainer = Gated()
    monkeypatch.setattr(ExplanationDesk, "_explainer_of", lambda self, model: explainer)
    yield explainer
    explainer.open.set()


async def begun(gated: Gated) -> None:
    while not gated.begun.is_set():
        await asyncio.sleep(0.001)


def test_while_a_row_is_explained_others_are_predicted(make_model, gated):
    async def story() -> list[int]:
        app = app_with(ExplanationDesk(ALLOWED, 30.0), ModelStore(make_model()))
        why = asyncio.create_task(ask(app, "POST", "/explain", GOOD))
        await begun(gated)
        predicted = await ask(app, "POST", "/predict", GOOD)
        assert not why.done()
        gated.open.set()
        return [predicted.status, (await why).status]

    assert asyncio.run(story()) == [200, 200]


def test_what_takes_too_long_is_given_up_after_the_row_it_is_at(make_model, gated):
    model = make_model()

    async def story() -> tuple[Refusal, list[int]]:
        desk = ExplanationDesk(ALLOWED, 0.05)
        with pytest.raises(Refusal) as late:
            await desk.answer(model, np.zeros((5, 2, 3), np.float32), "")
        gated.open.set()
        while desk._desk._jobs:
            desk._desk._forget_done()
            await asyncio.sleep(0.001)
        return late.value, [gated.rows]

    late, rows = asyncio.run(story())
    assert (late.status, late.message, rows) == (504, "no answer within 0.05 s", [1])


def test_more_than_can_wait_is_refused_before_its_body_is_read(make_model, gated, monkeypatch):
    monkeypatch.setattr(explaining, "MOST_WAITING", 2)

    async def story() -> tuple[Any, list[int]]:
        app = app_with(ExplanationDesk(ALLOWED, 30.0), ModelStore(make_model()))
        sent = [asyncio.create_task(ask(app, "POST", "/explain", GOOD)) for _ in range(2)]
        await begun(gated)
        full = await ask(app, "POST", "/explain", [STALLS])
        gated.open.set()
        return full, [one.status for one in await asyncio.gather(*sent)]

    full, others = asyncio.run(story())
    assert (full.status, others) == (503, [200, 200])
    assert full.document["error"].startswith("overloaded: 2 explanations wait")
    assert int(full.headers["retry-after"]) >= 1


def test_a_caller_that_goes_away_while_it_waits_is_not_explained(make_model: Any, gated):
    model: LoadedModel = make_model()

    async def story() -> int:
        desk, row = ExplanationDesk(ALLOWED, 30.0), np.zeros((1, 2, 3), np.float32)
        first, second = (asyncio.create_task(desk.answer(model, row, "")) for _ in "12")
        await begun(gated)
        second.cancel()
        await asyncio.wait([second])
        gated.open.set()
        await first
        await desk.answer(model, row, "")
        return gated.rows

    assert asyncio.run(story()) == 2
