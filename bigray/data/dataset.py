"""Source -> table -> split -> arrays: everything a job knows about its data, made once on the driver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.bundle import OutputSchema
from bigray.data.features import Column, FeatureSchema, column_to_numpy, table_to_records
from bigray.data.preprocessing import Preprocessing, fit_preprocessing
from bigray.data.sources import read_table
from bigray.data.splitting import fingerprint, row_hashes, split_rows
from bigray.errors import SpecError, did_you_mean
from bigray.specs import BuiltInTask, DataSpec

Targets = NDArray[np.int64] | NDArray[np.float32]


@dataclass(frozen=True)
class TrainingArrays:
    """What workers map from the object store: standardised inputs (rows, *input_shape) float32, and targets.

    Targets are class numbers (rows,) int64, or values (rows,) float32. The holdout is not among them.
    """

    x_train: NDArray[np.float32]
    y_train: Targets
    x_val: NDArray[np.float32]
    y_val: Targets

    @property
    def nbytes(self) -> int:
        """What the object store of a node holds of them, once."""
        return sum(array.nbytes for array in (self.x_train, self.y_train, self.x_val, self.y_val))


@dataclass(frozen=True)
class Dataset:
    """Prepared data and the schemas that travel in the bundle."""

    arrays: TrainingArrays
    holdout: pa.Table
    """Sealed rows, raw, with their target column."""
    inputs: FeatureSchema
    outputs: OutputSchema
    preprocessing: Preprocessing
    fingerprint: str
    example: dict[str, Any]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Least and largest raw value of each feature column among training and validation rows."""

    @property
    def num_rows(self) -> dict[str, int]:
        return {
            "train": len(self.arrays.x_train),
            "validation": len(self.arrays.x_val),
            "holdout": self.holdout.num_rows,
        }

    def holdout_targets(self) -> list[Any]:
        """The true answers of the holdout: class names as `outputs.class_names` has them, or values."""
        return true_answers(self.holdout, self.outputs)


def prepare_dataset(spec: DataSpec, task: BuiltInTask) -> Dataset:
    """Read, check, split and standardise.

    Raises:
        SpecError: with one line for each fault, each starting with the key it belongs to.
    """
    try:
        table = read_table(spec.source)
    except SpecError as error:
        raise SpecError([f"data.source: {fault}" for fault in error.faults]) from error
    features = spec.features or tuple(name for name in table.column_names if name != spec.target)
    faults = list(_column_faults(table, spec, features)) or list(_value_faults(table, (*features, spec.target)))
    if faults:
        raise SpecError(faults)

    table = _booleans_as_numbers(table, features)
    inputs = _feature_schema(table, features)
    x = inputs.from_table(table)
    _check_finite(x, inputs)
    targets, outputs = _encode_targets(table, spec.target, task)
    hashes = row_hashes(table.select([*features, spec.target]))
    split = split_rows(hashes, targets if task == "classification" else None, spec.split)  # type: ignore[arg-type]
    _check_split(spec, task, split.train.size, split.validation.size)

    x_train = x[split.train]
    preprocessing = fit_preprocessing(spec.normalize, x_train)
    x_standardised = preprocessing.apply(x)
    arrays = TrainingArrays(
        x_train=np.ascontiguousarray(x_standardised[split.train]),
        y_train=targets[split.train],
        x_val=np.ascontiguousarray(x_standardised[split.validation]),
        y_val=targets[split.validation],
    )
    return Dataset(
        arrays=arrays,
        holdout=table.select([*features, spec.target]).take(pa.array(split.holdout)),
        inputs=inputs,
        outputs=outputs,
        preprocessing=preprocessing,
        fingerprint=fingerprint(table.select([*features, spec.target]), hashes),
        example=table_to_records(table.select(list(features)).take(pa.array(split.train[:1])))[0],
        ranges=_ranges(inputs, x_train, x[split.validation]),
    )


def true_answers(table: pa.Table, outputs: OutputSchema) -> list[Any]:
    """The target column of some rows: class names as `outputs.class_names` has them, or values."""
    values = column_to_numpy(table, outputs.target)
    if outputs.task == "classification":
        return _class_names(_class_values(values))
    numbers: list[Any] = values.tolist()
    return numbers


def _column_faults(table: pa.Table, spec: DataSpec, features: tuple[str, ...]) -> Iterable[str]:
    if spec.target not in table.column_names:
        yield f"data.target: no column '{spec.target}'{did_you_mean(spec.target, table.column_names)}"
    for name in features:
        if name == spec.target:
            yield f"data.features: '{name}' is the target"
        elif name not in table.column_names:
            yield f"data.features: no column '{name}'{did_you_mean(name, table.column_names)}"
    if not features:
        yield f"data.source: '{spec.source}' has no column besides the target"


