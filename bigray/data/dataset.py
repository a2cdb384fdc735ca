"""Source -> table -> split -> arrays: everything a job knows about its data, made once on the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.bundle import OutputSchema
from bigray.data.cleaning import fit_column, kept_rows, label_faults, missing_faults
from bigray.data.features import Column, FeatureSchema, column_to_numpy, is_binary, table_to_records
from bigray.data.fitting import apply_in_parts, check_split, check_targets, fit_inputs
from bigray.data.images import decode_all, probe_size
from bigray.data.preprocessing import FloatArray, Preprocessing
from bigray.data.row_file import RowFile
from bigray.data.schema import Kind, infer_kinds
from bigray.data.sources import given_split, is_image, read_split, read_table, table_from_arrays
from bigray.data.splitting import Split, fingerprint, group_hashes, row_hashes, split_rows
from bigray.data.targets import Targets, encode_targets, true_answers
from bigray.data.text_rows import TextRows, is_plain_text, read_windows
from bigray.errors import SpecError, did_you_mean
from bigray.specs import BuiltInTask, DataSpec

GOLDEN_ROWS = 16
"""Most validation rows that are kept as they came."""
FREE = ("number", "date")
"""Kinds of which a value has the same code whatever the training rows are."""


@dataclass(frozen=True)
class TrainingArrays:
    """What workers map from the object store: model inputs (rows, *model_input_shape) float32, and targets.

    Targets are what `encode_targets` makes of the column. The holdout is not among them. Inputs that are larger than
    memory are files, which are read by rows as arrays are.
    """

    x_train: NDArray[np.float32] | RowFile
    y_train: Targets
    x_val: NDArray[np.float32] | RowFile
    y_val: Targets

    @property
    def nbytes(self) -> int:
        """What the object store of a node holds of them, once. Rows on the disk are not in it."""
        arrays = (self.x_train, self.y_train, self.x_val, self.y_val)
        return sum(array.nbytes for array in arrays if not isinstance(array, RowFile))


@dataclass(frozen=True)
class Dataset:
    """Prepared data and the schemas that travel in the bundle."""

    arrays: TrainingArrays
    holdout: pa.Table
    """Sealed rows, raw but without those that were left out, with their target column."""
    inputs: FeatureSchema
    outputs: OutputSchema
    preprocessing: Preprocessing
    fingerprint: str
    example: dict[str, Any]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Least and largest raw value of each column of numbers among training and validation rows."""
    golden_rows: FloatArray = field(default_factory=lambda: np.zeros((0,), np.float32))
    """Codes of a few validation rows, (rows, *inputs.input_shape): questions for the bundle."""
    notes: tuple[str, ...] = ()
    """What was left out of the data, one line each."""
    num_sealed: int | None = None
    """Rows of the holdout, where `holdout` is a sample of it."""

    @property
    def num_rows(self) -> dict[str, int]:
        return {
            "train": len(self.arrays.x_train),
            "validation": len(self.arrays.x_val),
            "holdout": self.holdout.num_rows if self.num_sealed is None else self.num_sealed,
        }

    @property
    def model_input_shape(self) -> tuple[int, ...]:
        """Shape of one row as the model sees it."""
        return self.preprocessing.output_shape(self.inputs.input_shape)

    def holdout_targets(self) -> list[Any]:
        """The true answers of the holdout, as `Predictions` has answers."""
        return true_answers(self.holdout, self.outputs)


@dataclass(frozen=True, eq=False)
class CleanRows:
    """All rows that can be used, cut into parts; nothing is fitted on them yet."""

    spec: DataSpec
    table: pa.Table = field(repr=False)
    kinds: Mapping[str, Kind]
    """Of each input column."""
    tensor: NDArray[Any] | None = field(repr=False)
    """Codes (rows, *shape) of a tensor column; None for scalar columns, whose codes depend on what is fitted."""
    targets: Targets = field(repr=False)
    outputs: OutputSchema
    hashes: NDArray[np.uint64] = field(repr=False)
    split: Split = field(repr=False)
    numbers: NDArray[np.int64] = field(repr=False)
    """The number of each row in the source."""
    num_given: int | None = None
    """Of a given split, how many rows of the source are those of its first part."""
    notes: tuple[str, ...] = ()
    """What was left out, one line each."""

    @property
    def content(self) -> pa.Table:
        """The input columns and the target, raw."""
        return self.table.select([*self.kinds, self.spec.target])

    def schema(self, train: NDArray[np.int64]) -> FeatureSchema:
        """The input columns, with the categories of these rows."""
        rows, shape = self.table.take(pa.array(train)), () if self.tensor is None else self.tensor.shape[1:]
        columns = (fit_column(name, kind, shape, rows.column(name), self.spec) for name, kind in self.kinds.items())
        return FeatureSchema(columns=tuple(columns))

    def codes(self, inputs: FeatureSchema) -> NDArray[Any]:
        """Codes of all rows, (rows, *inputs.input_shape): float32, or uint8 of pictures."""
        return self.tensor if self.tensor is not None else _encode(inputs, self.table, self.numbers)


