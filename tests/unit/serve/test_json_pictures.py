"""Pictures in base64 in JSON: decoded in the thread of pictures, on both ways that a request can take."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bigray.data.features import Column, FeatureSchema
from bigray.serve.http import Request
from bigray.serve.loaded import LoadedModel
from bigray.serve.pictures import may_hold_pictures
from bigray.serve.store import ModelStore
from bigray.serve.wire import bodies
from tests.unit.serve.test_asgi import call, make_app
from tests.unit.serve.test_fast_http import chunked, request, run, serving

SCHEMA = FeatureSchema(columns=(Column(name="photo", kind="image", shape=(1, 2, 3)),))
PIXELS = np.arange(6, dtype=np.uint8).reshape(2, 3)


def png_text() -> str:
    sink = io.BytesIO()
    Image.fromarray(PIXELS).save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()


def records(value: object) -> bytes:
    return json.dumps({"records": [{"photo": value}]}).encode()


PICTURE, NUMBERS = records(png_text()), records([PIXELS.tolist()])


@pytest.fixture
def model(make_model: Callable[..., LoadedModel]) -> LoadedModel:
    model = make_model()
    changed = {"inputs": SCHEMA, "example": {"photo": [PIXELS.tolist()]}}
    return replace(model, manifest=model.manifest.model_copy(update=changed))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where pictures were decoded: names of threads, of the event loop's "loop"."""
    found: list[str] = []
    decode, loop = bodies.decode_picture_records, threading.current_thread()

    def noted(*arguments):
        here = threading.current_thread()
        found.append("loop" if here is loop else here.name.rpartition("_")[0])
        return decode(*arguments)

    monkeypatch.setattr(bodies, "decode_picture_records", noted)
    return found


@pytest.mark.parametrize(
    ("body", "headers", "place"),
    [
        (PICTURE, [], "bigray-pictures"),
        (PICTURE.replace(b'": "iV', b'"\n:\t\r\n"\\u0069V'), [], "bigray-pictures"),
        (PICTURE, [("content-type", "text/plain; charset=utf-8")], "bigray-pictures"),
        (gzip.compress(PICTURE), [("content-encoding", "gzip")], "bigray-pictures"),
        (NUMBERS, [], "loop"),
        (NUMBERS, [("content-type", "application/json")], "loop"),
    ],
)
def test_pictures_in_json_leave_the_event_loop_to_others_and_numbers_stay_on_it(model, places, body, headers, place):
    answer = call(make_app(ModelStore(model)), "POST", "/predict", body, headers)
    assert (answer.status, places) == (200, [place])


@pytest.mark.parametrize(("body", "place"), [(PICTURE, "bigray-pictures"), (NUMBERS, "loop")])
@pytest.mark.parametrize("write", [request, chunked])
def test_so_they_do_over_a_connection_by_the_short_way_and_the_other(model, places, write, body, place):
    async def story() -> tuple[list[int], int]:
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            statuses = [(await client.ask(write(body))).status for _ in range(2)]
            assert endpoint.telemetry.snapshot()["load"]["ongoing"] == endpoint.front.num_open == 0
            return statuses, endpoint.front.num_short

    assert run(story()) == ([200, 200], 2 if write is request else 0)
    assert places == [place] * 2


def test_what_is_wrong_with_one_is_told_from_its_thread(model, places):
    async def story() -> list[tuple[int, str]]:
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            answers = [await client.ask(write(records("aGVsbG8="))) for write in (request, chunked)]
            return [(one.status, json.loads(one.body)["error"]) for one in answers]

    found = run(story())
    assert found[0] == found[1]
    assert (found[0][0], "photo: not a PNG or JPEG" in found[0][1]) == (400, True)
    assert places == ["bigray-pictures"] * 2


def test_a_connection_that_is_cut_while_its_picture_is_decoded_is_counted_as_gone(model, monkeypatch):
    gate, has_begun = threading.Event(), threading.Event()

    def hangs(*_: object) -> None:
        has_begun.set()
        assert gate.wait(20)

    monkeypatch.setattr(bodies, "decode_picture_records", hangs)

    async def story() -> dict[str, int]:
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            await client.send(request(PICTURE))
            await asyncio.to_thread(has_begun.wait, 20)
            client.writer.close()
            while not endpoint.telemetry.snapshot()["requests"]:
                await asyncio.sleep(0.005)
            gate.set()
            assert endpoint.front.num_open == 0
            return endpoint.telemetry.snapshot()["requests"][0]["statuses"]

    assert run(story()) == {"499": 1}


def test_other_models_text_and_other_forms_of_rows_hold_none(model, make_model):
    def holds(body: bytes, kind: bytes, one: LoadedModel) -> bool:
        return may_hold_pictures(Request("POST", "/predict", {b"content-type": kind}, body), one.manifest)

    assert holds(PICTURE, b"application/json", model)
    assert not holds(PICTURE, b"application/json", make_model())
    assert not holds(PICTURE, b"application/x-npy", model)
