from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bigray.errors import SpecError
from bigray.serve.scaling.trace import BUILT_IN, RateProfile, load_trace, poisson_trace


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes, name: str = "trace.csv") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def faults(source: str) -> tuple[str, ...]:
    with pytest.raises(SpecError) as error:
        load_trace(source)
    return error.value.faults


def test_times_are_sorted_and_begin_at_zero(write):
    trace = load_trace(write("time_s,rows\n12.5,3\n10,1\n11,2\n"))
    assert trace.arrivals_s.tolist() == [0, 1, 2.5]
    assert trace.rows.tolist() == [1, 2, 3]
    assert trace.duration_s == 2.5
    assert len(trace) == 3


def test_a_trace_without_rows_has_one_a_request(write):
    assert load_trace(write("id, time_s\na,0\nb,1\n")).rows.tolist() == [1, 1]


@pytest.mark.parametrize(
    "times",
    [
        ("1767225600", "1767225601.5"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:01.5Z"),
        ("2026-01-01 01:00:00+01:00", "2026-01-01T00:00:01.500+00:00"),
        ("2026-01-01T00:00:00", "2026-01-01T00:00:01.500"),
    ],
)
def test_timestamps_may_be_unix_or_iso(write, times):
    trace = load_trace(write("timestamp\n" + "\n".join(times) + "\n"))
    assert trace.arrivals_s.tolist() == [0, 1.5]


def test_a_file_as_spreadsheets_write_it_is_read(write):
    assert load_trace(write(b"\xef\xbb\xbftime_s,rows\r\n0,1\r\n\r\n2,4\r\n")).arrivals_s.tolist() == [0, 2]


def test_a_rate_profile_becomes_random_arrivals_with_those_rates(write):
    trace = load_trace(write("time_s,requests_per_s\n0,100\n100,0\n200,400\n"), seed=3)
    per_segment, _ = np.histogram(trace.arrivals_s, bins=[0, 100, 200, 300])
    assert per_segment[0] == pytest.approx(10_000, rel=0.05)
    assert per_segment[1] == 0
    assert per_segment[2] == pytest.approx(40_000, rel=0.05)
    assert trace.duration_s == 300  # the last line lasts as long as the one before
    assert (np.diff(trace.arrivals_s) >= 0).all()


def test_arrivals_of_a_rate_are_a_poisson_process():
    profile = RateProfile(np.array([0.0]), np.array([50.0]), 4000.0)
    gaps = np.diff(poisson_trace("steady", profile, np.random.default_rng(0)).arrivals_s)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.02)


def test_the_same_seed_gives_the_same_arrivals(write):
    path = write("time_s,requests_per_s\n0,10\n60,20\n")
    for source in (path, *BUILT_IN):
        first, again, other = load_trace(source, seed=1), load_trace(source, seed=1), load_trace(source, seed=2)
        assert np.array_equal(first.arrivals_s, again.arrivals_s)
        assert not np.array_equal(first.arrivals_s[:50], other.arrivals_s[:50])


def test_the_step_is_four_times_the_rate_for_two_minutes():
    trace = load_trace("step", rate_per_s=100)
    counts, _ = np.histogram(trace.arrivals_s, bins=[0, 60, 180, 300])
    assert counts / [60, 120, 120] == pytest.approx([100, 400, 100], rel=0.05)
    assert trace.steps_s == (60.0,)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_made_up_traces_follow_the_rate(name):
    small, large = load_trace(name, rate_per_s=10), load_trace(name, rate_per_s=100)
    assert small.duration_s == large.duration_s
    assert len(large) == pytest.approx(10 * len(small), rel=0.1)
    assert 10 * small.duration_s / 2 < len(small) < 10 * small.duration_s * 3


def test_bursts_are_steps_of_the_profile():
    trace = load_trace("bursts")
    assert len(trace.steps_s) >= 5
    before, after = (
        np.histogram(trace.arrivals_s, bins=[at - 5, at, at + 5])[0] for at in (trace.steps_s[0], trace.steps_s[1])
    )
    assert before[1] > 2 * before[0]
    assert after[1] > 2 * after[0]


