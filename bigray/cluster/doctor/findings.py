"""What the doctor says: one verdict a finding, and all of them together."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One verdict."""

    name: str
    """Of the check."""
    status: Status
    what: str
    """What was found, in one line."""
    fix: str = ""
    """The next command or setting; empty where nothing is wrong."""
    node: str | None = None
    """None where it is about the whole cluster."""


@dataclass(frozen=True)
class Report:
    """Of one examination."""

    address: str
    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]
    wall_s: float

    @property
    def has_failed(self) -> bool:
        return any(finding.status == "fail" for finding in self.findings)

    def counts(self) -> dict[Status, int]:
        counted = Counter(finding.status for finding in self.findings)
        return {status: counted[status] for status in ("pass", "warn", "fail")}

    def to_json(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "nodes": list(self.nodes),
            "ok": not self.has_failed,
            "counts": self.counts(),
            "findings": [asdict(finding) for finding in self.findings],
            "wall_s": self.wall_s,
        }
