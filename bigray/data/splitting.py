"""Which rows train, which validate, which stay sealed: decided by a hash of each row's content.

The split does not depend on the order of the rows, equal rows always land on the same side, and each class keeps its
share. Where rows form groups, a group is never parted; equal rows of two groups then may be. Pure functions of arrays.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bigray.data.features import column_to_numpy
from bigray.errors import SpecError, did_you_mean
from bigray.specs import SplitSpec

HashArray = NDArray[np.uint64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Row numbers of each part, ascending."""

    train: IndexArray
    validation: IndexArray
    holdout: IndexArray


@dataclass(frozen=True)
class _Units:
    """What is never parted: rows that are equal, or that are of one group."""

    of_row: IndexArray
    """The unit of each row."""
    ranks: HashArray
    classes: NDArray[np.int64]
    """The commonest class among the rows of each; all 0 where rows have no classes."""
    sizes: NDArray[np.int64]
    """Rows."""


def split_rows(
    hashes: HashArray, classes: NDArray[np.int64] | None, spec: SplitSpec, groups: HashArray | None = None
) -> Split:
    """Cut each class (or all rows, where `classes` is None) by hash rank into holdout, validation and train.

    With `groups`, as `group_hashes` gives them, whole groups are dealt out, each as its commonest class; the shares are
    kept as nearly as the sizes of the groups allow.
    """
    if groups is not None:
        units = _units(groups, classes, spec.seed)
        part = _parts_of_units(units, spec)[units.of_row]
    else:
        ranks = _ranks(hashes, spec.seed)
        strata = np.zeros(len(hashes), dtype=np.int64) if classes is None else classes
        part = np.zeros(len(hashes), dtype=np.int8)  # 0 train, 1 validation, 2 holdout
        for stratum in np.unique(strata):
            rows = np.flatnonzero(strata == stratum)
            part[rows] = _parts_of_stratum(ranks[rows], spec)
    train, validation, holdout = (np.flatnonzero(part == number) for number in range(3))
    return Split(train, validation, holdout)


def k_fold_rows(
    hashes: HashArray,
    classes: NDArray[np.int64] | None,
    num_folds: int,
    seed: int = 0,
    groups: HashArray | None = None,
) -> NDArray[np.int64]:
    """The fold of each row, 0 to `num_folds` - 1: every row is validated on once.

    As in a split, equal rows (or those of one group) are in one fold, each class is spread evenly, and the order of the
    rows does not matter.

    Raises:
        SpecError: there are fewer different rows, or groups, than folds.
    """
    units = _units(hashes if groups is None else groups, classes, seed)
    if not 2 <= num_folds <= len(units.sizes):
        kind = "rows that differ" if groups is None else "groups"
        raise SpecError(f"data.k_folds: {num_folds} folds of {len(units.sizes)} {kind}; use 2 to {len(units.sizes)}")
    if groups is None:
        folds = np.empty(len(units.sizes), dtype=np.int64)
        folds[np.lexsort((units.ranks, units.classes))] = np.arange(len(folds)) % num_folds
    else:
        folds = _level_folds(units, num_folds)
    return folds[units.of_row]


def group_hashes(table: pa.Table, name: str) -> HashArray:
    """A 64-bit hash of the value of one column in each row, for `split_rows`.

    Raises:
        SpecError: a row has no group.
    """
    if name not in table.column_names:
        raise SpecError(f"data.group: no column '{name}'{did_you_mean(name, table.column_names)}")
    column = table.column(name)
    row = pc.index(pc.is_null(column, nan_is_null=pa.types.is_floating(column.type)), True).as_py()
    if row >= 0:
        raise SpecError(f"data.group: '{name}' is empty in row {row}; give each row a group, or drop it in the source")
    return row_hashes(table.select([name]))


def row_hashes(table: pa.Table) -> HashArray:
    """A 64-bit hash of each row over all its columns, by name; vectorised over rows."""
    total = np.zeros(table.num_rows, dtype=np.uint64)
    for name in sorted(table.column_names):
        bits = _column_bits(table, name)
        column_hash = np.full(table.num_rows, _text_hash(name), dtype=np.uint64)
        for axis in range(bits.shape[1]):
            column_hash = _mix(column_hash ^ bits[:, axis])
        total += column_hash
    return _mix(total)


def fingerprint(table: pa.Table, hashes: HashArray) -> str:
    """SHA-256 over the column names and the rows in order, 16 hex digits: changes when any value or the order does."""
    content = hashlib.sha256(repr(sorted(table.column_names)).encode())
    content.update(hashes.tobytes())
    return content.hexdigest()[:16]


def _ranks(hashes: HashArray, seed: int) -> HashArray:
    return _mix(hashes ^ _mix(np.uint64(seed)))


