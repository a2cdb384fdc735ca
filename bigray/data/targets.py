"""The target column -> numbers that a model is trained on, and back to the answers that a caller is given.

One column holds the target: classes, values, labels of which a row has any number, or the tokens that follow a row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bigray.bundle import OutputSchema
from bigray.data.features import column_to_numpy
from bigray.errors import SpecError
from bigray.specs import BuiltInTask

Targets = NDArray[np.int64] | NDArray[np.float32] | NDArray[np.int8]
"""Class numbers (rows,) int64; values (rows,) float32; labels (rows, labels) int8, 0 or 1; tokens (rows, T) int64."""

SEPARATOR = "|"
"""Between the labels of a text cell."""


def encode_targets(
    table: pa.Table, target: str, task: BuiltInTask, positive: str | int | None = None
) -> tuple[Targets, OutputSchema]:
    """The target column as numbers, and the schema that tells what they mean.

    `positive`: the class that a binary task looks for; it gets the number 1.

    Raises:
        SpecError: the column does not suit the task.
    """
    if task == "multilabel":
        return _encode_labels(table, target)
    values = column_to_numpy(table, target)
    if task == "language":
        return _encode_tokens(values, target)
    if task == "regression":
        return _encode_values(values, target)
    return _encode_classes(values, target, task, positive)


def true_answers(table: pa.Table, outputs: OutputSchema) -> list[Any]:
    """The target column of some rows as `Predictions` has answers: class names, values, or lists of labels.

    Of a language task that is the token behind the row's last one.
    """
    if outputs.task == "multilabel":
        given = _given_labels(table, outputs.target)
        return [[name for name in outputs.class_names if name in labels] for labels in map(set, given)]
    values = column_to_numpy(table, outputs.target)
    if outputs.task == "language":
        last: list[int] = values.reshape(len(values), -1)[:, -1].astype(np.int64).tolist()
        return [outputs.class_names[token] for token in last] if outputs.class_names else last
    if outputs.task == "regression":
        numbers: list[Any] = values.tolist()
        return numbers
    return class_labels(class_values(values))


def untrained_classes(y_train: Targets, outputs: OutputSchema) -> list[str | int]:
    """Classes or labels that no training row has: what a model says of them nobody has taught it."""
    if outputs.task not in ("classification", "binary", "multilabel"):
        return []
    if outputs.task == "multilabel":
        counts = y_train.sum(axis=0, dtype=np.int64)
    else:
        counts = np.bincount(y_train.astype(np.int64), minlength=len(outputs.class_names))
    return [name for name, count in zip(outputs.class_names, counts.tolist(), strict=True) if not count]


def class_values(values: NDArray[Any]) -> NDArray[Any]:
    """A target column as its classes are told apart: 1.0 and true are the class 1."""
    if values.dtype.kind in "bf":
        return values.astype(np.int64)
    return values.astype(str) if values.dtype.kind == "O" else values


def class_labels(values: NDArray[Any]) -> list[int | str]:
    """Classes as they are in a schema."""
    return [int(value) if isinstance(value, np.integer) else str(value) for value in values]


def _encode_values(values: NDArray[Any], target: str) -> tuple[NDArray[np.float32], OutputSchema]:
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise SpecError(f"data.target: '{target}' is not a column of numbers, which regression needs")
    if not np.isfinite(values).all():
        raise SpecError(f"data.target: '{target}' holds NaN or infinite values{_first(~np.isfinite(values))}")
    return values.astype(np.float32), OutputSchema(task="regression", num_outputs=1, target=target)


def _encode_classes(
    values: NDArray[Any], target: str, task: BuiltInTask, positive: str | int | None
) -> tuple[NDArray[np.int64], OutputSchema]:
    if values.ndim != 1:
        raise SpecError(f"data.target: '{target}' holds {values.shape[1:]} values a row; {task} needs one")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise SpecError(f"data.target: '{target}' holds NaN or infinite values{_first(~np.isfinite(values))}")
        if not (values == np.round(values)).all():
            raise SpecError(f"data.target: '{target}' holds fractions, not classes; use training.task = 'regression'")
    classes, numbers = np.unique(class_values(values), return_inverse=True)
    if len(classes) < 2:
        raise SpecError(f"data.target: '{target}' has a single class ({classes[0]}); {task} needs two")
    names = class_labels(classes)
    numbers = numbers.astype(np.int64)
    if task == "binary":
        _check_two_classes(names, target, positive)
        if positive is not None and str(names[0]) == str(positive):
            names, numbers = names[::-1], 1 - numbers
        return numbers, OutputSchema(task=task, num_outputs=1, target=target, class_names=tuple(names))
    return numbers, OutputSchema(task=task, num_outputs=len(names), target=target, class_names=tuple(names))


def _check_two_classes(names: Sequence[int | str], target: str, positive: str | int | None) -> None:
    if len(names) > 2:
        shown = ", ".join(str(name) for name in names[:5])
        raise SpecError(
            f"data.target: '{target}' has {len(names)} classes ({shown}{', ...' if len(names) > 5 else ''}); "
            "binary needs exactly two; use training.task = 'classification'"
        )
    if positive is not None and str(positive) not in map(str, names):
        raise SpecError(f"training.positive: '{target}' has no class {positive!r}, only {names[0]!r} and {names[1]!r}")


def _encode_labels(table: pa.Table, target: str) -> tuple[NDArray[np.int8], OutputSchema]:
    rows = _given_labels(table, target)
    names = sorted({label for labels in rows for label in labels}, key=lambda label: (isinstance(label, str), label))
    if len(names) < 2:
        raise SpecError(f"data.target: '{target}' has {len(names)} labels in all; multilabel needs two")
    if bad := [name for name in names if name == "" or SEPARATOR in str(name)]:
        raise SpecError(f"data.target: '{target}' has the label {bad[0]!r}; use text without '{SEPARATOR}'")
    place = {name: number for number, name in enumerate(names)}
    encoded = np.zeros((len(rows), len(names)), np.int8)
    for row, labels in enumerate(rows):
        encoded[row, [place[label] for label in labels]] = 1
    return encoded, OutputSchema(task="multilabel", num_outputs=len(names), target=target, class_names=tuple(names))


def _given_labels(table: pa.Table, target: str) -> list[list[int | str]]:
    """The labels of each row, from lists, from text with a separator, or from 0 and 1 for each label by its number."""
    column = table.column(target)
    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType) or pa.types.is_fixed_size_list(kind):
        return _marked_labels(column_to_numpy(table, target), target)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        rows: list[Any] = column.to_pylist()
        if not all(_is_label(label) for labels in rows for label in labels):
            raise SpecError(f"data.target: '{target}' is {kind}; multilabel needs lists of text or of whole numbers")
        return rows
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SpecError(
            f"data.target: '{target}' is {kind}; multilabel needs lists, or text such as 'red{SEPARATOR}round'"
        )
    parts: list[list[str]] = pc.split_pattern(column, SEPARATOR).to_pylist()
    return [[label for part in row if (label := part.strip())] for row in parts]


def _marked_labels(marks: NDArray[Any], target: str) -> list[list[int | str]]:
    if marks.ndim != 2 or marks.dtype.kind not in "biuf" or not np.isin(marks, (0, 1)).all():
        raise SpecError(f"data.target: '{target}' is no table of 0 and 1; multilabel needs a mark for each label")
    return [[int(number) for number in np.flatnonzero(row)] for row in marks]


def _is_label(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _encode_tokens(values: NDArray[Any], target: str) -> tuple[NDArray[np.int64], OutputSchema]:
    """Tokens are numbers from 0; the model has an output for each up to the largest."""
    if values.ndim != 2 or values.dtype.kind not in "iu" or values.min(initial=0) < 0:
        raise SpecError(f"data.target: '{target}' holds no rows of tokens (whole numbers from 0), which language needs")
    num_tokens = int(values.max(initial=0)) + 1
    return values.astype(np.int64), OutputSchema(task="language", num_outputs=num_tokens, target=target)


def _first(is_bad: NDArray[np.bool_]) -> str:
    rows = np.flatnonzero(is_bad)
    return f", first in row {rows[0]} of {len(rows)} such rows"
