"""A source that is larger than memory -> a `Dataset` whose inputs are files of rows.

Three times through the source at most: to cut it (`first_pass`), for the categories of the training rows, and to write
codes to the disk. What is fitted is fitted on those files, and the codes become model inputs in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.bundle import HOLDOUT_BYTES, HOLDOUT_ROWS
from bigray.data import dataset as whole
from bigray.data.cleaning import fit_column
from bigray.data.dataset import Dataset, TrainingArrays
from bigray.data.features import FeatureSchema, is_binary, table_to_records
from bigray.data.fitting import check_split, check_targets
from bigray.data.images import decode_all
from bigray.data.row_file import FloatArray, RowFile, RowWriter
from bigray.data.scratch import Scratch, check_room, new_scratch
from bigray.data.streaming.decision import StreamedSource
from bigray.data.streaming.first_pass import HOLDOUT, LEFT_OUT, TRAIN, VALIDATION, CutRows, clean_batches, cut_rows
from bigray.data.streaming.fitting import fit_streamed
from bigray.errors import SpecError
from bigray.host_memory import shown
from bigray.specs import BuiltInTask, DataSpec


def prepare_streamed(
    source: StreamedSource, spec: DataSpec, task: BuiltInTask, positive: str | int | None = None
) -> Dataset:
    """As `prepare_dataset`, for what `to_stream` gave. Its holdout is the sample that a bundle seals.

    The files go when the data set is no more, at the latest with this process.

    Raises:
        SpecError: with one line for each fault; StorageError: the disk is full or fails.
    """
    cut = cut_rows(source, spec, task, positive)
    split, targets = cut.split, cut.targets
    check_split(spec, task, split.train.size, split.validation.size)
    check_targets(targets, cut.outputs, split, cut.numbers)
    inputs = _schema(source, spec, cut)
    num_codes = (split.train.size + split.validation.size) * int(np.prod(inputs.input_shape))
    scratch = new_scratch(4 * num_codes)
    codes = _write_codes(source, spec, cut, inputs, scratch)
    preprocessing = fit_streamed(spec, inputs, codes.train)
    golden = codes.validation.take(_spread(len(codes.validation), whole.GOLDEN_ROWS))
    apply, shape = preprocessing.function(), preprocessing.output_shape(inputs.input_shape)
    if preprocessing.steps or preprocessing.kind != "none":
        in_place = not preprocessing.steps
        x_train, x_val = (_applied(rows, apply, shape, in_place) for rows in (codes.train, codes.validation))
    else:
        x_train, x_val = codes.train, codes.validation
    needed, on_disk = shown(source.needed_bytes), shown(x_train.nbytes + x_val.nbytes)
    return Dataset(
        arrays=TrainingArrays(x_train, targets[split.train], x_val, targets[split.validation]),
        holdout=codes.holdout,
        inputs=inputs,
        outputs=cut.outputs,
        preprocessing=preprocessing,
        fingerprint=cut.fingerprint,
        example=codes.example,
        ranges=codes.ranges.of(inputs),
        golden_rows=golden,
        notes=(
            *whole._left_out(len(cut.part) - len(cut.numbers)),
            f"data.memory_gb: in memory the rows would need about {needed}; they are streamed from {on_disk} on disk",
        ),
        num_sealed=split.holdout.size,
    )


def _schema(source: StreamedSource, spec: DataSpec, cut: CutRows) -> FeatureSchema:
    """The input columns, with the categories of the training rows."""
    names = [name for name, kind in source.kinds.items() if kind == "category"]
    found: dict[str, list[pa.Array]] = {name: [] for name in names}
    for start, table in clean_batches(source, names) if names else ():
        is_train = pa.array(cut.part[start : start + table.num_rows] == TRAIN)
        for name in names:
            column = table.column(name)
            column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
            found[name] = [pa.chunked_array([*found[name], *column.filter(is_train).chunks], column.type).unique()]
    seen = {name: pa.chunked_array(parts) if parts else source.rows.head.column(name) for name, parts in found.items()}
    columns = (
        fit_column(name, kind, source.shape, seen.get(name, source.rows.head.column(name)), spec)
        for name, kind in source.kinds.items()
    )
    return FeatureSchema(columns=tuple(columns))


@dataclass(frozen=True, eq=False)
class _Codes:
    train: RowFile
    validation: RowFile
    holdout: pa.Table
    """The sample of sealed rows, raw."""
    example: dict[str, Any]
    ranges: _Ranges


def _write_codes(
    source: StreamedSource, spec: DataSpec, cut: CutRows, inputs: FeatureSchema, scratch: Scratch
) -> _Codes:
    sample = _Sample(cut, spec)
    content = [*source.kinds, spec.target]
    names = list(dict.fromkeys([*content, *({"path"} & set(source.rows.schema.names))]))
    example: dict[str, Any] | None = None
    ranges = _Ranges()
    shape = inputs.input_shape
    writers = {
        part: RowWriter(str(scratch.path / name), shape, scratch)
        for part, name in ((TRAIN, "train.f32"), (VALIDATION, "validation.f32"))
    }
    with writers[TRAIN], writers[VALIDATION]:
        for start, table in clean_batches(source, names):
            numbers = np.flatnonzero(cut.part[start : start + table.num_rows] != LEFT_OUT)
            if len(numbers) < table.num_rows:
                table = table.take(pa.array(numbers))
            part, numbers = cut.part[start + numbers], start + numbers
            codes = _encode(source, inputs, table, numbers)
            for name, writer in writers.items():
                writer.append(chosen := codes[part == name])
                ranges.add(chosen)
            if example is None:
                example = _example(inputs, table.select(content), codes, np.flatnonzero(part == TRAIN))
            sample.add(table.select(content), np.flatnonzero(part == HOLDOUT))
    if example is None:  # as in memory: where no row is whole, the first one
        first = next(iter(clean_batches(source, content)))[1]
        example = table_to_records(first.select(list(source.kinds)).slice(0, 1))[0]
    empty = pa.schema([source.rows.schema.field(name) for name in content]).empty_table()
    return _Codes(writers[TRAIN].rows, writers[VALIDATION].rows, sample.table(empty), example, ranges)


def _encode(source: StreamedSource, inputs: FeatureSchema, table: pa.Table, numbers: NDArray[np.int64]) -> FloatArray:
    """Codes (rows, *inputs.input_shape) of a batch whose rows have these numbers."""
    name = inputs.columns[0].name
    if inputs.columns[0].kind != "image" or not is_binary(table.schema.field(name).type):
        return whole._encode(inputs, table, numbers)
    channels, height, width = source.shape
    paths = table.column("path").to_pylist() if "path" in table.column_names else None
    first_row = int(numbers[0]) if len(numbers) else 0
    try:
        pixels, _, _ = decode_all(
            table.column(name), (height, width), 1 if channels == 1 else 3, paths=paths, first_row=first_row
        )
    except SpecError as error:
        raise SpecError([f"data.source: column '{name}': {fault}" for fault in error.faults]) from None
    return pixels.astype(np.float32)


def _applied(codes: RowFile, apply: Any, shape: tuple[int, ...], in_place: bool) -> RowFile:
    """Model inputs of codes, in their place where they are as long."""
    if in_place:
        codes.rewritten(apply)
        return codes
    path = Path(codes.path)
    check_room(path.parent, 4 * len(codes) * int(np.prod(shape)))
    with RowWriter(str(path.with_suffix(".inputs")), shape, codes.owner) as writer:
        for chunk in codes.chunks():
            writer.append(apply(chunk))
    path.unlink()
    return writer.rows


def _example(
    inputs: FeatureSchema, content: pa.Table, codes: FloatArray, train: NDArray[np.int64]
) -> dict[str, Any] | None:
    """A training row as a caller would send it: the first that has all its values; None where this batch has none."""
    is_whole = ~np.isnan(codes[train].reshape(len(train), -1)).any(axis=1)
    if not is_whole.any():
        return None
    row = int(train[is_whole.argmax()])
    if inputs.columns[0].kind == "image":
        return {inputs.tensor_name: codes[row].tolist()}
    return table_to_records(content.select([column.name for column in inputs.columns]).slice(row, 1))[0]


@dataclass
class _Ranges:
    """Least and largest code of each place among the rows so far; NaN aside."""

    low: FloatArray | None = None
    high: FloatArray | None = None

    def add(self, codes: FloatArray) -> None:
        if not len(codes):
            return
        low, high = np.fmin.reduce(codes, axis=0), np.fmax.reduce(codes, axis=0)
        self.low = low if self.low is None else np.fmin(self.low, low)
        self.high = high if self.high is None else np.fmax(self.high, high)

    def of(self, inputs: FeatureSchema) -> dict[str, tuple[float, float]]:
        """As `Dataset.ranges`."""
        assert self.low is not None, "there are training rows"
        assert self.high is not None, "as there is a least value"
        if inputs.columns[0].kind == "image":
            return {inputs.tensor_name: (0.0, 255.0)}
        if inputs.is_tensor:
            return {inputs.tensor_name: whole._range(np.asarray([self.low.min(), self.high.max()]))}
        ends = np.stack([self.low, self.high], axis=1)
        return {
            column.name: whole._range(ends[number])
            for number, column in enumerate(inputs.columns)
            if column.kind == "number" and not np.isnan(ends[number]).any()
        }


class _Sample:
    """As many sealed rows as a bundle takes, the same ones that it would take of all."""

    def __init__(self, cut: CutRows, spec: DataSpec) -> None:
        total = cut.split.holdout.size
        most = max(1, min(HOLDOUT_ROWS, int(HOLDOUT_BYTES / max(1.0, cut.content_bytes))))
        places = np.arange(total)
        if total > most:
            places = np.sort(np.random.default_rng(spec.split.seed).choice(total, most, replace=False))
        self._is_chosen = np.zeros(total, np.bool_)
        self._is_chosen[places] = True
        self._seen = 0
        self._parts: list[pa.Table] = []

    def add(self, content: pa.Table, holdout: NDArray[np.int64]) -> None:
        chosen = holdout[self._is_chosen[self._seen : self._seen + len(holdout)]]
        self._seen += len(holdout)
        if len(chosen):
            self._parts.append(content.take(pa.array(chosen)))

    def table(self, empty: pa.Table) -> pa.Table:
        return pa.concat_tables(self._parts) if self._parts else empty


def _spread(num_rows: int, count: int) -> NDArray[np.int64]:
    return np.linspace(0, num_rows - 1, min(count, num_rows), dtype=np.int64)
