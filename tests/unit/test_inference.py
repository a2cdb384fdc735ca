from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bigray.bundle import FactorySpec, ModelBundle
from bigray.data.features import Column
from bigray.errors import DeployError, SpecError
from bigray.inference import Predictions, Predictor, check_factory, softmax
from bigray.serve.sample import write_sample_bundle

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
