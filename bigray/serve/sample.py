"""A small bundle with an untrained model, for the tests and benchmarks of serving: real files, no training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigray.bundle import BundleManifest, FactorySpec, Origin, OutputSchema, save_bundle
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import fit_preprocessing
from bigray.storage import open_storage

if TYPE_CHECKING:
    from torch import nn


def write_sample_bundle(
    root: str,
    *,
    name: str = "sample",
    columns: tuple[Column, ...] = (Column(name="image", shape=(784,)),),
    class_names: tuple[str | int, ...] = tuple(range(10)),
    params: dict[str, Any] | None = None,
    seed: int = 0,
    onnx: bool = True,
) -> str:
    """Write an `mlp` bundle below `root` and return its location; no `class_names` makes it a regression."""
    import safetensors.torch
    import torch

    from bigray.models import build_model

    inputs = FeatureSchema(columns=columns)
    factory = FactorySpec(factory="bigray.models:mlp", params=params or {"hidden": [256]})
    torch.manual_seed(seed)
    num_outputs = len(class_names) or 1
    module = build_model(factory.factory, factory.params, inputs.input_shape, num_outputs).eval()
    rows = np.random.default_rng(seed).normal(size=(64, *inputs.input_shape)).astype(np.float32)
    manifest = BundleManifest(
        name=name,
        origin=_origin(seed),
        inputs=inputs,
        preprocessing=fit_preprocessing("standard", rows),
        outputs=OutputSchema(
            task="classification" if class_names else "regression",
            num_outputs=num_outputs,
            target="label",
            class_names=class_names,
        ),
        factory=factory,
        example=_record(inputs, rows[0]),
    )
    storage = open_storage(root)
    model = _export(module, torch.from_numpy(rows[:2])) if onnx else None
    save_bundle(storage, name, manifest, safetensors.torch.save(module.state_dict()), model)
    return storage.child(name).uri


def _record(inputs: FeatureSchema, row: np.ndarray[Any, Any]) -> dict[str, Any]:
    values = [row] if inputs.is_tensor else list(row)
    return {column.name: value.tolist() for column, value in zip(inputs.columns, values, strict=True)}


def _origin(seed: int) -> Origin:
    return Origin(
        run="sample",
        trial="0",
        model="mlp",
        step=0,
        epoch=0,
        metrics={},
        config={},
        seeds={"model": seed},
        data_fingerprint="",
        git=None,
        versions={},
    )


def _export(module: nn.Module, example: Any) -> bytes:
    import torch

    rows = torch.export.Dim("rows", min=1)
    program = torch.onnx.export(module, (example,), dynamic_shapes=({0: rows},), dynamo=True, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())
