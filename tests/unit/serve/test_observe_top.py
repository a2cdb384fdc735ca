from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from rich.console import Console

from bigray.errors import DeployError
from bigray.serve.observe.stats import StatsHistory
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.observe.top import SHOWN_REPLICAS, top_view, watch

URL = "http://127.0.0.1:8000/animals"
LIVE, CANDIDATE = "0123456789ab", "fedcba987654"


def stats(num_replicas: int = 3, errors: int = 0, **rollout: Any) -> dict[str, Any]:
    """The document that replicas with some traffic give."""
    snapshots = {}
    for number in range(num_replicas):
        uptime_s = 3600.0 * number + 40
        now = iter([0.0, uptime_s])
        telemetry = Telemetry(lambda now=now: next(now))
        telemetry.set_versions("animals", LIVE, **rollout)
        telemetry.tick(uptime_s - 1, 0.0, 1)
        for _ in range(100):
            telemetry.record("animals", LIVE, "predict", 200, 0.0123, 1, 100)
        for _ in range(errors):
            telemetry.record("animals", LIVE, "predict", 500, 0.1, 1, 100)
        if rollout:
            telemetry.record("animals", CANDIDATE, "predict", 200, 0.02, 1, 100)
        telemetry.queued(number, 0.0)
        telemetry.tick(uptime_s, number / num_replicas, 1)
        snapshots[f"animals#Model#replica{number:02d}"] = telemetry.snapshot()
    return StatsHistory().summary(snapshots)


def drawn(document: dict[str, Any], width: int, earlier: dict[str, Any] | None = None, **others: Any) -> list[str]:
    return exported(document, width, earlier, **others).splitlines()


def exported(
    document: dict[str, Any], width: int, earlier: dict[str, Any] | None = None, *, styles: bool = False, **others: Any
) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(top_view(document, earlier, width, url=URL, **others))
    return console.export_text(styles=styles)


def row(lines: Sequence[str], name: str) -> list[str]:
    (found,) = [line for line in lines if line.strip().startswith(name)]
    return found.split()


def test_the_head_names_the_endpoint_its_version_and_its_replicas():
    assert drawn(stats(), 100)[0] == f"{URL}  live {LIVE}  3 replicas"


def test_each_replica_has_a_row_and_there_is_a_total():
    lines = drawn(stats(), 130)

    assert row(lines, "replica01")[:6] == ["replica01", LIVE, "100", "12.7", "15.9", "1"]
    assert row(lines, "replica01")[-5:] == ["33%", "0", "0", "61", "min"]
    assert row(lines, "total")[:5] == ["total", "300", "12.7", "15.9", "3"]


@pytest.mark.parametrize("width", [60, 80, 100, 130, 200])
@pytest.mark.parametrize("scale", [1, 10_000])
def test_no_line_is_wider_than_the_terminal_and_no_row_is_two(width, scale):
    document = stats(candidate=CANDIDATE, kind="canary", share=0.1)
    for one in (*document["replicas"], document["total"]):
        for name in ("requests", "errors", "rate", "queued"):
            one[name] *= scale
    lines = drawn(document, width, rates=[float(number) for number in range(60)])

    assert max(map(len, lines)) <= width
    assert len([line for line in lines if line.strip().startswith("replica0")]) == 3
    # an ellipsis may end a line of words, but no figure
    assert not any("…" in line for line in lines[: lines.index(f"canary {CANDIDATE} answers 10% of the requests")])


def test_a_narrow_terminal_keeps_what_matters_most():
    assert row(drawn(stats(), 80), "replica ") == [
        *("replica", "live", "req/s", "p50", "ms", "p99", "ms", "queued", "busy", "errors", "uptime")
    ]
    assert "shed" in row(drawn(stats(), 100), "replica ")


def test_a_busy_replica_has_a_longer_bar():
    lines = drawn(stats(), 130)
    bars = ["".join(row(lines, f"replica0{number}")).count("█") for number in range(3)]

    assert bars[0] == 0 < bars[1] < bars[2] < 20


def test_errors_since_the_last_look_stand_out():
    def red(earlier: dict[str, Any] | None) -> bool:
        return "\x1b[1;31m" in exported(stats(errors=5), 100, earlier, styles=True)

    assert red(stats(errors=2))
    assert not red(stats(errors=5))
    assert not red(None)


def test_the_rates_of_late_are_a_line_of_bars():
    last = drawn(stats(), 100, rates=[0.0, 50.0, 100.0, 25.0])[-1]

    assert last == "▁▅█▃  25 requests/s, at most 100"


