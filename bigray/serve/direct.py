"""Requests straight from the replica's HTTP server to bigray's application.

Where replicas are reached without Serve's proxy, Serve puts about as much work around each request as the request is
itself: two tasks, a queue for its body, a span of metrics. bigray counts, limits, times out and cancels requests on its
own, so HTTP goes past that; health checks, gRPC, draining and everything else stay Serve's. Measured on two cores with
a small model and `wrk -t1 -c16`: see benchmarks/serve_throughput.py.
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

    if constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD:
        return  # the server's event loop is not the application's then
    start_server = replica.start_asgi_http_server
    add_request_id = http_util.RequestIdMiddleware.__call__

    async def start_direct(serves_app: Any, *arguments: Any, **options: Any) -> Any:
        return await start_server(DirectApp(app, serves_app), *arguments, **options)

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
        prefix = getattr(self._replica, "_route_prefix", None) or "/"
        if prefix != "/":
            root = scope.get("root_path", "")
            if not scope["path"].removeprefix(root).startswith(prefix):
                await self._serves_app(scope, receive, send)  # which answers that there is nothing
                return
            scope["root_path"] = root + prefix
        await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve's own count of requests stays right: its default autoscaling and its draining go by it."""
        metrics = getattr(self._replica, "_metrics_manager", None)
        if metrics is None:
            await self._app(scope, receive, send)
            return
        metrics._num_ongoing_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            metrics._num_ongoing_requests -= 1


def _is_ours(scope: Scope) -> bool:
    return scope["type"] == "http" and SERVES_OWN not in scope["path"][: len(scope.get("root_path", "")) + 3]