def prepare_dataset(spec: DataSpec, task: BuiltInTask, positive: str | int | None = None) -> Dataset:
    """Read, check, clean, split, fit and preprocess. `positive` is of a binary task.

    Raises:
        SpecError: with one line for each fault, each starting with the key it belongs to.
    """
    from bigray.data.streaming import prepare_streamed, to_stream  # which prepares by functions of this module

    if (source := to_stream(spec, task)) is not None:
        return prepare_streamed(source, spec, task, positive)
    table, num_given = _read(spec)
    if task == "language" and is_plain_text(table, spec):
        return _of_text(read_windows(table, num_given, spec), spec)
    return dataset_of(_clean(table, num_given, spec, task, positive))


def dataset_of(rows: CleanRows) -> Dataset:
    """Fit on the training rows, and preprocess.

    Raises:
        SpecError: the split leaves too few rows, or training rows of which nothing can be learnt.
    """
    spec, split, targets, content = rows.spec, rows.split, rows.targets, rows.content
    check_split(spec, rows.outputs.task, split.train.size, split.validation.size)
    check_targets(targets, rows.outputs, split, rows.numbers, rows.num_given)
    inputs = rows.schema(split.train)
    codes = rows.codes(inputs)
    x_train, x_val = codes[split.train], codes[split.validation]
    preprocessing = fit_inputs(spec, inputs, x_train)
    apply = preprocessing.function()
    arrays = TrainingArrays(
        x_train=apply_in_parts(apply, x_train),
        y_train=targets[split.train],
        x_val=apply_in_parts(apply, x_val),
        y_val=targets[split.validation],
    )
    return Dataset(
        arrays=arrays,
        holdout=content.take(pa.array(split.holdout)),
        inputs=inputs,
        outputs=rows.outputs,
        preprocessing=preprocessing,
        fingerprint=fingerprint(content, rows.hashes),
        example=_example(inputs, content, split.train, x_train),
        ranges=_ranges(inputs, x_train, x_val),
        golden_rows=_spread(x_val, GOLDEN_ROWS),
        notes=rows.notes,
    )


def read_clean(spec: DataSpec, task: BuiltInTask, positive: str | int | None = None) -> CleanRows:
    """The rows of the source, checked, cleaned and cut.

    Raises:
        SpecError: with one line for each fault.
    """
    return _clean(*_read(spec), spec, task, positive)


def _clean(
    table: pa.Table, num_given: int | None, spec: DataSpec, task: BuiltInTask, positive: str | int | None
) -> CleanRows:
    features = spec.features or _default_features(table, spec)
    _refuse(_column_faults(table, spec, features))
    kinds, first = infer_kinds(table, features, spec), num_given
    table = _plain_numbers(table, kinds)
    _refuse([*label_faults(table, spec.target, first), *missing_faults(table, kinds, spec, first)])
    num_rows, numbers = table.num_rows, kept_rows(table, kinds, spec)
    table, num_given = _kept(table, numbers, num_given)
    tensor, good, notes = _tensor(table, kinds, spec, numbers)
    table, num_given = _kept(table, good, num_given)
    notes, numbers = (*_left_out(num_rows - len(numbers)), *notes), numbers[good]
    _check_values(table, kinds, spec, numbers)
    targets, outputs = encode_targets(table, spec.target, task, positive)
    hashes = row_hashes(table.select([*features, spec.target]))
    classes = targets if task in ("classification", "binary") else None
    split = _split(table, hashes, classes, spec, num_given)
    return CleanRows(spec, table, kinds, tensor, targets, outputs, hashes, split, numbers, first, notes)


