"""The counters of all replicas as Prometheus reads them: the text format 0.0.4 (replica).

Written here and not by a client library, since those count in their own process and these numbers come from several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from bigray.serve.observe.telemetry import BATCH_BOUNDS_ROWS, LATENCY_BOUNDS_S

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, str, float]
"""What is added to the metric's name, the labels as they are written, the value."""
Series = Sequence[tuple[str, Mapping[str, Any]]]
"""Labels and what they stand for. Written once for each series, not for each of its thirty buckets."""

_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def render_prometheus(snapshots: Mapping[str, Mapping[str, Any]]) -> bytes:
    """One exposition of the snapshots by replica; a metric without a sample is left out."""
    lines = [line for name, kind, about, samples in _metrics(snapshots) for line in _lines(name, kind, about, samples)]
    return "".join(lines).encode()


def _metrics(snapshots: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str, Iterable[Sample]]]:
    series, batches = _series(snapshots, "requests", _SERIES), _series(snapshots, "batches", _BATCH)
    counter, gauge, histogram = "counter", "gauge", "histogram"

    yield "bigray_requests_total", counter, "Answers, by status.", _by_status(series)
    yield "bigray_errors_total", counter, "Answers of 5xx, those of a full queue among them.", _errors(series)
    yield (
        "bigray_request_seconds",
        histogram,
        "Time from the request's head to its answer, of answers below 400.",
        _histogram(series, LATENCY_BOUNDS_S, "seconds"),
    )
    yield "bigray_request_rows_total", counter, "Rows in answered requests.", _each(series, "rows")
    yield "bigray_request_bytes_total", counter, "Bytes of request bodies.", _each(series, "bytes")
    yield (
        "bigray_batch_rows",
        histogram,
        "Rows that the model was given at once.",
        _histogram(batches, BATCH_BOUNDS_ROWS, "rows"),
    )
    yield "bigray_model_seconds_total", counter, "Time in the model.", _each(batches, "seconds")
    about = "Age of each batch's oldest request when the model took it, summed."
    yield "bigray_batch_wait_seconds_total", counter, about, _each(batches, "waited_s")
    about = "Requests refused since the queue was full."
    yield "bigray_shed_total", counter, about, _table(snapshots, "shed", "model")
    about = "Requests refused before the model was asked."
    yield "bigray_refused_total", counter, about, _table(snapshots, "refused", "kind")

    for name, about, field in _LOAD_GAUGES:
        yield name, gauge, about, [("", _labels(replica=id_), one["load"][field]) for id_, one in snapshots.items()]
    uptimes = [("", _labels(replica=id_), one["uptime_s"]) for id_, one in snapshots.items()]
    yield "bigray_uptime_seconds", gauge, "Time since the replica started.", uptimes
    yield "bigray_live_version_info", gauge, "1 for the version that answers.", _live(snapshots)
    about = "Share of the requests that a rollout's candidate is asked."
    yield "bigray_candidate_share", gauge, about, _candidates(snapshots)


_SERIES = ("model", "version", "route")
_BATCH = ("model", "version")
_LOAD_GAUGES = (
    ("bigray_utilisation", "Share of the last second in which the model or the processors were busy.", "utilisation"),
    ("bigray_queue_requests", "Requests that wait for the model.", "queued"),
    ("bigray_queue_oldest_seconds", "Longest wait for the model over the last second.", "queue_age_s"),
    ("bigray_ongoing_requests", "Requests for the model that are not answered yet.", "ongoing"),
)


def _lines(name: str, kind: str, about: str, samples: Iterable[Sample]) -> Iterator[str]:
    rest = [f"{name}{suffix}{{{labels}}} {_number(value)}\n" for suffix, labels, value in samples]
    if rest:
        yield f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
        yield from rest


def _labels(**values: str) -> str:
    return ",".join(f'{key}="{value.translate(_ESCAPED)}"' for key, value in values.items())


def _number(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _series(snapshots: Mapping[str, Mapping[str, Any]], field: str, names: Sequence[str]) -> Series:
    return [
        (_labels(replica=id_, **{name: one[name] for name in names}), one)
        for id_, snapshot in snapshots.items()
        for one in snapshot[field]
    ]


def _each(series: Series, field: str) -> list[Sample]:
    return [("", labels, one[field]) for labels, one in series]


def _by_status(series: Series) -> list[Sample]:
    return [
        ("", f'{labels},status="{status}"', count)
        for labels, one in series
        for status, count in one["statuses"].items()
    ]


def _errors(series: Series) -> list[Sample]:
    """One for each series, 0 too: a counter that first shows with its first error hides that error from `rate`."""
    return [
        ("", labels, sum(count for status, count in one["statuses"].items() if int(status) >= 500))
        for labels, one in series
    ]


def _histogram(series: Series, bounds: Sequence[float], sum_of: str) -> Iterator[Sample]:
    shown = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    for labels, one in series:
        counts: list[int] = one["counts"]
        for bound, below in zip(shown, accumulate(counts), strict=True):
            yield "_bucket", f'{labels},le="{bound}"', below
        yield "_sum", labels, one[sum_of]
        yield "_count", labels, sum(counts)


def _table(snapshots: Mapping[str, Mapping[str, Any]], field: str, label: str) -> list[Sample]:
    return [
        ("", _labels(replica=id_, **{label: name}), count)
        for id_, snapshot in snapshots.items()
        for name, count in snapshot[field].items()
    ]


def _live(snapshots: Mapping[str, Mapping[str, Any]]) -> list[Sample]:
    return [
        ("", _labels(replica=id_, model=model, version=versions["live"]), 1)
        for id_, snapshot in snapshots.items()
        for model, versions in snapshot["versions"].items()
    ]


def _candidates(snapshots: Mapping[str, Mapping[str, Any]]) -> list[Sample]:
    return [
        (
            "",
            _labels(replica=id_, model=model, version=versions["candidate"], kind=versions["kind"] or ""),
            versions["share"],
        )
        for id_, snapshot in snapshots.items()
        for model, versions in snapshot["versions"].items()
        if versions["candidate"]
    ]
