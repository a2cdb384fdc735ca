"""What a bundle has to show before any replica loads it (driver; no Ray).

The candidate is served by a process of its own and asked over HTTP; the live version by another one beside it. A bundle
that crashes, hangs, eats the memory or answers wrong does so there. The checks run in order and the first refusal ends
them; those that compare with the live version can be forced past, the others cannot.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa

from bigray.bundle import GOLDEN, BundleManifest, ModelBundle, load_holdout
from bigray.data.targets import true_answers
from bigray.errors import BigrayError, DeployError, StorageError
from bigray.inference import BUILT_IN_FACTORIES, FloatArray, Predictions, check_factory, decide, interpret
from bigray.serve.release.golden import describe_difference
from bigray.serve.release.paired import PairedResult, compare_paired, row_losses
from bigray.serve.release.process import (
    JSON,
    CandidateProcess,
    ProcessSettings,
    ask_binary,
    ask_json,
)

State = Literal["running", "passed", "failed", "forced", "skipped"]
Listener = Callable[[str, State], object]

CHECKS = ("files", "factory", "schema", "load", "golden", "holdout", "latency")
FORCIBLE = frozenset({"schema", "holdout", "latency"})
"""Matters of judgement; of the others no force makes a model that answers right."""

LEAST_MEMORY_MB = 4096
"""What a process may have where nobody says: room for torch, and its own size several times."""
TIMES_ITS_SIZE = 4

WARM_UP_REQUESTS, WARM_UP_S = 20, 0.3
TIMED_REQUESTS, TIMED_S = 200, 1.5
LEAST_REQUESTS = 5
"""Of a model so slow that the time is over before."""
SLOWER_TIMES, SLOWER_MS = 10, 1.0
"""A candidate is too slow when its median is this many times the live version's, and this much above it."""


@dataclass(frozen=True)
class GateSettings:
    """How strict to be, and what a candidate may have."""

    allow_factories: Sequence[str] = BUILT_IN_FACTORIES
    num_threads: int = 1
    slo_ms: float | None = None
    """A candidate whose p99 is above is refused."""
    memory_mb: int | None = None
    """Memory of the candidate's process; where it is not given, 4 GB and four times the bundle's size."""
    load_timeout_s: float = 60.0
    request_timeout_s: float = 30.0
    alpha: float = 0.05
    """How unlikely, by chance alone, a loss on the holdout has to be that counts."""
    force: bool = False
    """Let through what is only worse than the live version, or has another schema; the report says so."""


@dataclass(frozen=True)
class Check:
    """One check of the gate, done."""

    name: str
    passed: bool
    """False only where it was forced past."""
    detail: str
    """What was found, in one line."""
    seconds: float


@dataclass(frozen=True)
class Latency:
    """Single rows over HTTP, one after the other."""

    requests: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class GateReport:
    """The gate let the bundle through."""

    version: str
    model: str
    """The model's name in its bundle."""
    checks: tuple[Check, ...]
    forced: tuple[str, ...]
    """Checks that it failed and was let through all the same."""
    seconds: float
    paired: PairedResult | None = None
    """Candidate and live version on the candidate's holdout; None without one of them."""
    latency: Latency | None = None
    live_latency: Latency | None = None


def run_gate(
    candidate: str, live: str | None, settings: GateSettings, listener: Listener = lambda name, state: None
) -> GateReport:
    """Try a bundle in a process of its own, beside the live one where there is one; nothing of either is changed.

    `listener` is told of each check when it begins and ends. No process is left, however this ends.

    Raises:
        CorruptFile: a file of the bundle differs from its manifest.
        StorageError: there is no bundle, or one with something in it that no bundle has.
        DeployError: refused; names the check, what was found and the way out.
    """
    with _Gate(candidate, live, settings, listener) as gate:
        return gate.run()


@dataclass
class _Found:
    """What the checks know of each other."""

    bundle: ModelBundle | None = None
    holdout: pa.Table | None = None
    live_manifest: BundleManifest | None = None
    """None where there is no live version that the candidate can be compared with."""
    paired: PairedResult | None = None
    latency: Latency | None = None
    live_latency: Latency | None = None
    checks: list[Check] = field(default_factory=list)
    forced: list[str] = field(default_factory=list)


class _Skipped(Exception):
    """A check has nothing to look at; says why."""


