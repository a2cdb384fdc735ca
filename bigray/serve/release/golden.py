"""Whether a loaded model gives the answers that were stored beside it when it was exported."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import GOLDEN, ModelBundle
from bigray.inference import Predictor

FloatArray = NDArray[np.float32]

TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest absolute value that is expected."""
LEAST_SCALE = 1e-3
"""Of outputs that are all smaller, rounding in the layers before them is larger than that."""


def check_golden(bundle: ModelBundle, predictor: Predictor) -> str | None:
    """What differs, in one line; None where all is well (replica, before a version takes a request)."""
    if bundle.golden is None:
        return f"has no {GOLDEN}, so nothing tells whether it answers as it was trained to"
    return describe_difference(predictor.outputs(bundle.golden.inputs), bundle.golden.outputs)


def describe_difference(answered: FloatArray, expected: FloatArray) -> str | None:
    """How an answer differs from what is expected, in one line; None within the tolerance. NaN never passes."""
    if answered.shape != expected.shape:
        return f"golden answers: expected shape {expected.shape}, got {answered.shape}"
    if not np.isfinite(answered).all():
        row = int(np.flatnonzero(~np.isfinite(answered.reshape(len(answered), -1)).all(axis=1))[0])
        return f"golden answers: row {row} of {len(expected)} is answered with NaN or an infinite value"
    apart = np.abs(answered - expected)
    scale = max(LEAST_SCALE, float(np.abs(expected).max()))
    if float(apart.max()) <= TOLERANCE * scale:  # so asked, an expected NaN is refused too
        return None
    row = int(apart.reshape(len(apart), -1).max(axis=1).argmax())
    return (
        f"golden answers: row {row} of {len(expected)} is off by {float(apart.max()):.2g}, "
        f"more than {TOLERANCE:g} of the largest, {scale:.3g}: these are not the answers it was exported with"
    )
