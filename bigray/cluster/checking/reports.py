"""What `bigray cluster check` has to say of each file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.kinds import Kind, check_file, kind_of


@dataclass(frozen=True)
class FileReport:
    """A file, its kind, and what was found in it."""

    file: str
    kind: Kind | None
    """None where it could not be read, or is none of those that are checked."""
    found: tuple[Fault, ...]

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(fault for fault in self.found if not fault.is_note)

    @property
    def notes(self) -> tuple[Fault, ...]:
        return tuple(fault for fault in self.found if fault.is_note)

    @property
    def is_ok(self) -> bool:
        return not self.faults

    @property
    def summary(self) -> str:
        return f"{self.file}: {self.kind}, ok"

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "kind": self.kind,
            "ok": self.is_ok,
            "faults": [_fault_to_json(fault) for fault in self.faults],
            "notes": [_fault_to_json(note) for note in self.notes],
        }


def check_files(files: Iterable[Path]) -> list[FileReport]:
    """A report for each file, in order. Raises nothing for what is in them."""
    return [FileReport(str(file), _kind(file), tuple(check_file(file))) for file in files]


def _kind(file: Path) -> Kind | None:
    try:
        return kind_of(file.read_text(encoding="utf-8"), file.name) if file.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None


def _fault_to_json(fault: Fault) -> dict[str, Any]:
    return {"line": fault.line, "place": fault.place, "message": fault.message}
