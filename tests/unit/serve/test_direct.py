from __future__ import annotations

import asyncio

import pytest

from bigray.serve.direct import DirectApp, go_direct
from bigray.serve.heads import MOST_HEAD_BYTES


class Named:
    """An ASGI application that notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, scope, receive, send) -> None:
        self.asked.append((scope["path"], scope.get("root_path", "")))


class ServesReplica(Named):
    """A stand-in for Serve's replica object, whose bound method is what Serve hands to its HTTP server."""

    def __init__(self, route_prefix: str) -> None:
        super().__init__()
        self._route_prefix = route_prefix

    async def direct_ingress(self, scope, receive, send) -> None:
        await self(scope, receive, send)


def ask(route_prefix: str, path: str, kind: str = "http", root_path: str = "") -> tuple[list, list]:
    own, serves = Named(), ServesReplica(route_prefix)
    scope = {"type": kind, "path": path, "root_path": root_path}
    asyncio.run(DirectApp(own, serves.direct_ingress)(scope, None, None))
    return own.asked, serves.asked


@pytest.mark.parametrize("path", ["/", "/predict", "/v2/models/a-/-b/infer", "/v2/health/ready"])
def test_requests_go_to_the_application(path):
    assert ask("/", path) == ([(path, "")], [])


@pytest.mark.parametrize("path", ["/-/healthz", "/-/routes"])
def test_health_and_routes_stay_serves(path):
    assert ask("/", path) == ([], [(path, "")])


def test_the_application_sees_the_prefix_it_is_mounted_at():
    assert ask("/second", "/second/predict") == ([("/second/predict", "/second")], [])
    assert ask("/second", "/root/second/predict", root_path="/root") == ([("/root/second/predict", "/root/second")], [])


def test_a_path_of_another_application_is_serves_to_refuse():
    assert ask("/second", "/first/predict") == ([], [("/first/predict", "")])


def test_websockets_are_serves():
    assert ask("/", "/predict", kind="websocket")[0] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_apart", [False, True])
def test_the_replicas_own_server_bounds_the_head_of_a_request(monkeypatch, is_apart):
    from ray.serve._private import constants, http_util, replica
    from ray.serve.config import HTTPOptions

    # what go_direct changes is put back after the test
    monkeypatch.setattr(replica, "start_asgi_http_server", replica.start_asgi_http_server)
    monkeypatch.setattr(http_util.RequestIdMiddleware, "__call__", http_util.RequestIdMiddleware.__call__)
    monkeypatch.setattr(constants, "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", is_apart)
    go_direct(Named())

    async def story() -> bytes:
        options, loop = HTTPOptions(host="127.0.0.1", port=0), asyncio.get_running_loop()
        serves = ServesReplica("/").direct_ingress
        serving, server = await replica.start_asgi_http_server(serves, options, event_loop=loop)
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in (b"GET /" + b"x" * (MOST_HEAD_BYTES - 5), b"xx"):
            writer.write(part)
            await asyncio.sleep(0.03)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        server.should_exit = True
        await serving
        return answer

    assert asyncio.run(story()).startswith(b"HTTP/1.1 431 ")