def _of_text(rows: TextRows, spec: DataSpec) -> Dataset:
    vocabulary = rows.column.categories
    (x_train, y_train), (x_val, y_val), (x_holdout, y_holdout) = rows.train, rows.validation, rows.holdout
    return Dataset(
        arrays=TrainingArrays(x_train=x_train, y_train=y_train, x_val=x_val, y_val=y_val),
        holdout=table_from_arrays({rows.column.name: x_holdout, spec.target: y_holdout}),
        inputs=FeatureSchema(columns=(rows.column,)),
        outputs=OutputSchema(task="language", num_outputs=len(vocabulary), target=spec.target, class_names=vocabulary),
        preprocessing=Preprocessing(),
        fingerprint=rows.fingerprint,
        example={rows.column.name: x_train[0].astype(int).tolist()},
        golden_rows=_spread(x_val, GOLDEN_ROWS),
    )


def _check_values(table: pa.Table, kinds: Mapping[str, Kind], spec: DataSpec, numbers: NDArray[np.int64]) -> None:
    """Before anything is made of the rows, so that what is wrong with a value is told as such."""
    free = [fit_column(name, kind, (), table.column(name), spec) for name, kind in kinds.items() if kind in FREE]
    if free:
        _encode(FeatureSchema(columns=tuple(free)), table, numbers)


def _read(spec: DataSpec) -> tuple[pa.Table, int | None]:
    """All rows; and how many of them are to train on, where the rest is a holdout that was given as such."""
    train, test = spec.train, spec.test
    if spec.source is not None:
        try:
            given = given_split(spec.source)
            if given is None:
                return read_table(spec.source), None
        except SpecError as error:
            raise SpecError([f"data.source: {fault}" for fault in error.faults]) from error
        train, test = given
    assert train is not None and test is not None, "checked by DataSpec"
    first, second = read_split(train, test)
    return pa.concat_tables([first, second]), first.num_rows


def _default_features(table: pa.Table, spec: DataSpec) -> tuple[str, ...]:
    """Every column but the target and the group; of pictures only they, since what is beside them are their names."""
    names = [name for name in table.column_names if name not in (spec.target, spec.group)]
    pictures = [name for name in names if is_image(table.schema.field(name))]
    return tuple(pictures or names)


def _kept(table: pa.Table, rows: NDArray[np.int64], num_given: int | None) -> tuple[pa.Table, int | None]:
    if len(rows) == table.num_rows:
        return table, num_given
    return table.take(pa.array(rows)), None if num_given is None else int(np.searchsorted(rows, num_given))


def _tensor(
    table: pa.Table, kinds: Mapping[str, Kind], spec: DataSpec, rows: NDArray[np.int64]
) -> tuple[NDArray[Any] | None, NDArray[np.int64], tuple[str, ...]]:
    """The codes of a tensor column (rows, *shape), the rows that they are of, and a line about others.

    Numbers are float32; pictures uint8, and only those rows stay where they can be read. None for scalar columns.
    """
    everything = np.arange(table.num_rows)
    name = next(iter(kinds))
    if kinds[name] == "image" and is_binary(table.schema.field(name).type):
        return _pictures(table, name, spec)
    if kinds[name] not in ("image", "tensor"):
        return None, everything, ()
    column = Column(name=name, shape=column_shape(table, name))
    return _encode(FeatureSchema(columns=(column,)), table, rows), everything, ()


