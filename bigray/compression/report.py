"""A compressed bundle beside the one it was made from: bytes, time, and the metric on sealed rows."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.data.targets import true_answers
from bigray.inference import Predictions, Predictor, interpret

FloatArray = NDArray[np.float32]

BATCHES = (1, 64)
"""Rows of a request, at which a row is timed."""
ROUNDS = 30
"""Both bundles are timed in turns, so that a busy moment hits both."""
ROUND_S = 0.01
"""Least time of a round: several calls, where one is shorter."""
EVALUATION_ROWS = 512


@dataclass(frozen=True)
class Score:
    """What both bundles came to on the same rows."""

    metric: str
    """Larger is better: accuracy, r2, or agreement where there are no sealed rows."""
    rows: int
    before: float
    after: float

    @property
    def drop(self) -> float:
        """How much was lost; below 0 where something was won."""
        return self.before - self.after


@dataclass(frozen=True)
class Pruned:
    """What pruning alone came to, where its weights were then trained on."""

    run: str
    """Folder of the run that did."""
    sizes: Mapping[str, int]
    """Bytes of weights and graph."""
    packed: int
    latency_ms: Mapping[int, float]
    metric: float
    """That of the score, on the same rows."""
    zeros: float

    def describe(self, score: Score) -> tuple[str, ...]:
        """A sentence each: these figures, and where training has made it worse."""
        times = ", ".join(f"{ms:.3g} ms a row at {batch}" for batch, ms in self.latency_ms.items())
        told = (
            f"pruned alone: {score.metric} {self.metric:.4f}, {sum(self.sizes.values()):,} bytes, "
            f"{self.packed:,} packed, {times}, {self.zeros:.1%} zeros; fine-tuned by {self.run}"
        )
        if score.after >= self.metric:
            return (told,)
        return (told, "fine-tuning made it worse than pruning alone; try a smaller rate: --set training.lr=...")


@dataclass(frozen=True)
class Compression:
    """What `bigray compress` made."""

    method: str
    amount: float | None
    source: str
    """Location of the bundle it was made from."""
    location: str
    """Of the new one."""
    source_version: str
    version: str
    sizes: Mapping[str, tuple[int, int]]
    """Bytes of each file before and after; 0 where there is none."""
    packed: tuple[int, int]
    """Bytes of what is served, `model.onnx` or else the weights, when packed with zlib."""
    latency_ms: Mapping[int, tuple[float, float]]
    """Median time of a row, by the rows of its batch, before and after; preprocessing is part of it."""
    score: Score
    zeros: tuple[float, float]
    """Share of the numbers in the weights' matrices that are exactly 0, before and after."""
    notes: tuple[str, ...]
    pruned: Pruned | None = None
    """Between the two, where it was fine-tuned."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "score": {**asdict(self.score), "drop": self.score.drop}}


def packed_size(data: bytes) -> int:
    """Bytes of a file as it travels or is stored compressed."""
    return len(zlib.compress(data, 6))


def score_holdout(before: Predictor, after: Predictor, holdout: pa.Table) -> Score:
    """Accuracy on sealed rows, of a multilabel task the share with exactly their labels; of a regression R2."""
    truth = true_answers(holdout, before.manifest.outputs)
    name = "r2" if before.manifest.outputs.task == "regression" else "accuracy"
    values = [_score(_predict(predictor, holdout), truth) for predictor in (before, after)]
    return Score(name, holdout.num_rows, *values)


def score_golden(before: Predictor, after: Predictor, rows: FloatArray) -> Score:
    """Where there are no sealed rows: how often the new bundle says what the old one says. `rows` are raw features."""
    expected, found = (interpret(predictor.outputs(rows), predictor.manifest.outputs) for predictor in (before, after))
    if expected.values is not None:
        return Score("r2_to_source", len(rows), 1.0, _score(found, expected.values.tolist()))
    assert expected.labels is not None, "a prediction has labels or values"
    return Score("agreement", len(rows), 1.0, _score(found, expected.labels))


def time_rows(before: Predictor, after: Predictor, rows: FloatArray) -> dict[int, tuple[float, float]]:
    """Milliseconds a row of both, by the size of the batch; `rows` are raw features, repeated where they are few."""
    found = {}
    for size in BATCHES:
        batch = np.resize(rows, (size, *rows.shape[1:]))
        seconds = _time_in_turns([lambda: before.run(batch), lambda: after.run(batch)])  # noqa: B023  # called here
        found[size] = (seconds[0] * 1e3 / size, seconds[1] * 1e3 / size)
    return found


def _time_in_turns(functions: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of a call of each."""
    calls = [max(1, int(ROUND_S / max(_time(function, 2), 1e-6))) for function in functions]
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for number, function in enumerate(functions):
            seconds[number].append(_time(function, calls[number]))
    return [statistics.median(each) for each in seconds]


def _time(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _predict(predictor: Predictor, table: pa.Table) -> Predictions:
    """All rows of a table, in batches."""
    outputs = [
        predictor.outputs(predictor.manifest.inputs.from_table(table.slice(start, EVALUATION_ROWS)))
        for start in range(0, table.num_rows, EVALUATION_ROWS)
    ]
    return interpret(np.concatenate(outputs), predictor.manifest.outputs)


def _score(predictions: Predictions, truth: Sequence[Any]) -> float:
    if predictions.values is None:
        assert predictions.labels is not None, "a prediction has labels or values"
        return float(np.mean([_same(a, b) for a, b in zip(predictions.labels, truth, strict=True)]))
    expected = np.asarray(truth, np.float64)
    errors, spread = ((expected - each) ** 2 for each in (predictions.values, expected.mean()))
    # of equal targets there is no R2: only no error at all is as good as one can be
    return 1.0 - float(errors.sum()) / (float(spread.sum()) or 1.0)


def _same(answer: Any, truth: Any) -> bool:
    if isinstance(answer, list):
        return sorted(map(str, answer)) == sorted(map(str, truth))
    return str(answer) == str(truth)
