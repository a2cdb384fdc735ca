"""Two runs of one model side by side, and whether the second came out as it has to. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bigray.results import Kill, MetricDifference, ModelVerification, Resize, SampleCounts, WeightDifference
from bigray.specs import TrainingSpec

if TYPE_CHECKING:
    import torch

SGD_TOLERANCE, ADAPTIVE_TOLERANCE = 1e-5, 1e-3
"""Relative. An adaptive optimizer divides by small numbers, so its steps differ more."""

Weights = Mapping[str, "torch.Tensor"]
EpochMetrics = tuple[int, Mapping[str, float]]
"""A report of an epoch: its number, from 1, and its validation metrics."""


@dataclass(frozen=True)
class Outcome:
    """One model at the end of one run."""

    status: str
    error: str | None = None
    weights: Weights | None = None
    """Of the last step; None where there is no checkpoint."""
    epochs: tuple[EpochMetrics, ...] = ()
    """As the journal has them: one may be there twice, or be missing."""
    samples: SampleCounts = field(default_factory=lambda: SampleCounts(0, 0))
    steps: int = 0
    """Optimizer steps in all."""
    steps_per_s: float = 0.0


def judge(
    training: TrainingSpec,
    expected: Outcome,
    found: Outcome,
    *,
    model_name: str,
    kills: Sequence[Kill] = (),
    kills_planned: int = 0,
    resize: Resize | None = None,
) -> ModelVerification:
    """The verdict on a disturbed run beside its reference.

    With `training.exact` weights and metrics have to be bit-equal; without, the weights may differ by the tolerance of
    the optimizer. Either way no sample may be lost or repeated.
    """
    weights = None
    if expected.weights is not None and found.weights is not None:
        weights = compare_weights(expected.weights, found.weights)
    metrics = compare_metrics(expected.epochs, found.epochs)
    reasons = _reasons(training, expected, found, weights, metrics)
    return ModelVerification(
        model_name=model_name,
        kills=tuple(kills),
        kills_planned=kills_planned,
        resize=resize,
        weights=weights,
        metrics=metrics,
        samples=found.samples,
        reference_samples=expected.samples,
        verdict=_verdict(training, weights, metrics, reasons),
        reasons=reasons,
        notes=_notes(expected.steps, kills, kills_planned, resize, metrics),
    )


def tolerance_of(training: TrainingSpec) -> float:
    """Largest relative difference of the weights that counts as equal."""
    if training.exact:
        return 0.0
    return SGD_TOLERANCE if training.optimizer == "sgd" else ADAPTIVE_TOLERANCE


def compare_weights(expected: Weights, found: Weights) -> WeightDifference:
    """Bit for bit, and by the norm of the difference over all tensors."""
    if expected.keys() != found.keys():
        return WeightDifference(False, None, min(expected.keys() ^ found.keys()))
    squares, squared_difference, worst = 0.0, 0.0, (-1.0, "")
    for name, tensor in expected.items():
        square, difference = _squares(tensor, found[name])
        squares, squared_difference = squares + square, squared_difference + difference
        worst = max(worst, (_ratio(difference, square), name))
    if all(_same_bits(tensor, found[name]) for name, tensor in expected.items()):
        return WeightDifference(True, 0.0, None)
    relative = _ratio(squared_difference, squares)
    return WeightDifference(False, relative if math.isfinite(relative) else None, worst[1])


def compare_metrics(expected: Sequence[EpochMetrics], found: Sequence[EpochMetrics]) -> MetricDifference:
    """Each report of an epoch beside the reference's; one that is there twice has to be right twice."""
    reference = dict(expected)
    pairs = [(reference[number], metrics) for number, metrics in found if number in reference]
    numbers = {number for number, _ in found}
    is_comparable = bool(pairs) and all(a.keys() == b.keys() for a, b in pairs)
    largest = max((abs(a[name] - b[name]) for a, b in pairs for name in a), default=0.0) if is_comparable else None
    return MetricDifference(
        num_epochs=len(reference.keys() & numbers),
        largest=largest,
        missing=tuple(sorted(reference.keys() ^ numbers)),
    )


