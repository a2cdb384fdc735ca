"""`POST /generate`: a prompt in JSON, and the text after it as server-sent events or whole (replica, event loop).

The events are those of the WHATWG's HTML standard, section 9.2: `data: {"text": ...}` for each piece and a last one
with `"done": true`; of a text that cannot be ended, the last one holds `"error"`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from bigray.bundle import BundleManifest
from bigray.data.features import Column
from bigray.errors import SpecError
from bigray.serve.generation.sampling import GenerationRequest, generate
from bigray.serve.http import Answer, Headers, Refusal, Streamed
from bigray.serve.wire.protocol import parse_json

FloatArray = NDArray[np.float32]
AskModel = Callable[[FloatArray], Awaitable[FloatArray]]
"""One window (1, context) -> the probabilities of the token after it (1, vocabulary)."""

EVENTS = b"text/event-stream"
HEADERS: Headers = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))
"""A proxy that gathers an answer before it passes it on would undo the streaming; nginx goes by the second one."""
WAITS_FOR_ROOM_S = 30.0
"""A text that has begun waits so long for a token while the model is overloaded, and lets others go first."""
ASKS_AGAIN_S = 0.02
TYPES = ("", "application/json", "application/x-www-form-urlencoded", "text/plain")
"""JSON, and what `curl -d` and `fetch` send where nobody has named a type."""


def writes_text(manifest: BundleManifest) -> bool:
    """Whether the model says what comes next in a text."""
    return manifest.outputs.task == "language" and bool(_text_column(manifest).categories)


def decode_generation(body: bytes, content_type: str, manifest: BundleManifest) -> GenerationRequest:
    """The body of a request -> what it asks for.

    Raises:
        Refusal: 404, this model writes no text; 415, a content type that is not JSON.
        SpecError: it is no such request.
    """
    if not writes_text(manifest):
        raise Refusal(404, f"model '{manifest.name}' writes no text: it predicts '{manifest.outputs.target}'")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in TYPES:
        raise Refusal(415, f"content-type '{media_type[:60]}' is not known; send application/json")
    try:
        return GenerationRequest.model_validate(parse_json(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:40]
        raise SpecError(f"{where or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


async def answer_generation(
    asked: GenerationRequest, manifest: BundleManifest, version: str, ask: AskModel
) -> Answer | Streamed:
    """The answer to a request for text, whole or to come.

    Raises:
        SpecError: the prompt holds a character that the model does not know; of a text to come, at its first piece.
    """
    tokens = _Tokens(ask)
    column = _text_column(manifest)
    pieces = generate(asked, column.categories, column.shape[0], tokens.next)
    if asked.stream:
        return Streamed(_events(pieces, tokens), _event_of_fault, EVENTS, headers=HEADERS)
    text = "".join([piece async for piece in pieces])
    return _json({"model": manifest.name, "version": version, "text": text, "tokens": tokens.num_asked})


class _Tokens:
    """Asks the model for one token after the other, and counts them."""

    def __init__(self, ask: AskModel) -> None:
        self._ask = ask
        self.num_asked = 0

    async def next(self, window: FloatArray) -> FloatArray:
        deadline = time.monotonic() + (WAITS_FOR_ROOM_S if self.num_asked else 0.0)
        while True:
            try:
                probabilities = await self._ask(window)
                break
            except Refusal as refusal:
                if refusal.status != 503 or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(ASKS_AGAIN_S)
        if not np.isfinite(probabilities).all():
            raise Refusal(500, "the model's numbers are no longer finite")
        self.num_asked += 1
        first: FloatArray = probabilities[0]
        return first


async def _events(pieces: AsyncIterator[str], tokens: _Tokens) -> AsyncIterator[bytes]:
    async with aclosing(pieces):  # type: ignore[type-var]  # of an async generator, which has it
        async for piece in pieces:
            yield _event({"text": piece})
    yield _event({"done": True, "tokens": tokens.num_asked})


def _event_of_fault(message: str) -> bytes:
    return _event({"error": message})


def _event(document: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(document)


def _json(document: dict[str, Any]) -> Answer:
    return Answer(orjson.dumps(document))


def _text_column(manifest: BundleManifest) -> Column:
    return manifest.inputs.columns[0]
