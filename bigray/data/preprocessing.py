"""What becomes of codes before the model sees them: fitted on the training rows and carried in the bundle.

One function applies it, on the driver before training and in the replica before inference, in float32 both times, so
an endpoint cannot disagree with the training run about what the model saw. The bits of a row do not depend on the rows
beside it, nor on the processor: only additions, multiplications and divisions of single numbers are used, in a fixed
order.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
Kind = Literal["none", "standard", "minmax", "robust"]

DAYS_A_YEAR = 365.2425
DAYS_A_WEEK = 7.0
DATE_WIDTH = 5
"""Outputs of a date: days, then sine and cosine of its place in the year and in the week."""

_PRODUCTS_AT_ONCE = 2**18
"""Numbers of a projection held in memory together: 2 MB, which a cache holds."""
_PICTURES_AT_ONCE = 1024


class ColumnStep(BaseModel):
    """What becomes of one scalar column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["number", "category", "date"] = "number"
    fill: float | None = None
    """Code in place of a missing one; None where none can be missing."""
    indicator: bool = False
    """Whether a last output tells, by 1, that the value was missing."""
    num_categories: int = 0
    encode: Literal["one_hot", "embedding"] = "one_hot"

    @property
    def width(self) -> int:
        """Outputs of this column."""
        is_one_hot = self.kind == "category" and self.encode == "one_hot"
        values = self.num_categories if is_one_hot else DATE_WIDTH if self.kind == "date" else 1
        return values + self.indicator


class Preprocessing(BaseModel):
    """Fill, scale by `(x - center) / scale`, encode, project.

    Without `steps`, center and scale hold one value per feature, per channel, or one for the whole sample, and the
    shape stays. With them (scalar columns only) they hold one for each column, and each column becomes one or more
    outputs, in order. Of the two, categories have 0 and 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = "none"
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    steps: tuple[ColumnStep, ...] = ()
    """One for each column, or none where all columns are plain numbers."""
    components: str | None = None
    """Principal axes, (num_components, outputs) float32 in base64; None where there is no projection."""
    num_components: int = 0
    offset: tuple[float, ...] = ()
    """The mean training row along each of them."""

    @model_validator(mode="after")
    def _fits_together(self) -> Preprocessing:
        if len(self.center) != len(self.scale) or not all(self.scale):
            raise ValueError("center and scale have one value each, and no scale is 0")
        if self.steps and self.center and len(self.center) != len(self.steps):
            raise ValueError("there is a center for each step")
        if (self.components is None) != (self.num_components == 0) or len(self.offset) != self.num_components:
            raise ValueError("components, num_components and offset go together")
        if self.components is not None and self._axes.size % self.num_components:
            raise ValueError("components is not a base64 array of num_components rows")
        return self

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one row as the model sees it, for codes of this shape."""
        if self.components is not None:
            return (self.num_components,)
        return (sum(step.width for step in self.steps),) if self.steps else input_shape

    @property
    def embeddings(self) -> tuple[tuple[int, int], ...]:
        """(index of the output, number of categories) of each column to embed.

        Its values are codes; -1 is a category that training did not see, or that is missing and has no fill.
        """
        starts: list[int] = _starts(self.steps).tolist()
        is_embedded = [step.kind == "category" and step.encode == "embedding" for step in self.steps]
        return tuple(
            (start, step.num_categories)
            for step, start, embedded in zip(self.steps, starts, is_embedded, strict=True)
            if embedded
        )

    def apply(self, x: FloatArray) -> FloatArray:
        """Codes (rows, *input_shape) -> model inputs (rows, *output_shape), both float32."""
        return self.function()(x)

    def function(self) -> Callable[[FloatArray], FloatArray]:
        """`apply` with its constants made once, for callers that need it on every request."""
        prepare = _prepare_columns(self.steps, self._scaler()) if self.steps else self._scaler()
        if self.components is None:
            return prepare
        axes, offset = self._axes.astype(np.float64), np.asarray(self.offset, np.float64)
        return lambda x: _project(prepare(x), axes, offset)

    @cached_property
    def _axes(self) -> FloatArray:
        assert self.components is not None
        found = np.frombuffer(base64.b64decode(self.components, validate=True), "<f4")
        return found.reshape(self.num_components, -1) if found.size % self.num_components == 0 else found

    def _scaler(self) -> Callable[[FloatArray], FloatArray]:
        if self.kind == "none":
            return lambda x: x
        center, scale = np.asarray(self.center, dtype=np.float32), np.asarray(self.scale, dtype=np.float32)

        def rescale(x: FloatArray) -> FloatArray:
            shape = (len(center), *(1,) * (x.ndim - 2))
            found = x - center.reshape(shape)
            found /= scale.reshape(shape)
            return found

        return rescale


