"""The rows that are not holdout, cut into k folds for cross-validation: each is validated on what the others trained.

A fold is a data set of its own: categories, fills, scaling and components are fitted on the other folds alone (driver).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.bundle import OutputSchema
from bigray.data import dataset as whole
from bigray.data.cleaning import fit_column, kept_rows, label_faults, missing_faults
from bigray.data.dataset import TrainingArrays
from bigray.data.features import FeatureSchema
from bigray.data.preprocessing import FloatArray, Preprocessing
from bigray.data.schema import Kind, infer_kinds
from bigray.data.splitting import HashArray, IndexArray, Split, group_hashes, k_fold_rows, row_hashes
from bigray.data.targets import Targets, encode_targets
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, DataSpec


@dataclass(frozen=True, eq=False)
class CleanRows:
    """All rows as `prepare_dataset` has them before it cuts them."""

    spec: DataSpec
    task: BuiltInTask
    table: pa.Table
    kinds: Mapping[str, Kind]
    """Of each input column."""
    tensor: NDArray[Any] | None = field(repr=False)
    """Codes (rows, *shape) of a tensor column; None for scalar columns, whose codes depend on what is fitted."""
    targets: Targets = field(repr=False)
    outputs: OutputSchema
    hashes: HashArray = field(repr=False)
    numbers: IndexArray = field(repr=False)
    """The number of each row in the source."""
    kept: IndexArray = field(repr=False)
    """Rows of the table that are not holdout, ascending."""

    def codes(self, inputs: FeatureSchema, rows: IndexArray) -> NDArray[Any]:
        """Codes of some rows of the table, (rows, *inputs.input_shape)."""
        if self.tensor is not None:
            return self.tensor[rows]
        return whole._encode(inputs, self.table.take(pa.array(rows)), self.numbers[rows])


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
        return TrainingArrays(
            x_train=self._inputs_of(self.train),
            y_train=self.rows.targets[self.train],
            x_val=self._inputs_of(self.validation),
            y_val=self.rows.targets[self.validation],
        )

    def _inputs_of(self, rows: IndexArray) -> FloatArray:
        return whole._in_parts(self.preprocessing.function(), self.rows.codes(self.inputs, rows))


def prepare_folds(spec: DataSpec, task: BuiltInTask, positive: str | int | None = None) -> tuple[Fold, ...]:
    """Read and clean as `prepare_dataset` does, cut, and fit each fold; none without `data.k_folds`.

    Raises:
        SpecError: with one line for each fault.
    """
    if spec.k_folds is None:
        return ()
    if task == "language":
        raise SpecError("data.k_folds: the windows of one text overlap, so they are no folds; leave it out")
    return fit_folds(read_clean(spec, task, positive), spec.k_folds)


def fit_folds(rows: CleanRows, num_folds: int) -> tuple[Fold, ...]:
    """Cut and fit.

    Raises:
        SpecError: there are too few rows for so many folds, or nothing to learn outside one of them.
    """
    fold_of = _fold_of_each(rows, num_folds)
    folds, faults = [], []
    for number in range(num_folds):
        try:
            folds.append(_fit_fold(rows, number, rows.kept[fold_of != number], rows.kept[fold_of == number]))
        except SpecError as error:
            faults += [f"data.k_folds: fold {number + 1} of {num_folds}: {fault}" for fault in error.faults]
    if faults:
        raise SpecError(faults)
    return tuple(folds)


def _fold_of_each(rows: CleanRows, num_folds: int) -> IndexArray:
    """For each of `rows.kept`; the seed is that of the split."""
    spec, kept = rows.spec, rows.kept
    classes = rows.targets[kept].astype(np.int64) if rows.task in ("classification", "binary") else None
    groups = None if spec.group is None else group_hashes(rows.table, spec.group)[kept]
    return k_fold_rows(rows.hashes[kept], classes, num_folds, spec.split.seed, groups)


def _fit_fold(rows: CleanRows, number: int, train: IndexArray, validation: IndexArray) -> Fold:
    if rows.task == "regression" and len(validation) < 2:
        raise SpecError("it has one row, and val_r2 needs at least two; use fewer folds")
    whole._check_targets(rows.targets, rows.outputs, Split(train, validation, _NONE), rows.numbers)
    table, spec = rows.table.take(pa.array(train)), rows.spec
    shape = () if rows.tensor is None else rows.tensor.shape[1:]
    columns = [fit_column(name, kind, shape, table.column(name), spec) for name, kind in rows.kinds.items()]
    inputs = FeatureSchema(columns=tuple(columns))
    preprocessing = whole._fit(spec, inputs, rows.codes(inputs, train))
    return Fold(number, train, validation, inputs, preprocessing, rows)


_NONE = np.zeros(0, np.int64)


def read_clean(spec: DataSpec, task: BuiltInTask, positive: str | int | None = None) -> CleanRows:
    """The rows of the source, checked and cleaned.

    Raises:
        SpecError: with one line for each fault.
    """
    table, num_given = whole._read(spec)
    features = spec.features or whole._default_features(table, spec)
    whole._refuse(whole._column_faults(table, spec, features))
    kinds = infer_kinds(table, features, spec)
    table = whole._plain_numbers(table, kinds)
    whole._refuse([*label_faults(table, spec.target), *missing_faults(table, kinds, spec)])
    numbers = kept_rows(table, kinds, spec)
    table, num_given = whole._kept(table, numbers, num_given)
    tensor, good, _ = whole._tensor(table, kinds, spec, numbers)
    table, num_given = whole._kept(table, good, num_given)
    targets, outputs = encode_targets(table, spec.target, task, positive)
    hashes = row_hashes(table.select([*features, spec.target]))
    classes = targets if task in ("classification", "binary") else None
    split = whole._split(table, hashes, classes, spec, num_given)
    return CleanRows(
        spec=spec,
        task=task,
        table=table,
        kinds=kinds,
        tensor=tensor,
        targets=targets,
        outputs=outputs,
        hashes=hashes,
        numbers=numbers[good],
        kept=np.sort(np.concatenate([split.train, split.validation])),
    )
