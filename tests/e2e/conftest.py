"""Helpers that run the installed command as a user does, in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BIGRAY = str(Path(sys.executable).with_name("bigray"))
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def bigray() -> Run:
    """Run `bigray` with arguments; `env` adds variables. Never joins a cluster unless told to."""

    def run(*arguments: str, timeout: float = 170, env: dict[str, str] | None = None) -> Any:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [BIGRAY, *arguments], env={**clean, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def serve_file(tmp_path: Path) -> str:
    """`serve/local.yaml` on a free port, so that tests do not meet another endpoint."""
    text = Path("serve/local.yaml").read_text()
    file = tmp_path / "serve.yaml"
    file.write_text(text.replace("port: 8000", f"port: {free_port()}"))
    return str(file)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def only_json(text: str) -> Any:
    """The document that `--json` printed, and nothing else on standard output."""
    return json.loads(text)


def ray_processes() -> set[int]:
    """Process ids of everything Ray or HAProxy runs on this machine."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:  # ended while we looked
                continue
            if any(word in command for word in (b"ray::", b"raylet", b"gcs_server", b"haproxy")):
                found.add(int(entry.name))
    return found
