"""How a benchmark tells a server what to do while it serves: a line of JSON each way."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ANSWERS = "BENCHMARK_ANSWERS"
"""Environment variable: the file that answers are appended to, since libraries write to standard output."""


def obey(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Do what standard input says, `["name", argument, ...]` a line, until it ends or Ctrl-C."""
    try:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            _answer(_timed(handlers[name], arguments))
    except KeyboardInterrupt:
        pass


def _timed(handler: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        result: dict[str, Any] = {"result": handler(*arguments)}
    except Exception as error:  # the benchmark shows it, and goes on
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.monotonic() - started}


def _answer(document: Mapping[str, Any]) -> None:
    with Path(os.environ[ANSWERS]).open("a") as file:
        file.write(json.dumps(document) + "\n")