def _units(hashes: HashArray, classes: NDArray[np.int64] | None, seed: int) -> _Units:
    unique, of_row, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    commonest = np.zeros(len(unique), dtype=np.int64)
    if classes is not None:
        pairs, counts = np.unique(np.stack([of_row, classes], axis=1), axis=0, return_counts=True)
        # the last one written of a unit stays: the largest count and, among equals, the lowest class
        order = np.lexsort((-pairs[:, 1], counts))
        commonest[pairs[order, 0]] = pairs[order, 1]
    return _Units(of_row, _ranks(unique, seed), commonest, sizes)


def _parts_of_units(units: _Units, spec: SplitSpec) -> NDArray[np.int8]:
    """The part of each unit. What one class has too many rows of in a part, the next has fewer of: a class of two
    groups has no share to be rounded."""
    parts = np.zeros(len(units.sizes), dtype=np.int8)
    owed_holdout = owed_both = 0.0
    for stratum in np.unique(units.classes):
        members = np.flatnonzero(units.classes == stratum)
        members = members[np.argsort(units.ranks[members])]
        rows = np.concatenate([[0], np.cumsum(units.sizes[members])])
        owed_holdout += spec.holdout * float(rows[-1])
        owed_both += (spec.holdout + spec.validation) * float(rows[-1])
        first = int(np.argmin(np.abs(rows - owed_holdout)))
        second = max(first, int(np.argmin(np.abs(rows - owed_both))))
        parts[members[:second]] = 1
        parts[members[:first]] = 2
        owed_holdout -= float(rows[first])
        owed_both -= float(rows[second])
    return parts


def _level_folds(units: _Units, num_folds: int) -> NDArray[np.int64]:
    """The largest unit first, each to the fold with the fewest rows of its class, then with the fewest rows."""
    folds = np.empty(len(units.sizes), dtype=np.int64)
    filled = np.zeros(num_folds, dtype=np.int64)
    of_class = {int(stratum): np.zeros(num_folds, dtype=np.int64) for stratum in np.unique(units.classes)}
    for unit in np.lexsort((units.ranks, -units.sizes)):
        mine = of_class[int(units.classes[unit])]
        fold = int(np.lexsort((filled, mine))[0])
        folds[unit] = fold
        mine[fold] += units.sizes[unit]
        filled[fold] += units.sizes[unit]
    return folds


def _parts_of_stratum(ranks: HashArray, spec: SplitSpec) -> NDArray[np.int8]:
    ordered = np.sort(ranks)
    num_holdout = round(spec.holdout * len(ranks))
    num_validation = round(spec.validation * len(ranks))
    part = np.zeros(len(ranks), dtype=np.int8)
    # thresholds rather than positions, so that equal rows (equal hashes) are never parted
    if num_holdout + num_validation > 0:
        part[ranks <= ordered[num_holdout + num_validation - 1]] = 1
    if num_holdout > 0:
        part[ranks <= ordered[num_holdout - 1]] = 2
    return part


def _column_bits(table: pa.Table, name: str) -> HashArray:
    """Values as 64-bit patterns, (rows, values per row). Numbers go through float64, so 1 and 1.0 hash alike."""
    kind = table.schema.field(name).type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _bytes_hashes(table.column(name)).reshape(-1, 1)
    values = _texts_of_lists(table, name) if _is_ragged(table, name) else column_to_numpy(table, name)
    if values.dtype.kind in "biuf":
        # + 0.0 turns -0.0 into 0.0, which it is equal to
        return (values.reshape(len(values), -1).astype(np.float64) + 0.0).view(np.uint64)
    if values.dtype.kind == "O":  # an array of text is as wide as its longest, so many times as large
        known: dict[str, np.uint64] = {}
        texts = map(str, values.reshape(-1))
        each = (known.get(text) or known.setdefault(text, _text_hash(text)) for text in texts)
        return np.fromiter(each, dtype=np.uint64, count=values.size).reshape(len(values), -1)
    unique, inverse = np.unique(values.astype(str), return_inverse=True)
    hashes = np.array([_text_hash(text) for text in unique], dtype=np.uint64)
    return hashes[inverse].reshape(len(values), -1)


def _is_ragged(table: pa.Table, name: str) -> bool:
    """Whether rows hold lists of different lengths, as labels of which a row has any number."""
    column = table.column(name)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return False
    return len(pc.list_value_length(column).unique()) > 1


def _texts_of_lists(table: pa.Table, name: str) -> NDArray[Any]:
    return np.array([repr(values) for values in table.column(name).to_pylist()])


def _bytes_hashes(column: pa.ChunkedArray) -> HashArray:
    """By chunks, and without a copy: images may be more than one array of Arrow holds."""
    buffers = (value.as_buffer() or b"" for chunk in column.chunks for value in chunk)
    return np.fromiter((_bytes_hash(buffer) for buffer in buffers), dtype=np.uint64, count=len(column))


def _bytes_hash(content: pa.Buffer | bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))


def _text_hash(text: str) -> np.uint64:
    return _bytes_hash(text.encode())


def _mix(values: HashArray | np.uint64) -> HashArray:
    """The SplitMix64 finaliser (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))  # type: ignore[return-value]
