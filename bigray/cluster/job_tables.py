"""What a person reads of jobs and of what is sent with them, as renderables and lines; `bigray.console` prints them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bigray.cluster.jobs import Job
from bigray.cluster.package import MIB, Package

_STYLES = {"SUCCEEDED": "green", "FAILED": "red", "STOPPED": "yellow"}


def jobs_table(jobs: Sequence[Job], now_s: float | None = None) -> Table:
    """A row for each job, in the order given."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("id", "status", "started (UTC)", "took", "exit"):
        table.add_column(name, no_wrap=True)
    table.add_column("command", overflow="fold")
    for job in jobs:
        code = str(job.exit_code) if job.has_ended else ""
        status = Text(job.status, style=_STYLES.get(job.status, ""))
        table.add_row(job.id, status, _at(job.started_s), _took(job, now_s or time.time()), code, Text(job.command))
    return table


def package_table(package: Package) -> Table:
    """The ten largest files that are sent."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("MiB", justify="right", no_wrap=True)
    table.add_column("the largest", overflow="fold")
    for file in package.largest():
        table.add_row(f"{file.size / MIB:,.2f}", Text(file.path))
    return table


def package_line(package: Package) -> str:
    """How much is sent of which folder."""
    return f"{len(package.files):,} files of {package.folder}, {package.size / MIB:,.1f} MiB"


def left_out_lines(package: Package) -> list[str]:
    """One line for each thing that is not sent though no ignore file names it."""
    return [f"not sent: {left.path}: {left.why}" for left in package.left_out]


def package_document(package: Package) -> dict[str, Any]:
    """For scripts."""
    return {
        "folder": str(package.folder),
        "files": len(package.files),
        "bytes": package.size,
        "largest": [{"path": file.path, "bytes": file.size} for file in package.largest()],
        "not_sent": [{"path": left.path, "why": left.why} for left in package.left_out],
    }


def _at(started_s: float | None) -> str:
    return "" if started_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started_s))


def _took(job: Job, now_s: float) -> str:
    if job.started_s is None:
        return ""
    minutes, seconds = divmod(max(0, round((job.ended_s or now_s) - job.started_s)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
