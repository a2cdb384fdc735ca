"""Request traces: when requests came and how many rows each had, from a file or made up with a seed.

A file is CSV with a column `time_s` (seconds) or `timestamp` (Unix or ISO 8601) and perhaps `rows`, one line a request;
or CSV with `time_s,requests_per_s`, a rate that holds until the next line; or bigray's own access log, JSON lines with
`time` and `rows`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bigray.errors import SpecError, did_you_mean

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MOST_REQUESTS = 20_000_000
MOST_FAULTS = 5
"""Of a file's faults, the first so many are told."""
STEP = 1.5
"""Times by which the rate rises at once where it is called a step."""

TIME_COLUMNS = ("time_s", "timestamp")
COLUMNS = (*TIME_COLUMNS, "rows", "requests_per_s")


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    arrivals_s: FloatArray
    """(requests,) ascending, from 0."""
    rows: IntArray
    """(requests,) rows of each, at least 1."""
    duration_s: float
    """To the end of the profile, or to the last request."""
    steps_s: tuple[float, ...] = ()
    """When a profile's rate rises at once by half or more; empty for recorded requests."""

    def __len__(self) -> int:
        return len(self.arrivals_s)


@dataclass(frozen=True)
class RateProfile:
    """A rate that changes at certain times."""

    times_s: FloatArray
    """(segments,) where each rate begins, ascending."""
    rates: FloatArray
    """(segments,) requests a second."""
    end_s: float

    @property
    def steps_s(self) -> tuple[float, ...]:
        before, after = self.rates[:-1], self.rates[1:]
        return tuple(self.times_s[1:][(before > 0) & (after >= STEP * before)].tolist())


def load_trace(source: str, *, seed: int = 0, rate_per_s: float = 50.0) -> Trace:
    """The trace of a file, or a made-up one: `step`, `day` or `bursts`, about `rate_per_s` when quiet.

    The seed draws arrivals where only rates are known: a Poisson process of that rate.

    Raises:
        SpecError: the file is missing, empty or not a trace; names the line.
    """
    if source in BUILT_IN and not Path(source).exists():
        if not (math.isfinite(rate_per_s) and rate_per_s > 0):
            raise SpecError(f"trace '{source}': the rate must be more than 0 a second, got {rate_per_s:g}")
        random = np.random.default_rng(seed)
        return poisson_trace(source, BUILT_IN[source](rate_per_s, random), random)
    lines = _read_lines(source)
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise SpecError(f"{source}: empty, expected a line for each request")
    if first.lstrip().startswith("{"):
        return _recorded(source, *_read_access_log(source, lines))
    return _read_csv(source, lines, seed)


def poisson_trace(name: str, profile: RateProfile, random: np.random.Generator) -> Trace:
    """Arrivals of one row each, at random times with the profile's rates."""
    lengths = np.diff(np.append(profile.times_s, profile.end_s))
    expected = float((profile.rates * lengths).sum())
    if expected > MOST_REQUESTS:
        raise SpecError(f"{name}: about {expected:,.0f} requests, of which at most {MOST_REQUESTS:,} can be simulated")
    counts = random.poisson(profile.rates * lengths)
    starts, spans = np.repeat(profile.times_s, counts), np.repeat(lengths, counts)
    arrivals = np.sort(starts + spans * random.random(len(starts)))
    return Trace(name, arrivals, np.ones(len(arrivals), np.int64), profile.end_s, profile.steps_s)


def step_profile(rate_per_s: float, _random: np.random.Generator | None = None) -> RateProfile:
    """A minute of the rate, two of four times as much, two of the rate."""
    return RateProfile(np.array([0.0, 60.0, 180.0]), rate_per_s * np.array([1.0, 4.0, 1.0]), 300.0)


def day_profile(rate_per_s: float, random: np.random.Generator) -> RateProfile:
    """A day in 24 minutes: a fifth of the rate at night, twice the rate in the evening, no minute like the next."""
    times = np.arange(0.0, 24 * 60, 10.0)
    hour = times / 60
    curve = 1.1 - 0.9 * np.cos(2 * np.pi * (hour - 4) / 24) + 0.3 * np.exp(-(((hour - 20) / 1.5) ** 2))
    noise = np.repeat(random.lognormal(0.0, 0.1, 24 * 2), 3)
    return RateProfile(times, rate_per_s * curve * noise, 24 * 60.0)


def bursts_profile(rate_per_s: float, random: np.random.Generator) -> RateProfile:
    """Ten minutes of the rate, with bursts of 5 to 20 s and 3 to 8 times the rate, half a minute or more apart."""
    times, rates, now = [0.0], [1.0], 0.0
    while (start := now + 20 + random.exponential(20)) < 560:
        now = start + random.uniform(5, 20)
        times += [start, now]
        rates += [random.uniform(3, 8), 1.0]
    return RateProfile(np.array(times), rate_per_s * np.array(rates), 600.0)


BUILT_IN: dict[str, Callable[[float, np.random.Generator], RateProfile]] = {
    "bursts": bursts_profile,
    "day": day_profile,
    "step": step_profile,
}


def _read_lines(source: str) -> list[str]:
    try:
        return Path(source).read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except FileNotFoundError:
        known = did_you_mean(source, BUILT_IN)
        raise SpecError(f"{source}: no such file, and not a trace that comes with bigray{known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{source}: cannot be read as text: {error}") from None


