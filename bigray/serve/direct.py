"""Requests straight from the replica's HTTP server to bigray's application.

Where replicas are reached without Serve's proxy, Serve puts about as much work around each request as the request is
itself: two tasks, a queue for its body, a span of metrics. bigray counts, limits, times out and cancels requests on its
own, so HTTP goes past that, and plain requests for a model past ASGI too (`fast_http`); health checks, gRPC, draining
and everything else stay Serve's. Measured on two cores with a small model and `wrk -t1 -c16`: see
benchmarks/serve_throughput.py.
"""

from __future__ import annotations

from typing import Any

from bigray.serve.asgi import ModelApp, Receive, Scope, Send

SERVES_OWN = "/-/"
"""Paths that Serve answers itself: health and routes."""


def go_direct(app: ModelApp) -> None:
    """Have this process's replica hand HTTP requests to `app`; called before Serve starts its server (replica).

    Leans on three names of `ray.serve._private` of 2.60. It changes them in this process only, which is one replica's.
    """
    from ray.serve._private import constants, http_util, replica

    from bigray.serve.fast_http import use_fast_http
    from bigray.serve.heads import bound_heads

    start_server = replica.start_asgi_http_server
    add_request_id = http_util.RequestIdMiddleware.__call__

    async def start_bounded(*arguments: Any, **options: Any) -> Any:
        serving, server = await start_server(*arguments, **options)
        bound_heads(server, serving)  # the task begins when this one pauses
        return serving, server

    if constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD:
        # the server's event loop is not the application's then
        replica.start_asgi_http_server = start_bounded
        return

    async def start_direct(serves_app: Any, http_options: Any, **options: Any) -> Any:
        direct = DirectApp(app, serves_app)
        serving, server = await start_bounded(direct, http_options, **options)
        if not http_options.middlewares:  # an operator's own have to see every request
            use_fast_http(server.config, app, direct)
        return serving, server

    async def call_middleware(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_ours(scope):
            await self._app(scope, receive, send)  # the application has request ids of its own
        else:
            await add_request_id(self, scope, receive, send)

    replica.start_asgi_http_server = start_direct
    http_util.RequestIdMiddleware.__call__ = call_middleware


class DirectApp:
    """What the replica's HTTP server runs: `app`, and `serves_app` for what is Serve's own."""

    def __init__(self, app: ModelApp, serves_app: Any) -> None:
        self._app, self._serves_app = app, serves_app
        self._replica = getattr(serves_app, "__self__", None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_ours(scope):
            await self._serves_app(scope, receive, send)
            return
        prefix = self._prefix()
        if prefix != "/":
            root = scope.get("root_path", "")
            if not scope["path"].removeprefix(root).startswith(prefix):
                await self._serves_app(scope, receive, send)  # which answers that there is nothing
                return
            scope["root_path"] = root + prefix
        self.count(1)
        try:
            await self._app(scope, receive, send)
        finally:
            self.count(-1)

    def below_prefix(self, path: str) -> str | None:
        """The path as the application knows it; None for another application's."""
        prefix = self._prefix()
        if prefix == "/":
            return path
        return path.removeprefix(prefix) if path.startswith(prefix) else None

    def count(self, change: int) -> None:
        """Serve's own count of requests stays right: its default autoscaling and its draining go by it."""
        metrics = getattr(self._replica, "_metrics_manager", None)
        if metrics is not None:
            metrics._num_ongoing_requests += change

    def _prefix(self) -> str:
        return getattr(self._replica, "_route_prefix", None) or "/"


def _is_ours(scope: Scope) -> bool:
    return scope["type"] == "http" and SERVES_OWN not in scope["path"][: len(scope.get("root_path", "")) + 3]
