from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification, regression

from bigray.bundle import BundleManifest, ModelBundle, OutputSchema
from bigray.inference import interpret
from bigray.serve.sample import write_sample_bundle
from bigray.specs import TrainingSpec
from bigray.training.evaluation import Evaluation, choose_threshold, evaluate

GENERATOR = np.random.default_rng(3)
ROWS = 200
BINARY = OutputSchema(task="binary", num_outputs=1, target="y", class_names=("no", "yes"))
CLASSES = OutputSchema(task="classification", num_outputs=4, target="y", class_names=("a", "b", "c", "d"))
LABELS = OutputSchema(task="multilabel", num_outputs=3, target="y", class_names=("a", "b", "c"))


def _spec(task: str, **settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"task": task, **settings})


def _binary(**settings: Any) -> tuple[Evaluation, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    targets = (GENERATOR.random(ROWS) < 0.3).astype(np.int64)
    outputs = (GENERATOR.normal(size=(ROWS, 1)) + 2 * targets[:, None] - 2).astype(np.float32)
    return evaluate(outputs, targets, BINARY, _spec("binary", **settings)), outputs, targets


def _f1(given: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    return float(2 * (given & targets).sum() / (given.sum() + targets.sum()))


def test_the_threshold_of_the_best_f1_is_no_worse_than_any_other() -> None:
    scores = GENERATOR.random(ROWS).astype(np.float32).round(2)
    targets = scores + GENERATOR.normal(scale=0.3, size=ROWS) > 0.7
    chosen = choose_threshold(scores, targets, "f1")

    best = max(_f1(scores >= level, targets) for level in np.unique(scores))
    assert _f1(scores >= chosen, targets) == best
    assert np.abs(scores - chosen).min() > 1e-3, "halfway between two scores"


@pytest.mark.parametrize(("recall", "expected"), [(0.01, 0.85), (0.25, 0.85), (0.5, 0.65), (0.51, 0.45), (1.0, 0.15)])
def test_the_threshold_of_a_recall_is_the_highest_that_reaches_it(recall: float, expected: float) -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.1], np.float32)
    is_positive = np.array([1, 0, 1, 0, 1, 0, 1, 0], bool)

    assert choose_threshold(scores, is_positive, {"recall": recall}) == pytest.approx(expected)


def test_a_threshold_lies_on_a_score_where_nothing_fits_between_two() -> None:
    above = np.float32(0.5)
    scores = np.array([above, np.nextafter(above, np.float32(0))])

    assert choose_threshold(scores, np.array([True, False]), "f1") == above
    assert choose_threshold(scores, np.array([False, False]), "f1") == 0.5
    assert choose_threshold(scores, np.array([True, False]), 0.2) == 0.2
    assert choose_threshold(np.array([0.8], np.float32), np.array([True]), "f1") == pytest.approx(0.4)


@pytest.mark.parametrize("rule", ["f1", 0.5, {"recall": 0.9}], ids=str)
def test_the_scores_of_a_binary_model_are_torchmetrics_own_at_the_threshold(rule: Any) -> None:
    found, outputs, targets = _binary(threshold=rule)
    chosen = BINARY.model_copy(update={"threshold": found.threshold})
    answers = interpret(outputs, chosen)
    assert answers.probabilities is not None and answers.labels is not None
    scores, given = (torch.from_numpy(np.ascontiguousarray(answers.probabilities[:, 1])), np.array(answers.labels))
    decided, true = torch.from_numpy((given == "yes").astype(np.int64)), torch.from_numpy(targets)

    assert found.scores == {
        "accuracy": pytest.approx(classification.binary_accuracy(decided, true).item()),
        "precision": pytest.approx(classification.binary_precision(decided, true).item()),
        "recall": pytest.approx(classification.binary_recall(decided, true).item()),
        "f1": pytest.approx(classification.binary_f1_score(decided, true).item()),
        "roc_auc": pytest.approx(classification.binary_auroc(scores, true).item()),
        "pr_auc": pytest.approx(classification.binary_average_precision(scores, true).item()),
        "calibration_error": pytest.approx(classification.binary_calibration_error(scores, true).item()),
    }
    assert found.confusion == tuple(map(tuple, classification.binary_confusion_matrix(decided, true).tolist()))
    assert [(one.name, one.rows) for one in found.per_class] == [("no", (targets == 0).sum()), ("yes", targets.sum())]
    if isinstance(rule, dict):
        assert found.scores["recall"] >= 0.9


