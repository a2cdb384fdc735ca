from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.kinds import check_file

CLUSTER = Path(__file__).parents[4] / "cluster"


@pytest.fixture
def faults_after(tmp_path: Path) -> Callable[..., tuple[list[Fault], str]]:
    """Check one of our files with the first `old` replaced; gives its faults, without notes, and its new text."""

    def check(file: str, old: str, new: str) -> tuple[list[Fault], str]:
        text = (CLUSTER / file).read_text()
        assert old in text, f"{file} has no {old!r} to plant a mistake in"
        edited = tmp_path / Path(file).name
        edited.write_text(text.replace(old, new, 1))
        return [fault for fault in check_file(edited) if not fault.is_note], edited.read_text()

    return check


@pytest.fixture
def assert_told_once(faults_after: Callable[..., tuple[list[Fault], str]]) -> Callable[..., None]:
    """A mistake planted in one of our files is told by one line, with its words, on the line that holds `where`."""

    def check(file: str, old: str, new: str, where: str, says: str) -> None:
        faults, text = faults_after(file, old, new)
        assert len(faults) == 1, "\n".join(str(fault) for fault in faults) or "no fault was found"
        told = str(faults[0])
        assert says in told
        assert "\n" not in told
        line = text[: text.index(where)].count("\n") + 1
        assert faults[0].line == line, told

    return check
