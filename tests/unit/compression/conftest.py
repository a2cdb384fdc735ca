from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import nn

from bigray.bundle import BundleManifest, FactorySpec, Golden, Origin, OutputSchema, pack_holdout, save_bundle
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import fit_preprocessing
from bigray.data.sources import table_from_arrays
from bigray.models import build_model
from bigray.onnx_export import export_onnx, run_module
from bigray.storage import open_storage

TRAIN_ROWS, EPOCHS, BATCH = 1200, 8, 64


def _train(module: nn.Module, x: np.ndarray, y: np.ndarray) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of steps this small, threads cost more than they save
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])).backward()
            optimizer.step()
    torch.set_num_threads(threads)


def _write(root: Path, factory: FactorySpec, shape: tuple[int, ...]) -> str:
    """A model of scikit-learn's digits, really trained, as a bundle with its holdout."""
    digits = load_digits()
    images, labels = digits.images.astype(np.float32).reshape(-1, *shape), digits.target.astype(np.int64)
    preprocessing = fit_preprocessing("standard", images[:TRAIN_ROWS])
    x = preprocessing.apply(images)
    torch.manual_seed(0)
    module = build_model(factory.factory, factory.params, shape, 10)
    _train(module, x[:TRAIN_ROWS], labels[:TRAIN_ROWS])
    golden = images[TRAIN_ROWS : TRAIN_ROWS + 32]
    onnx, why_not = export_onnx(module.eval(), preprocessing.apply(golden))
    assert onnx is not None, why_not
    manifest = BundleManifest(
        name="digits",
        origin=Origin(
            run="digits-1a2b3c",
            trial="0",
            model="cnn",
            step=1,
            epoch=EPOCHS,
            metrics={"val_accuracy": 0.9},
            config={},
            seeds={},
            data_fingerprint="",
            git=None,
            versions={},
        ),
        inputs=FeatureSchema(columns=(Column(name="image", shape=shape),)),
        preprocessing=preprocessing,
        outputs=OutputSchema(task="classification", num_outputs=10, target="label", class_names=tuple(range(10))),
        factory=factory,
        example={"image": images[0].tolist()},
        input_range=(0.0, 16.0),
    )
    save_bundle(
        open_storage(root),
        "bundle",
        manifest,
        safetensors.torch.save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}),
        onnx,
        Golden(golden, run_module(module, preprocessing.apply(golden))),
        pack_holdout(table_from_arrays({"image": images[TRAIN_ROWS:], "label": labels[TRAIN_ROWS:]})),
    )
    return str(root / "bundle")


@pytest.fixture(scope="session")
def cnn_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = FactorySpec(factory="bigray.models:cnn", params={"channels": [32, 64]})
    return _write(tmp_path_factory.mktemp("cnn"), spec, (8, 8))


@pytest.fixture(scope="session")
def mlp_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = FactorySpec(factory="bigray.models:mlp", params={"hidden": [256, 128]})
    return _write(tmp_path_factory.mktemp("mlp"), spec, (64,))
