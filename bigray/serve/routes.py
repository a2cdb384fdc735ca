"""What answers which path: a table, made once, and the few paths with a model's name in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from bigray.inference import Predictions
from bigray.serve.explaining import ExplanationDesk
from bigray.serve.generation.answering import decode_generation, writes_text
from bigray.serve.generation.sampling import GenerationRequest
from bigray.serve.http import Answer, Refusal, Request
from bigray.serve.loaded import LoadedModel
from bigray.serve.page.page import model_card, page_answer
from bigray.serve.store import ModelStore
from bigray.serve.wire import bodies, protocol
from bigray.serve.wire.openapi import openapi_document

FloatArray = NDArray[np.float32]
Handler = Callable[[Request], Awaitable[Answer]]
Encode = Callable[[Predictions, LoadedModel], Answer]
Numbers = Callable[[], Awaitable[Answer]]
"""Makes the answer of `/stats` or `/metrics`: numbers of all replicas."""

MOST_FOUND = 64
"""Routes of models that are kept once they are found; callers make up versions."""
OPEN, PREDICT = "open", "predict"
"""Scopes: what anybody may ask, and what takes a key where the endpoint has keys."""


class Question(NamedTuple):
    """A decoded request for the model: its rows, and how to write the answer."""

    rows: FloatArray
    encode: Encode


Decode = Callable[[Request, LoadedModel], Question]
DecodeGeneration = Callable[[Request, LoadedModel], GenerationRequest]
GENERATE, EXPLAIN = "/generate", "/explain"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request leads: to a handler, to a model by way of `decode` or, where it writes text, `generates`, or with
    decoded rows to the desk that explains what the model says of them.
    """

    kind: str
    """One of a closed set of words, for metrics."""
    scope: str
    handler: Handler | None
    decode: Decode
    model: str | None = None
    """None for the channel's own model."""
    version: str | None = None
    generates: DecodeGeneration | None = None
    explains: ExplanationDesk | None = None


