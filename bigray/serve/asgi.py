"""The HTTP application of one model: raw ASGI, so that nothing stands between the server and the model.

Runs in the replica under Serve, and anywhere else an ASGI application runs (the tests call it in-process).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

from bigray.bundle import ModelBundle
from bigray.errors import SpecError
from bigray.serve import protocol
from bigray.serve.batching import Batcher
from bigray.serve.openapi import openapi_document

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Handler = Callable[[bytes], Awaitable[bytes]]

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")


class Refusal(Exception):
    """An answer other than 200; `message` is sent to the caller."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class ModelApp:
    """Answers every route of one loaded bundle."""

    def __init__(self, bundle: ModelBundle, backend: str, batcher: Batcher, max_body_bytes: int) -> None:
        self._manifest, self._version = bundle.manifest, bundle.version
        self._batcher = batcher
        self._max_body_bytes = max_body_bytes
        self._routes = self._build_routes(backend)
        self._headers: tuple[tuple[bytes, bytes], ...] = (
            (b"content-type", b"application/json"),
            (b"x-bigray-version", self._version.encode()),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer_http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _answer_lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _answer_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, headers = 200, self._headers
        try:
            handler = self._find_handler(scope)
            body = await handler(await self._read_body(receive))
        except Refusal as refusal:
            status, headers, body = refusal.status, headers + refusal.headers, _error_body(refusal.message)
        except SpecError as error:
            status, body = 400, _error_body(str(error))
        except Exception:
            _logger.exception("bigray: a request failed")
            status, body = 500, _error_body("internal error; the replica's log has the details")
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": status, "headers": (*headers, length)})
        await send({"type": "http.response.body", "body": body})

    def _find_handler(self, scope: Scope) -> Handler:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        methods = self._routes.get(path)
        if methods is None:
            raise Refusal(404, f"{path}: no such route; GET / lists them")
        handler = methods.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if handler is None:
            allowed = ", ".join(methods)
            raise Refusal(405, f"{path}: use {allowed}, not {scope['method']}", ((b"allow", allowed.encode()),))
        return handler

    async def _read_body(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            # a body over the limit is read to its end but not kept: a client still sending cannot read an answer
            if size <= self._max_body_bytes:
                chunks.append(chunk)
            more = message.get("more_body", False)
        if size > self._max_body_bytes:
            limit_mb = self._max_body_bytes / 2**20
            raise Refusal(413, f"body: {size / 2**20:.1f} MB is over the limit of {limit_mb:g} MB; send fewer rows")
        return b"".join(chunks)

    def _build_routes(self, backend: str) -> Mapping[str, Mapping[str, Handler]]:
        name = self._manifest.name
        platform = {"onnxruntime": "onnxruntime_onnx", "torch": "pytorch"}[backend]
        routes: dict[str, dict[str, Handler]] = {
            "/predict": {"POST": self._predict},
            "/openapi.json": {"GET": _constant(openapi_document(self._manifest, self._version))},
            "/v2": {"GET": _constant({"name": "bigray", "version": "1", "extensions": []})},
            "/v2/health/live": {"GET": _constant({"live": True})},
            "/v2/health/ready": {"GET": _constant({"ready": True})},
        }
        model = _constant(protocol.describe_model(self._manifest, self._version, platform))
        for prefix in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{self._version}"):
            routes[prefix] = {"GET": model}
            routes[f"{prefix}/ready"] = {"GET": _constant({"name": name, "ready": True})}
            routes[f"{prefix}/infer"] = {"POST": self._infer}
        listed = sorted(f"{method} {path}" for path, methods in routes.items() for method in methods)
        routes["/"] = {"GET": _constant({"name": name, "version": self._version, "routes": listed})}
        return routes

    async def _predict(self, body: bytes) -> bytes:
        rows = protocol.decode_records(body, self._manifest.inputs)
        predictions = await self._batcher.submit(rows)
        return protocol.encode_records(predictions, self._manifest.name, self._version)

    async def _infer(self, body: bytes) -> bytes:
        request = protocol.decode_infer(body, self._manifest)
        predictions = await self._batcher.submit(request.rows)
        return protocol.encode_infer(predictions, request, self._manifest.name, self._version)


def _constant(document: dict[str, Any]) -> Handler:
    answer = orjson.dumps(document)

    async def handler(body: bytes) -> bytes:
        return answer

    return handler


def _error_body(message: str) -> bytes:
    return orjson.dumps({"error": message})


async def _answer_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
