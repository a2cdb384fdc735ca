"""From a trial's checkpoint to a bundle. The exporter takes seconds, so each real export serves several tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from onnx import TensorProto, helper

from bigray.bundle import (
    BundleManifest,
    FactorySpec,
    ModelBundle,
    ModelCard,
    Origin,
    OutputSchema,
    pack_holdout,
)
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import Preprocessing, fit_preprocessing
from bigray.errors import StorageError
from bigray.inference import Predictor
from bigray.models import build_model
from bigray.onnx_export import TOLERANCE, export_onnx
from bigray.paths import RunPaths
from bigray.serve.release.golden import check_golden
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import open_storage
from bigray.training.answers import Exported
from bigray.training.checkpoint import Progress
from bigray.training.checkpoint_writer import save_checkpoint, trim_trial
from bigray.training.export import export_bundle
from bigray.training.tensor_files import pack_tensors, unpack_tensors

ROWS = np.random.default_rng(0).normal(size=(64, 8, 8)).astype(np.float32)
RAW_ROWS = ROWS[:16] * 2 + np.float32(0.5)
TARGETS = np.random.default_rng(1).integers(3, size=64)


def _trial(factory: str, params: dict[str, Any]) -> TrialSpec:
    return TrialSpec(
        trial_id="0-net",
        model_name="net",
        model=ModelSpec(factory=factory, params=params),
        training=TrainingSpec(task="classification"),
        seed=0,
    )


def _manifest(trial: TrialSpec) -> BundleManifest:
    return BundleManifest(
        name="digits",
        origin=Origin(
            run="digits-1",
            trial=trial.trial_id,
            model=trial.model_name,
            step=10,
            epoch=2,
            metrics={"val_loss": 0.5},
            config=trial.training.model_dump(mode="json"),
            seeds={"job": 0},
            data_fingerprint="f",
            git=None,
            versions={},
        ),
        inputs=FeatureSchema(columns=(Column(name="image", shape=(8, 8)),)),
        preprocessing=Preprocessing(kind="standard", center=(0.5,), scale=(2.0,)),
        outputs=OutputSchema(task="classification", num_outputs=3, target="label", class_names=(0, 1, 2)),
        factory=FactorySpec(factory=trial.model.factory, params=trial.model.params),
        example={"image": ROWS[0].tolist()},
        card=ModelCard(rows={"train": 7}),
    )


def _export(paths: RunPaths, trial: TrialSpec) -> tuple[Exported, bytes, bytes]:
    """Save a checkpoint whose best weights are not its last ones, and export; also returns both weights."""
    best, last = (
        pack_tensors(build_model(trial.model.factory, {**trial.model.params}, (8, 8), 3).state_dict()) for _ in range(2)
    )
    files = {"model.safetensors": last, "best.safetensors": best}
    save_checkpoint(paths, trial, 1, Progress(epoch=3, step=15, best_epoch=2, best_step=10), files)
    holdout = pack_holdout(pa.table({"image": ROWS[:2].reshape(2, 64).tolist(), "label": [0, 1]}))
    exported = export_bundle(
        paths, trial, _manifest(trial), ROWS, golden_rows=RAW_ROWS, targets=TARGETS, holdout=holdout
    )
    return exported, best, last


CNN = ("bigray.models:cnn", {"channels": [4, 4], "dropout": 0.5})
"""Has all that an mlp has as well; exporting both would take a second more."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelBundle, Path]:
    """A bundle with `model.onnx`, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    result, best, last = _export(RunPaths(open_storage(folder), "digits-1"), _trial(*CNN))
    assert result == Exported(f"{folder}/bundle", None)
    bundle = ModelBundle.load(result.uri)
    assert bundle.weights == best != last
    return bundle, folder / "bundle"


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_onnx_model_answers_as_the_module_does_for_any_number_of_rows(
    exported: tuple[ModelBundle, Path], rows: int
) -> None:
    bundle, _ = exported
    module = build_model(bundle.manifest.factory.factory, bundle.manifest.factory.params, (8, 8), 3).eval()
    module.load_state_dict(unpack_tensors(bundle.weights))
    predictor = Predictor(bundle)

    with torch.inference_mode():
        standardised = torch.from_numpy((ROWS[:rows] - 0.5) / 2)
        expected = torch.softmax(module(standardised), dim=1).numpy()

    assert predictor.backend == "onnxruntime"
    np.testing.assert_allclose(predictor.run(ROWS[:rows]).probabilities, expected, atol=TOLERANCE)


def test_torch_and_onnx_runtime_answer_alike(exported: tuple[ModelBundle, Path]) -> None:
    bundle, _ = exported
    without = ModelBundle(bundle.manifest, bundle.weights, None, bundle.version)
    by_onnx, by_torch = Predictor(bundle).run(ROWS), Predictor(without).run(ROWS)

    assert Predictor(without).backend == "torch"
    assert by_onnx.labels == by_torch.labels
    np.testing.assert_allclose(by_onnx.probabilities, by_torch.probabilities, atol=1e-5)


def test_a_bundle_is_safetensors_onnx_and_json_and_nothing_else(exported: tuple[ModelBundle, Path]) -> None:
    _, folder = exported

    names = {"manifest.json", "model.onnx", "weights.safetensors", "golden.safetensors", "holdout.arrow"}
    assert {path.name for path in folder.iterdir()} == names


def test_the_golden_answers_are_the_modules_to_rows_as_they_come(exported: tuple[ModelBundle, Path]) -> None:
    bundle, _ = exported
    golden = bundle.golden
    assert golden is not None
    module = build_model(bundle.manifest.factory.factory, bundle.manifest.factory.params, (8, 8), 3).eval()
    module.load_state_dict(unpack_tensors(bundle.weights))

    with torch.inference_mode():
        expected = module(torch.from_numpy(bundle.manifest.preprocessing.apply(golden.inputs))).numpy()

    np.testing.assert_array_equal(golden.outputs, expected)
    np.testing.assert_array_equal(golden.inputs, RAW_ROWS)
    assert check_golden(bundle, Predictor(bundle)) is None


def test_the_card_counts_which_class_was_taken_for_which(exported: tuple[ModelBundle, Path]) -> None:
    bundle, _ = exported
    module = build_model(bundle.manifest.factory.factory, bundle.manifest.factory.params, (8, 8), 3).eval()
    module.load_state_dict(unpack_tensors(bundle.weights))
    with torch.inference_mode():
        answers = module(torch.from_numpy(ROWS)).argmax(dim=1).tolist()

    card = bundle.manifest.card
    assert card is not None
    counts = Counter(zip(TARGETS.tolist(), answers, strict=True))
    assert card.confusion == tuple(tuple(counts[(true, given)] for given in range(3)) for true in range(3))
    assert card.num_parameters == sum(parameter.numel() for parameter in module.parameters())
    assert card.rows == {"train": 7}


def test_a_module_without_an_answer_on_this_machine_gives_a_bundle_without_golden_answers(
    paths: RunPaths, user_module: Callable[[str], str]
) -> None:
    name = user_module(
        """
        from torch import nn

        class Net(nn.Linear):
            def forward(self, x):
                raise RuntimeError("only on a GPU")

        def make(shape, outputs):
            return Net(64, outputs)
        """
    )
    result, best, _ = _export(paths, _trial(f"{name}:make", {}))
    bundle = ModelBundle.load(result.uri)

    assert (bundle.golden, bundle.weights) == (None, best)
    assert bundle.manifest.card is not None
    assert bundle.manifest.card.confusion == ()


def test_a_module_is_built_for_what_the_preprocessing_makes_of_a_row(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.training.export.export_onnx", lambda *_: (None, "not asked"))
    trial = _trial("bigray.models:mlp", {})
    weights = pack_tensors(build_model(trial.model.factory, {}, (5,), 3).state_dict())
    save_checkpoint(paths, trial, 1, Progress(step=10, best_step=10), {"model.safetensors": weights})
    codes = RAW_ROWS.copy()
    preprocessing = fit_preprocessing("standard", codes, num_components=5)
    manifest = _manifest(trial).model_copy(update={"preprocessing": preprocessing})

    export_bundle(paths, trial, manifest, preprocessing.apply(codes), golden_rows=codes)
    bundle = ModelBundle.load(paths.bundle)

    assert (bundle.manifest.inputs.input_shape, bundle.manifest.model_input_shape) == ((8, 8), (5,))
    assert check_golden(bundle, Predictor(bundle)) is None


@pytest.mark.parametrize("causal", [True, False])
def test_a_transformer_is_exported_for_any_number_of_rows(causal: bool) -> None:
    """The export itself compares 1, 3 and all rows with the module."""
    params = {"width": 8, "depth": 1, "heads": 2, "dropout": 0.1, "causal": causal}
    module = build_model("bigray.models:transformer", params, (8, 8), 3).eval()

    model, why_no_onnx = export_onnx(module, ROWS)

    assert why_no_onnx is None
    assert model is not None


def test_a_module_that_cannot_be_exported_gives_a_bundle_without_onnx_and_says_why(
    paths: RunPaths, user_module: Callable[[str], str]
) -> None:
    name = user_module(
        """
        import torch
        from torch import nn

        class Net(nn.Linear):
            def forward(self, x):
                if torch.compiler.is_exporting():
                    raise RuntimeError("not for export")
                return super().forward(x.flatten(1))

        def make(shape, outputs):
            return Net(64, outputs)
        """
    )
    result, best, _ = _export(paths, _trial(f"{name}:make", {}))
    bundle = ModelBundle.load(result.uri)

    assert result.why_no_onnx is not None
    assert result.why_no_onnx.startswith("export failed: ")
    assert (bundle.onnx, bundle.weights) == (None, best)


def test_a_trial_without_a_checkpoint_cannot_be_exported(paths: RunPaths) -> None:
    trial = _trial("bigray.models:mlp", {})

    with pytest.raises(StorageError, match="trials/0-net: no checkpoint to export"):
        export_bundle(paths, trial, _manifest(trial), ROWS)


def test_a_trial_of_which_only_the_record_was_kept_cannot_be_exported(paths: RunPaths) -> None:
    trial = _trial("bigray.models:mlp", {})
    save_checkpoint(paths, trial, 1, Progress(step=10, best_step=10), {"model.safetensors": pack_tensors({})})
    trim_trial(paths, trial.trial_id, 1)

    with pytest.raises(StorageError, match="ckpt-0000000010: expected weights, found only the record"):
        export_bundle(paths, trial, _manifest(trial), ROWS)


def test_averaged_weights_are_what_is_exported_where_there_are_some(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.training.export.export_onnx", lambda *_: (None, "not asked"))
    trial = _trial("bigray.models:mlp", {})
    last, averaged = (pack_tensors(build_model(trial.model.factory, {}, (8, 8), 3).state_dict()) for _ in range(2))
    files = {"model.safetensors": last, "ema.safetensors": averaged}
    save_checkpoint(paths, trial, 1, Progress(step=10, best_step=10), files)

    result = export_bundle(paths, trial, _manifest(trial), ROWS)

    assert ModelBundle.load(result.uri).weights == averaged != last


def _onnx_of(operator: str) -> bytes:
    """One operator from (rows, 3) to (rows, 3)."""
    features, outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 3]) for name in ("features", "outputs")
    )
    graph = helper.make_graph([helper.make_node(operator, ["features"], ["outputs"])], "g", [features], [outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("operator", "accepted"), [("Identity", True), ("Neg", False), ("Log", False)], ids=["equal", "other", "nan"]
)
def test_only_an_export_that_gives_the_modules_own_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch, operator: str, accepted: bool
) -> None:
    monkeypatch.setattr("bigray.onnx_export._to_onnx", lambda *_: _onnx_of(operator))
    sample = np.linspace(-3, -1, 12, dtype=np.float32).reshape(4, 3)  # the logarithm of these is NaN

    model, why_not = export_onnx(torch.nn.Identity(), sample)

    assert (model is not None) is accepted
    assert (why_not is None) is accepted
