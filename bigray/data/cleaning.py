"""Missing values, and rows that nothing can be learnt from: what is refused, left out or filled (driver).

What fills a gap, and which categories there are, is found among the training rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bigray.data.codes import category_text, days_since_1970, distinct_values, is_missing
from bigray.data.features import Column
from bigray.data.preprocessing import ColumnStep
from bigray.data.schema import Kind
from bigray.errors import SpecError
from bigray.specs import ColumnSpec, DataSpec

FloatArray = NDArray[np.float32]
Mask = NDArray[np.bool_]

_SHOWN = 5
"""Rows that a message names."""


def missing_mask(column: pa.ChunkedArray) -> Mask:
    """Which rows are null, NaN or an empty string; (rows,)."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_null = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        is_null = pc.or_(is_null, pc.fill_null(pc.equal(column, ""), False))
    return np.asarray(is_null.to_numpy(), np.bool_)


def label_faults(table: pa.Table, target: str, num_given: int | None = None) -> Iterable[str]:
    """One line where rows have no label; there is no way to fill one. `num_given` as in `rows_named`."""
    column = table.column(target)
    rows = np.flatnonzero(missing_mask(column) if not pa.types.is_nested(column.type) else _nulls(column))
    if len(rows):
        yield (
            f"data.target: column '{target}' has {len(rows)} empty values (in {rows_named(rows, num_given)}); "
            f"leave those rows out of the source"
        )


def missing_faults(
    table: pa.Table, kinds: Mapping[str, Kind], spec: DataSpec, num_given: int | None = None
) -> Iterable[str]:
    """One line for each column with gaps that the job does not say what to do with. `num_given` as in `rows_named`."""
    for name, kind in kinds.items():
        settings = spec.of_column(name)
        if kind == "image" or is_filled(settings, kind) or _is_dropped(settings):
            continue  # of pictures, data.bad_images tells what to do
        column = table.column(name)
        # NaN in numbers is told with infinities, since it may be a mistake as they are
        nan_counts = kind != "number" or not pa.types.is_floating(column.type)
        rows = np.flatnonzero(missing_mask(column) if nan_counts and _is_scalar(kind) else _nulls(column))
        if len(rows):
            yield (
                f"data.source: column '{name}' has {len(rows)} empty values (in {rows_named(rows, num_given)}); "
                f"fill them in the source, or say what to do in data.missing"
            )


def kept_rows(table: pa.Table, kinds: Mapping[str, Kind], spec: DataSpec) -> NDArray[np.int64]:
    """Rows that stay where those with gaps in some columns are to be left out.

    Raises:
        SpecError: none stays.
    """
    is_out = np.zeros(table.num_rows, np.bool_)
    for name, kind in kinds.items():
        if _is_dropped(spec.of_column(name)):
            is_out |= missing_mask(table.column(name)) if _is_scalar(kind) else _nulls(table.column(name))
    if is_out.all():
        raise SpecError('data.missing: "drop" leaves no row: each has an empty value; name fewer data.features')
    return np.flatnonzero(~is_out)


def fit_column(name: str, kind: Kind, shape: tuple[int, ...], train: pa.ChunkedArray, spec: DataSpec) -> Column:
    """The schema of a column: its categories are those of the training rows, and of a constant that fills them.

    Raises:
        SpecError: the column is of categories and has none.
    """
    settings = spec.of_column(name)
    if kind == "tensor" or kind == "image":
        return Column(name=name, shape=shape, kind="image" if kind == "image" else "number")
    nullable = is_filled(settings, kind)
    if kind != "category":
        return Column(name=name, kind=kind, nullable=nullable)
    categories = _categories(name, train, settings)
    return Column(
        name=name, kind=kind, categories=categories, nullable=nullable, unknown=settings.unknown_category or "ignore"
    )


