"""One bundle behind HTTP in a process of its own: where the gate asks a version before any replica loads it.

    python -m bigray.serve.release.candidate BUNDLE --threads 1 --memory-mb 2048 --allow 'bigray.models:*'

The process says one line of JSON on its standard output, `{"port": ...}` when it takes requests or `{"error": ...,
"kind": ...}` when it cannot, and ends when its standard input is closed: it cannot outlive whoever started it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import threading
from collections.abc import Sequence
from typing import Any, Literal

import uvicorn

from bigray.errors import BigrayError
from bigray.serve.asgi import ModelApp
from bigray.serve.fast_http import use_fast_http
from bigray.serve.standalone import standalone_app

Kind = Literal["refused", "memory", "exit", "failed"]
"""Why a bundle is not served: bigray says no, memory is out, its code ended the process, its code raised."""

KEEP_ALIVE_S = 3600
"""The gate's connection rests while it asks the other version."""
LONGEST_ERROR = 300

_SIGNS_OF_NO_MEMORY = (
    "MemoryError",
    "can't allocate memory",
    "DefaultCPUAllocator",
    "bad_alloc",
    "can't start new thread",
)


NICENESS = 10
"""What is tried stands back behind what serves, where both are on one machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, say so, and serve until the standard input ends."""
    options = _parser().parse_args(arguments)
    os.nice(NICENESS)
    report = _take_standard_output()
    threading.Thread(target=_end_with_standard_input, name="end-with-parent", daemon=True).start()
    if options.memory_mb is not None:
        limit = options.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        app = standalone_app(options.bundle, num_threads=options.threads, allow_factories=options.allow)
    except BaseException as error:  # SystemExit too: a factory may call it
        _write_line(report, {"error": _one_line(error), "kind": _kind_of(error)})
        return 1
    asyncio.run(_serve(app, report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigray.serve.release.candidate")
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-mb", type=int)
    parser.add_argument("--allow", nargs="*", default=[], metavar="PATTERN")
    return parser


async def _serve(app: ModelApp, report: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # it listens from here on: who connects now only waits
    # inherited by its connections: else a small answer waits 40 ms for the other side's acknowledgement of its headers
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S)
    use_fast_http(config, app)  # as in a replica, whose latency the gate is to know
    _write_line(report, {"port": listener.getsockname()[1]})
    await uvicorn.Server(config).serve(sockets=[listener])


def _take_standard_output() -> int:
    """Keep the line to the gate apart from what the model's code prints, which goes with its errors."""
    report = os.dup(1)
    os.dup2(2, 1)
    return report


def _end_with_standard_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _write_line(descriptor: int, document: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(document).encode() + b"\n")


def _kind_of(error: BaseException) -> Kind:
    if any(sign in f"{type(error).__name__}: {error}" for sign in _SIGNS_OF_NO_MEMORY):
        return "memory"
    if isinstance(error, SystemExit):
        return "exit"
    return "refused" if isinstance(error, BigrayError) else "failed"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    shown = text if isinstance(error, BigrayError) else f"{type(error).__name__}: {text}"
    return shown if len(shown) <= LONGEST_ERROR else f"{shown[:LONGEST_ERROR]} ..."


if __name__ == "__main__":
    raise SystemExit(main())
