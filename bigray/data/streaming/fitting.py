"""What is fitted on training rows that are on the disk: the same numbers as `fit_preprocessing` finds in memory.

Least and largest values, and means of pictures, come out with the same bits; other means differ in the last ones, since
numbers are added in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigray.data.cleaning import fit_steps
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import ColumnStep, Preprocessing
from bigray.data.row_file import FloatArray, RowFile
from bigray.specs import DataSpec

DoubleArray = NDArray[np.float64]


def fit_streamed(spec: DataSpec, inputs: FeatureSchema, codes: RowFile) -> Preprocessing:
    """Fill, steps and scaling of training rows, given as codes (rows, *inputs.input_shape).

    Raises:
        SpecError: as `fit_steps`.
    """
    steps = () if inputs.is_plain else fit_steps(inputs.columns, _stand_in(inputs.columns, codes), spec)
    if spec.normalize == "none":
        return Preprocessing(steps=steps)
    center, scale = map(np.atleast_1d, _fit_scaling(spec, inputs, codes, steps))
    scale = np.where(scale > 1e-12, scale, 1.0)
    if steps:
        is_category = [step.kind == "category" for step in steps]
        center, scale = np.where(is_category, 0.0, center), np.where(is_category, 1.0, scale)
    return Preprocessing(
        kind=spec.normalize, center=tuple(map(float, center)), scale=tuple(map(float, scale)), steps=steps
    )


def _stand_in(columns: Sequence[Column], codes: RowFile) -> FloatArray:
    """A few rows on which steps are fitted as on all: of each column its mean, or its commonest category, and a gap
    where it has one."""
    found = [_ColumnCount(len(column.categories)) for column in columns]
    for chunk in codes.chunks():
        for number, column in enumerate(found):
            column.add(chunk[:, number])
    return np.asarray([[column.typical for column in found], [column.gap for column in found]], np.float64)


@dataclass
class _ColumnCount:
    """Of one column of codes, so far."""

    num_categories: int
    total: float = 0.0
    known: int = 0
    rows: int = 0
    counts: NDArray[np.int64] | None = None

    def add(self, codes: FloatArray) -> None:
        values = codes[~np.isnan(codes)]
        self.rows += len(codes)
        self.known += len(values)
        if self.num_categories:
            counts = np.bincount(values[values >= 0].astype(np.int64), minlength=self.num_categories)
            self.counts = counts if self.counts is None else self.counts + counts
        else:
            self.total += math.fsum([float(values.sum(dtype=np.float64))])

    @property
    def typical(self) -> float:
        """NaN where nothing is known."""
        if not self.known:
            return math.nan
        return float(self.counts.argmax()) if self.counts is not None else self.total / self.known

    @property
    def gap(self) -> float:
        return self.typical if self.known == self.rows else math.nan


def _fit_scaling(
    spec: DataSpec, inputs: FeatureSchema, codes: RowFile, steps: Sequence[ColumnStep]
) -> tuple[DoubleArray, DoubleArray]:
    def filled() -> Iterator[FloatArray]:
        fills = np.asarray([math.nan if step.fill is None else step.fill for step in steps], np.float32)
        return (np.where(np.isnan(chunk), fills, chunk) if steps else chunk for chunk in codes.chunks())

    axes = _reduced_axes(codes.ndim)
    if spec.normalize == "minmax":
        return _extent(filled(), axes)
    if inputs.columns[0].kind == "image":
        return _moments_of_pictures(filled(), axes, codes)
    count = math.prod(codes.shape) / math.prod(_kept_shape(codes.shape, axes))
    mean = _sum((chunk.astype(np.float64) for chunk in filled()), axes) / count
    shaped = mean.reshape(_broadcast_shape(codes.ndim, mean))
    squares = _sum(((chunk - shaped) ** 2 for chunk in filled()), axes)
    return mean, np.sqrt(squares / count)


def _extent(chunks: Iterator[FloatArray], axes: tuple[int, ...] | None) -> tuple[DoubleArray, DoubleArray]:
    ends = [(chunk.min(axis=axes), chunk.max(axis=axes)) for chunk in chunks]
    low = np.min([low for low, _ in ends], axis=0).astype(np.float64)
    return low, np.max([high for _, high in ends], axis=0).astype(np.float64) - low


def _moments_of_pictures(
    chunks: Iterator[FloatArray], axes: tuple[int, ...] | None, codes: RowFile
) -> tuple[DoubleArray, DoubleArray]:
    """Brightness is whole numbers, whose sums a double holds exactly."""
    total: DoubleArray = np.zeros(())
    squares: DoubleArray = np.zeros(())
    for chunk in chunks:
        exact = chunk.astype(np.float64)
        total = total + exact.sum(axis=axes)
        squares = squares + (exact * exact).sum(axis=axes)
    count = math.prod(codes.shape) / np.size(total)
    mean = np.asarray(total / count)
    return mean, np.sqrt(np.maximum(squares / count - mean * mean, 0.0))


def _sum(chunks: Iterator[DoubleArray], axes: tuple[int, ...] | None) -> DoubleArray:
    """One row after another, as numpy adds the rows of a table that is in memory."""
    total: DoubleArray | None = None
    for chunk in chunks:
        if axes != (0,):
            part = np.asarray(chunk.sum(axis=axes))
            total = part if total is None else total + part
        else:
            total = (chunk if total is None else np.concatenate([total[None], chunk])).sum(axis=0)
    assert total is not None, "there are training rows"
    return total


def _reduced_axes(ndim: int) -> tuple[int, ...] | None:
    """As `fit_preprocessing` scales: by feature, as a whole, or by channel."""
    return (0,) if ndim == 2 else None if ndim == 3 else (0, *range(2, ndim))


def _kept_shape(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    return () if axes is None else tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _broadcast_shape(ndim: int, mean: DoubleArray) -> tuple[int, ...]:
    return () if mean.ndim == 0 else (len(mean), *(1,) * (ndim - 2))
