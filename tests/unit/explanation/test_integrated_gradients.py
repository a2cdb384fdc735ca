from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from bigray.bundle import BundleManifest, FactorySpec, ModelBundle
from bigray.data.codes import UNSEEN
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import ColumnStep, Preprocessing, fit_preprocessing
from bigray.errors import DeployError, SpecError
from bigray.explanation.integrated_gradients import Explainer, explain_rows, why_not_supported
from bigray.inference import Predictor
from bigray.models import build_model
from bigray.serve.sample import write_sample_bundle

NUMBERS = tuple(Column(name=name) for name in ("a", "b", "c", "d"))
ROWS = np.random.default_rng(3).normal(2, 3, size=(6, 4)).astype(np.float32)


def _sample(root: Path, task: str = "classification", **more: Any) -> ModelBundle:
    names: dict[str, tuple[str, ...]] = {"regression": (), "binary": ("no", "yes")}
    settings: dict[str, Any] = {
        "columns": NUMBERS,
        "class_names": names.get(task, ("x", "y", "z")),
        "params": {"hidden": [8]},
        "onnx": False,
        "task": task,
        **more,
    }
    return ModelBundle.load(write_sample_bundle(str(root), **settings))


def _rebuilt(bundle: ModelBundle, factory: str, params: dict[str, Any], **changes: Any) -> ModelBundle:
    """The bundle with another module, of random weights, and other parts of its manifest."""
    spec = FactorySpec(factory=factory, params=params)
    manifest = bundle.manifest.model_copy(update={"factory": spec, **changes})
    shape = manifest.preprocessing.output_shape(manifest.inputs.input_shape)
    torch.manual_seed(0)
    module = build_model(factory, params, shape, manifest.outputs.num_outputs)
    return ModelBundle(manifest, safetensors.torch.save(module.state_dict()), None, "0123456789ab")


def _weights(bundle: ModelBundle) -> np.ndarray:
    (matrix,) = [tensor for tensor in safetensors.torch.load(bundle.weights).values() if tensor.ndim == 2]
    return matrix.numpy()


def _linear(root: Path, manifest_changes: dict[str, Any] | None = None) -> ModelBundle:
    return _rebuilt(_sample(root, "regression"), "bigray.models:linear", {}, **(manifest_changes or {}))


def test_of_a_linear_model_an_attribution_is_weight_times_standardised_value(tmp_path: Path) -> None:
    bundle = _linear(tmp_path)
    found = explain_rows(bundle, ROWS)

    expected = _weights(bundle)[0] * bundle.manifest.preprocessing.apply(ROWS)
    np.testing.assert_allclose(found.attributions, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.outputs, Predictor(bundle).run(ROWS).values, rtol=1e-5)
    assert (found.columns, found.labels) == (("a", "b", "c", "d"), None)


@pytest.mark.parametrize("task", ["classification", "binary", "multilabel", "regression"])
def test_attributions_add_up_to_the_difference_from_the_baseline(tmp_path: Path, task: str) -> None:
    bundle = _sample(tmp_path, task)
    found = explain_rows(bundle, np.repeat(ROWS, 4, axis=0))

    np.testing.assert_allclose(
        found.attributions.sum(axis=1), found.outputs - found.base, atol=0.01 * max(1, np.abs(found.outputs).max())
    )
    assert found.is_complete.all()
    assert len(found.outputs) == 24


def test_the_predicted_class_is_explained(tmp_path: Path) -> None:
    bundle = _sample(tmp_path)
    found = explain_rows(bundle, ROWS)
    predictor = Predictor(bundle)

    assert found.labels == predictor.run(ROWS).labels
    np.testing.assert_allclose(found.outputs, predictor.outputs(ROWS).max(axis=1), rtol=1e-4)


def test_what_speaks_for_the_negative_class_of_a_binary_task_is_positive(tmp_path: Path) -> None:
    bundle = _sample(tmp_path, "binary")
    rows = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    found, logits = explain_rows(bundle, rows), Predictor(bundle).outputs(rows)[:, 0]

    assert found.labels == Predictor(bundle).run(rows).labels
    assert set(found.labels) == {"no", "yes"}, "the rows show both"
    np.testing.assert_allclose(
        found.outputs,
        [a if b == "yes" else -a for a, b in zip(logits, found.labels, strict=True)],
        rtol=1e-4,
        atol=1e-6,
    )


def test_of_several_labels_the_likeliest_is_explained(tmp_path: Path) -> None:
    bundle = _sample(tmp_path, "multilabel")
    likeliest = Predictor(bundle).outputs(ROWS).argmax(axis=1)

    assert explain_rows(bundle, ROWS).labels == [bundle.manifest.outputs.class_names[i] for i in likeliest]


def test_a_row_has_the_same_attributions_alone_and_among_others(tmp_path: Path) -> None:
    explainer = Explainer(_sample(tmp_path))
    alone = np.concatenate([explainer.explain(ROWS[i : i + 1]).attributions for i in range(len(ROWS))])

    np.testing.assert_allclose(alone, explainer.explain(ROWS).attributions, rtol=1e-4, atol=1e-5)


def test_a_row_beside_itself_has_no_attributions(tmp_path: Path) -> None:
    found = Explainer(_sample(tmp_path)).explain(ROWS[:1], baseline=ROWS[0])

    np.testing.assert_array_equal(found.attributions, 0)
    assert found.base == pytest.approx(found.outputs)


STEPS = (
    ColumnStep(name="a", fill=1.0, indicator=True),
    ColumnStep(name="b", kind="category", num_categories=3),
    ColumnStep(name="c", kind="date", fill=10.0),
    ColumnStep(name="d"),
)
CODES = np.array([[np.nan, 2, 19000.5, 0.5], [3, -1, 19100, -2], [0, 0, np.nan, 1]], np.float32)