def _recorded(source: str, times: FloatArray, rows: IntArray) -> Trace:
    if not len(times):
        raise SpecError(f"{source}: holds no requests")
    order = np.argsort(times, kind="stable")
    arrivals = times[order] - times[order[0]]
    return Trace(source, arrivals, rows[order], float(arrivals[-1]))


def _read_csv(source: str, lines: list[str], seed: int) -> Trace:
    table = _CsvTable(source, lines)
    time_column = next((name for name in TIME_COLUMNS if name in table.header), None)
    if time_column is None:
        raise SpecError(_no_time_column(source, table.header))
    if "requests_per_s" in table.header:
        rates = table.numbers("requests_per_s", _not_negative)
        profile = _profile(source, table.numbers(time_column, _TIMES[time_column]), rates)
        return poisson_trace(source, profile, np.random.default_rng(seed))
    times = table.numbers(time_column, _TIMES[time_column])
    rows = table.numbers("rows", _count) if "rows" in table.header else np.ones(len(times))
    return _recorded(source, times, rows.astype(np.int64))


def _no_time_column(source: str, header: Sequence[str]) -> str:
    for name in header:
        known = did_you_mean(name, TIME_COLUMNS)
        if known.startswith(","):
            return f"{source}:1: no column 'time_s' or 'timestamp', but '{name}'{known}"
    return f"{source}:1: no column 'time_s' or 'timestamp', only {', '.join(map(repr, header)) or 'an empty line'}"


def _profile(source: str, times: FloatArray, rates: FloatArray) -> RateProfile:
    """The last rate holds as long as the one before it."""
    if len(times) < 2:
        raise SpecError(f"{source}: a rate profile needs two lines or more, since the last ends as the one before")
    order = np.argsort(times, kind="stable")
    times, rates = times[order] - times[order[0]], rates[order]
    if not (rates > 0).any():
        raise SpecError(f"{source}: holds no requests, every rate is 0")
    return RateProfile(times, rates, float(2 * times[-1] - times[-2]))


class _CsvTable:
    """The cells of a CSV file by column, with the line of each record."""

    def __init__(self, source: str, lines: list[str]) -> None:
        self._source = source
        reader = csv.reader(lines)
        records = [(reader.line_num, record) for record in reader if any(cell.strip() for cell in record)]
        self.header = [name.strip() for name in records[0][1]]
        self._lines = [line for line, _ in records[1:]]
        self._records = [record for _, record in records[1:]]
        if not records[1:]:
            raise SpecError(f"{source}: holds no requests, only a header")

    def numbers(self, column: str, parse: Callable[[str], float]) -> FloatArray:
        """A whole column as numbers; a fault for each cell that `parse` refuses."""
        index, faults, values = self.header.index(column), [], []
        for line, record in zip(self._lines, self._records, strict=True):
            cell = record[index].strip() if index < len(record) else ""
            try:
                values.append(parse(cell))
            except ValueError as error:
                faults.append(f"{self._source}:{line}: {column}: {error}")
        _raise(faults)
        return np.array(values, np.float64)


def _raise(faults: list[str]) -> None:
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], f"{len(faults) - MOST_FAULTS} more lines like these"]
    if faults:
        raise SpecError(faults)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got '{text}'")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise ValueError(f"must not be negative, got {text}")
    return value


def _count(text: str) -> float:
    value = _number(text)
    if value < 1 or value != int(value):
        raise ValueError(f"expected a whole number from 1 up, got {text}")
    return value


def _timestamp(text: str) -> float:
    try:
        return _not_negative(text) if text[:1].isdigit() and "-" not in text and ":" not in text else _iso(text)
    except ValueError:
        raise ValueError(f"expected Unix seconds or ISO 8601, got '{text}'") from None


def _iso(text: str) -> float:
    """Unix seconds; a time without a zone is UTC."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_TIMES: dict[str, Callable[[str], float]] = {"time_s": _not_negative, "timestamp": _timestamp}


def _read_access_log(source: str, lines: list[str]) -> tuple[FloatArray, IntArray]:
    """Requests that asked for a prediction; a last line that is still being written is left out."""
    times, rows, faults = [], [], []
    for number, line in _records(lines):
        try:
            time_s, count = _entry(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            if number < len(lines) or line.endswith("\n"):
                faults.append(f"{source}:{number}: not valid JSON: {error}")
            continue
        except ValueError as error:
            faults.append(f"{source}:{number}: {error}")
            continue
        if count:
            times.append(time_s)
            rows.append(count)
    _raise(faults)
    return np.array(times, np.float64), np.array(rows, np.int64)


def _records(lines: list[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _entry(entry: Any) -> tuple[float, int]:
    """(Unix seconds, rows) of a line of the access log; 0 rows where it asked for no prediction."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {type(entry).__name__}")
    if "time" not in entry:
        raise ValueError(f"no key 'time'{did_you_mean('time', entry) if entry else ''}")
    rows = entry.get("rows", 0 if "lost" in entry else 1) or 0  # a line about lines that were lost is no request
    if not isinstance(rows, int) or rows < 0:
        raise ValueError(f"rows: expected a whole number, got {rows!r}")
    return _timestamp(str(entry["time"])), rows
