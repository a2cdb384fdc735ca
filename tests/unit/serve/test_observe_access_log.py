from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bigray.errors import SpecError
from bigray.serve.observe.access_log import LONGEST_TEXT, AccessLog


def note(log: AccessLog, **others: Any) -> None:
    facts: dict[str, Any] = {
        "id": "f00",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "seconds": 0.0123456,
        "rows": 2,
        "body_bytes": 345,
        "model": "animals",
        "version": "0123456789ab",
        "key_id": "k1",
        "client": "10.0.0.7",
    }
    log.write(**{**facts, **others})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_each_request_is_a_line_of_json(tmp_path):
    log = AccessLog(str(tmp_path / "logs" / "access.jsonl"))
    note(log)
    note(log, id="f01", status=404, model="", version="", key_id="")
    log.close()
    first, second = lines(tmp_path / "logs" / "access.jsonl")

    assert datetime.fromisoformat(first.pop("time")).utcoffset() == timedelta(0)
    assert first == {
        "id": "f00",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "ms": 12.346,
        "rows": 2,
        "bytes": 345,
        "model": "animals",
        "version": "0123456789ab",
        "key": "k1",
        "client": "10.0.0.7",
    }
    assert (second["id"], second["status"]) == ("f01", 404)


@pytest.mark.parametrize("name", ["path", "id", "client", "method"])
@pytest.mark.parametrize(
    "text", ['a"}\n{"status":200}', "a\r\nb", "\x1b[31mred\x07", "\x9b31m\x7f", "\u2028", "\ud800"]
)
def test_a_caller_cannot_write_a_line_of_its_own(tmp_path, name, text):
    log = AccessLog(str(tmp_path / "access.jsonl"))
    note(log, **{name: text})
    log.close()
    written = (tmp_path / "access.jsonl").read_bytes()

    assert written.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in written[:-1])
    assert lines(tmp_path / "access.jsonl")[0][name] == text


def test_long_words_of_a_caller_are_cut(tmp_path):
    log = AccessLog(str(tmp_path / "access.jsonl"))
    note(log, path="/" + "x" * 100_000)
    log.close()

    assert len(lines(tmp_path / "access.jsonl")[0]["path"]) == LONGEST_TEXT


def test_of_a_sample_of_nothing_errors_are_kept(tmp_path):
    log = AccessLog(str(tmp_path / "access.jsonl"), sample=0.0)
    for status in (200, 400, 200, 503, 304):
        note(log, status=status)
    log.close()

    assert [line["status"] for line in lines(tmp_path / "access.jsonl")] == [400, 503]


def test_a_sample_keeps_about_its_share(tmp_path):
    log = AccessLog(str(tmp_path / "access.jsonl"), sample=0.5)
    for _ in range(2000):
        note(log)
    log.close()

    assert 800 < len(lines(tmp_path / "access.jsonl")) < 1200


def test_lines_beyond_the_queue_are_dropped_and_told(tmp_path):
    log = AccessLog(str(tmp_path / "access.jsonl"), most_waiting=0)
    for _ in range(7):
        note(log)
    log.close()

    assert log.num_lost == 7
    assert [line["lost"] for line in lines(tmp_path / "access.jsonl")] == [7]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_loses_lines_and_nothing_else():
    log = AccessLog("/dev/full")
    for _ in range(5):
        note(log)
    log.close()

    assert log.num_lost == 5


def test_a_folder_that_cannot_be_made_loses_lines_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("")
    log = AccessLog(str(tmp_path / "file" / "access.jsonl"))
    note(log)
    log.close()

    assert log.num_lost == 1


def test_a_large_file_makes_room_for_a_new_one(tmp_path):
    path = tmp_path / "access.jsonl"
    for number in range(5):
        log = AccessLog(str(path), max_bytes=1, num_kept=2)
        note(log, id=f"r{number}")
        log.close()

    assert sorted(file.name for file in tmp_path.iterdir()) == ["access.jsonl.1", "access.jsonl.2"]
    assert [lines(tmp_path / f"access.jsonl.{number}")[0]["id"] for number in (1, 2)] == ["r4", "r3"]


def test_without_old_files_a_large_one_is_deleted(tmp_path):
    log = AccessLog(str(tmp_path / "access.jsonl"), max_bytes=1, num_kept=0)
    note(log)
    log.close()

    assert list(tmp_path.iterdir()) == []


def test_a_log_goes_on_where_it_ended(tmp_path):
    for number in range(2):
        log = AccessLog(str(tmp_path / "access.jsonl"))
        note(log, id=f"r{number}")
        log.close()

    assert [line["id"] for line in lines(tmp_path / "access.jsonl")] == ["r0", "r1"]


def test_replicas_of_a_machine_may_share_a_file(tmp_path):
    logs = [AccessLog(str(tmp_path / "access.jsonl"), max_bytes=20_000, num_kept=50) for _ in range(3)]
    for number in range(1000):
        for log in logs:
            note(log, id=str(number))
    for log in logs:
        log.close()
    found = [line for file in tmp_path.iterdir() for line in lines(file)]

    assert len(found) == 3000


def test_without_a_path_there_is_no_log_and_no_thread():
    log = AccessLog(None)
    note(log)
    log.close()

    assert log.num_lost == 0


def test_an_object_store_is_no_place_for_lines():
    with pytest.raises(SpecError, match="'s3://bucket/log' is not a local file"):
        AccessLog("s3://bucket/log")
