"""A small bundle with an untrained model, for the tests and benchmarks of serving: real files, no training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

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
from bigray.data.cleaning import fit_steps
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import fit_preprocessing
from bigray.data.sources import table_from_arrays
from bigray.data.targets import SEPARATOR
from bigray.inference import interpret
from bigray.specs import BuiltInTask, DataSpec
from bigray.storage import open_storage

if TYPE_CHECKING:
    from torch import nn

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

TARGET = "label"
LABEL_NOISE = 0.05
_FILLED = DataSpec(source="sample", target=TARGET, missing="mean", missing_indicator=True)
"""How columns are filled and encoded that are no plain numbers."""


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
    task: BuiltInTask | None = None,
    thresholds: tuple[float, ...] = (),
) -> str:
    """Write a bundle below `root` and return its location; no `class_names` makes it a regression.

    `task` is for others than that and classification; `thresholds` are of a binary one, or of each label.

    `scale` multiplies all weights. The holdout is labelled by the model itself, so that it is right in all but a share
    of `label_noise` of the rows (for values: off by that share of their spread); or, with `teacher_seed`, by the model
    of that seed, so that it is right by chance alone. 0 `holdout_rows` leaves the holdout out.
    """
    import safetensors.torch
    import torch

    inputs = FeatureSchema(columns=columns)
    spec = FactorySpec(factory=factory, params={"hidden": [256]} if params is None else params)
    outputs = OutputSchema(
        task=task or ("classification" if class_names else "regression"),
        num_outputs=1 if task == "binary" else len(class_names) or 1,
        target=TARGET,
        class_names=class_names,
        threshold=thresholds[0] if task == "binary" and thresholds else None,
        thresholds=thresholds if task == "multilabel" else (),
    )
    # the same rows whatever the seed, as versions of one model are trained on the same data
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(max(64, holdout_rows), *inputs.input_shape)).astype(np.float32)
    rows = rows if inputs.is_plain and columns[0].kind != "image" else _codes(inputs, rows)
    preprocessing = fit_preprocessing("standard", rows, () if inputs.is_plain else fit_steps(columns, rows, _FILLED))
    shape = preprocessing.output_shape(inputs.input_shape)
    module = _build(spec, shape, outputs, seed, scale)
    teacher = module if teacher_seed is None else _build(spec, shape, outputs, teacher_seed, scale)
    answers, truth = (_ask(each, preprocessing.apply(rows)) for each in (module, teacher))
    targets = _targets(truth, outputs, label_noise, generator)
    manifest = BundleManifest(
        name=name,
        origin=_origin(seed),
        inputs=inputs,
        preprocessing=preprocessing,
        outputs=outputs,
        factory=spec,
        example=inputs.to_records(rows[~np.isnan(rows.reshape(len(rows), -1)).any(axis=1)][:1])[0],
        input_range=_range(inputs, rows) if inputs.is_tensor else None,
        ranges={} if inputs.is_tensor else _ranges(inputs, rows),
        card=ModelCard(
            rows={"train": len(rows), "validation": len(rows), "holdout": holdout_rows},
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            confusion=_confusion(targets, answers, class_names) if outputs.task == "classification" else (),
        ),
    )
    storage = open_storage(root)
    save_bundle(
        storage,
        name,
        manifest,
        safetensors.torch.save(module.state_dict()),
        _export(module, torch.from_numpy(preprocessing.apply(rows[:2]))) if onnx else None,
        Golden(rows[:GOLDEN_ROWS], answers[:GOLDEN_ROWS]),
        pack_holdout(_table(inputs, rows, targets).slice(0, holdout_rows)),
    )
    return storage.child(name).uri


def _codes(inputs: FeatureSchema, normal: FloatArray) -> FloatArray:
    """Normal numbers (rows, *input_shape) -> codes that the columns can have, some missing where they may be."""
    if inputs.is_tensor:
        return np.clip(np.round(128 + 50 * normal), 0, 255).astype(np.float32)
    codes = normal.copy()
    for i, column in enumerate(inputs.columns):
        if column.kind == "category":
            codes[:, i] = np.floor(100 * np.abs(normal[:, i])) % max(1, len(column.categories))
        elif column.kind == "date":
            codes[:, i] = 19_000 + np.round(100 * normal[:, i])
        if column.nullable:
            codes[normal[:, i] > 1.5, i] = np.nan
    return codes


def _table(inputs: FeatureSchema, rows: FloatArray, targets: np.ndarray[Any, Any]) -> pa.Table:
    """The rows as they came, with their answers."""
    if inputs.is_plain:
        return table_from_arrays(_columns(inputs, rows) | {TARGET: targets})
    raw = pa.Table.from_pylist(inputs.to_records(rows))
    return raw.append_column(TARGET, table_from_arrays({TARGET: targets}).column(0))


def _build(spec: FactorySpec, shape: tuple[int, ...], outputs: OutputSchema, seed: int, scale: float) -> nn.Module:
    import torch

    from bigray.models import build_model

    torch.manual_seed(seed)
    module = build_model(spec.factory, spec.params, shape, outputs.num_outputs).eval()
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
    if outputs.task in ("binary", "multilabel"):
        return _decided_targets(interpret(truth, outputs).labels or [], outputs, noise, generator)
    others = generator.integers(len(outputs.class_names), size=len(truth))
    chosen = np.where(generator.random(len(truth)) < noise, others, truth.argmax(axis=1))
    return np.asarray(outputs.class_names)[chosen]


def _decided_targets(
    labels: list[Any], outputs: OutputSchema, noise: float, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Of a share of the rows a wrong class, or no label; lists of labels are text cells."""
    is_wrong = generator.random(len(labels)) < noise
    if outputs.task == "multilabel":
        cells = [SEPARATOR.join(map(str, label)) for label in labels]
        return np.where(is_wrong, "", np.array(cells, dtype=object)).astype(str)
    first, second = outputs.class_names
    others = np.array([second if label == first else first for label in labels])
    return np.where(is_wrong, others, np.array(labels))


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
    numbers = [column.name for column in inputs.columns if column.kind == "number"]
    found = _columns(inputs, rows)
    return {name: (float(np.nanmin(found[name])), float(np.nanmax(found[name]))) for name in numbers}


def _range(inputs: FeatureSchema, rows: FloatArray) -> tuple[float, float]:
    if inputs.columns[0].kind == "image":
        return 0.0, 255.0
    return float(rows.min()), float(rows.max())


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
