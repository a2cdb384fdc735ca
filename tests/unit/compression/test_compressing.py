from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from bigray.bundle import HOLDOUT, ONNX, WEIGHTS, ModelBundle, load_holdout
from bigray.compression.compressing import Method, compress
from bigray.errors import DeployError, SpecError, StorageError
from bigray.inference import Predictor
from bigray.onnx_export import run_module
from bigray.rebuilding import rebuild_module
from bigray.serve.release.golden import check_golden
from bigray.serve.sample import write_sample_bundle


def test_an_int8_cnn_has_at_most_three_tenths_of_the_bytes_and_loses_at_most_half_a_point(
    cnn_bundle: str, tmp_path: Path
) -> None:
    before = ModelBundle.load(cnn_bundle)
    made = compress(cnn_bundle, Method("int8"), out=str(tmp_path / "small"))
    after = ModelBundle.load(made.location)

    assert made.sizes[ONNX][1] <= 0.3 * made.sizes[ONNX][0]
    assert made.score.before > 0.9
    assert made.score.drop <= 0.005
    assert made.score.rows == 597, "all sealed rows, none of which it was made with"
    assert sorted(made.latency_ms) == [1, 64]
    assert ModelBundle.load(cnn_bundle) == before, "the old one stays as it was"
    assert (made.source_version, made.version) == (before.version, after.version)
    assert after.version != before.version
    assert check_golden(after, Predictor(after)) is None
    assert made.sizes[HOLDOUT][0] == made.sizes[HOLDOUT][1]
    derived = after.manifest.derived_from
    assert derived is not None
    assert (derived.version, derived.method, derived.after) == (before.version, "int8", made.score.after)
    assert after.manifest.origin.metrics == {}, "they were measured of other weights"


def test_a_row_of_an_int8_model_gets_the_same_answer_alone_and_among_others(cnn_bundle: str, tmp_path: Path) -> None:
    bundle = ModelBundle.load(compress(cnn_bundle, Method("int8"), out=str(tmp_path / "small")).location)
    assert bundle.golden is not None
    predictor, rows = Predictor(bundle), bundle.golden.inputs

    alone = np.concatenate([predictor.outputs(rows[i : i + 1]) for i in range(len(rows))])

    np.testing.assert_array_equal(alone, predictor.outputs(rows))


def test_a_pruned_bundle_has_that_share_of_its_weights_at_zero_and_is_served_without_its_factory(
    cnn_bundle: str, tmp_path: Path
) -> None:
    made = compress(cnn_bundle, Method("prune", 0.5), max_drop=0.02, out=str(tmp_path / "pruned"))
    bundle = ModelBundle.load(made.location)
    tensors = safetensors.numpy.load(bundle.weights)
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight")]

    assert sum((w == 0).sum() for w in weights) / sum(w.size for w in weights) == pytest.approx(0.5, abs=1e-4)
    assert all((tensor != 0).all() for name, tensor in tensors.items() if name.endswith("bias"))
    assert made.sizes[WEIGHTS][0] == made.sizes[WEIGHTS][1]
    assert made.packed[1] < 0.7 * made.packed[0]
    _check_the_graph_is_the_module(bundle)


def test_a_factored_bundle_is_smaller_and_its_weights_file_holds_the_product(mlp_bundle: str, tmp_path: Path) -> None:
    made = compress(mlp_bundle, Method("low_rank", 0.5), max_drop=0.02, out=str(tmp_path / "factored"))
    bundle = ModelBundle.load(made.location)

    assert made.sizes[ONNX][1] <= 0.55 * made.sizes[ONNX][0]
    assert made.sizes[WEIGHTS][0] == made.sizes[WEIGHTS][1]
    assert made.score.drop <= 0.02
    assert "layers factored" in made.notes[0]
    _check_the_graph_is_the_module(bundle)


def _check_the_graph_is_the_module(bundle: ModelBundle) -> None:
    assert bundle.golden is not None
    assert bundle.onnx is not None
    module = rebuild_module(bundle)
    rows = bundle.manifest.preprocessing.apply(bundle.golden.inputs)
    np.testing.assert_allclose(run_module(module, rows), bundle.golden.outputs, rtol=1e-3, atol=1e-3)


