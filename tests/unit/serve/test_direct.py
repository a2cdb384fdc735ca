from __future__ import annotations

import asyncio

import pytest

from bigray.serve.direct import DirectApp


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