class _Gate:
    def __init__(self, candidate: str, live: str | None, settings: GateSettings, listener: Listener) -> None:
        self._candidate, self._live = candidate, live
        self._settings, self._listener = settings, listener
        self._found = _Found()
        self._processes = contextlib.ExitStack()
        self._process: CandidateProcess | None = None
        self._live_process: CandidateProcess | None = None

    def __enter__(self) -> _Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._processes.close()

    def run(self) -> GateReport:
        started = time.monotonic()
        functions = (
            self._check_files,
            self._check_factory,
            self._check_schema,
            self._check_load,
            self._check_golden,
            self._check_holdout,
            self._check_latency,
        )
        for name, function in zip(CHECKS, functions, strict=True):
            self._run_check(name, function)
        found = self._found
        return GateReport(
            version=self._bundle.version,
            model=self._bundle.manifest.name,
            checks=tuple(found.checks),
            forced=tuple(found.forced),
            seconds=time.monotonic() - started,
            paired=found.paired,
            latency=found.latency,
            live_latency=found.live_latency,
        )

    def _run_check(self, name: str, function: Callable[[], str]) -> None:
        self._listener(name, "running")
        started = time.monotonic()
        state: State = "passed"
        try:
            detail = function()
        except _Skipped as skipped:
            state, detail = "skipped", f"skipped: {skipped}"
        except DeployError as refusal:
            if name not in FORCIBLE or not self._settings.force:
                self._listener(name, "failed")
                raise DeployError(self._refusal(name, str(refusal))) from None
            state, detail = "forced", str(refusal)
            self._found.forced.append(name)
        except BigrayError:
            self._listener(name, "failed")
            raise
        self._found.checks.append(Check(name, state != "forced", detail, time.monotonic() - started))
        self._listener(name, state)

    def _refusal(self, name: str, why: str) -> str:
        way_out = "; deploy it with --force to take it all the same" if name in FORCIBLE else ""
        return f"{self._candidate}: refused by the gate's check '{name}': {' '.join(why.split())}{way_out}"

    @property
    def _bundle(self) -> ModelBundle:
        assert self._found.bundle is not None, "the first check has read it"
        return self._found.bundle

    def _check_files(self) -> str:
        bundle = ModelBundle.load(self._candidate)
        if bundle.golden is None:
            raise DeployError(f"it has no {GOLDEN}, so nothing tells whether it answers right; export it anew")
        self._found.bundle, self._found.holdout = bundle, load_holdout(self._candidate)
        return f"{len(bundle.sizes)} files, {sum(bundle.sizes.values()) / 2**20:.1f} MB, as the manifest has them"

    def _check_factory(self) -> str:
        check_factory(self._bundle, self._settings.allow_factories)
        if self._bundle.onnx is not None:
            return "served from its ONNX graph: no code of the model runs"
        return f"'{self._bundle.manifest.factory.factory}' is allowed"

    def _check_schema(self) -> str:
        # already here, so that it loads while the live version is read and started
        self._process = self._start(self._candidate, self._bundle)
        if self._live is None:
            raise _Skipped("nothing is live")
        with _about_the_live_version():
            live = ModelBundle.load(self._live)
        difference = schema_difference(self._bundle.manifest, live.manifest)
        if difference is not None:
            raise DeployError(f"callers of the live version would be refused: {difference}")
        self._found.live_manifest = live.manifest
        self._live_process = self._start(self._live, live)
        return "same inputs and outputs as the live version"

    def _check_load(self) -> str:
        seconds = self._ready().wait_until_ready()
        return f"takes requests {seconds:.1f} s after its start"

    def _check_golden(self) -> str:
        golden, manifest = self._bundle.golden, self._bundle.manifest
        assert golden is not None, "the first check asked for it"
        expected = _numbers(interpret(golden.outputs, manifest.outputs))
        for way, ask in (("JSON", ask_json), ("the Open Inference Protocol", ask_binary)):
            answered = ask(self._ready(), golden.inputs, manifest)
            difference = describe_difference(_numbers(answered), expected) or _label_difference(answered, manifest)
            if difference is not None:
                raise DeployError(f"over {way}: {difference}")
        return f"{len(golden.inputs)} answers over HTTP are those it was exported with"

    def _check_holdout(self) -> str:
        table, manifest = self._found.holdout, self._bundle.manifest
        if table is None:
            raise _Skipped("the bundle has no holdout")
        rows, truth = manifest.inputs.from_table(table), true_answers(table, manifest.outputs)
        answers = ask_binary(self._ready(), rows, manifest)
        if (bad := _rows_without_number(answers)) > 0:
            raise DeployError(f"answers {bad} of {len(rows)} rows with NaN or an infinite value")
        losses = row_losses(answers, truth, manifest.outputs)
        if self._live_process is None or self._found.live_manifest is None:
            return f"{_loss(float(losses.mean()), manifest)} of {len(rows)} rows; nothing is live to compare with"
        with _about_the_live_version():
            live = self._found.live_manifest
            live_losses = row_losses(ask_binary(self._live_process, rows, live), truth, live.outputs)
        paired = self._found.paired = compare_paired(losses, live_losses)
        detail = (
            f"{_loss(paired.candidate, manifest)} of {paired.rows} rows, "
            f"live {_loss(paired.live, manifest)} (p = {paired.p_value:.2g})"
        )
        if paired.is_worse(self._settings.alpha):
            raise DeployError(f"worse than the live version on sealed rows: {detail}")
        return detail

    def _check_latency(self) -> str:
        body = orjson.dumps({"records": [self._bundle.manifest.example]})
        live = self._found.live_latency = self._time_live(body)
        measured = _time_requests(self._ready(), body)
        if latency_fault(measured, live, self._settings.slo_ms) is not None:
            measured = _time_requests(self._ready(), body)  # a second try tells a slow model from a busy moment
        self._found.latency = measured
        if (fault := latency_fault(measured, live, self._settings.slo_ms)) is not None:
            raise DeployError(fault)
        beside = "" if live is None else f"; live {live.p50_ms:.2f} and {live.p99_ms:.2f} ms"
        return f"p50 {measured.p50_ms:.2f} ms, p99 {measured.p99_ms:.2f} ms{beside}"

    def _time_live(self, body: bytes) -> Latency | None:
        if self._live_process is None:
            return None
        with _about_the_live_version():
            return _time_requests(self._live_process, body)

    def _start(self, location: str, bundle: ModelBundle) -> CandidateProcess:
        asked = self._settings
        size_mb = sum(bundle.sizes.values()) / 2**20
        settings = ProcessSettings(
            num_threads=asked.num_threads,
            allow_factories=asked.allow_factories,
            memory_mb=asked.memory_mb or LEAST_MEMORY_MB + int(TIMES_ITS_SIZE * size_mb),
            load_timeout_s=asked.load_timeout_s,
            request_timeout_s=asked.request_timeout_s,
        )
        return self._processes.enter_context(CandidateProcess(location, settings))

    def _ready(self) -> CandidateProcess:
        assert self._process is not None, "the schema check started it"
        return self._process