def test_a_bundle_that_got_worse_is_refused_and_nothing_is_written(
    cnn_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.compression.change.export_onnx", lambda module, rows: (None, "not asked for"))
    before = sorted(Path(cnn_bundle).parent.iterdir())

    with pytest.raises(DeployError, match=r"--prune takes accuracy on 597 rows from 0\.9\d+ to .* > --max-drop 0\.005"):
        compress(cnn_bundle, Method("prune", 0.97))

    assert sorted(Path(cnn_bundle).parent.iterdir()) == before


def test_the_same_command_again_replaces_what_it_made_and_nothing_else(
    cnn_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.compression.change.export_onnx", lambda module, rows: (None, "not asked for"))
    place = tmp_path / "pruned"
    first = compress(cnn_bundle, Method("prune", 0.1), out=str(place))
    assert first.notes[-1] == "it has no model.onnx: not asked for"
    assert compress(cnn_bundle, Method("prune", 0.1), out=str(place)).version == first.version

    with pytest.raises(SpecError, match="--out: there is something else at"):
        compress(cnn_bundle, Method("int8"), out=str(place))
    with pytest.raises(SpecError, match="is the bundle itself"):
        compress(cnn_bundle, Method("int8"), out=cnn_bundle)
    with pytest.raises(SpecError, match="--out: there is something else at"):
        compress(cnn_bundle, Method("prune", 0.2), out=str(place))
    (tmp_path / "notes").mkdir()
    with pytest.raises(SpecError, match="--out: there is something else at"):
        compress(cnn_bundle, Method("int8"), out=str(tmp_path / "notes"))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 50.0, math.nan])
def test_a_share_is_between_0_and_1(share: float) -> None:
    assert Method("prune", share).faults() == [f"--prune: use a share between 0 and 1, got {share:g}"]


@pytest.mark.parametrize("drop", [-0.1, math.nan])
def test_a_drop_that_is_no_amount_is_refused(drop: float) -> None:
    with pytest.raises(SpecError, match="--max-drop: use a number from 0"):
        compress("nowhere", Method("int8"), max_drop=drop)


def test_what_a_bundle_cannot_give_is_told_with_the_way_out(tmp_path: Path) -> None:
    plain = write_sample_bundle(str(tmp_path), params={"hidden": [4]}, onnx=False)
    foreign = write_sample_bundle(str(tmp_path), name="foreign", params={"hidden": [4]}, onnx=False)

    with pytest.raises(SpecError, match=r"--int8: the bundle has no model\.onnx, which is what is quantized"):
        compress(plain, Method("int8"))
    with pytest.raises(SpecError, match=r"--low-rank: the bundle has no model\.onnx"):
        compress(plain, Method("low_rank", 0.5))
    with pytest.raises(DeployError, match=r"by the factory 'bigray\.models:mlp', which is not allowed"):
        compress(foreign, Method("prune", 0.5), allow_factories=())


def test_eight_bits_are_not_made_smaller_again(cnn_bundle: str, tmp_path: Path) -> None:
    small = compress(cnn_bundle, Method("int8"), out=str(tmp_path / "small")).location

    with pytest.raises(SpecError, match="--prune: the bundle is of eight bits already; compress the one it was made"):
        compress(small, Method("prune", 0.5))


def test_factored_layers_are_not_made_whole_by_pruning(mlp_bundle: str, tmp_path: Path) -> None:
    factored = compress(mlp_bundle, Method("low_rank", 0.5), max_drop=1, out=str(tmp_path / "factored")).location

    with pytest.raises(SpecError, match=r"--prune: the bundle's layers are factored already, .*; prune first"):
        compress(factored, Method("prune", 0.5))


def test_a_place_that_cannot_be_written_is_told_before_any_work(cnn_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="cannot write here"):
        compress(cnn_bundle, Method("prune", 0.5), out=str(tmp_path / "file" / "small"), allow_factories=())


def test_by_default_it_lies_beside_the_old_one(cnn_bundle: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(cnn_bundle, tmp_path / "run" / "bundle")
    made = compress(str(tmp_path / "run" / "bundle"), Method("int8"))

    assert made.location == str(tmp_path / "run" / "bundle-int8")
    assert load_holdout(made.location) == load_holdout(cnn_bundle)
