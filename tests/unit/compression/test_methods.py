"""The methods apart from bundles: what is decided, and what is done to tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from bigray.bundle import ModelBundle
from bigray.compression.int8 import halve
from bigray.compression.layers import weighted_layers
from bigray.compression.low_rank import Matrix, called_layers, choose_ranks
from bigray.compression.prune import prune_weights
from bigray.compression.report import score_golden, score_holdout
from bigray.data.features import Column
from bigray.errors import SpecError
from bigray.inference import Predictor
from bigray.models import build_model
from bigray.serve.sample import write_sample_bundle


def _decaying(rows: int, columns: int, rate: float) -> Matrix:
    return Matrix(rows, columns, tuple(float(rate**i) for i in range(min(rows, columns))))


def test_ranks_keep_to_the_share_and_favour_the_layer_whose_energy_is_spread() -> None:
    matrices = [_decaying(100, 100, 0.5), _decaying(100, 100, 0.99)]
    ranks = choose_ranks(matrices, 0.3)

    assert None not in ranks
    assert sum(rank * 200 for rank in ranks if rank) <= 0.3 * 20_000
    assert ranks[1] > 2 * ranks[0]  # type: ignore[operator]


def test_a_layer_that_two_factors_would_make_larger_stays_whole() -> None:
    assert choose_ranks([Matrix(1, 500, (3.0,))], 0.5) == [None]
    assert choose_ranks([_decaying(10, 10, 0.9), _decaying(300, 300, 0.9)], 0.9)[0] is None


def test_a_layer_whose_weight_is_read_without_calling_it_cannot_be_replaced() -> None:
    params = {"width": 8, "depth": 1, "heads": 2, "tie_weights": False}
    module = build_model("bigray.models:language_model", params, (6,), 5).eval()
    names = [name for name, _ in called_layers(module, np.zeros((2, 6), np.float32))]

    assert "head" in dict(module.named_children()), "it is applied by functional.linear"
    assert "head" not in names
    assert "blocks.0.perceptron.1" in names
    assert not any(layer._forward_hooks for layer in module.modules())


def test_pruning_takes_the_smallest_weights_of_all_layers() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = torch.cat([module[i].weight.detach().flatten().abs() for i in (0, 2)])
    masks = prune_weights(module, 0.5)
    kept = torch.cat([masks["0.weight"].flatten(), masks["2.weight"].flatten()])

    assert int((~kept).sum()) == 48
    assert before[~kept].max() <= before[kept].min()
    assert sorted(name for name, _ in module.named_parameters()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert torch.equal(module[0].weight != 0, masks["0.weight"])


def test_a_weight_that_two_layers_share_is_left_alone() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    module = nn.Sequential(first, second, nn.Linear(4, 4))

    assert [name for name, _ in weighted_layers(module, (nn.Linear,))] == ["2"]


def test_a_model_without_layers_to_prune_is_told() -> None:
    with pytest.raises(SpecError, match="--prune: the model has no linear or convolutional layer"):
        prune_weights(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), 0.5)


def test_weights_are_halved_where_sixteen_bits_can_hold_them() -> None:
    tensors = {
        "small": np.array([0.1, -2.0], np.float32),
        "large": np.array([1e6], np.float32),
        "count": np.array(3, np.int64),
        "none": np.zeros(0, np.float32),
    }
    halved = safetensors.numpy.load(halve(safetensors.numpy.save(tensors)))

    assert {name: str(tensor.dtype) for name, tensor in halved.items()} == {
        "small": "float16",
        "large": "float32",
        "count": "int64",
        "none": "float16",
    }
    np.testing.assert_allclose(halved["small"], tensors["small"], rtol=1e-3)


def _sample(root: Path, seed: int, task: str, class_names: tuple[str, ...]) -> str:
    return write_sample_bundle(
        str(root),
        name=f"{task}-{seed}",
        columns=(Column(name="a"), Column(name="b")),
        class_names=class_names,
        params={"hidden": [8]},
        onnx=False,
        label_noise=0.0,
        seed=seed,
        task=task,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("task", "class_names", "metric", "without"),
    [
        ("classification", ("x", "y", "z"), "accuracy", "agreement"),
        ("binary", ("no", "yes"), "accuracy", "agreement"),
        ("multilabel", ("red", "round", "small"), "accuracy", "agreement"),
        ("regression", (), "r2", "r2_to_source"),
    ],
)
def test_a_model_beside_itself_loses_nothing_and_beside_another_much(
    tmp_path: Path, task: str, class_names: tuple[str, ...], metric: str, without: str
) -> None:
    from bigray.bundle import load_holdout

    own, other = (_sample(tmp_path, seed, task, class_names) for seed in (0, 1))
    first, second = (Predictor(ModelBundle.load(location)) for location in (own, other))
    holdout, golden = load_holdout(own), ModelBundle.load(own).golden
    assert holdout is not None
    assert golden is not None

    same, different = score_holdout(first, first, holdout), score_holdout(first, second, holdout)
    assert (same.metric, same.before, same.drop) == (metric, pytest.approx(1.0), 0.0)
    assert different.drop > 0.2
    same, different = score_golden(first, first, golden.inputs), score_golden(first, second, golden.inputs)
    assert (same.metric, same.drop) == (without, 0.0)
    assert different.drop > 0.1
