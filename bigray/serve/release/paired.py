"""Whether a candidate is worse than the live version, by their losses on the same rows. Pure; numpy alone.

The sign-flip test: were neither better, each row's difference would be as likely with the other sign. The p-value is
the share of random signs under which the candidate looks at least as bad as it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import OutputSchema
from bigray.inference import Predictions

LossArray = NDArray[np.float64]

MOST_DRAWS = 10_000
_LEAST_PROBABILITY = 1e-9
_SIGNS_AT_ONCE = 1 << 22
"""Bounds memory."""


@dataclass(frozen=True)
class PairedResult:
    """Two versions on the same rows; losses are means of `row_losses`."""

    rows: int
    candidate: float
    live: float
    difference: float
    """Candidate minus live: above 0, the candidate is worse."""
    p_value: float
    """Of a difference as large as this or larger where neither is better."""

    def is_worse(self, alpha: float = 0.05) -> bool:
        return self.difference > 0 and self.p_value < alpha


def row_losses(predictions: Predictions, truth: Sequence[Any], outputs: OutputSchema | None = None) -> LossArray:
    """(rows,) 0 or 1 for a right or wrong class, the share of wrong ones of a row's labels, squared error for a value.

    With `outputs` of a language task, the nats of the token that came: most are no certain thing, so that right or
    wrong would tell little. NaN where the answer is no number.
    """
    if outputs is not None and outputs.task == "language":
        return _nats(predictions, truth, outputs)
    if predictions.values is not None:
        return (predictions.values.astype(np.float64) - np.asarray(truth, dtype=np.float64)) ** 2
    assert predictions.labels is not None, "a prediction has values or labels"
    pairs = zip(predictions.labels, truth, strict=True)
    if truth and isinstance(truth[0], list):
        assert predictions.probabilities is not None, "labels have probabilities"
        num_labels = predictions.probabilities.shape[1]
        return np.array([len({*given} ^ {*true}) / num_labels for given, true in pairs])
    return np.array([float(a != b) for a, b in pairs])


def _nats(predictions: Predictions, truth: Sequence[Any], outputs: OutputSchema) -> LossArray:
    assert predictions.probabilities is not None, "a model of language has them"
    names = outputs.class_names or tuple(range(outputs.num_outputs))
    places = {name: place for place, name in enumerate(names)}
    known = [place for place, token in enumerate(truth) if token in places]
    found = np.zeros(len(truth))  # what a version has never heard of, it does not expect
    found[known] = predictions.probabilities[known, [places[truth[place]] for place in known]]
    losses: LossArray = -np.log(np.maximum(found, _LEAST_PROBABILITY))
    return losses


def compare_paired(candidate: LossArray, live: LossArray, *, draws: int = MOST_DRAWS, seed: int = 0) -> PairedResult:
    """Test losses (rows,) of both on the same rows in the same order; the same seed gives the same p-value."""
    if candidate.shape != live.shape or candidate.ndim != 1 or not len(candidate):
        raise ValueError(f"expected losses of the same rows, got shapes {candidate.shape} and {live.shape}")
    differences = candidate - live
    return PairedResult(
        rows=len(differences),
        candidate=float(candidate.mean()),
        live=float(live.mean()),
        difference=float(differences.mean()),
        p_value=_p_value(differences, min(draws, MOST_DRAWS), seed),
    )


def _p_value(differences: LossArray, draws: int, seed: int) -> float:
    differing = differences[differences != 0]  # a zero is the same with either sign
    if not len(differing):
        return 1.0
    if not np.isfinite(differing).all():
        return 0.0  # a candidate that answers NaN; the live one is refused before
    differing = differing / np.abs(differing).max()
    observed, generator, reached = float(differing.sum()), np.random.default_rng(seed), 0
    rows_at_once = max(1, _SIGNS_AT_ONCE // len(differing))
    for start in range(0, draws, rows_at_once):
        size = min(rows_at_once, draws - start), len(differing)
        bits = np.unpackbits(np.frombuffer(generator.bytes(-(-size[0] * size[1] // 8)), np.uint8))
        signs = bits[: size[0] * size[1]].reshape(size).astype(np.float32)
        sums = 2 * (signs @ differing.astype(np.float32)).astype(np.float64) - observed
        reached += int((sums >= observed - 1e-6 * len(differing)).sum())
    # the observed signs are one of the draws, so that a p-value is never 0
    return (reached + 1) / (draws + 1)
