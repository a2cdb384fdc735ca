"""One thing that is wrong with a cluster file, and where."""

from __future__ import annotations

from dataclasses import dataclass

Path = tuple[str | int, ...]
"""Keys and list indices from a document's root to a value in it."""


@dataclass(frozen=True)
class Fault:
    """A mistake of a file, told in one line: `str()` is `FILE:LINE: place: message`, without what is not known."""

    place: str
    """Which value: the dotted path of its key, an instruction or a directive; may be empty."""
    message: str
    """What is wrong with it, the value found, and the way out."""
    line: int | None = None
    """1-based, in the file."""
    file: str | None = None
    """Filled in by `check_file`."""
    is_note: bool = False
    """True for what is told and is no mistake, such as a rule that could not be checked here."""

    def __str__(self) -> str:
        where = self.file or ""
        if self.line is not None:
            where = f"{where}:{self.line}" if where else f"line {self.line}"
        return ": ".join(part for part in (where, self.place, self.message.replace("\n", " ")) if part)


def dotted(path: Path) -> str:
    """`("provider", "worker_ips", 0)` -> `provider.worker_ips[0]`."""
    shown = ""
    for step in path:
        shown += f"[{step}]" if isinstance(step, int) else f".{step}" if shown else str(step)
    return shown