def _pictures(
    table: pa.Table, name: str, spec: DataSpec
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    column = table.column(name)
    paths = table.column("path").to_pylist() if "path" in table.column_names else None
    try:
        size, channels = probe_size(column)
        size, channels = spec.image_size or size, spec.image_channels or channels
        pixels, good, faults = decode_all(column, size, channels, spec.bad_images, spec.max_bad_share, paths=paths)
    except SpecError as error:
        raise SpecError([f"data.source: column '{name}': {fault}" for fault in error.faults]) from None
    if not faults:
        return pixels, np.arange(len(pixels)), ()
    more = f" and {len(faults) - 1:,} more" if len(faults) > 1 else ""
    return pixels[good], np.flatnonzero(good), (f"data.bad_images: left out {faults[0]}{more}",)


def _left_out(num_rows: int) -> tuple[str, ...]:
    return (f"data.missing: left out {num_rows:,} rows with empty values",) if num_rows else ()


def _split(
    table: pa.Table,
    hashes: NDArray[np.uint64],
    classes: Targets | None,
    spec: DataSpec,
    num_given: int | None,
) -> Split:
    groups = None if spec.group is None else group_hashes(table, spec.group)
    if num_given is None:
        return split_rows(hashes, classes, spec.split, groups)  # type: ignore[arg-type]  # classes have numbers
    own = spec.split.model_copy(update={"holdout": 0.0})
    first = [None if each is None else each[:num_given] for each in (classes, groups)]
    split = split_rows(hashes[:num_given], first[0], own, first[1])  # type: ignore[arg-type]
    return Split(split.train, split.validation, np.arange(num_given, table.num_rows))


def _encode(inputs: FeatureSchema, table: pa.Table, rows: NDArray[np.int64]) -> FloatArray:
    try:
        return inputs.from_table(table, rows)  # type: ignore[arg-type]  # an array of numbers is as good as a list
    except SpecError as error:
        raise SpecError([f"data.source: {fault}; {_way_out(fault, inputs)}" for fault in error.faults]) from None


def _way_out(fault: str, inputs: FeatureSchema) -> str:
    if "holds NaN" in fault and not inputs.is_tensor:
        return "clean them in the source, or say in data.missing what to do with NaN"
    if "not a category" in fault:
        return 'set data.unknown_category = "ignore", or leave those rows out of the source'
    return "clean them in the source"


def _spread(codes: NDArray[Any], count: int) -> FloatArray:
    """At most so many rows, from the first to the last."""
    chosen = np.linspace(0, len(codes) - 1, min(count, len(codes)), dtype=np.int64)
    return codes[chosen].astype(np.float32)


def _example(
    inputs: FeatureSchema, content: pa.Table, train: NDArray[np.int64], x_train: NDArray[Any]
) -> dict[str, Any]:
    """A training row as a caller would send it: the first that has all its values."""
    if inputs.columns[0].kind == "image":
        return {inputs.tensor_name: x_train[0].tolist()}
    is_whole = ~np.isnan(x_train.reshape(len(x_train), -1)).any(axis=1)
    row = int(train[is_whole.argmax()])
    return table_to_records(content.select([column.name for column in inputs.columns]).slice(row, 1))[0]


def _column_faults(table: pa.Table, spec: DataSpec, features: tuple[str, ...]) -> Iterable[str]:
    known = table.column_names
    if spec.target not in known:
        yield f"data.target: no column '{spec.target}'{did_you_mean(spec.target, known)}"
    if spec.group is not None and spec.group not in known:
        yield f"data.group: no column '{spec.group}'{did_you_mean(spec.group, known)}"
    for name in features:
        if name in (spec.target, spec.group):
            yield f"data.features: '{name}' is the {'target' if name == spec.target else 'group'}"
        elif name not in known:
            yield f"data.features: no column '{name}'{did_you_mean(name, known)}"
    if not features:
        yield f"data.source: '{spec.source or spec.train}' has no column besides the target"
    if table.num_rows == 0:
        yield "data.source: holds no rows"


def column_shape(table: pa.Table, name: str) -> tuple[int, ...]:
    """Shape of one value of a column: `()` for numbers and strings."""
    return column_to_numpy(table.slice(0, 1), name).shape[1:]


def _ranges(inputs: FeatureSchema, *parts: NDArray[Any]) -> dict[str, tuple[float, float]]:
    if inputs.columns[0].kind == "image":
        return {inputs.tensor_name: (0.0, 255.0)}
    if inputs.is_tensor:
        return {inputs.tensor_name: _range(np.asarray([end for part in parts for end in (part.min(), part.max())]))}
    codes = np.concatenate(parts)
    found = {
        column.name: codes[:, i][~np.isnan(codes[:, i])]
        for i, column in enumerate(inputs.columns)
        if column.kind == "number"
    }
    return {name: _range(values) for name, values in found.items() if len(values)}


def _range(values: NDArray[Any]) -> tuple[float, float]:
    # by way of their text, which is 0.1 and not the 0.10000000149 that float32 makes of it
    return float(str(values.min())), float(str(values.max()))


def _plain_numbers(table: pa.Table, kinds: Mapping[str, Kind]) -> pa.Table:
    """So that a row taken from the table is one that an endpoint accepts: JSON's true and false are not numbers, and
    it has no decimals."""
    for name in (name for name, kind in kinds.items() if kind == "number"):
        column, index = table.column(name), table.column_names.index(name)
        if pa.types.is_boolean(column.type):
            table = table.set_column(index, name, column.cast(pa.int8()))
        elif pa.types.is_decimal(column.type):
            values = [None if value is None else float(value) for value in column.to_pylist()]
            table = table.set_column(index, name, pa.array(values, pa.float64()))
    return table


def _refuse(faults: Iterable[str]) -> None:
    if found := list(faults):
        raise SpecError(found)
