"""What a person reads of a cluster on this machine; `bigray.console` prints it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bigray.cluster.local import LocalStatus, NodeStatus

_STYLES = {"up": "green", "draining": "yellow", "lost": "red"}


def node_table(status: LocalStatus) -> Table:
    """A row for each node, also for those that have ended."""
    table = Table(title=_title(status), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("node", "state", "CPUs", "GPUs", "labels", "id in Ray", "pid", "processes"):
        table.add_column(name, no_wrap=name != "labels", overflow="fold")
    for node in status.nodes:
        table.add_row(*_cells(node))
    return table


def _title(status: LocalStatus) -> str:
    up = sum(node.state in ("up", "draining") for node in status.nodes)
    address = status.cluster.address or "no head yet"
    return f"{status.cluster.name}: {up} of {len(status.nodes)} nodes up on this machine, {address}"


def _cells(status: NodeStatus) -> Iterable[str | Text]:
    node = status.node
    yield node.name
    yield Text(describe_state(status), style=_STYLES.get(status.state, "dim"))
    yield str(node.cpus)
    yield describe_gpus(node.gpus)
    yield ", ".join(f"{key}={value}" for key, value in node.labels.items())
    yield node.node_id[:8]
    yield str(node.root.pid) if node.root and status.processes else ""
    yield str(status.processes)


def describe_gpus(count: int) -> str:
    return f"{count} fake GPU{'s' if count != 1 else ''}" if count else "0"


def describe_state(status: NodeStatus) -> str:
    """One word, and why."""
    node = status.node
    if status.state == "draining" and node.leaves_at is not None:
        return f"draining, {max(0.0, node.leaves_at - time.time()):.0f} s left"
    if status.state == "ended":
        return f"ended by {node.ended_by}"
    return "lost (died by itself)" if status.state == "lost" else status.state


def export_lines(exports: dict[str, str]) -> list[str]:
    """For a shell: `eval "$(bigray cluster local)"`."""
    return [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
