from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigray.bundle import FactorySpec, ModelBundle, OutputSchema
from bigray.data.features import Column
from bigray.data.text import PADDING
from bigray.errors import DeployError, SpecError
from bigray.inference import Predictions, Predictor, check_factory, interpret, row_outputs, softmax
from bigray.serve.sample import write_sample_bundle
from bigray.specs import BuiltInTask

COLUMNS = (Column(name="width"), Column(name="height"))
ROWS = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> ModelBundle:
    return ModelBundle.load(
        write_sample_bundle(
            str(tmp_path), columns=COLUMNS, class_names=("cat", "dog"), params={"hidden": [4]}, onnx=False
        )
    )


@pytest.fixture
def regression_bundle(tmp_path: Path) -> ModelBundle:
    return ModelBundle.load(
        write_sample_bundle(str(tmp_path), columns=COLUMNS, class_names=(), params={"hidden": [4]}, onnx=False)
    )


def _with_factory(bundle: ModelBundle, factory: str) -> ModelBundle:
    manifest = bundle.manifest.model_copy(update={"factory": FactorySpec(factory=factory, params={})})
    return ModelBundle(manifest, bundle.weights, None, bundle.version)


def test_probabilities_sum_to_1_and_the_label_is_the_likeliest(bundle: ModelBundle) -> None:
    predictions = Predictor(bundle).run(ROWS)

    assert predictions.probabilities is not None
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1, rtol=1e-6)
    names = [("cat", "dog")[row.argmax()] for row in predictions.probabilities]
    assert predictions.labels == names
    assert predictions.values is None


def test_regression_answers_one_value_a_row(regression_bundle: ModelBundle) -> None:
    predictions = Predictor(regression_bundle).run(ROWS)

    assert predictions.values is not None
    assert predictions.values.shape == (6,)
    assert (predictions.labels, predictions.probabilities) == (None, None)


def test_a_row_gets_the_same_answer_alone_and_among_others(bundle: ModelBundle) -> None:
    predictor = Predictor(bundle)
    together = predictor.run(ROWS).probabilities
    alone = [predictor.run(ROWS[i : i + 1]).probabilities for i in range(6)]

    assert together is not None
    np.testing.assert_allclose(np.concatenate([row for row in alone if row is not None]), together, rtol=1e-6)


def test_a_table_means_the_same_as_an_array(bundle: ModelBundle) -> None:
    table = pa.table({"height": ROWS[:, 1], "id": range(6), "width": ROWS[:, 0]})

    np.testing.assert_array_equal(
        Predictor(bundle).run_table(table).probabilities, Predictor(bundle).run(ROWS).probabilities
    )


def test_the_bundles_own_standardisation_is_applied(bundle: ModelBundle) -> None:
    plain = bundle.manifest.model_copy(update={"preprocessing": type(bundle.manifest.preprocessing)()})
    without = Predictor(ModelBundle(plain, bundle.weights, None, bundle.version))
    standardised = bundle.manifest.preprocessing.apply(ROWS)

    np.testing.assert_array_equal(Predictor(bundle).run(ROWS).probabilities, without.run(standardised).probabilities)


def test_records_hold_what_json_can() -> None:
    probabilities = np.array([[0.25, 0.75]], dtype=np.float32)

    assert Predictions(["dog"], probabilities, None).to_records() == [{"label": "dog", "probabilities": [0.25, 0.75]}]
    assert Predictions(None, None, np.array([1.5], dtype=np.float32)).to_records() == [{"value": 1.5}]


def test_softmax_does_not_overflow() -> None:
    result = softmax(np.array([[1000.0, 0.0], [-1000.0, -1000.0]], dtype=np.float32))

    np.testing.assert_array_equal(result, [[1.0, 0.0], [0.5, 0.5]])


def test_a_factory_that_is_not_allowed_is_not_even_imported(
    bundle: ModelBundle, user_module: Callable[[str], str]
) -> None:
    name = user_module("raise SystemExit('this code ran')")

    with pytest.raises(DeployError, match=rf"factory '{name}:make' is not allowed; add it to 'allow_factories'"):
        Predictor(_with_factory(bundle, f"{name}:make"))


def test_a_factory_that_the_deployer_allows_is_built(bundle: ModelBundle, user_module: Callable[[str], str]) -> None:
    name = user_module(
        "from bigray.models import mlp\ndef make(shape, outputs): return mlp(shape, outputs, hidden=(4,))"
    )
    predictor = Predictor(_with_factory(bundle, f"{name}:make"), allow_factories=[f"{name}:*"])

    np.testing.assert_array_equal(predictor.run(ROWS).probabilities, Predictor(bundle).run(ROWS).probabilities)