@contextlib.contextmanager
def _about_the_live_version() -> Iterator[None]:
    """Its faults are not the candidate's, but leave nothing to compare with: a refusal that can be forced past."""
    try:
        yield
    except (DeployError, StorageError) as error:
        raise DeployError(f"the live version is nothing to compare with: {error}") from None


def schema_difference(new: BundleManifest, live: BundleManifest) -> str | None:
    """What callers of the live version would trip over, in one line; None where nothing is."""
    if new.name != live.name:
        return f"the model is called '{new.name}' in URLs, the live version '{live.name}'"
    columns, live_columns = ({c.name: c.shape for c in each.inputs.columns} for each in (new, live))
    for name in (*columns, *live_columns):
        if columns.get(name) != live_columns.get(name):
            return (
                f"input '{name}' is {_shape(columns.get(name))}, of the live version {_shape(live_columns.get(name))}"
            )
    if list(columns) != list(live_columns):
        return f"inputs come in another order, '{next(iter(columns))}' first"
    for key in ("task", "num_outputs", "class_names"):
        ours, theirs = getattr(new.outputs, key), getattr(live.outputs, key)
        if ours != theirs:
            return f"outputs: {key} is {_some(ours)}, of the live version {_some(theirs)}"
    return None


def latency_fault(measured: Latency, live: Latency | None, slo_ms: float | None) -> str | None:
    """Why a version is too slow; None where it is not."""
    if slo_ms is not None and measured.p99_ms > slo_ms:
        return f"p99 {measured.p99_ms:.1f} ms of single rows is above the SLO of {slo_ms:g} ms"
    if live is None:
        return None
    is_slower = measured.p50_ms > SLOWER_TIMES * live.p50_ms and measured.p50_ms > live.p50_ms + SLOWER_MS
    if not is_slower:
        return None
    return f"p50 {measured.p50_ms:.1f} ms of single rows, {measured.p50_ms / live.p50_ms:.0f} times the live version's"


def _time_requests(process: CandidateProcess, body: bytes) -> Latency:
    _repeat(process, body, WARM_UP_REQUESTS, WARM_UP_S)
    seconds = _repeat(process, body, TIMED_REQUESTS, TIMED_S)
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return Latency(len(seconds), float(p50), float(p99))


def _repeat(process: CandidateProcess, body: bytes, most: int, for_s: float) -> list[float]:
    """Seconds of each request."""
    seconds: list[float] = []
    while len(seconds) < most and (sum(seconds) < for_s or len(seconds) < LEAST_REQUESTS):
        start = time.perf_counter()
        process.ask("/predict", body, JSON)
        seconds.append(time.perf_counter() - start)
    return seconds


def _label_difference(answered: Predictions, manifest: BundleManifest) -> str | None:
    if answered.labels is None or answered.probabilities is None:
        return None
    decided = decide(answered.probabilities, manifest.outputs)
    if answered.labels == decided:
        return None
    row = next(row for row, (a, b) in enumerate(zip(answered.labels, decided, strict=True)) if a != b)
    return f"golden answers: row {row} is labelled {answered.labels[row]!r}, the likeliest is {decided[row]!r}"


def _numbers(answers: Predictions) -> FloatArray:
    """Values (rows,), or probabilities (rows, classes)."""
    numbers = answers.values if answers.values is not None else answers.probabilities
    assert numbers is not None, "an answer has values or probabilities"
    return numbers


def _rows_without_number(answers: Predictions) -> int:
    numbers = _numbers(answers)
    return int((~np.isfinite(numbers.reshape(len(numbers), -1)).all(axis=1)).sum())


def _loss(value: float, manifest: BundleManifest) -> str:
    if manifest.outputs.task == "language":
        return f"{value:.4g} nats a token"
    return f"mean squared error {value:.4g}" if manifest.outputs.task == "regression" else f"{value:.1%} wrong"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "a number" if shape == () else f"of shape {shape}"


def _some(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