def test_the_scores_of_classes_are_torchmetrics_own_but_for_a_class_that_no_row_has() -> None:
    targets = GENERATOR.integers(3, size=ROWS)
    outputs = (GENERATOR.normal(size=(ROWS, 4)) + 1.5 * np.eye(4)[targets] - 9 * np.eye(4)[3]).astype(np.float32)
    found = evaluate(outputs, targets, CLASSES, _spec("classification"))
    scores, true = torch.from_numpy(outputs).softmax(dim=1), torch.from_numpy(targets)
    recalls = classification.multiclass_recall(scores, true, 4, average="none").tolist()
    areas = [classification.binary_auroc(scores[:, i], (true == i).long()).item() for i in range(3)]
    precise = classification.multiclass_average_precision(scores, true, 4, average="none").tolist()[:3]

    assert [one.recall for one in found.per_class] == pytest.approx(recalls)
    assert [one.roc_auc for one in found.per_class] == [*map(pytest.approx, areas), None]
    assert found.scores == {
        "accuracy": pytest.approx(classification.multiclass_accuracy(scores, true, 4, average="micro").item()),
        "macro_precision": pytest.approx(classification.multiclass_precision(scores, true, 4).item()),
        "macro_recall": pytest.approx(classification.multiclass_recall(scores, true, 4).item()),
        "macro_f1": pytest.approx(classification.multiclass_f1_score(scores, true, 4).item()),
        "macro_roc_auc": pytest.approx(np.mean(areas)),
        "macro_pr_auc": pytest.approx(np.mean(precise)),
        "calibration_error": pytest.approx(classification.multiclass_calibration_error(scores, true, 4).item()),
    }
    assert np.sum(found.confusion) == ROWS


def test_each_label_has_a_threshold_and_scores_of_its_own() -> None:
    targets = (GENERATOR.random((ROWS, 3)) < [0.1, 0.5, 0.8]).astype(np.int8)
    outputs = (GENERATOR.normal(size=(ROWS, 3)) + targets).astype(np.float32)
    found = evaluate(outputs, targets, LABELS, _spec("multilabel"))
    chosen = LABELS.model_copy(update={"thresholds": found.thresholds})
    labels = interpret(outputs, chosen).labels
    assert labels is not None
    decided = torch.tensor([[int(name in row) for name in LABELS.class_names] for row in labels])
    true = torch.from_numpy(targets).long()

    assert len({*found.thresholds}) == 3
    per_label = classification.multilabel_f1_score(decided, true, 3, average="none").tolist()
    assert [one.f1 for one in found.per_class] == pytest.approx(per_label)
    assert found.scores["macro_f1"] == pytest.approx(np.mean(per_label))
    assert found.scores["micro_f1"] == pytest.approx(
        classification.multilabel_f1_score(decided, true, 3, average="micro").item()
    )
    assert found.scores["exact_match"] == pytest.approx((decided == true).all(dim=1).double().mean().item())
    scores = torch.from_numpy(outputs).sigmoid()
    assert found.scores["macro_roc_auc"] == pytest.approx(classification.multilabel_auroc(scores, true, 3).item())


def test_the_scores_of_values_are_torchmetrics_own() -> None:
    schema = OutputSchema(task="regression", num_outputs=1, target="y")
    targets = GENERATOR.normal(size=ROWS).astype(np.float32)
    outputs = targets[:, None] + np.float32(0.1)
    found = evaluate(outputs, targets, schema, _spec("regression"))
    given, true = torch.from_numpy(outputs[:, 0]), torch.from_numpy(targets)

    assert found.scores["mse"] == pytest.approx(regression.mean_squared_error(given, true).item(), rel=1e-4)
    assert found.scores["r2"] == pytest.approx(regression.r2_score(given, true).item())
    assert "r2" not in evaluate(outputs, np.ones_like(targets), schema, _spec("regression")).scores


def test_nothing_is_told_of_outputs_that_are_no_numbers() -> None:
    outputs = np.full((2, 1), np.nan, np.float32)

    assert evaluate(outputs, np.array([0, 1]), BINARY, _spec("binary")) == Evaluation({})


def test_a_manifest_takes_the_scores_on_its_card_and_the_threshold_into_its_schema(tmp_path: Path) -> None:
    manifest = ModelBundle.load(
        write_sample_bundle(str(tmp_path), class_names=("no", "yes"), task="binary", params={"hidden": [2]}, onnx=False)
    ).manifest
    found, _, _ = _binary(threshold=0.25)
    described = found.described(manifest)

    assert described.outputs == manifest.outputs.model_copy(update={"threshold": 0.25})
    assert described.card is not None and manifest.card is not None
    assert (described.card.scores, described.card.rows) == (found.scores, manifest.card.rows)
    assert BundleManifest.model_validate_json(described.model_dump_json()) == described
