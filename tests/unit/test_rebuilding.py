from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from bigray.bundle import FactorySpec, ModelBundle
from bigray.data.features import Column
from bigray.errors import DeployError, StorageError
from bigray.inference import Predictor
from bigray.onnx_export import export_onnx, run_module, run_onnx, strip_metadata
from bigray.rebuilding import rebuild_module
from bigray.serve.sample import write_sample_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    columns = (Column(name="a"), Column(name="b"))
    root = str(tmp_path_factory.mktemp("bundle"))
    return ModelBundle.load(write_sample_bundle(root, columns=columns, params={"hidden": [4]}, onnx=False))


ROWS = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)


def test_the_module_answers_as_the_bundle_does_and_its_graph_as_the_module(bundle: ModelBundle) -> None:
    module = rebuild_module(bundle)
    inputs = bundle.manifest.preprocessing.apply(ROWS)
    graph, why_not = export_onnx(module, inputs)
    assert graph is not None, why_not

    np.testing.assert_allclose(run_module(module, inputs), Predictor(bundle).outputs(ROWS), rtol=1e-5)
    np.testing.assert_allclose(
        run_onnx(strip_metadata(graph), inputs), run_module(module, inputs), rtol=1e-4, atol=1e-5
    )
    assert len(strip_metadata(graph)) < len(graph)
    assert __file__.encode() not in strip_metadata(graph), "nor any other file of this machine"


def test_a_module_that_cannot_be_exported_says_why() -> None:
    import torch

    class Undecided(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if bool(x.sum() > 0) else -x

    graph, why_not = export_onnx(Undecided(), ROWS)

    assert graph is None
    assert str(why_not).startswith("export failed: ")


def test_a_factory_that_is_not_allowed_is_not_even_imported(
    bundle: ModelBundle, user_module: Callable[[str], str]
) -> None:
    name = user_module("raise SystemExit('this code ran')")
    spec = FactorySpec(factory=f"{name}:make", params={})
    foreign = bundle.manifest.model_copy(update={"factory": spec})

    with pytest.raises(DeployError, match=rf"by the factory '{name}:make', which is not allowed"):
        rebuild_module(ModelBundle(foreign, bundle.weights, b"a graph", bundle.version))


def test_weights_of_another_module_are_told(bundle: ModelBundle, tmp_path: Path) -> None:
    weights = safetensors.numpy.save({"weight": np.zeros((2, 2), np.float32)})

    with pytest.raises(StorageError, match=r"weights\.safetensors does not fit its factory"):
        rebuild_module(ModelBundle(bundle.manifest, weights, None, bundle.version))
