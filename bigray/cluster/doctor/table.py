"""What a person reads of an examination, as renderables; `bigray.console` prints them."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bigray.cluster.doctor.findings import Finding, Report

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def report_table(report: Report) -> Table:
    """A line for each finding, in the order of the checks, with what to do about it below."""
    nodes = f"{len(report.nodes):,} node{'s' if len(report.nodes) != 1 else ''}"
    table = Table(title=f"cluster at {report.address}: {nodes}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("check", "", "node"):
        table.add_column(name, no_wrap=name != "node", overflow="fold")
    table.add_column("found, and what to do", overflow="fold")
    for finding in report.findings:
        mark = Text(finding.status, STYLES[finding.status])
        table.add_row(Text(finding.name), mark, Text(finding.node or "all"), _told(finding))
    return table


def _told(finding: Finding) -> Text:
    text = Text(finding.what)
    if finding.fix:
        text.append(f"\n-> {finding.fix}", "bold")
    return text


def summary(report: Report) -> str:
    """One line."""
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    return f"{counts}   {report.wall_s:.1f} s"