def fit_steps(columns: Sequence[Column], x_train: FloatArray, spec: DataSpec) -> tuple[ColumnStep, ...]:
    """How each scalar column is filled and encoded, fitted on the codes of the training rows (rows, columns).

    Raises:
        SpecError: a column has no value to fit on, or its constant is of another kind; one line each.
    """
    steps: list[ColumnStep] = []
    faults: list[str] = []
    for number, column in enumerate(columns):
        settings, codes = spec.of_column(column.name), x_train[:, number]
        try:
            fill = _fit_fill(column, codes, settings) if column.nullable else None
        except SpecError as error:
            faults += error.faults
            continue
        has_gaps = bool(np.isnan(codes).any())  # an indicator that was never 1 teaches nothing
        steps.append(
            ColumnStep(
                name=column.name,
                kind=column.kind,
                fill=fill,
                indicator=bool(settings.missing_indicator) and column.nullable and has_gaps,
                num_categories=len(column.categories),
                encode=settings.categories or "one_hot",
            )
        )
    if faults:
        raise SpecError(faults)
    return tuple(steps)


def is_filled(settings: ColumnSpec, kind: Kind) -> bool:
    """Whether gaps of a column are filled, in training and at the endpoint."""
    return settings.missing in ("mean", "median", "constant") and _is_scalar(kind)


def rows_named(rows: Sequence[int] | NDArray[np.int64], num_given: int | None = None) -> str:
    """`row 3`, `rows 3, 7 and 12 more`; counted from 0.

    Of a given split, where the first `num_given` rows are those of data.train, as `row 3 of data.test`.
    """
    if num_given is not None:
        train, test = [row for row in rows if row < num_given], [row - num_given for row in rows if row >= num_given]
        parts = (("data.train", train), ("data.test", test))
        return " and ".join(f"{rows_named(part)} of {place}" for place, part in parts if part)
    shown = ", ".join(str(int(row)) for row in rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def _is_dropped(settings: ColumnSpec) -> bool:
    return settings.missing == "drop"


def _is_scalar(kind: Kind) -> bool:
    return kind not in ("tensor", "image")


def _nulls(column: pa.ChunkedArray) -> Mask:
    return np.asarray(column.is_null().to_numpy(), np.bool_)


def _categories(name: str, train: pa.ChunkedArray, settings: ColumnSpec) -> tuple[str, ...]:
    if pa.types.is_dictionary(train.type):
        train = train.cast(train.type.value_type)
    try:
        found = {category_text(value) for value in distinct_values(train) if not is_missing(value)}
    except ValueError:
        raise SpecError(f"data.source: column '{name}' holds infinite values, which are no categories") from None
    if settings.missing == "constant" and settings.missing_value is not None:
        found.add(category_text(settings.missing_value))
    if not found:
        raise SpecError(f"data.source: column '{name}' is empty in every training row; leave it out in data.features")
    return tuple(sorted(found))


def _fit_fill(column: Column, codes: FloatArray, settings: ColumnSpec) -> float:
    if settings.missing == "constant":
        return _constant(column, settings.missing_value)
    known = codes[~np.isnan(codes)].astype(np.float64)
    if not len(known):
        raise SpecError(
            f"data.source: column '{column.name}' is empty in every training row; leave it out in data.features"
        )
    if column.kind == "category":
        return float(np.bincount(known[known >= 0].astype(np.int64)).argmax())
    return float(np.float32(known.mean() if settings.missing == "mean" else np.median(known)))


def _constant(column: Column, value: str | float | None) -> float:
    assert value is not None, "checked by DataSpec"
    if column.kind == "category":
        return float(column.categories.index(category_text(value)))
    try:
        if column.kind == "date":
            return float(np.float32(days_since_1970(value)))
        if isinstance(value, str):
            raise ValueError
    except ValueError:
        place = f"data.missing_value: {value!r} cannot fill column '{column.name}', which holds {column.kind}s"
        raise SpecError(f"{place}; set data.columns.{column.name}.missing and missing_value") from None
    return float(np.float32(value))
