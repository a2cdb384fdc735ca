"""The rows that are not holdout, cut into k folds for cross-validation: each is validated on what the others trained.

A fold is a data set of its own: categories, fills, scaling and components are fitted on the other folds alone (driver).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from bigray.data.dataset import CleanRows, Dataset, TrainingArrays, dataset_of, prepare_dataset, read_clean
from bigray.data.features import FeatureSchema
from bigray.data.fitting import apply_in_parts, check_targets, fit_inputs
from bigray.data.preprocessing import Preprocessing
from bigray.data.splitting import IndexArray, Split, group_hashes, k_fold_rows
from bigray.data.streaming import to_stream
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, DataSpec


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold, fitted. Its arrays are made when they are asked for: k of them at once would fill the memory."""

    number: int
    """From 0."""
    train: IndexArray = field(repr=False)
    """Rows of the clean table."""
    validation: IndexArray = field(repr=False)
    inputs: FeatureSchema
    preprocessing: Preprocessing
    rows: CleanRows = field(repr=False)

    @property
    def model_input_shape(self) -> tuple[int, ...]:
        """Shape of one row as a model sees it. A category that no other fold has makes it another than theirs."""
        return self.preprocessing.output_shape(self.inputs.input_shape)

    @property
    def nbytes(self) -> int:
        """What the object store of a node holds of its arrays."""
        target_bytes = self.rows.targets.nbytes // len(self.rows.targets)
        num_rows = len(self.train) + len(self.validation)
        return num_rows * (4 * math.prod(self.model_input_shape) + target_bytes)

    def arrays(self) -> TrainingArrays:
        """Model inputs and targets, as `Dataset.arrays` has them of the usual split."""
        codes, targets, apply = self.rows.codes(self.inputs), self.rows.targets, self.preprocessing.function()
        return TrainingArrays(
            x_train=apply_in_parts(apply, codes[self.train]),
            y_train=targets[self.train],
            x_val=apply_in_parts(apply, codes[self.validation]),
            y_val=targets[self.validation],
        )


def prepare_with_folds(
    spec: DataSpec, task: BuiltInTask, positive: str | int | None = None
) -> tuple[Dataset, tuple[Fold, ...]]:
    """The usual split as `prepare_dataset` makes it and, with `data.k_folds`, the folds of the same rows, read once.

    Raises:
        SpecError: with one line for each fault.
    """
    if spec.k_folds is None:
        return prepare_dataset(spec, task, positive), ()
    if task == "language":
        raise SpecError("data.k_folds: the windows of one text overlap, so they are no folds; leave it out")
    to_stream(spec, task)  # says no where the rows do not fit in memory, which folds need
    rows = read_clean(spec, task, positive)
    return dataset_of(rows), fit_folds(rows, spec.k_folds)


def fit_folds(rows: CleanRows, num_folds: int) -> tuple[Fold, ...]:
    """Cut and fit.

    Raises:
        SpecError: there are too few rows for so many folds, or nothing to learn outside one of them.
    """
    kept = np.sort(np.concatenate([rows.split.train, rows.split.validation]))
    fold_of = _fold_of_each(rows, kept, num_folds)
    folds, faults = [], []
    for number in range(num_folds):
        try:
            folds.append(_fit_fold(rows, number, kept[fold_of != number], kept[fold_of == number]))
        except SpecError as error:
            faults += [f"data.k_folds: fold {number + 1} of {num_folds}: {fault}" for fault in error.faults]
    if faults:
        raise SpecError(faults)
    return tuple(folds)


def _fold_of_each(rows: CleanRows, kept: IndexArray, num_folds: int) -> IndexArray:
    """For each of the `kept` rows; the seed is that of the split."""
    spec = rows.spec
    classes = rows.targets[kept].astype(np.int64) if rows.outputs.task in ("classification", "binary") else None
    groups = None if spec.group is None else group_hashes(rows.table, spec.group)[kept]
    return k_fold_rows(rows.hashes[kept], classes, num_folds, spec.split.seed, groups)


def _fit_fold(rows: CleanRows, number: int, train: IndexArray, validation: IndexArray) -> Fold:
    if rows.outputs.task == "regression" and len(validation) < 2:
        raise SpecError("it has one row, and val_r2 needs at least two; use fewer folds")
    check_targets(rows.targets, rows.outputs, Split(train, validation, _NONE), rows.numbers, rows.num_given)
    inputs = rows.schema(train)
    preprocessing = fit_inputs(rows.spec, inputs, rows.codes(inputs)[train])
    return Fold(number, train, validation, inputs, preprocessing, rows)


_NONE = np.zeros(0, np.int64)
