"""`rayStartParams`: the options of `ray start`, without their dashes, all of them text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.nearest import unknown
from bigray.cluster.checking.shapes import Mistake


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FLAGS = _names(
    "block disable-usage-stats enable-object-reconstruction enable-resource-isolation head include-dashboard "
    "include-log-monitor no-monitor no-redirect-output ray-debugger-external"
)
NUMBERS = _names("num-cpus num-gpus memory object-store-memory system-reserved-cpu system-reserved-memory")
PORTS = _names(
    "port dashboard-port dashboard-agent-listen-port dashboard-agent-grpc-port runtime-env-agent-port "
    "object-manager-port node-manager-port min-worker-port max-worker-port ray-client-server-port metrics-export-port"
)
TEXTS = _names(
    "address autoscaling-config cgroup-path dashboard-host labels labels-file node-ip-address node-name "
    "object-spilling-directory plasma-directory proxy-server-url redis-password redis-shard-ports redis-username "
    "resources system-config temp-dir tracing-startup-hook worker-port-list"
)
START_OPTIONS = FLAGS | NUMBERS | PORTS | TEXTS
"""Of Ray 2.60; a test compares them with `ray start`."""

_OPERATORS = {
    "head": "the operator sets it from the group; remove it",
    "address": "the operator sets it to the head's service; remove it",
    "autoscaling-config": "the operator runs the autoscaler; use enableInTreeAutoscaling",
}


def start_param_mistakes(params: dict[str, Any], path: Path) -> Iterator[Mistake]:
    """What is wrong with the parameters of one group."""
    for name, value in params.items():
        message = _name_fault(name) or (_value_fault(name, value) if isinstance(value, str) else None)
        if message:
            yield (*path, name), message


def _name_fault(name: str) -> str | None:
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name in START_OPTIONS:
        return None
    bare = name.lstrip("-").replace("_", "-")
    if bare in START_OPTIONS:
        return f"is not a key here, did you mean '{bare}'?"
    return unknown(name, START_OPTIONS)


def _value_fault(name: str, value: str) -> str | None:
    if value.startswith("$"):
        return None  # filled in by the pod's shell
    if name in FLAGS and value.lower() not in ("true", "false", ""):
        return f"takes 'true' or 'false', got '{value}'"
    if name in NUMBERS and not re.fullmatch(r"\d+(\.\d+)?", value):
        unit = " (bytes)" if "memory" in name else ""
        return f"takes a plain number{unit}, got '{value}'"
    if name in PORTS and not (value.isdigit() and int(value) <= 65535):
        return f"takes a port, got '{value}'"
    if name == "resources":
        return _resources_fault(value)
    return None


def _resources_fault(value: str) -> str | None:
    """The text goes through a shell, so the JSON stands in quotes of its own."""
    try:
        table = json.loads(value.strip("'") if value.startswith("'") else value)
        table = json.loads(table) if isinstance(table, str) else table
    except ValueError:
        try:
            table = json.loads(value.strip('"').replace('\\"', '"'))
        except ValueError:
            table = None
    if not isinstance(table, dict):
        return 'is not JSON in quotes; write \'"{\\"name\\": 1}"\''
    return None
