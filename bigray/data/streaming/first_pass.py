"""Once through all rows: what is missing, the hash of each row, the targets; then which rows train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bigray.bundle import OutputSchema
from bigray.data import dataset as whole
from bigray.data.cleaning import is_filled, missing_mask, rows_named
from bigray.data.codes import distinct_values, is_missing
from bigray.data.schema import MOST_CATEGORIES
from bigray.data.splitting import HashArray, Split, fingerprint, row_hashes, split_rows
from bigray.data.streaming.decision import StreamedSource
from bigray.data.targets import Targets, encode_targets
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, DataSpec

LEFT_OUT, TRAIN, VALIDATION, HOLDOUT = range(4)
_SCALAR = ("number", "category", "date")


@dataclass(frozen=True, eq=False)
class CutRows:
    """What is known of every row, a few bytes each: its part, and its target."""

    part: NDArray[np.int8] = field(repr=False)
    """LEFT_OUT, TRAIN, ... of each row of the source."""
    split: Split = field(repr=False)
    """Of the rows that were not left out."""
    numbers: NDArray[np.int64] = field(repr=False)
    """Their numbers in the source."""
    targets: Targets = field(repr=False)
    """Theirs."""
    outputs: OutputSchema
    fingerprint: str
    content_bytes: float
    """Of a row's inputs and target, as the source has them."""


def cut_rows(source: StreamedSource, spec: DataSpec, task: BuiltInTask, positive: str | int | None) -> CutRows:
    """The same rows in the same part as if all had been in memory.

    Raises:
        SpecError: rows have no label, or gaps that the job does not say what to do with; the target does not suit.
    """
    rows, content = source.rows, [*source.kinds, spec.target]
    names = list(dict.fromkeys([*source.features, spec.target, *([spec.group] if spec.group else [])]))
    hashes = np.zeros(rows.num_rows, np.uint64)
    groups = np.zeros(rows.num_rows if spec.group else 0, np.uint64)
    is_kept = np.ones(rows.num_rows, np.bool_)
    target, gaps, categories = _TargetColumn(spec.target), _Gaps(source, spec), _Categories(source, spec)
    num_bytes = 0
    for start, table in clean_batches(source, names):
        stop = start + table.num_rows
        is_kept[start:stop] = gaps.kept(table, start)
        categories.add(table)
        hashes[start:stop] = row_hashes(table.select([*source.features, spec.target]))
        if spec.group is not None:
            groups[start:stop] = row_hashes(table.select([spec.group]))
        target.add(table.column(spec.target), is_kept[start:stop])
        num_bytes += table.select(content).nbytes
    gaps.refuse()
    categories.check(rows.num_rows)
    if not is_kept.any():
        raise SpecError('data.missing: "drop" leaves no row: each has an empty value; name fewer data.features')
    if not is_kept.all():
        hashes, groups = hashes[is_kept], groups[is_kept] if spec.group else groups
    num_given = None if rows.num_given is None else int(np.count_nonzero(is_kept[: rows.num_given]))
    targets, outputs = target.encoded(task, positive)
    classes = targets if task in ("classification", "binary") else None
    split = _split(hashes, classes, spec, num_given, groups if spec.group else None)
    numbers = np.flatnonzero(is_kept)
    part = np.full(rows.num_rows, LEFT_OUT, np.int8)
    for name, members in ((TRAIN, split.train), (VALIDATION, split.validation), (HOLDOUT, split.holdout)):
        part[numbers[members]] = name
    columns = pa.schema([rows.schema.field(name) for name in content]).empty_table()
    return CutRows(part, split, numbers, targets, outputs, fingerprint(columns, hashes), num_bytes / rows.num_rows)


def clean_batches(source: StreamedSource, names: Iterable[str]) -> Iterator[tuple[int, pa.Table]]:
    """Batches with numbers as an endpoint takes them."""
    wanted = list(names)
    kinds = {name: kind for name, kind in source.kinds.items() if name in wanted}
    for start, table in source.rows.batches(source.batch_rows, wanted):
        yield start, whole._plain_numbers(table, kinds)


def _split(hashes: HashArray, classes: Any, spec: DataSpec, num_given: int | None, groups: HashArray | None) -> Split:
    if num_given is None:
        return split_rows(hashes, classes, spec.split, groups)
    own = spec.split.model_copy(update={"holdout": 0.0})
    first_groups = None if groups is None else groups[:num_given]
    split = split_rows(hashes[:num_given], None if classes is None else classes[:num_given], own, first_groups)
    return Split(split.train, split.validation, np.arange(num_given, len(hashes)))