def fit_preprocessing(
    kind: Kind, x_train: NDArray[Any], steps: Sequence[ColumnStep] = (), num_components: int | None = None
) -> Preprocessing:
    """Fit on training rows only (codes, of float32 or, for pictures, uint8).

    Scaling is per feature for vectors, per channel for (C, H, W), one value for (H, W). Constant features get scale 1,
    so they become 0 instead of NaN.
    """
    filled = _fill(x_train, _fills(steps)) if steps else x_train
    center, scale = _fit_scaling(kind, filled) if kind != "none" else (np.zeros(0), np.ones(0))
    if steps and kind != "none":
        is_category = [step.kind == "category" for step in steps]
        center, scale = np.where(is_category, 0.0, center), np.where(is_category, 1.0, scale)
    fitted = Preprocessing(kind=kind, center=_floats(center), scale=_floats(scale), steps=tuple(steps))
    if num_components is None:
        return fitted
    prepared = fitted.apply(x_train.astype(np.float32, copy=False))
    axes, offset = _fit_axes(prepared.reshape(len(prepared), -1), num_components)
    encoded = base64.b64encode(axes.astype("<f4").tobytes()).decode("ascii")
    return Preprocessing(
        kind=kind,
        center=fitted.center,
        scale=fitted.scale,
        steps=fitted.steps,
        components=encoded,
        num_components=num_components,
        offset=_floats(offset),
    )


def _prepare_columns(
    steps: Sequence[ColumnStep], rescale: Callable[[FloatArray], FloatArray]
) -> Callable[[FloatArray], FloatArray]:
    """Codes (rows, columns) -> outputs (rows, all widths)."""
    first, width, fills = _starts(steps), sum(step.width for step in steps), _fills(steps)
    sizes = np.asarray([step.num_categories for step in steps])
    scaled = _chosen(steps, lambda step: step.kind != "category")
    dates = _chosen(steps, lambda step: step.kind == "date")
    one_hot = _chosen(steps, lambda step: step.kind == "category" and step.encode == "one_hot")
    embedded = _chosen(steps, lambda step: step.kind == "category" and step.encode == "embedding")
    told = _chosen(steps, lambda step: step.indicator)
    at_scaled, at_one_hot, at_embedded = first[scaled], first[one_hot], first[embedded]
    at_told = first[told] + [steps[i].width - 1 for i in told]
    at_sines, at_cosines = (first[dates, None] + offsets for offsets in ((1, 3), (2, 4)))

    def prepare(codes: FloatArray) -> FloatArray:
        filled = _fill(codes, fills)
        found = np.zeros((len(codes), width), np.float32)
        found[:, at_scaled] = rescale(filled)[:, scaled]
        if len(told):
            found[:, at_told] = np.isnan(codes[:, told])
        if len(embedded):
            found[:, at_embedded] = np.nan_to_num(filled[:, embedded], nan=-1.0)
        if len(one_hot):
            places = filled[:, one_hot]
            rows, columns = np.nonzero((places >= 0) & (places < sizes[one_hot]))
            found[rows, at_one_hot[columns] + places[rows, columns].astype(np.int64)] = 1
        if len(dates):
            turns = filled[:, dates, None].astype(np.float64) / (DAYS_A_YEAR, DAYS_A_WEEK)
            found[:, at_sines], found[:, at_cosines] = _circle(turns)
        return found

    return prepare


def _chosen(steps: Sequence[ColumnStep], wanted: Callable[[ColumnStep], bool]) -> NDArray[np.int64]:
    return np.asarray([i for i, step in enumerate(steps) if wanted(step)], np.int64)


def _starts(steps: Sequence[ColumnStep]) -> NDArray[np.int64]:
    """The first output of each column."""
    return np.cumsum([0, *(step.width for step in steps)])[:-1]


def _fills(steps: Sequence[ColumnStep]) -> FloatArray:
    """The code of each column in place of a missing one, NaN where there is none."""
    return np.asarray([math.nan if step.fill is None else step.fill for step in steps], np.float32)