def test_rates_of_nothing_are_drawn_too():
    assert drawn(stats(), 100, rates=[0.0, 0.0])[-1].startswith("▁▁")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("canary", f"canary {CANDIDATE} answers 10% of the requests"),
        ("shadow", f"shadow {CANDIDATE} is asked copies of 10% of the requests"),
        ("load", f"candidate {CANDIDATE} is held ready, without traffic"),
    ],
)
def test_a_candidate_is_told_of(kind, words):
    lines = drawn(stats(candidate=CANDIDATE, kind=kind, share=0.1), 100)

    assert words in lines
    assert f"  live      {LIVE}  300 requests, 0 errors, p50 12.7 ms, p99 15.9 ms" in lines
    assert any(line.startswith(f"  candidate {CANDIDATE}  3 requests, 0 errors") for line in lines)


def test_the_comparison_of_a_rollout_is_told_where_there_is_one():
    document = stats(candidate=CANDIDATE, kind="shadow", share=0.1)
    document["comparison"] = {"compared_rows": 2000, "disagreeing_rows": 3, "candidate": {"errors": 1}}

    assert "  compared  2,000 rows, 3 differ (0.15%); the candidate failed 1 requests" in drawn(document, 100)


def test_replicas_that_still_serve_another_version_are_counted():
    document = stats()
    document["replicas"][1]["live"] = CANDIDATE

    assert drawn(document, 100)[0].endswith("1 still on another version")


def test_of_many_replicas_the_busiest_are_shown():
    lines = drawn(stats(num_replicas=SHOWN_REPLICAS + 6), 100)

    assert sum(line.strip().startswith("replica") for line in lines) == 1 + SHOWN_REPLICAS
    assert any(line.strip() == "+6 more" for line in lines)
    assert not any("replica00" in line for line in lines)
    assert any("replica29" in line for line in lines)


def test_an_endpoint_without_replicas_is_shown():
    lines = drawn(StatsHistory().summary({}), 80)

    assert lines[0] == f"{URL}  live -  0 replicas"
    assert row(lines, "total")[:2] == ["total", "0"]


def test_what_an_endpoint_says_is_text_and_no_command_to_the_terminal():
    document = stats()
    document["replicas"][0]["id"] = "a\x1b[2J[red]b"
    document["versions"]["live"] = "\x1b]0;title\x07"

    assert "\x1b" not in exported(document, 100)
    assert any("a?[2J[red]b" in line for line in drawn(document, 100))


def watched(answers: Sequence[dict[str, Any] | Exception], *, terminal: bool) -> tuple[str, list[float]]:
    """What is shown of these answers, after which the user presses Ctrl-C, and the pauses between."""
    left, pauses = list(answers), []

    def fetch(url: str) -> dict[str, Any]:
        assert url == URL
        if not left:
            raise KeyboardInterrupt
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    sleep: Callable[[float], None] = pauses.append
    console = Console(width=100, file=io.StringIO(), force_terminal=terminal, color_system=None, legacy_windows=False)
    watch(URL, fetch, 1.0, console, sleep)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), pauses


def test_without_a_terminal_there_is_a_line_every_few_seconds():
    text, pauses = watched([stats(), stats(errors=2)], terminal=False)
    lines = text.splitlines()

    assert len(lines) == 2
    assert lines[1].endswith(
        f"3 replicas, live {LIVE}, 306 requests/s, p50 12.7 ms, p99 15.9 ms, 3 queued, 6 errors",
    )
    assert pauses == [5.0, 5.0]


def test_a_lost_endpoint_is_told_and_asked_again():
    for lost in (ConnectionRefusedError("connection refused"), DeployError("connection refused")):
        text, _ = watched([stats(), lost, stats()], terminal=False)
        lines = text.splitlines()

        assert lines[1].endswith(f"no answer from {URL}, asking again: connection refused")
        assert "3 replicas" in lines[2]


def test_an_answer_of_something_else_is_told_as_such():
    for document in ({}, {"total": None}, {"total": {"rate": 1.0}}):
        text, _ = watched([document], terminal=False)

        assert "its answer is not the /stats of a bigray endpoint" in text


def test_on_a_terminal_the_table_stays_after_ctrl_c():
    text, pauses = watched([stats(), TimeoutError(), stats()], terminal=True)

    assert f"no answer from {URL}, asking again: TimeoutError" in text
    assert "as it was last:" in text
    assert "replica02" in text.rsplit("as it was last:", 1)[1]
    assert pauses == [1.0, 1.0, 1.0]