class _Gaps:
    """Empty values, counted over all batches, and what becomes of them."""

    def __init__(self, source: StreamedSource, spec: DataSpec) -> None:
        self._source, self._spec = source, spec
        self._rows: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}

    def kept(self, table: pa.Table, start: int) -> NDArray[np.bool_]:
        """Rows of a batch that stay."""
        is_out = np.zeros(table.num_rows, np.bool_)
        self._count(self._spec.target, _mask(table.column(self._spec.target), is_scalar=True), start)
        if self._spec.group is not None:
            self._count(self._spec.group, missing_mask(table.column(self._spec.group)), start)
        for name, kind in self._source.kinds.items():
            settings, column = self._spec.of_column(name), table.column(name)
            if settings.missing == "drop":
                is_out |= _mask(column, is_scalar=kind in _SCALAR)
            elif kind != "image" and not is_filled(settings, kind):
                # NaN in numbers is told with infinities, since it may be a mistake as they are
                nan_counts = kind in _SCALAR and (kind != "number" or not pa.types.is_floating(column.type))
                self._count(name, _mask(column, is_scalar=nan_counts), start)
            if kind == "category" and pa.types.is_boolean(column.type) and column.null_count:
                raise SpecError(
                    f"data.source: column '{name}' is of true and false with empty values, whose hash depends on all "
                    f"rows; write it as text, or raise data.memory_gb"
                )
        return ~is_out

    def refuse(self) -> None:
        """Raise `SpecError` with a line for each column that has gaps and must not."""
        faults = []
        for name, count in self._counts.items():
            listed = rows_named(self._rows[name])
            more = f" and {count - len(self._rows[name]):,} more" if count > len(self._rows[name]) else ""
            where = f"column '{name}' has {count} empty values (in {listed}{more})"
            if name == self._spec.target:
                faults.append(f"data.target: {where}; leave those rows out of the source")
            elif name == self._spec.group:
                faults.append(f"data.group: {where}; give each row a group, or drop it in the source")
            else:
                faults.append(f"data.source: {where}; fill them in the source, or say what to do in data.missing")
        if faults:
            raise SpecError(faults)

    def _count(self, name: str, is_gap: NDArray[np.bool_], start: int) -> None:
        found = np.flatnonzero(is_gap)
        if len(found):
            rows = self._rows.setdefault(name, [])
            rows += (found[: max(0, 5 - len(rows))] + start).tolist()
            self._counts[name] = self._counts.get(name, 0) + len(found)


class _Categories:
    """Distinct values of columns of categories, to hold to the rules for them, which the first rows may have kept."""

    def __init__(self, source: StreamedSource, spec: DataSpec) -> None:
        names = [name for name, kind in source.kinds.items() if kind == "category"]
        self._values: dict[str, set[Any]] = {name: set() for name in names}
        self._is_told = {name: spec.of_column(name).kind is not None for name in names}

    def add(self, table: pa.Table) -> None:
        for name, values in self._values.items():
            column = table.column(name)
            column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
            values.update(value for value in distinct_values(column) if not is_missing(value))
            if len(values) > 100 * MOST_CATEGORIES:
                place = f"data.columns.{name}.kind: more than {100 * MOST_CATEGORIES:,} categories"
                raise SpecError(f"{place}; leave the column out in data.features")

    def check(self, num_rows: int) -> None:
        """As `infer_kinds` does where it sees all rows."""
        faults = [
            f"data.source: column '{name}' is text with {len(values):,} distinct values in {num_rows:,} rows; "
            f'name the columns to use in data.features, or set data.columns.{name}.kind = "category"'
            for name, values in self._values.items()
            if not self._is_told[name] and (len(values) > MOST_CATEGORIES or 2 * len(values) >= num_rows)
        ]
        if faults:
            raise SpecError(faults)


class _TargetColumn:
    """The target of all rows: text as the number of each distinct value, other values as they are."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts: list[pa.Array] = []
        self._codes: list[NDArray[np.int32]] = []
        self._places: dict[Any, int] = {}

    def add(self, column: pa.ChunkedArray, is_kept: NDArray[np.bool_]) -> None:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not is_kept.all():
            column = column.filter(pa.array(is_kept))
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            self._parts += column.chunks
            return
        for chunk in column.dictionary_encode().chunks:
            places = [self._places.setdefault(value, len(self._places)) for value in chunk.dictionary.to_pylist()]
            indices = pc.fill_null(chunk.indices, 0).to_numpy(zero_copy_only=False)
            self._codes.append(np.asarray(places or [0], np.int32)[indices])

    def encoded(self, task: BuiltInTask, positive: str | int | None) -> tuple[Targets, OutputSchema]:
        """As `encode_targets` makes them of the whole column."""
        if not self._codes:
            return encode_targets(pa.table({self._name: pa.chunked_array(self._parts)}), self._name, task, positive)
        distinct = pa.table({self._name: pa.array(list(self._places), pa.string())})
        targets, outputs = encode_targets(distinct, self._name, task, positive)
        return targets[np.concatenate(self._codes)], outputs


def _mask(column: pa.ChunkedArray, *, is_scalar: bool) -> NDArray[np.bool_]:
    if is_scalar and not pa.types.is_nested(column.type):
        return missing_mask(column)
    return np.asarray(column.is_null().to_numpy(), np.bool_)
