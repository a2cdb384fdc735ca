from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from bigray.journal import Journal, read_journal
from bigray.paths import RunPaths
from bigray.storage import Storage


@pytest.fixture
def paths(storage: Storage) -> RunPaths:
    return RunPaths(storage, "digits-1a2b3c")


def _file(paths: RunPaths, attempt: int) -> Path:
    return Path(paths.storage.root) / paths.journal_file(attempt)


def test_events_of_two_attempts_are_read_in_order(paths: RunPaths) -> None:
    first = Journal.open(paths)
    first.append("epoch", "mlp", step=1)
    first.append("epoch", "mlp", step=2)
    second = Journal.open(paths)
    second.append("epoch", "mlp", step=3)

    events = list(read_journal(paths))

    assert [(event["attempt"], event["step"]) for event in events] == [(1, 1), (1, 2), (2, 3)]
    assert {event["trial"] for event in events} == {"mlp"}
    assert all(event["kind"] == "epoch" and event["time"] > 0 for event in events)


def test_a_run_without_a_journal_has_no_events(paths: RunPaths) -> None:
    assert list(read_journal(paths)) == []


def test_an_event_can_be_read_as_soon_as_it_is_appended(paths: RunPaths) -> None:
    journal = Journal.open(paths)
    journal.append("attempt", plan={"groups": 2})

    assert [event["plan"] for event in read_journal(paths)] == [{"groups": 2}]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _fill_with_zeros(path: Path) -> None:
    """What some filesystems leave of a write after a power cut."""
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1] + b"\0" * 41)


@pytest.mark.parametrize("damage", [_cut, _fill_with_zeros])
def test_a_last_line_lost_in_a_crash_is_left_out(paths: RunPaths, damage: Callable[[Path], None]) -> None:
    first = Journal.open(paths)
    first.append("epoch", step=1)
    first.append("epoch", step=2)
    damage(_file(paths, 1))
    Journal.open(paths).append("epoch", step=3)

    assert [event["step"] for event in read_journal(paths)] == [1, 3]


def test_where_files_cannot_be_appended_to_a_flush_brings_every_event(tmp_path: Path) -> None:
    object_store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    object_store.create_dir("run/journal")
    paths = RunPaths(Storage(object_store, "run", "mock://run"), "run")
    journal = Journal.open(paths)
    journal.append("epoch", step=1)
    journal.flush()
    journal.append("epoch", step=2)
    journal.flush()

    assert [event["step"] for event in read_journal(paths)] == [1, 2]
