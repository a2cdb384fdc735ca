"""What is fitted on training rows alone, and what must be true of them before anything is (driver)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import OutputSchema
from bigray.data.cleaning import fit_steps, rows_named
from bigray.data.features import FeatureSchema
from bigray.data.preprocessing import FloatArray, Preprocessing, fit_preprocessing
from bigray.data.splitting import Split
from bigray.data.targets import Targets, untrained_classes
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, DataSpec

ROWS_AT_ONCE = 4096
"""Preprocessed together: more would hold several copies of all rows in memory."""


def fit_inputs(spec: DataSpec, inputs: FeatureSchema, x_train: NDArray[Any]) -> Preprocessing:
    """Fills, encodings, scaling and components, of the codes of the training rows (rows, *inputs.input_shape).

    Raises:
        SpecError: there is nothing to fill with, or more components are asked for than there can be.
    """
    steps = () if inputs.is_plain else fit_steps(inputs.columns, x_train, spec)
    num_outputs = math.prod(inputs.input_shape) if not steps else sum(step.width for step in steps)
    most = min(num_outputs, len(x_train))
    if spec.pca is not None and spec.pca > most:
        raise SpecError(
            f"data.pca: {spec.pca} components, but there are {num_outputs} inputs and {len(x_train)} training rows; "
            f"use at most {most}"
        )
    return fit_preprocessing(spec.normalize, x_train, steps, spec.pca)


def apply_in_parts(apply: Callable[[FloatArray], FloatArray], codes: NDArray[Any]) -> FloatArray:
    """`apply(codes)` of at least one row, with the memory of `ROWS_AT_ONCE` of them beside the result."""
    starts = range(0, len(codes), ROWS_AT_ONCE)
    parts = (apply(codes[start : start + ROWS_AT_ONCE].astype(np.float32, copy=False)) for start in starts)
    first = next(parts)
    found = np.empty((len(codes), *first.shape[1:]), np.float32)
    found[: len(first)] = first
    for start, part in zip(starts[1:], parts, strict=True):
        found[start : start + len(part)] = part
    return found


def check_split(spec: DataSpec, task: BuiltInTask, num_train: int, num_validation: int) -> None:
    """Raise `SpecError` unless there are rows to train on, and enough to validate on."""
    if num_train == 0:
        raise SpecError("data.split: leaves no training rows")
    if num_validation == 0:
        raise SpecError(
            f"data.split.validation: {spec.split.validation:g} leaves no row to validate on; "
            f"use a larger share, or more rows that differ (equal rows stay on one side)"
        )
    if task == "regression" and num_validation < 2:
        raise SpecError("data.split.validation: leaves one row, and val_r2 needs at least two")


def check_targets(
    targets: Targets, outputs: OutputSchema, split: Split, rows: NDArray[np.int64], num_given: int | None = None
) -> None:
    """Raise `SpecError` where nothing can be learnt: of a class that no training row has, or where all have one value.

    `rows` are the numbers of those that `targets` are of, in the source; `num_given` as in `rows_named`.
    """
    y_train = targets[split.train]
    if outputs.task == "regression" and (y_train == y_train[0]).all():
        raise SpecError(
            f"data.target: '{outputs.target}' is {y_train[0]:g} in every training row; there is nothing to learn"
        )
    names = list(outputs.class_names)
    for name in untrained_classes(y_train, outputs):
        number = names.index(name)
        has_it = targets[:, number] > 0 if outputs.task == "multilabel" else targets == number
        raise SpecError(
            f"data.target: '{name}' of '{outputs.target}' is in no training row, only in "
            f"{rows_named(rows[np.flatnonzero(has_it)], num_given)}; give it more rows, or leave it out of the source"
        )