def _reasons(
    training: TrainingSpec,
    expected: Outcome,
    found: Outcome,
    weights: WeightDifference | None,
    metrics: MetricDifference,
) -> tuple[str, ...]:
    if expected.error is not None:
        return (f"it cannot be trained, with faults or without: {expected.error}",)
    if found.error is not None:
        return (f"the disturbed run failed: {found.error}",)
    reasons = []
    if found.status != expected.status:
        reasons.append(f"it is {found.status}, undisturbed {expected.status}")
    if fault := _weight_fault(training, weights):
        reasons.append(fault)
    if metrics.largest is None:
        reasons.append("the runs report no validation metrics in common")
    elif training.exact and metrics.largest > 0:
        reasons.append(f"validation metrics differ by up to {metrics.largest:.1e}")
    for run, samples in (("disturbed", found.samples), ("undisturbed", expected.samples)):
        if samples != SampleCounts(0, 0):
            reasons.append(f"the {run} run lost {samples.lost:,} samples and repeated {samples.repeated:,}")
    return tuple(reasons)


def _weight_fault(training: TrainingSpec, weights: WeightDifference | None) -> str | None:
    if weights is None:
        return "a run left no weights"
    if weights.is_bit_equal:
        return None
    if weights.relative is None:
        return f"weights cannot be compared, see '{weights.worst}'"
    if training.exact:
        return f"weights are not bit-equal: {weights.relative:.1e} relative, most in '{weights.worst}'"
    tolerance = tolerance_of(training)
    if weights.relative <= tolerance:
        return None
    why = "; without training.exact, dropout and batch norm depend on the number of workers"
    return f"weights differ by {weights.relative:.1e} > {tolerance:g} relative, most in '{weights.worst}'{why}"


def _verdict(
    training: TrainingSpec, weights: WeightDifference | None, metrics: MetricDifference, reasons: Sequence[str]
) -> str:
    if reasons:
        return "DIFFERENT"
    if weights is not None and weights.is_bit_equal and metrics.largest == 0:
        return "identical"
    return f"equal within {tolerance_of(training):g}"


def _notes(
    num_steps: int, kills: Sequence[Kill], planned: int, resize: Resize | None, metrics: MetricDifference
) -> tuple[str, ...]:
    notes = []
    if len(kills) < planned:
        notes.append(f"{len(kills)} of {planned} kills landed: the training was over before; more epochs make room")
    if resize is None:
        notes.append("no resize: the training was over before; more epochs make room")
    elif resize.step is None or resize.step >= num_steps:
        notes.append("resized after the last step: the training was too short; more epochs make room")
    elif resize.workers_before == resize.workers_after:
        notes.append(f"restarted with {resize.workers_after} workers: no other number fits the cluster and the job")
    if metrics.missing:
        numbers = ", ".join(map(str, metrics.missing))
        notes.append(f"only one run has the report of epoch {numbers}: it went with its worker before it was sent")
    return tuple(notes)


def _squares(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Squared norms: of the reference, and of the difference (infinite where there is none)."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return 0.0, math.inf
    if not expected.is_floating_point():  # a counter, which no tolerance applies to
        return 0.0, 0.0 if bool((expected == found).all()) else math.inf
    reference = expected.double()
    return float(reference.square().sum()), float((found.double() - reference).square().sum())


def _ratio(squared_difference: float, squares: float) -> float:
    """Relative difference; infinite where it is not defined."""
    if math.isnan(squared_difference) or math.isnan(squares):
        return math.inf
    if squared_difference == 0:
        return 0.0
    return math.sqrt(squared_difference / squares) if squares > 0 else math.inf


def _same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    import torch

    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (expected, found)]
    return torch.equal(*bits)
