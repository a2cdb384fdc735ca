"""Which rows train, which validate, which stay sealed: decided by a hash of each row's content.

The split does not depend on the order of the rows, equal rows always land on the same side, and each class keeps its
share. Pure functions of arrays.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.data.features import column_to_numpy
from bigray.specs import SplitSpec

HashArray = NDArray[np.uint64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Row numbers of each part, ascending."""

    train: IndexArray
    validation: IndexArray
    holdout: IndexArray


def split_rows(hashes: HashArray, classes: NDArray[np.int64] | None, spec: SplitSpec) -> Split:
    """Cut each class (or all rows, where `classes` is None) by hash rank into holdout, validation and train."""
    ranks = _mix(hashes ^ _mix(np.uint64(spec.seed)))
    groups = np.zeros(len(hashes), dtype=np.int64) if classes is None else classes
    part = np.zeros(len(hashes), dtype=np.int8)  # 0 train, 1 validation, 2 holdout
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        part[rows] = _parts_of_group(ranks[rows], spec)
    train, validation, holdout = (np.flatnonzero(part == number) for number in range(3))
    return Split(train, validation, holdout)


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


def _parts_of_group(ranks: HashArray, spec: SplitSpec) -> NDArray[np.int8]:
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
    values = column_to_numpy(table, name)
    if values.dtype.kind in "biuf":
        # + 0.0 turns -0.0 into 0.0, which it is equal to
        return (values.reshape(len(values), -1).astype(np.float64) + 0.0).view(np.uint64)
    unique, inverse = np.unique(values.astype(str), return_inverse=True)
    hashes = np.array([_text_hash(text) for text in unique], dtype=np.uint64)
    return hashes[inverse].reshape(len(values), -1)


def _text_hash(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _mix(values: HashArray | np.uint64) -> HashArray:
    """The SplitMix64 finaliser (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))  # type: ignore[return-value]
