"""What a person and a script get of a report."""

from __future__ import annotations

import json
import socket

import pytest
from rich.console import Console

import bigray.cli.doctor  # noqa: F401  # registers the command
from bigray import cli
from bigray.cluster.doctor.findings import Finding, Report
from bigray.cluster.doctor.table import report_table, summary

REPORT = Report(
    "10.0.0.1:6379",
    ("10.0.0.1", "10.0.0.2"),
    (
        Finding("ray", "pass", "2.60.0 on all 2 nodes"),
        Finding("memory", "warn", "/dev/shm has only 0.1 GiB", "docker run --shm-size=2g", "10.0.0.2"),
        Finding("token", "fail", "[/x] has mode 644", "chmod 600 [/x]", "the driver"),
    ),
    wall_s=3.21,
)


def test_each_finding_has_its_status_its_node_and_its_fix() -> None:
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(report_table(REPORT))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]

    assert lines[0] == "cluster at 10.0.0.1:6379: 2 nodes"
    assert "ray pass all 2.60.0 on all 2 nodes" in lines
    assert "memory warn 10.0.0.2 /dev/shm has only 0.1 GiB" in lines
    assert "-> docker run --shm-size=2g" in lines
    assert "token fail the driver [/x] has mode 644" in lines
    assert summary(REPORT) == "1 pass, 1 warn, 1 fail   3.2 s"


def test_a_script_gets_plain_values() -> None:
    document = json.loads(json.dumps(REPORT.to_json()))

    assert (document["ok"], document["counts"]) == (False, {"pass": 1, "warn": 1, "fail": 1})
    assert document["findings"][1]["fix"] == "docker run --shm-size=2g"
    assert document["findings"][0]["node"] is None


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str]:
    with pytest.raises(SystemExit) as ended:
        cli.app(("doctor", *arguments))
    printed = capsys.readouterr()
    assert printed.out == ""
    return ended.value.code, printed.err


def test_a_dead_address_is_one_line_and_exit_5(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.cluster.connect.JOIN_PATIENCE_S", 0.0)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr("bigray.cluster.connect.prepare_environment", lambda joining: None)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # held, and not listened at
        code, told = _refused(capsys, "--address", f"127.0.0.1:{held.getsockname()[1]}", "--json")

    assert code == 5
    assert told.count("\n") == 1
    assert "nothing answers there (connection refused): start it with ray start --head" in told


def test_a_job_and_a_storage_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = _refused(capsys, "--job", "examples/digits/job.toml", "--storage", "/shared")

    assert (code, told) == (2, "error: --storage: --job names one already; give one of the two\n")
