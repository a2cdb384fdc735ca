"""A simulation as a person reads it: a table of figures, and the course of the replicas drawn in characters."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bigray.serve.scaling.simulation import SimulationResult

FloatArray = NDArray[np.float64]

EIGHTHS = " ▁▂▃▄▅▆▇█"
MARGIN = 8
"""Characters left of a chart, for its scale."""


def simulation_table(result: SimulationResult) -> Table:
    """The figures, a line each."""
    table = Table(title=f"{result.trace}: what it would do", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _figures(result):
        table.add_row(name, value)
    return table


def _figures(result: SimulationResult) -> list[tuple[str, str]]:
    settings, latency = result.settings, result.latency_s
    share = result.shed / result.requests if result.requests else 0.0
    ups = sum(change.after > change.before for change in result.changes)
    rows = [
        ("requests", f"{result.requests:,} in {result.duration_s:,.0f} s"),
        ("shed", f"{result.shed:,} ({share:.2%})"),
        ("latency", ", ".join(f"{name} {_milliseconds(latency[name])}" for name in ("p50", "p95", "p99", "max"))),
        ("replicas", f"{settings.min_replicas} to {settings.max_replicas} allowed, at most {result.peak_replicas} ran"),
        ("changes", f"{ups} up, {len(result.changes) - ups} down"),
        ("replica time", f"{result.replica_seconds:,.0f} s, {result.cpu_hours:.3f} CPU hours"),
    ]
    if result.reaction_s is not None:
        rows.append(("first step", f"the next replica took requests {result.reaction_s:.1f} s later"))
    if result.cost is not None:
        rows.append(("cost", f"{result.cost:.4f} at the price given for a replica hour"))
    return rows


def _milliseconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1000:,.1f} ms"


def simulation_chart(result: SimulationResult, width: int = 72) -> Group:
    """Three charts over time, one below the other: requests a second, ready replicas, and the p99 of latency."""
    timeline = result.timeline
    width = max(8, width - MARGIN)
    return Group(
        _chart("requests/s", _columns(timeline.requests_per_s, width, np.mean), 3),
        _chart("replicas", _columns(timeline.replicas, width, np.max), 4),
        _chart("p99, ms", _columns(timeline.p99_s * 1000, width, np.max), 3),
        Text(f"{'':{MARGIN}}0 s to {result.duration_s:,.0f} s"),
    )


def _columns(values: FloatArray, width: int, reduce: Callable[[FloatArray], np.floating]) -> list[float]:
    """As many values as there are columns, each of several bins; NaN counts as 0."""
    parts = np.array_split(np.nan_to_num(values), min(width, len(values)))
    return [float(reduce(part)) for part in parts]


def _chart(name: str, columns: list[float], height: int) -> Text:
    """Bars from below, with the highest value at the scale's end."""
    top = max(columns) or 1.0
    filled = [round(value / top * height * 8) for value in columns]
    lines = [f"{'':{MARGIN}}{name}"]
    for level in reversed(range(height)):
        scale = f"{top:,.5g}" if level == height - 1 else ""
        bars = "".join(EIGHTHS[min(8, max(0, eighths - 8 * level))] for eighths in filled)
        lines.append(f"{scale:>{MARGIN - 1}} {bars}")
    return Text("\n".join(lines), no_wrap=True)