class Router:
    """Finds the route for a path and a method; for a HEAD, that of the GET."""

    def __init__(
        self,
        store: ModelStore,
        max_body_bytes: int,
        stats: Numbers,
        metrics: Numbers,
        explanations: ExplanationDesk | None = None,
    ) -> None:
        """Without a desk nothing is explained: there is no such route."""
        self._store, self._max_body_bytes, self._explanations = store, max_body_bytes, explanations
        self._table = self._build_table(stats, metrics)
        self._model_table = self._build_model_table()
        self._found: dict[tuple[str, str], Route] = {}

    def find(self, path: str, method: str) -> Route:
        """The route of a request.

        Raises:
            Refusal: 404, no such path or model; 405, the path has another method.
        """
        methods = self._table.get(path)
        if methods is not None:
            return _of_method(methods, path, method)
        if path.startswith("/v2/models/"):
            return self._find_model(path, method)
        raise Refusal(404, f"{path[:80]}: no such route; GET /openapi.json lists them")

    def listed(self) -> list[str]:
        """Every route, for people."""
        fixed = [f"{method} {path}" for path, methods in self._table.items() for method in methods]
        name = self._store.view.live.name
        own = [f"{method} /v2/models/{name}{rest}" for rest, methods in self._model_table.items() for method in methods]
        left_out = [path for path, is_there in self._optional().items() if not is_there]
        return sorted(line for line in (*fixed, *own) if not line.endswith(tuple(left_out)))

    def _optional(self) -> dict[str, bool]:
        """Routes that not every model has, and whether the live one does."""
        live = self._store.view.live
        return {GENERATE: writes_text(live.manifest), EXPLAIN: self._explains(live)}

    def _explains(self, model: LoadedModel) -> bool:
        return self._explanations is not None and self._explanations.supports(model)

    def _find_model(self, path: str, method: str) -> Route:
        found = self._found.get((path, method))
        if found is not None and found.model is not None and self._store.knows(found.model):
            return found
        name, _, rest = path.removeprefix("/v2/models/").partition("/")
        version: str | None = None
        if rest.startswith("versions/"):
            version, _, rest = rest.removeprefix("versions/").partition("/")
        methods = self._model_table.get(f"/{rest}" if rest else "")
        if methods is None:
            raise Refusal(404, f"{path[:80]}: no such route; GET /openapi.json lists them")
        if not self._store.knows(name):
            raise Refusal(404, f"model '{name[:80]}' is not served here; POST /v2/repository/index lists the models")
        found = replace(_of_method(methods, path, method), model=name, version=version)
        if len(self._found) < MOST_FOUND:
            self._found[path, method] = found
        return found

    def _build_table(self, stats: Numbers, metrics: Numbers) -> dict[str, dict[str, Route]]:
        server = _constant(protocol.describe_server())
        return {
            "/": {"GET": _route("page", OPEN, self._root)},
            "/predict": {"POST": _question("predict", self._decode_predict)},
            GENERATE: {"POST": _generation(self._decode_generation)},
            **self._explanation(),
            "/card": {"GET": _route("page", PREDICT, self._card)},
            "/stats": {"GET": _route("stats", PREDICT, _ignoring_request(stats))},
            "/metrics": {"GET": _route("metrics", PREDICT, _ignoring_request(metrics))},
            "/openapi.json": {"GET": _route("other", PREDICT, self._openapi)},
            "/v2": {"GET": _route("other", OPEN, server)},
            "/v2/health/live": {"GET": _route("health", OPEN, _constant({"live": True}))},
            "/v2/health/ready": {"GET": _route("health", OPEN, _constant({"ready": True}))},
            "/v2/repository/index": {"POST": _route("other", PREDICT, self._index)},
        }

    def _build_model_table(self) -> dict[str, dict[str, Route]]:
        return {
            "": {"GET": _route("other", PREDICT, self._model)},
            "/ready": {"GET": _route("health", OPEN, self._ready)},
            "/config": {"GET": _route("other", PREDICT, self._config)},
            "/infer": {"POST": _question("infer", self._decode_infer)},
            GENERATE: {"POST": _generation(self._decode_generation)},
            **self._explanation(),
        }

    def _explanation(self) -> dict[str, dict[str, Route]]:
        if self._explanations is None:
            return {}
        return {EXPLAIN: {"POST": Route("explain", PREDICT, None, self._decode_predict, explains=self._explanations)}}

    def _decode_predict(self, request: Request, model: LoadedModel) -> Question:
        rows = bodies.decode_predict(self._plain_body(request), request.header(b"content-type"), model.manifest)
        accept = request.header(b"accept")
        return Question(rows, lambda predictions, by: bodies.encode_predict(predictions, accept, by.name, by.version))

    def _decode_infer(self, request: Request, model: LoadedModel) -> Question:
        length = protocol.header_length(request.header(b"inference-header-content-length"))
        asked = protocol.decode_infer(self._plain_body(request), model.manifest, length)
        return Question(
            asked.rows, lambda predictions, by: protocol.encode_infer(predictions, asked, by.name, by.version)
        )

    def _decode_generation(self, request: Request, model: LoadedModel) -> GenerationRequest:
        return decode_generation(self._plain_body(request), request.header(b"content-type"), model.manifest)

    def _plain_body(self, request: Request) -> bytes:
        encoding = request.header(b"content-encoding")
        return bodies.decompress(request.body, encoding, self._max_body_bytes) if encoding else request.body

    async def _root(self, request: Request) -> Answer:
        if "text/html" in request.header(b"accept"):
            return page_answer()
        live = self._store.view.live
        return _json({"name": live.name, "version": live.version, "routes": self.listed()})

    async def _card(self, request: Request) -> Answer:
        view = self._store.view
        live = view.live
        return _json(
            model_card(
                live.manifest,
                live.version,
                {"name": live.name, "backend": live.backend, "explains": self._explains(live)},
            )
        )

    async def _openapi(self, request: Request) -> Answer:
        live = self._store.view.live
        return _json(openapi_document(live.manifest, live.version, explains=self._explains(live)))

    async def _index(self, request: Request) -> Answer:
        versions = {self._store.view.live.name: list(self._store.view.held)}
        entries = [
            {"name": name, "version": version, "state": "READY" if self._store.is_loaded(name) else "UNAVAILABLE"}
            for name in self._store.names()
            for version in versions.get(name, [""])
        ]
        return _json(entries)

    async def _model(self, request: Request) -> Answer:
        model = await self._named(request)
        return _json(protocol.describe_model(model.manifest, self._versions(model), model.backend, model.name))

    async def _config(self, request: Request) -> Answer:
        model = await self._named(request)
        return _json(protocol.describe_config(model.manifest, model.backend, model.name))

    async def _ready(self, request: Request) -> Answer:
        route = self._find_model(request.path, "GET")
        assert route.model is not None, "this path has a model's name in it"
        if not self._store.is_loaded(route.model):
            raise Refusal(503, f"model '{route.model}': not loaded; it is when it is first asked")
        self._store.find(route.model, route.version)
        return _json({"name": route.model, "ready": True})

    async def _named(self, request: Request) -> LoadedModel:
        route = self._find_model(request.path, "GET")
        assert route.model is not None, "this path has a model's name in it"
        if not self._store.is_loaded(route.model):
            await self._store.load(route.model)
        return self._store.find(route.model, route.version)

    def _versions(self, model: LoadedModel) -> Sequence[str]:
        view = self._store.view
        return list(view.held) if model.name == view.live.name else [model.version]


def _of_method(methods: Mapping[str, Route], path: str, method: str) -> Route:
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None:
        allowed = ", ".join(methods)
        raise Refusal(405, f"{path[:80]}: use {allowed}, not {method[:20]}", ((b"allow", allowed.encode()),))
    return route


def _route(kind: str, scope: str, handler: Handler) -> Route:
    return Route(kind, scope, handler, _no_question)


def _question(kind: str, decode: Decode) -> Route:
    return Route(kind, PREDICT, None, decode)


def _generation(decode: DecodeGeneration) -> Route:
    return Route("generate", PREDICT, None, _no_question, generates=decode)


def _no_question(request: Request, model: LoadedModel) -> Question:
    raise AssertionError("a route with a handler asks no model, and one that generates asks it many times")


def _ignoring_request(numbers: Numbers) -> Handler:
    async def handler(request: Request) -> Answer:
        return await numbers()

    return handler


def _constant(document: Any) -> Handler:
    answer = _json(document)

    async def handler(request: Request) -> Answer:
        return answer

    return handler


def _json(document: Any) -> Answer:
    return Answer(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))