def test_the_access_log_is_a_trace(write):
    log = (
        '{"time": "2026-01-01T00:00:00.000Z", "route": "/predict", "rows": 4, "status": 200}\n'
        '{"time": "2026-01-01T00:00:00.500Z", "route": "/stats", "rows": 0, "status": 200}\n'
        '{"time": 1767225602, "rows": 1}\n'
        '{"time": "2026-01-01T00:00:03Z"}\n'
        '{"time": "2026-01-01T00:0'  # the server is writing it
    )
    trace = load_trace(write(log, "access.log"))
    assert trace.arrivals_s.tolist() == [0, 2, 3]
    assert trace.rows.tolist() == [4, 1, 1]


def test_faults_of_an_access_log_name_their_lines(write):
    path = write(
        '{"time": "2026-01-01T00:00:00Z"}\n{"tme": 3}\n{"time": "soon"}\nnot json\n{"time": 1, "rows": "x"}\n[]\n'
    )
    told = faults(path)
    assert [fault.removeprefix(path).split(":")[1] for fault in told] == ["2", "3", "4", "5", "6"]
    assert told[0].endswith("no key 'time', did you mean 'tme'?")
    assert "expected Unix seconds or ISO 8601, got 'soon'" in told[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{path}: empty, expected a line for each request"),
        ("\n \n", "{path}: empty, expected a line for each request"),
        ("time_s,rows\n", "{path}: holds no requests, only a header"),
        ("times_s\n1\n", "{path}:1: no column 'time_s' or 'timestamp', but 'times_s', did you mean 'time_s'?"),
        ("a,b\n1,2\n", "{path}:1: no column 'time_s' or 'timestamp', only 'a', 'b'"),
        ("time_s\n0\n-1\n", "{path}:3: time_s: must not be negative, got -1"),
        ("time_s\n0\n\nsoon\n", "{path}:4: time_s: expected a number, got 'soon'"),
        ("time_s\n0\nnan\n", "{path}:3: time_s: expected a number, got 'nan'"),
        ("rows,time_s\n1,0\n1\n", "{path}:3: time_s: expected a number, got ''"),
        ("time_s,rows\n0,0\n", "{path}:2: rows: expected a whole number from 1 up, got 0"),
        ("time_s,rows\n0,1.5\n", "{path}:2: rows: expected a whole number from 1 up, got 1.5"),
        ("timestamp\nyesterday\n", "{path}:2: timestamp: expected Unix seconds or ISO 8601, got 'yesterday'"),
        ("time_s,requests_per_s\n0,5\n1,-5\n", "{path}:3: requests_per_s: must not be negative, got -5"),
        ("time_s,requests_per_s\n0,5\n", "{path}: a rate profile needs two lines or more"),
        ("time_s,requests_per_s\n0,0\n9,0\n", "{path}: holds no requests, every rate is 0"),
        ("time_s,requests_per_s\n0,1e9\n99,1\n", "{path}: about 99,000,000,099 requests, of which at most 20,000,000"),
        (b"time_s\n\xff\xfe\n", "{path}: cannot be read as text"),
        ('{"time": 1, "rows": 0}\n', "{path}: holds no requests"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(write, text, message):
    path = write(text)
    (fault,) = faults(path)
    assert fault.startswith(message.format(path=path))


def test_many_faults_are_told_in_a_few_lines(write):
    told = faults(write("time_s\n" + "x\n" * 100))
    assert len(told) == 6
    assert told[-1] == "95 more lines like these"


def test_a_name_that_is_no_file_and_no_trace_is_near_one(tmp_path):
    (fault,) = faults("stepp")
    assert fault == "stepp: no such file, and not a trace that comes with bigray, did you mean 'step'?"
    (fault,) = faults(str(tmp_path))
    assert "cannot be read as text" in fault


def test_a_rate_must_be_more_than_nothing():
    with pytest.raises(SpecError, match="trace 'step': the rate must be more than 0 a second, got 0"):
        load_trace("step", rate_per_s=0)
