"""A small bundle with an untrained model, for the tests and benchmarks of serving: real files, no training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigray.bundle import (
    GOLDEN_ROWS,
    BundleManifest,
    FactorySpec,
    Golden,
    ModelCard,
    Origin,
    OutputSchema,
    pack_holdout,
    save_bundle,
)
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import fit_preprocessing
from bigray.data.sources import table_from_arrays
from bigray.storage import open_storage

if TYPE_CHECKING:
    from torch import nn

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

TARGET = "label"
LABEL_NOISE = 0.05


def write_sample_bundle(
    root: str,
    *,
    name: str = "sample",
    columns: tuple[Column, ...] = (Column(name="image", shape=(784,)),),
    class_names: tuple[str | int, ...] = tuple(range(10)),
    params: dict[str, Any] | None = None,
    factory: str = "bigray.models:mlp",
    seed: int = 0,
    onnx: bool = True,
    scale: float = 1.0,
    holdout_rows: int = 200,
    teacher_seed: int | None = None,
    label_noise: float = LABEL_NOISE,
) -> str:
    """Write a bundle below `root` and return its location; no `class_names` makes it a regression.

    `scale` multiplies all weights. The holdout is labelled by the model itself, so that it is right in all but a share
    of `label_noise` of the rows (for values: off by that share of their spread); or, with `teacher_seed`, by the model
    of that seed, so that it is right by chance alone. 0 `holdout_rows` leaves the holdout out.
    """
    import safetensors.torch
    import torch

    inputs = FeatureSchema(columns=columns)
    spec = FactorySpec(factory=factory, params={"hidden": [256]} if params is None else params)
    outputs = OutputSchema(
        task="classification" if class_names else "regression",
        num_outputs=len(class_names) or 1,
        target=TARGET,
        class_names=class_names,
    )
    module = _build(spec, inputs, outputs, seed, scale)
    teacher = module if teacher_seed is None else _build(spec, inputs, outputs, teacher_seed, scale)
    # the same rows whatever the seed, as versions of one model are trained on the same data
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(max(64, holdout_rows), *inputs.input_shape)).astype(np.float32)
    preprocessing = fit_preprocessing("standard", rows)
    answers, truth = (_ask(each, preprocessing.apply(rows)) for each in (module, teacher))
    targets = _targets(truth, outputs, label_noise, generator)
    manifest = BundleManifest(
        name=name,
        origin=_origin(seed),
        inputs=inputs,
        preprocessing=preprocessing,
        outputs=outputs,
        factory=spec,
        example=_record(inputs, rows[0]),
        input_range=(float(rows.min()), float(rows.max())) if inputs.is_tensor else None,
        ranges={} if inputs.is_tensor else _ranges(inputs, rows),
        card=ModelCard(
            rows={"train": len(rows), "validation": len(rows), "holdout": holdout_rows},
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            confusion=_confusion(targets, answers, class_names) if class_names else (),
        ),
    )
    storage = open_storage(root)
    save_bundle(
        storage,
        name,
        manifest,
        safetensors.torch.save(module.state_dict()),
        _export(module, torch.from_numpy(rows[:2])) if onnx else None,
        Golden(rows[:GOLDEN_ROWS], answers[:GOLDEN_ROWS]),
        pack_holdout(table_from_arrays(_columns(inputs, rows) | {TARGET: targets}).slice(0, holdout_rows)),
    )
    return storage.child(name).uri


def _build(spec: FactorySpec, inputs: FeatureSchema, outputs: OutputSchema, seed: int, scale: float) -> nn.Module:
    import torch

    from bigray.models import build_model

    torch.manual_seed(seed)
    module = build_model(spec.factory, spec.params, inputs.input_shape, outputs.num_outputs).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


def _ask(module: nn.Module, rows: FloatArray) -> FloatArray:
    import torch

    with torch.inference_mode():
        return module(torch.from_numpy(rows)).numpy()  # type: ignore[no-any-return]


def _targets(
    truth: FloatArray, outputs: OutputSchema, noise: float, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    if outputs.task == "regression":
        values = truth.reshape(-1)
        errors = noise * values.std() * generator.normal(size=len(values))
        return np.asarray(values + errors, dtype=np.float32)
    others = generator.integers(len(outputs.class_names), size=len(truth))
    chosen = np.where(generator.random(len(truth)) < noise, others, truth.argmax(axis=1))
    return np.asarray(outputs.class_names)[chosen]


def _confusion(
    targets: np.ndarray[Any, Any], answers: FloatArray, class_names: tuple[str | int, ...]
) -> tuple[tuple[int, ...], ...]:
    names = np.asarray(class_names)
    given = names[answers.argmax(axis=1)]
    return tuple(tuple(int(((targets == true) & (given == guess)).sum()) for guess in names) for true in names)


def _columns(inputs: FeatureSchema, rows: FloatArray) -> dict[str, FloatArray]:
    if inputs.is_tensor:
        return {inputs.columns[0].name: rows}
    return {column.name: rows[:, i] for i, column in enumerate(inputs.columns)}


def _ranges(inputs: FeatureSchema, rows: FloatArray) -> dict[str, tuple[float, float]]:
    return {name: (float(values.min()), float(values.max())) for name, values in _columns(inputs, rows).items()}


def _record(inputs: FeatureSchema, row: FloatArray) -> dict[str, Any]:
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
