"""How the rows of a data set are cut into parts, and which of them are still to do. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigray.errors import SpecError

MOST_ROWS, FEWEST_ROWS, WANTED_PARTS = 8192, 256, 32
"""Of a part of a table in memory: small enough for every core to get some, and for little to be lost when a process
dies. A Parquet file's own row groups are its parts."""


@dataclass(frozen=True)
class Part:
    """Rows that are predicted together and end up in one file."""

    number: int
    start: int
    """Number of its first row in the whole data set."""
    stop: int
    """One behind its last row."""

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def file(self) -> str:
        """Sorted by name, the files are in the order of the rows."""
        return f"part-{self.number:06d}.parquet"


def cut(num_rows: int) -> tuple[Part, ...]:
    """Parts of equal size, but that the last one may be smaller; the same ones for the same number of rows."""
    rows_per_part = min(MOST_ROWS, max(FEWEST_ROWS, -(-num_rows // WANTED_PARTS)))
    starts = range(0, num_rows, rows_per_part)
    return parts_of([min(rows_per_part, num_rows - start) for start in starts])


def parts_of(sizes: Sequence[int]) -> tuple[Part, ...]:
    """Parts of these numbers of rows, one after the other; one without rows is none."""
    found: list[Part] = []
    start = 0
    for size in sizes:
        if size:
            found.append(Part(len(found), start, start + size))
        start += size
    return tuple(found)


def remaining(parts: Sequence[Part], done: Mapping[str, int]) -> tuple[Part, ...]:
    """Those without a file of all their rows; `done` holds the rows of each whole file that is there."""
    return tuple(part for part in parts if done.get(part.file) != part.num_rows)


def check_same(before: Mapping[str, object], asked: Mapping[str, object], place: str) -> None:
    """Refuse to go on with, or to write over, predictions that something else made.

    Raises:
        SpecError: names what differs.
    """
    different = [name for name in asked if before.get(name) != asked[name]]
    if different:
        name = different[0]
        raise SpecError(
            f"--out: {place} holds predictions of another {name.replace('_', ' ')} ({before.get(name)}, now "
            f"{asked[name]}); choose another place, or remove it"
        )
