from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from bigray.errors import StorageError
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


@pytest.fixture
def object_store(tmp_path: Path) -> RunPaths:
    """A run on a filesystem that is no local one."""
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    filesystem.create_dir("run/journal")
    return RunPaths(Storage(filesystem, "run", "mock://run"), "run")


def test_where_files_cannot_be_appended_to_a_flush_brings_every_event(object_store: RunPaths) -> None:
    paths = object_store
    journal = Journal.open(paths)
    journal.append("epoch", step=1)
    journal.flush(force=True)
    journal.append("epoch", step=2)
    journal.flush(force=True)

    assert [event["step"] for event in read_journal(paths)] == [1, 2]


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr("bigray.journal.time", clock)
    return clock


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was written, in order."""
    written: list[bytes] = []
    write_bytes = Storage.write_bytes

    def recording(self: Storage, path: str, data: bytes) -> None:
        write_bytes(self, path, data)
        written.append(data)

    monkeypatch.setattr(Storage, "write_bytes", recording)
    return written


def test_a_flush_without_news_uploads_nothing(object_store: RunPaths, clock: _Clock, uploads: list[bytes]) -> None:
    journal = Journal.open(object_store)
    journal.append("epoch", step=1)
    uploads.clear()
    for _ in range(3):
        journal.flush(force=True)
        clock.now += 60.0
        journal.flush()

    assert len(uploads) == 1


def test_news_are_uploaded_at_most_every_five_seconds(
    object_store: RunPaths, clock: _Clock, uploads: list[bytes]
) -> None:
    journal = Journal.open(object_store)
    uploads.clear()
    for step in range(21):  # ten seconds, with something new twice in each
        journal.append("epoch", step=step)
        journal.flush()
        clock.now += 0.5

    assert [data.count(b"\n") for data in uploads] == [1, 11, 21]


def test_a_forced_flush_does_not_wait(object_store: RunPaths, clock: _Clock) -> None:
    journal = Journal.open(object_store)
    journal.append("epoch", step=1)
    journal.flush()
    journal.append("epoch", step=2)
    journal.flush(force=True)

    assert [event["step"] for event in read_journal(object_store)] == [1, 2]


def test_what_could_not_be_uploaded_is_tried_again(
    object_store: RunPaths, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Storage, path: str, data: bytes) -> None:
        raise StorageError("no network")

    journal = Journal.open(object_store)
    journal.append("epoch", step=1)
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write_bytes", fail)
        with pytest.raises(StorageError, match="no network"):
            journal.flush()
    journal.flush()

    assert [event["step"] for event in read_journal(object_store)] == [1]


def test_the_next_attempt_is_numbered_after_the_highest_one(paths: RunPaths) -> None:
    for _ in range(3):
        Journal.open(paths).append("epoch")
    _file(paths, 1).unlink()

    assert Journal.open(paths).attempt == 4
    assert len(list(read_journal(paths))) == 2, "no older attempt was written over"


def test_a_file_that_is_no_attempts_is_neither_counted_nor_read(paths: RunPaths) -> None:
    Journal.open(paths).append("epoch", step=1)
    _file(paths, 1).with_name(".0009.jsonl.77.tmp").write_text('{"step": 9}\n')

    assert Journal.open(paths).attempt == 2
    assert [event["step"] for event in read_journal(paths)] == [1]


def test_two_drivers_that_start_together_get_a_file_each(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunPaths, "attempts", lambda self: [])  # both looked before either wrote
    journals = [Journal.open(paths), Journal.open(paths)]
    for journal in journals:
        journal.append("epoch")
    monkeypatch.undo()

    assert [event["attempt"] for event in read_journal(paths)] == [1, 2]


def test_an_event_that_cannot_be_written_is_a_storage_error(paths: RunPaths) -> None:
    journal = Journal.open(paths)
    _file(paths, 1).unlink()
    _file(paths, 1).mkdir()

    with pytest.raises(StorageError, match=r"journal/0001\.jsonl: cannot write"):
        journal.append("epoch")


@dataclass(frozen=True)
class _Event:
    kind: str
    trial_id: str
    values: dict[str, Any]


def _epochs(*steps: int) -> list[_Event]:
    return [_Event("epoch", "mlp", {"step": step}) for step in steps]


def test_a_batch_of_events_is_read_like_events_appended_one_by_one(paths: RunPaths, clock: _Clock) -> None:
    journal = Journal.open(paths)
    for step in range(1, 4):
        journal.append("epoch", "mlp", step=step)
    one_by_one = list(read_journal(paths))
    Journal.open(paths).append_all(_epochs(1, 2, 3))
    batch = list(read_journal(paths))[3:]

    assert [{**event, "attempt": 1} for event in batch] == one_by_one


def test_a_batch_of_events_is_one_write(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    append = Storage.append_line
    monkeypatch.setattr(
        Storage, "append_line", lambda self, path, line: (writes.append(line), append(self, path, line))[1]
    )
    journal = Journal.open(paths)
    journal.append_all(_epochs(*range(1000)))
    journal.append_all([])

    assert len(writes) == 1
    assert [event["step"] for event in read_journal(paths)] == list(range(1000))


@pytest.mark.parametrize("damage", [_cut, _fill_with_zeros])
def test_a_crash_inside_a_batch_loses_only_what_was_not_written(
    paths: RunPaths, damage: Callable[[Path], None]
) -> None:
    journal = Journal.open(paths)
    journal.append_all(_epochs(1, 2))
    journal.append_all(_epochs(3, 4, 5))
    damage(_file(paths, 1))
    Journal.open(paths).append_all(_epochs(6))

    assert [event["step"] for event in read_journal(paths)] == [1, 2, 3, 4, 6]


def test_where_files_cannot_be_appended_to_a_flush_brings_batches_too(object_store: RunPaths) -> None:
    journal = Journal.open(object_store)
    journal.append_all(_epochs(1, 2))
    journal.flush(force=True)
    journal.append_all(_epochs(3))
    journal.flush(force=True)

    assert [event["step"] for event in read_journal(object_store)] == [1, 2, 3]
