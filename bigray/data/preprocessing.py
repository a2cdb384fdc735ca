"""Standardisation fitted on the training rows and carried in the bundle.

One function applies it, on the driver before training and in the replica before inference, in float32 both times, so
an endpoint cannot disagree with the training run about what the model saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

FloatArray = NDArray[np.float32]


class Preprocessing(BaseModel):
    """`(x - mean) / std`. Both lists hold one value per feature, per channel, or one for the whole sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "standard"] = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def apply(self, x: FloatArray) -> FloatArray:
        """(rows, *input_shape) float32 -> the same shape, standardised."""
        return self.function()(x)

    def undo(self, x: FloatArray) -> FloatArray:
        """Standardised rows -> raw ones, to the rounding of float32; applying it again gives `x` but for that."""
        if self.kind == "none":
            return x
        shape = (len(self.mean), *(1,) * (x.ndim - 2))
        mean, std = (np.asarray(values, dtype=np.float64).reshape(shape) for values in (self.mean, self.std))
        return (x * std + mean).astype(np.float32)

    def function(self) -> Callable[[FloatArray], FloatArray]:
        """`apply` with its constants made once, for callers that need it on every request."""
        if self.kind == "none":
            return lambda x: x
        mean, std = np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)

        def standardise(x: FloatArray) -> FloatArray:
            shape = (len(mean), *(1,) * (x.ndim - 2))
            return (x - mean.reshape(shape)) / std.reshape(shape)

        return standardise


def fit_preprocessing(kind: Literal["none", "standard"], x_train: FloatArray) -> Preprocessing:
    """Fit on training rows only: per feature for vectors, per channel for (C, H, W), one value for (H, W).

    Constant features get std 1, so they become 0 instead of NaN.
    """
    if kind == "none":
        return Preprocessing()
    axes = _reduced_axes(x_train.ndim)
    mean = np.atleast_1d(x_train.mean(axis=axes, dtype=np.float64))
    std = np.atleast_1d(x_train.std(axis=axes, dtype=np.float64))
    std = np.where(std > 1e-12, std, 1.0)
    return Preprocessing(kind=kind, mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _reduced_axes(ndim: int) -> tuple[int, ...] | None:
    if ndim == 2:  # (rows, features)
        return (0,)
    if ndim == 3:  # (rows, H, W): one channel, which is not written out
        return None
    return (0, *range(2, ndim))  # (rows, C, H, W)
