"""What a person reads of releases, as renderables and lines; `bigray.console` prints them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bigray.serve.release.lineage import Lineage
from bigray.serve.release.record import ChannelState, HistoryEntry, ReplicaReport


class Check(Protocol):
    """One check of the gate."""

    @property
    def name(self) -> str: ...
    @property
    def passed(self) -> bool: ...
    @property
    def detail(self) -> str: ...
    @property
    def seconds(self) -> float: ...


def versions_table(state: ChannelState, reports: Sequence[ReplicaReport]) -> Table:
    """What happened to which version, newest first; the live one and the one to go back to are marked."""
    table = Table(title=_title(state, reports), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("at (UTC)", "version", "now", "in memory", "what"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    roles = roles_of(state)
    shown: set[str] = set()
    if state.rollout is not None:
        version = state.rollout.release.version
        shown.add(version)
        table.add_row("now", version, roles[version], _in_memory(version, reports), "", "", style="yellow")
    for entry in reversed(state.history):
        is_newest = entry.version not in shown
        shown.add(entry.version)
        role = roles.get(entry.version, "") if is_newest else ""
        memory = _in_memory(entry.version, reports) if is_newest else ""
        cells = (_short_time(entry.at), entry.version, role, memory, entry.action, entry.why)
        table.add_row(*map(Text, cells), style=_STYLES.get(role))
    return table


def history_document(state: ChannelState) -> dict[str, Any]:
    """The same for scripts, with the spans of time in which each version was live."""
    document: dict[str, Any] = state.model_dump(mode="json")
    return document | {"served": [{"version": v, "from": start, "until": end} for v, start, end in spans(state)]}


def spans(state: ChannelState) -> tuple[tuple[str, str, str | None], ...]:
    """Which version was live from when until when, oldest first; the last one still is, so it has no end.

    A history that has lost its first entries may begin with a span whose version it does not tell: left out.
    """
    began: list[tuple[str, str]] = []
    for entry, version in _became_live(state):
        if not began or began[-1][0] != version:
            began.append((version, entry.at))
    ends: list[str | None] = [at for _, at in began[1:]]
    return tuple((version, at, end) for (version, at), end in zip(began, [*ends, None], strict=False) if version)


def roles_of(state: ChannelState) -> dict[str, str]:
    """What each version in memory is there for."""
    roles: dict[str, str] = {}
    if state.previous is not None:
        roles[state.previous.version] = "previous"
    if (rollout := state.rollout) is not None:
        share = f" {rollout.share:.0%}" if rollout.kind == "canary" else ""
        roles[rollout.release.version] = ("loading" if rollout.kind == "load" else rollout.kind) + share
    return roles | {state.live.version: "live"}


def lineage_table(lineage: Lineage) -> Table:
    """Everything that made a version, one thing a line."""
    table = Table(title=f"version {lineage.version}", show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    place = "" if lineage.step is None else f", step {lineage.step:,}"
    place += "" if lineage.epoch is None else f" (epoch {lineage.epoch})"
    rows = {
        "job": lineage.name,
        "run": lineage.run,
        "trial": f"{lineage.trial}{place}",
        "model": f"{lineage.model} ({lineage.factory})" if lineage.factory else lineage.model,
        "metrics": _pairs(lineage.metrics),
        "settings": _pairs(lineage.config),
        "seeds": _pairs(lineage.seeds),
        "data": lineage.data_fingerprint,
        "predicts": f"{lineage.target} ({lineage.task}) from {_few(lineage.inputs)}" if lineage.task else "",
        "git": lineage.git or "not in a repository",
        "versions": _pairs(lineage.versions),
        **{name.replace("_", " "): _plain(value) for name, value in lineage.more.items()},
        "weights": f"sha256 {lineage.weights_sha256}",
        "bundle": lineage.bundle,
        "also in": ", ".join(lineage.copies),
        "schema": "" if lineage.schema_version is None else str(lineage.schema_version),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def gate_table(checks: Sequence[Check]) -> Table:
    """What a bundle was asked before it may take traffic."""
    table = Table(title="gate", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        mark = Text("passed", "green") if check.passed else Text("forced", "bold yellow")
        if check.detail.startswith("skipped"):
            mark = Text("skipped", "dim")
        table.add_row(Text(check.name), mark, f"{check.seconds:.2f}", Text(check.detail))
    return table


_STYLES = {"live": "bold green", "previous": "cyan"}
_MOST_NAMES = 6


def _title(state: ChannelState, reports: Sequence[ReplicaReport]) -> str:
    if not reports:
        return f"revision {state.revision}; no replica has reported"
    current = sum(report.live == state.live.version for report in reports)
    return f"revision {state.revision}; {current} of {len(reports)} replicas answer with {state.live.version}"


def _in_memory(version: str, reports: Sequence[ReplicaReport]) -> str:
    count = sum(version in report.loaded for report in reports)
    return f"{count} of {len(reports)}" if count else ""


def _became_live(state: ChannelState) -> list[tuple[HistoryEntry, str]]:
    """Each entry after which it is known what is live; an empty version where it is not."""
    found: list[tuple[HistoryEntry, str]] = []
    live, previous = "", ""
    for entry in state.history:
        if entry.action in ("deployed", "promoted", "forced"):
            live, previous = entry.version, live
        elif entry.action == "rolled back" and entry.version == live:
            live, previous = previous, live
        found.append((entry, live))
    return found


def _short_time(at: str) -> str:
    try:
        return datetime.fromisoformat(at).strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return at


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _few(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")