def test_all_that_becomes_of_a_column_counts_as_that_column(tmp_path: Path) -> None:
    preprocessing = fit_preprocessing("standard", CODES, STEPS)
    bundle = _linear(tmp_path, {"preprocessing": preprocessing})
    found = explain_rows(bundle, CODES)

    products = _weights(bundle)[0] * preprocessing.apply(CODES)
    ends = np.cumsum([step.width for step in STEPS])
    expected = np.stack([part.sum(axis=1) for part in np.split(products, ends[:-1], axis=1)], axis=1)
    assert found.attributions.shape == (3, 4)
    np.testing.assert_allclose(found.attributions, expected, rtol=1e-4, atol=1e-4)


def test_an_embedded_category_is_a_step_of_its_own(tmp_path: Path) -> None:
    steps = (ColumnStep(name="a"), ColumnStep(name="b", kind="category", num_categories=3, encode="embedding"))
    codes = np.array([[1.0, 2], [-1, 0], [2, UNSEEN]], np.float32)
    preprocessing = Preprocessing(steps=steps)
    bundle = _rebuilt(
        _sample(tmp_path),
        "bigray.models:mlp",
        {"hidden": [16], "embeddings": [list(pair) for pair in preprocessing.embeddings]},
        preprocessing=preprocessing,
        inputs=FeatureSchema(columns=NUMBERS[:2]),
    )
    found = explain_rows(bundle, codes)

    assert found.is_complete.all()
    assert (found.attributions[:2, 1] != 0).all()
    assert found.attributions[2, 1] == 0, "a category that training did not see is the baseline"
    with torch.inference_mode():
        module = Explainer(bundle)._module
        points = torch.from_numpy(preprocessing.apply(codes))
        alone = torch.stack([torch.zeros(3), points[:, 1]], dim=1)
        none = torch.stack([torch.zeros(3), points[2, 1].repeat(3)], dim=1)
        steps_up = (module(alone) - module(none)).numpy()
    chosen = [bundle.manifest.outputs.class_names.index(label) for label in found.labels or ()]
    np.testing.assert_allclose(found.attributions[:, 1], steps_up[np.arange(3), chosen], atol=1e-5)


def test_a_projection_is_undone(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(1, 2, size=(50, 4)).astype(np.float32)
    preprocessing = fit_preprocessing("standard", rows, num_components=2)
    bundle = _linear(tmp_path, {"preprocessing": preprocessing})
    plain = fit_preprocessing("standard", rows)
    found = explain_rows(bundle, rows[:5])

    assert found.attributions.shape == (5, 4)
    assert found.is_complete.all()
    weights = _weights(bundle)[0] @ preprocessing._axes
    np.testing.assert_allclose(found.attributions, weights * plain.apply(rows[:5]), rtol=1e-3, atol=1e-4)
    against = Explainer(bundle).explain(rows[:5], baseline=rows[9])
    np.testing.assert_allclose(
        against.attributions, weights * (plain.apply(rows[:5]) - plain.apply(rows[9:10])), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(("shape", "pixels"), [((8, 8), (8, 8)), ((3, 8, 8), (8, 8)), ((5,), (5,))])
def test_pixels_are_summed_over_the_channels(tmp_path: Path, shape: tuple[int, ...], pixels: tuple[int, ...]) -> None:
    bundle = _sample(tmp_path, columns=(Column(name="x", shape=shape),))
    rows = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    found = explain_rows(bundle, rows)

    assert found.attributions.shape == (2, *pixels)
    assert found.columns == ()
    assert found.is_complete.all()


def test_the_document_names_columns_of_a_table_and_nests_pixels(tmp_path: Path) -> None:
    (record,) = explain_rows(_sample(tmp_path), ROWS[:1]).to_json()["explanations"]
    assert list(record) == ["label", "output", "base", "error", "attributions"]
    assert list(record["attributions"]) == ["a", "b", "c", "d"]

    image = _sample(tmp_path, name="image", columns=(Column(name="x", shape=(4, 4)),))
    (record,) = explain_rows(image, np.ones((1, 4, 4), np.float32)).to_json()["explanations"]
    assert np.shape(record["attributions"]) == (4, 4)

    value = _sample(tmp_path, "regression", name="value")
    assert "label" not in explain_rows(value, ROWS[:1]).to_records()[0]


def _of_language(manifest: BundleManifest) -> BundleManifest:
    outputs = manifest.outputs.model_copy(update={"task": "language"})
    return manifest.model_copy(update={"outputs": outputs})


def test_what_cannot_be_explained_is_told_before_torch_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _sample(tmp_path)
    assert why_not_supported(bundle.manifest) is None
    assert "not for text" in str(why_not_supported(_of_language(bundle.manifest)))
    assert "not allowed" in str(why_not_supported(bundle.manifest, ()))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_supported(bundle.manifest) == "explanations need captum: pip install 'bigray[explain]'"
    with pytest.raises(SpecError, match="explanations need captum"):
        explain_rows(bundle, ROWS)


def test_a_factory_that_is_not_allowed_is_not_run_even_with_a_graph(tmp_path: Path) -> None:
    bundle = _sample(tmp_path)
    foreign = bundle.manifest.model_copy(update={"factory": FactorySpec(factory="os:system", params={})})

    with pytest.raises(DeployError, match="by the factory 'os:system', which is not allowed"):
        explain_rows(ModelBundle(foreign, bundle.weights, b"a graph", bundle.version), ROWS)