@pytest.mark.parametrize("factory", ["bigray.models.evil:make", "bigray.modelsx:mlp", "os:system", "Bigray.models:mlp"])
def test_only_bigrays_own_factories_are_allowed_from_the_start(bundle: ModelBundle, factory: str) -> None:
    with pytest.raises(DeployError, match="is not allowed"):
        Predictor(_with_factory(bundle, factory))


def test_with_an_onnx_model_no_factory_needs_to_be_allowed(bundle: ModelBundle) -> None:
    foreign = _with_factory(bundle, "os:system")

    check_factory(ModelBundle(foreign.manifest, foreign.weights, b"an onnx file", foreign.version), [])


def test_an_allowed_factory_that_is_not_installed_is_told(bundle: ModelBundle) -> None:
    with pytest.raises(SpecError, match="cannot import 'no_such_package'"):
        Predictor(_with_factory(bundle, "no_such_package:make"), allow_factories=["*"])


LOGITS = np.array([[-1.0, 3.0], [0.2, -200.0], [0.0, 100.0]], np.float32)


def test_a_binary_answer_is_the_positive_class_from_the_threshold_on() -> None:
    schema = OutputSchema(task="binary", num_outputs=1, target="y", class_names=("no", "yes"))
    answers = interpret(LOGITS[:, :1], schema)
    careful = interpret(LOGITS[:, :1], schema.model_copy(update={"threshold": 0.52}))

    assert answers.labels == ["no", "yes", "yes"]
    assert careful.labels == ["no", "yes", "no"]
    assert answers.probabilities is not None
    np.testing.assert_allclose(answers.probabilities[:, 1], 1 / (1 + np.exp(-LOGITS[:, 0])), rtol=1e-6)
    np.testing.assert_allclose(answers.probabilities.sum(axis=1), 1, rtol=1e-6)


def test_a_row_has_each_label_from_its_threshold_on() -> None:
    schema = OutputSchema(task="multilabel", num_outputs=2, target="y", class_names=("sea", "sun"))
    strict = schema.model_copy(update={"thresholds": (0.6, 0.99)})

    assert interpret(LOGITS, schema).labels == [["sun"], ["sea"], ["sea", "sun"]]
    assert interpret(LOGITS, strict).labels == [[], [], ["sun"]]
    assert interpret(LOGITS, strict).to_records()[2]["label"] == ["sun"]


def test_a_language_is_answered_by_what_follows_the_last_token_of_each_window() -> None:
    outputs = np.zeros((2, 3, 4), np.float32)
    outputs[0, 2, 3] = outputs[1, 0, 1] = 5.0
    windows = np.array([[0, 1, 2], [2, PADDING, PADDING]], np.float32)
    schema = OutputSchema(task="language", num_outputs=4, target="y", class_names=tuple("abcd"))
    answers = interpret(row_outputs(outputs, windows, schema), schema)

    assert answers.labels == ["d", "b"]
    assert answers.probabilities is not None and answers.probabilities.shape == (2, 4)
    assert interpret(outputs[:, 0], schema.model_copy(update={"class_names": ()})).labels == [0, 1]


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_a_bundle_answers_by_the_thresholds_it_carries(tmp_path: Path, task: BuiltInTask) -> None:
    thresholds = (0.9,) if task == "binary" else (0.9, 0.1)
    location = write_sample_bundle(
        str(tmp_path),
        columns=COLUMNS,
        class_names=("cat", "dog"),
        params={"hidden": [4]},
        task=task,
        thresholds=thresholds,
        onnx=False,
    )
    predictor = Predictor(ModelBundle.load(location))
    answers = predictor.run(ROWS)

    assert predictor.manifest.outputs.decision == thresholds
    assert answers.probabilities is not None and answers.probabilities.shape == (6, 2)
    expected = [["cat", "dog"][int(row[1] >= 0.9)] for row in answers.probabilities]
    has_label = answers.probabilities >= np.array([0.9, 0.1])
    lists = [[name for name, has in zip(("cat", "dog"), row, strict=True) if has] for row in has_label]
    assert answers.labels == (expected if task == "binary" else lists)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "binary", "num_outputs": 2},
        {"task": "binary", "class_names": ("a", "b", "c")},
        {"task": "binary", "threshold": float("nan")},
        {"task": "binary", "threshold": 1.5},
        {"task": "multilabel", "num_outputs": 2, "thresholds": (0.5,)},
        {"task": "multilabel", "num_outputs": 3},
        {"task": "classification", "num_outputs": 2, "thresholds": (0.5, 0.5)},
    ],
)
def test_a_schema_whose_parts_do_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error for OutputSchema"):
        OutputSchema.model_validate({"num_outputs": 1, "target": "y", "class_names": ("a", "b"), **changes})
