"""A dashboard with the Jobs API alone: real sockets and Ray's own client, no Ray behind it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

RUNNING_COMMAND = "python -m bigray run job.toml"


@dataclass
class JobsServer:
    """What it was sent, and how it is to behave; a test changes both as it goes."""

    ray_version: str = "2.60.0"
    token: str | None = None
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    chunks: list[str] = field(default_factory=list)
    """What the job prints, as one connection tells it."""
    drops: list[int] = field(default_factory=list)
    """After how many chunks each of the first connections is cut."""
    ends_with: dict[str, Any] = field(default_factory=lambda: {"status": "SUCCEEDED", "driver_exit_code": 0})
    """What becomes of the job once its output has been told to its end."""
    errors: int = 0
    """So many requests more are answered by an error 500."""
    hides_jobs: bool = False
    """The list of jobs is empty, as while someone else is submitting."""
    submitted: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    url: str = ""

    def add(self, job_id: str, status: str = "RUNNING", **more: Any) -> None:
        self.jobs[job_id] = {
            "type": "SUBMISSION",
            "submission_id": job_id,
            "status": status,
            "entrypoint": RUNNING_COMMAND,
            "start_time": 1_000 * (len(self.jobs) + 1),
            **more,
        }

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard], client_max_size=2**27)
        application.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.post("/api/jobs/{id}/stop", self._stop),
                web.get("/api/jobs/{id}/logs", self._logs),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
                web.get("/api/packages/{protocol}/{name}", self._package),
                web.put("/api/packages/{protocol}/{name}", self._upload),
            ]
        )
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.errors > 0:
            self.errors -= 1
            return web.Response(status=500, text="Traceback (most recent call last):\n  ...\nRpcError: no GCS\n")
        if self.token is not None:
            header = request.headers.get("Authorization", "")
            if not header:
                return web.Response(status=401, text="Unauthorized: Missing authentication token")
            if header != f"Bearer {self.token}":
                return web.Response(status=403, text="Forbidden: Invalid authentication token")
        response: web.StreamResponse = await handler(request)
        return response

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": self.ray_version, "ray_commit": "", "session_name": ""}
        )

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response([] if self.hides_jobs else list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        document = await request.json()
        job_id = document["submission_id"]
        if job_id in self.jobs:
            self.hides_jobs = False
            return web.Response(
                status=500, text=f"Traceback\nValueError: Job with submission_id {job_id} already exists.\n"
            )
        self.submitted.append(document)
        sent = {key: document[key] for key in ("entrypoint", "metadata", "runtime_env")}
        self.add(job_id, **sent)
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    async def _stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["id"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(self.chunks)})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        last = self.drops.pop(0) if self.drops else len(self.chunks)
        for chunk in self.chunks[:last]:
            await socket.send_str(chunk)
        if last < len(self.chunks):
            assert request.transport is not None, "it is connected"
            await asyncio.sleep(0.05)
            request.transport.abort()
            return socket
        self.jobs.get(request.match_info["id"], {}).update(self.ends_with)
        if not self.ends_with:  # the job goes on without a word
            while (await socket.receive()).type not in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING):
                pass
        return socket

    async def _package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _upload(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()


class Serving:
    """Runs a server in a thread of its own for the length of a `with` block."""

    def __init__(self, server: JobsServer) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> JobsServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self._server

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        self._runner = web.AppRunner(self._server.application(), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self._server.url = f"http://{host}:{port}"