def _fill(codes: NDArray[Any], fills: FloatArray) -> FloatArray:
    return np.where(np.isnan(codes), fills, codes).astype(np.float32, copy=False)


def _circle(turns: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
    """Sine and cosine of an angle in turns, to 1e-11.

    By their Taylor series within an eighth of a turn: numpy's own differ in the last bit by processor and by how an
    array lies in memory.
    """
    quarter = np.floor(4 * turns + 0.5)
    angle = (turns - quarter / 4) * (2 * math.pi)
    square = angle * angle
    sine, cosine = np.ones_like(angle), np.ones_like(angle)
    for power in range(12, 0, -2):
        sine = 1 - sine * square / (power * (power + 1))
        cosine = 1 - cosine * square / (power * (power - 1))
    sine = sine * angle
    place = quarter % 4
    swapped = place % 2 == 1
    first, second = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(place >= 2, -first, first), np.where((place == 1) | (place == 2), -second, second)


def _project(x: FloatArray, axes: DoubleArray, offset: DoubleArray) -> FloatArray:
    """(rows, *shape) -> (rows, components): each sum by itself, since a matrix product adds in an order of its own."""
    flat = np.ascontiguousarray(x.reshape(len(x), -1))
    found = np.empty((len(x), len(axes)), np.float32)
    at_once = max(1, _PRODUCTS_AT_ONCE // axes.size)
    for start in range(0, len(x), at_once):
        part = flat[start : start + at_once].astype(np.float64)
        found[start : start + at_once] = (part[:, None, :] * axes).sum(axis=-1) - offset
    return found


def _fit_scaling(kind: Kind, x: NDArray[Any]) -> tuple[DoubleArray, DoubleArray]:
    axes = _reduced_axes(x.ndim)
    if kind == "standard" and x.dtype == np.uint8:
        center, scale = _moments_of_pictures(x, axes)
    elif kind == "standard":
        center, scale = x.mean(axis=axes, dtype=np.float64), x.std(axis=axes, dtype=np.float64)
    elif kind == "minmax":
        center, most = (np.asarray(end(x, axis=axes), np.float64) for end in (np.min, np.max))
        scale = most - center
    else:
        exact = x if x.dtype == np.uint8 else x.astype(np.float64)
        low, center, high = np.quantile(exact, (0.25, 0.5, 0.75), axis=axes)
        scale = high - low
    center, scale = np.atleast_1d(center), np.atleast_1d(scale)
    return center, np.where(scale > 1e-12, scale, 1.0)


def _moments_of_pictures(x: NDArray[np.uint8], axes: tuple[int, ...] | None) -> tuple[DoubleArray, DoubleArray]:
    """Mean and deviation by exact sums, a part at a time: doubles of all pictures would take eight times the memory."""
    total: Any = 0
    squares: Any = 0
    for start in range(0, len(x), _PICTURES_AT_ONCE):
        part = x[start : start + _PICTURES_AT_ONCE].astype(np.uint32)
        total = total + part.sum(axis=axes, dtype=np.int64)
        squares = squares + (part * part).sum(axis=axes, dtype=np.int64)
    count = x.size / np.size(total)
    mean = np.asarray(total / count, np.float64)
    return mean, np.sqrt(np.maximum(np.asarray(squares / count, np.float64) - mean * mean, 0.0))


def _fit_axes(rows: FloatArray, count: int) -> tuple[FloatArray, DoubleArray]:
    """Principal axes (count, outputs) and the mean row along them; each axis' largest entry is positive."""
    exact = rows.astype(np.float64)
    mean = exact.mean(axis=0)
    exact -= mean
    # the factor R has the same axes as the rows, and only as many rows as there are outputs
    _, _, axes = np.linalg.svd(np.linalg.qr(exact, mode="r"), full_matrices=False)
    axes = axes[:count]
    largest = axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)]
    rounded = (axes * np.where(largest < 0, -1.0, 1.0)[:, None]).astype(np.float32)
    return rounded, (rounded.astype(np.float64) * mean).sum(axis=-1)


def _reduced_axes(ndim: int) -> tuple[int, ...] | None:
    if ndim == 2:  # (rows, features)
        return (0,)
    if ndim == 3:  # (rows, H, W): one channel, which is not written out
        return None
    return (0, *range(2, ndim))  # (rows, C, H, W)


def _floats(values: DoubleArray) -> tuple[float, ...]:
    return tuple(map(float, values))
