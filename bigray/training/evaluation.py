"""What a finished model is worth on the validation rows: scores for its card, and the thresholds it decides by. Pure.

Computed once, at export: exact areas under curves and calibration need the probabilities of all rows at once, which
epochs do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, ClassScores, ModelCard, OutputSchema
from bigray.data.targets import Targets
from bigray.inference import FloatArray, interpret
from bigray.specs import Threshold, TrainingSpec

if TYPE_CHECKING:
    import torch

MOST_CLASSES = 100
"""With more, the confusion matrix and what is told of each class are left out: nobody reads them."""
CALIBRATION_BINS = 15
"""Of equal width, as Guo et al. 2017 (arXiv 1706.04599) have it."""

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Evaluation:
    """Over the validation rows."""

    scores: dict[str, float]
    per_class: tuple[ClassScores, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    threshold: float | None = None
    """Of a binary task."""
    thresholds: tuple[float, ...] = ()
    """Of a multilabel task, one for each label."""

    def described(self, manifest: BundleManifest) -> BundleManifest:
        """The manifest with these scores on its card and these thresholds in its schema."""
        found = {"scores": self.scores, "per_class": self.per_class, "confusion": self.confusion}
        card = (manifest.card or ModelCard()).model_copy(update=found)
        chosen = {"threshold": self.threshold, "thresholds": self.thresholds}
        return manifest.model_copy(update={"card": card, "outputs": manifest.outputs.model_copy(update=chosen)})


def is_evaluated(schema: OutputSchema) -> bool:
    """Whether `evaluate` asks for the outputs at all: those of a language model are many, and epochs tell it all."""
    return schema.task != "language"


def evaluate(outputs: FloatArray, targets: Targets, schema: OutputSchema, spec: TrainingSpec) -> Evaluation:
    """Scores and thresholds from a module's outputs (rows, num_outputs) for the validation rows and their targets.

    The thresholds are chosen by `spec.threshold`; those of `schema` are not looked at. Of outputs that are not all
    finite nothing is told: such a model is not served.
    """
    if not np.isfinite(outputs).all():
        return Evaluation({})
    if schema.task == "regression":
        return Evaluation(_value_scores(outputs.reshape(-1), targets))
    if schema.task == "binary":
        return _evaluate_binary(outputs, targets, schema, spec.threshold)
    if schema.task == "multilabel":
        return _evaluate_labels(outputs, targets, schema, spec.threshold)
    if schema.task == "classification":
        return _evaluate_classes(outputs, targets, schema)
    return Evaluation({})


def choose_threshold(scores: FloatArray, is_positive: BoolArray, rule: Threshold) -> float:
    """The probability from which on a row counts as positive, by the probabilities (rows,) of rows that are known.

    "f1": where F1 is best, and of equal ones the highest. {"recall": r}: the highest that finds the share r of the
    positive rows. It lies halfway between two rows' probabilities, so that none of them sits on the edge, where the
    last bit of another kernel would decide. Without a positive row to go by it is 0.5.
    """
    if isinstance(rule, float):
        return rule
    if not is_positive.any():
        return 0.5
    levels, hits, taken = _counts_from_above(scores, is_positive)
    if isinstance(rule, dict):
        # rounded up, with room for r x positives that is a whole number but for its last bit
        needed = max(1, int(np.ceil(rule["recall"] * is_positive.sum() - 1e-9)))
        place = int(np.searchsorted(hits, needed))
    else:
        place = int(np.argmax(2 * hits / (taken + is_positive.sum())))
    above, below = levels[place], levels[place + 1] if place + 1 < len(levels) else np.float32(0)
    middle = np.float32((float(above) + float(below)) / 2)
    return float(middle if middle > below else above)


def _counts_from_above(
    scores: FloatArray, is_positive: BoolArray
) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.int64]]:
    """Each different score, highest first; the positive rows with at least that score; and all rows that have it."""
    levels, places = np.unique(scores, return_inverse=True)
    all_rows = np.bincount(places, minlength=len(levels))
    positives = np.bincount(places, weights=is_positive, minlength=len(levels)).astype(np.int64)
    return levels[::-1], np.cumsum(positives[::-1]), np.cumsum(all_rows[::-1])


def _evaluate_binary(outputs: FloatArray, targets: Targets, schema: OutputSchema, rule: Threshold) -> Evaluation:
    from torchmetrics.functional import classification as functional

    probabilities = _probabilities(outputs, schema)
    threshold = choose_threshold(probabilities[:, 1], targets == 1, rule)
    given = (probabilities[:, 1] >= np.float32(threshold)).astype(np.int64)
    confusion = _confusion(targets, given, 2)
    per_class = _per_class(schema, confusion, probabilities, targets[:, None] == np.arange(2))
    positive = per_class[1]
    scores = {"accuracy": float((given == targets).mean()), **_areas(per_class[1:])}
    scores |= {"precision": positive.precision, "recall": positive.recall, "f1": positive.f1}
    scores["calibration_error"] = _calibration(functional.binary_calibration_error, probabilities[:, 1], targets)
    return Evaluation(scores, per_class, _as_rows(confusion), threshold)


def _evaluate_classes(outputs: FloatArray, targets: Targets, schema: OutputSchema) -> Evaluation:
    from torchmetrics.functional import classification as functional

    probabilities, classes = _probabilities(outputs, schema), schema.num_outputs
    given = probabilities.argmax(axis=1)
    is_few = classes <= MOST_CLASSES
    confusion = _confusion(targets, given, classes) if is_few else None
    per_class: tuple[ClassScores, ...] = ()
    scores = {"accuracy": float((given == targets).mean())}
    if confusion is not None:
        per_class = _per_class(schema, confusion, probabilities, targets[:, None] == np.arange(classes))
        seen = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0  # as torchmetrics' macro averages have it
        scores |= _macro([one for one, is_seen in zip(per_class, seen, strict=True) if is_seen])
    calibrate = functional.multiclass_calibration_error
    scores["calibration_error"] = _calibration(calibrate, probabilities, targets, num_classes=classes)
    return Evaluation(scores, per_class, () if confusion is None else _as_rows(confusion))


def _evaluate_labels(outputs: FloatArray, targets: Targets, schema: OutputSchema, rule: Threshold) -> Evaluation:
    from torchmetrics.functional import classification as functional

    probabilities, has_label = _probabilities(outputs, schema), targets > 0
    chosen = [choose_threshold(probabilities[:, i], has_label[:, i], rule) for i in range(schema.num_outputs)]
    given = probabilities >= np.asarray(chosen, np.float32)
    hits, wrong, missed = (found.sum(axis=0) for found in (given & has_label, given & ~has_label, ~given & has_label))
    per_class = tuple(
        _scores_of(
            schema.class_names[i], int(hits[i]), int(wrong[i]), int(missed[i]), probabilities[:, i], has_label[:, i]
        )
        for i in range(schema.num_outputs)
    )
    scores = {
        "exact_match": float((given == has_label).all(axis=1).mean()),
        "micro_f1": _ratio(2 * hits.sum(), 2 * hits.sum() + wrong.sum() + missed.sum()),
        **_macro(per_class),
    }
    calibrate = functional.binary_calibration_error
    scores["calibration_error"] = _calibration(calibrate, probabilities.reshape(-1), targets.reshape(-1))
    return Evaluation(scores, per_class if len(per_class) <= MOST_CLASSES else (), thresholds=tuple(chosen))


def _value_scores(values: FloatArray, targets: Targets) -> dict[str, float]:
    errors, expected = values.astype(np.float64) - targets, targets.astype(np.float64)
    spread = float(((expected - expected.mean()) ** 2).sum())
    scores = {"mse": float((errors**2).mean()), "mae": float(np.abs(errors).mean())}
    return scores | ({"r2": 1 - float((errors**2).sum()) / spread} if spread > 0 else {})


def _probabilities(outputs: FloatArray, schema: OutputSchema) -> FloatArray:
    found = interpret(outputs, schema).probabilities
    assert found is not None, "all but regression have them"
    return found


def _confusion(targets: Targets, given: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    pairs = targets.astype(np.int64) * classes + given
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _as_rows(confusion: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, confusion.tolist()))


def _per_class(
    schema: OutputSchema, confusion: NDArray[np.int64], probabilities: FloatArray, is_class: BoolArray
) -> tuple[ClassScores, ...]:
    hits, given, true = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    wrong, missed = (given - hits).tolist(), (true - hits).tolist()
    return tuple(
        _scores_of(name, int(hits[i]), wrong[i], missed[i], probabilities[:, i], is_class[:, i])
        for i, name in enumerate(schema.class_names)
    )


def _scores_of(
    name: str | int, hits: int, wrong: int, missed: int, probabilities: FloatArray, has_it: BoolArray
) -> ClassScores:
    has_both = 0 < hits + missed < len(has_it)
    roc_auc, pr_auc = _exact_areas(probabilities, has_it) if has_both else (None, None)
    return ClassScores(
        name=name,
        rows=hits + missed,
        precision=_ratio(hits, hits + wrong),
        recall=_ratio(hits, hits + missed),
        f1=_ratio(2 * hits, 2 * hits + wrong + missed),
        roc_auc=roc_auc,
        pr_auc=pr_auc,
    )


def _exact_areas(probabilities: FloatArray, has_it: BoolArray) -> tuple[float, float]:
    from torchmetrics.functional import classification as functional

    scores, targets = _tensor(probabilities), _tensor(has_it.astype(np.int64))
    area = functional.binary_auroc(scores, targets, thresholds=None)
    return float(area), float(functional.binary_average_precision(scores, targets, thresholds=None))


def _macro(per_class: tuple[ClassScores, ...] | list[ClassScores]) -> dict[str, float]:
    means = {f"macro_{key}": _mean([getattr(one, key) for one in per_class]) for key in ("precision", "recall", "f1")}
    return means | {f"macro_{key}": value for key, value in _areas(per_class).items()}


def _areas(per_class: tuple[ClassScores, ...] | list[ClassScores]) -> dict[str, float]:
    """The mean of the areas under curves, over the classes that have one; without an entry where none has."""
    found = {key: [getattr(one, key) for one in per_class] for key in ("roc_auc", "pr_auc")}
    known = {key: [value for value in values if value is not None] for key, values in found.items()}
    return {key: _mean(values) for key, values in known.items() if values}


def _calibration(
    measure: Callable[..., torch.Tensor], probabilities: FloatArray, targets: Targets, **settings: Any
) -> float:
    """The expected calibration error: how far confidence is from being right as often as it says."""
    numbers = _tensor(targets.astype(np.int64))
    return float(measure(_tensor(probabilities), numbers, n_bins=CALIBRATION_BINS, norm="l1", **settings))


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0