def _value_faults(table: pa.Table, names: tuple[str, ...]) -> Iterable[str]:
    if table.num_rows == 0:
        yield "data.source: holds no rows"
    for name in names:
        if nulls := table.column(name).null_count:
            yield f"data.source: column '{name}' has {nulls} empty values; fill or drop them in the source"
    for name in names[:-1]:
        if not _is_numeric(table.column(name).type):
            kind = table.column(name).type
            yield f"data.source: column '{name}' is {kind}, not numeric; name the columns to use in data.features"
    tensors = [name for name in names[:-1] if column_shape(table, name)] if table.num_rows else []
    if tensors and len(names) > 2:
        yield f"data.source: tensor column '{tensors[0]}' cannot be mixed with others; name it alone in data.features"


def _is_numeric(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.FixedShapeTensorType):
        return _is_numeric(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_numeric(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def column_shape(table: pa.Table, name: str) -> tuple[int, ...]:
    """Shape of one value of a column: `()` for numbers and strings."""
    return column_to_numpy(table.slice(0, 1), name).shape[1:]


def _feature_schema(table: pa.Table, features: tuple[str, ...]) -> FeatureSchema:
    return FeatureSchema(columns=tuple(Column(name=name, shape=column_shape(table, name)) for name in features))


def _ranges(inputs: FeatureSchema, *parts: NDArray[np.float32]) -> dict[str, tuple[float, float]]:
    axes = None if inputs.is_tensor else 0
    least = np.atleast_1d(np.min([part.min(axis=axes) for part in parts], axis=0))
    largest = np.atleast_1d(np.max([part.max(axis=axes) for part in parts], axis=0))
    # by way of their text, which is 0.1 and not the 0.10000000149 that float32 makes of it
    bounds = [(float(str(low)), float(str(high))) for low, high in zip(least, largest, strict=True)]
    return {column.name: bound for column, bound in zip(inputs.columns, bounds, strict=True)}


def _booleans_as_numbers(table: pa.Table, features: tuple[str, ...]) -> pa.Table:
    """So that a row taken from the table is one that an endpoint accepts: JSON's true and false are not numbers."""
    for name in features:
        if pa.types.is_boolean(table.column(name).type):
            index = table.column_names.index(name)
            table = table.set_column(index, name, table.column(name).cast(pa.int8()))
    return table


def _encode_targets(table: pa.Table, target: str, task: BuiltInTask) -> tuple[Targets, OutputSchema]:
    values = column_to_numpy(table, target)
    if task == "regression":
        if values.dtype.kind not in "iuf" or values.ndim != 1:
            raise SpecError(f"data.target: '{target}' is not a column of numbers, which regression needs")
        if not np.isfinite(values).all():
            raise SpecError(f"data.target: '{target}' holds NaN or infinite values")
        return values.astype(np.float32), OutputSchema(task=task, num_outputs=1, target=target)
    if values.ndim != 1:
        raise SpecError(f"data.target: '{target}' holds {values.shape[1:]} values a row; classification needs one")
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        raise SpecError(f"data.target: '{target}' holds fractions, not classes; use training.task = 'regression'")
    classes, numbers = np.unique(_class_values(values), return_inverse=True)
    if len(classes) < 2:
        raise SpecError(f"data.target: '{target}' has a single class ({classes[0]}); classification needs two")
    names = tuple(_class_names(classes))
    outputs = OutputSchema(task=task, num_outputs=len(classes), target=target, class_names=names)
    return numbers.astype(np.int64), outputs


def _class_values(values: NDArray[Any]) -> NDArray[Any]:
    """A target column as its classes are told apart: 1.0 and true are the class 1."""
    if values.dtype.kind in "bf":
        return values.astype(np.int64)
    return values.astype(str) if values.dtype.kind == "O" else values


def _class_names(values: NDArray[Any]) -> list[int | str]:
    return [int(value) if isinstance(value, np.integer) else str(value) for value in values]


def _check_finite(x: NDArray[np.float32], inputs: FeatureSchema) -> None:
    bad_rows = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
    if not len(bad_rows):
        return
    column = 0 if inputs.is_tensor else int(np.flatnonzero(~np.isfinite(x[bad_rows[0]]))[0])
    raise SpecError(
        f"data.source: column '{inputs.columns[column].name}' holds NaN or infinite values, first in row "
        f"{bad_rows[0]} of {len(bad_rows)} such rows; clean them in the source"
    )


def _check_split(spec: DataSpec, task: BuiltInTask, num_train: int, num_validation: int) -> None:
    if num_train == 0:
        raise SpecError("data.split: leaves no training rows")
    if num_validation == 0:
        raise SpecError(
            f"data.split.validation: {spec.split.validation:g} leaves no row to validate on; "
            f"use a larger share, or more rows that differ (equal rows stay on one side)"
        )
    if task == "regression" and num_validation < 2:
        raise SpecError("data.split.validation: leaves one row, and val_r2 needs at least two")
