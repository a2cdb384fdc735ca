from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bigray.data.splitting import Split, fingerprint, group_hashes, k_fold_rows, row_hashes, split_rows
from bigray.errors import SpecError
from bigray.specs import SplitSpec

SPEC = SplitSpec(validation=0.2, holdout=0.1)
KNOWN_HASHES = [10571973677434978658, 10473275853727369624]


def _table(num_rows: int = 500, seed: int = 0) -> pa.Table:
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "x": generator.normal(size=num_rows),
            "name": [f"row {number}" for number in range(num_rows)],
            "label": generator.choice(3, size=num_rows, p=[0.6, 0.3, 0.1]),
        }
    )


def _split(table: pa.Table, spec: SplitSpec = SPEC) -> Split:
    return split_rows(row_hashes(table), table.column("label").to_numpy(), spec)


def _names(table: pa.Table, split: Split) -> list[set[str]]:
    names = np.array(table.column("name").to_pylist())
    return [set(names[rows]) for rows in (split.train, split.validation, split.holdout)]


def test_the_parts_are_disjoint_and_complete() -> None:
    split = _split(_table())

    everything = np.concatenate([split.train, split.validation, split.holdout])
    assert sorted(everything) == list(range(500))
    assert all(np.all(np.diff(part) > 0) for part in (split.train, split.validation, split.holdout))


def test_the_split_does_not_depend_on_the_order_of_the_rows() -> None:
    table = _table()
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(table.num_rows)))

    assert _names(shuffled, _split(shuffled)) == _names(table, _split(table))


def test_the_split_does_not_depend_on_the_order_of_the_columns() -> None:
    table = _table()

    assert _names(table, _split(table.select(["label", "x", "name"]))) == _names(table, _split(table))


def test_equal_rows_never_land_on_two_sides_of_the_split() -> None:
    generator = np.random.default_rng(2)
    values = generator.integers(0, 12, size=400)
    table = pa.table({"x": values, "label": values % 2})
    split = _split(table)

    sides = [set(values[rows]) for rows in (split.train, split.validation, split.holdout)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def test_zero_and_minus_zero_are_the_same_value() -> None:
    hashes = row_hashes(pa.table({"x": [0.0, -0.0]}))

    assert hashes[0] == hashes[1]


def test_every_class_keeps_its_share_in_every_part() -> None:
    table = _table(2000)
    classes = table.column("label").to_numpy()
    split = _split(table)

    for label in range(3):
        total = int((classes == label).sum())
        assert abs(int((classes[split.holdout] == label).sum()) - 0.1 * total) <= 0.5
        assert abs(int((classes[split.validation] == label).sum()) - 0.2 * total) <= 0.5


def test_without_classes_the_parts_have_the_asked_sizes() -> None:
    split = split_rows(row_hashes(_table(1000)), None, SPEC)

    assert (split.train.size, split.validation.size, split.holdout.size) == (700, 200, 100)


def test_a_part_of_share_zero_is_empty() -> None:
    split = _split(_table(), SplitSpec(validation=0.2, holdout=0.0))

    assert split.holdout.size == 0
    assert split.validation.size > 0


def test_another_split_seed_gives_another_split() -> None:
    table = _table()
    other = _split(table, SplitSpec(validation=0.2, holdout=0.1, seed=1))

    assert len(_names(table, other)[2] & _names(table, _split(table))[2]) < 20


def test_adding_rows_moves_few_of_the_old_ones() -> None:
    table = _table(1000)
    fewer = table.slice(0, 950)
    old, new = _names(fewer, _split(fewer)), _names(table, _split(table))

    moved = sum(len(before - after) for before, after in zip(old, new, strict=True))
    assert moved < 30


def test_numbers_hash_by_value_and_not_by_type() -> None:
    as_int, as_float = pa.table({"x": [1, 2]}), pa.table({"x": [1.0, 2.0]})

    assert row_hashes(as_int).tolist() == row_hashes(as_float).tolist()


def test_a_value_under_another_name_is_another_row() -> None:
    one, other = pa.table({"a": [1.0], "b": [2.0]}), pa.table({"a": [2.0], "b": [1.0]})

    assert row_hashes(one)[0] != row_hashes(other)[0]


def test_the_place_of_a_value_inside_a_tensor_counts() -> None:
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[[1.0, 2.0]], [[2.0, 1.0]]]))
    hashes = row_hashes(pa.table({"image": images}))

    assert hashes[0] != hashes[1]


def _fingerprint(table: pa.Table) -> str:
    return fingerprint(table, row_hashes(table))


def _with_one_value_changed(table: pa.Table) -> pa.Table:
    x = table.column("x").to_numpy().copy()
    x[7] = np.nextafter(x[7], np.inf)
    return table.set_column(0, "x", pa.array(x))


@pytest.mark.parametrize(
    "change",
    [
        _with_one_value_changed,
        lambda table: table.take(pa.array([1, 0, *range(2, table.num_rows)])),
        lambda table: table.rename_columns(["y", "name", "label"]),
        lambda table: table.slice(1),
    ],
    ids=["a value", "the order of two rows", "a name", "a row less"],
)
def test_the_fingerprint_changes_with(change: object) -> None:
    assert callable(change)
    assert _fingerprint(change(_table())) != _fingerprint(_table())


def test_the_fingerprint_of_the_same_rows_is_the_same() -> None:
    chunked = pa.concat_tables([_table().slice(0, 100), _table().slice(100)])

    assert _fingerprint(chunked) == _fingerprint(_table())


def _patients(num_patients: int = 120, seed: int = 3) -> pa.Table:
    """Scans of patients, one to nine each, nearly all of a patient with the same finding."""
    generator = np.random.default_rng(seed)
    patient = np.repeat(np.arange(num_patients), generator.integers(1, 10, num_patients))
    finding = np.where(generator.random(len(patient)) < 0.05, 1, (patient % 5 == 0).astype(np.int64))
    return pa.table({"scan": np.arange(len(patient)), "patient": [f"p{n}" for n in patient], "finding": finding})


def _split_by_patient(table: pa.Table, spec: SplitSpec = SPEC) -> Split:
    classes, groups = table.column("finding").to_numpy(), group_hashes(table, "patient")
    return split_rows(row_hashes(table), classes, spec, groups)


def _of(table: pa.Table, name: str, rows: np.ndarray) -> set[object]:
    return set(table.column(name).take(pa.array(rows)).to_pylist())


def test_a_group_is_on_one_side_of_the_split() -> None:
    table = _patients()
    split = _split_by_patient(table)

    sides = [_of(table, "patient", rows) for rows in (split.train, split.validation, split.holdout)]
    assert all(sides)
    assert sum(map(len, sides)) == 120
    assert sum(map(len, (split.train, split.validation, split.holdout))) == table.num_rows


def test_groups_keep_the_shares_of_rows_and_of_classes_as_nearly_as_they_can() -> None:
    table = _patients(1000)
    split, finding = _split_by_patient(table), table.column("finding").to_numpy()

    for rows, share in ((split.holdout, 0.1), (split.validation, 0.2)):
        assert abs(len(rows) / table.num_rows - share) < 0.01
        assert abs(finding[rows].mean() - finding.mean()) < 0.03


def test_the_split_of_groups_does_not_depend_on_the_order_of_the_rows() -> None:
    table = _patients()
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(table.num_rows)))
    one, other = _split_by_patient(table), _split_by_patient(shuffled)

    assert _of(table, "scan", one.holdout) == _of(shuffled, "scan", other.holdout)
    assert _of(table, "scan", one.validation) == _of(shuffled, "scan", other.validation)
    assert _of(table, "scan", one.holdout) != _of(
        table, "scan", _split_by_patient(table, SPEC.model_copy(update={"seed": 1})).holdout
    )


def test_classes_of_two_groups_each_leave_rows_to_validate_on() -> None:
    # a fifth of two is rounded to none, so that class by class no group would ever be held out
    classes, groups = np.repeat(np.arange(10), 6), np.repeat(np.arange(20, dtype=np.uint64), 3)

    split = split_rows(np.arange(60, dtype=np.uint64), classes, SPEC, groups)

    assert (split.train.size, split.validation.size, split.holdout.size) == (42, 12, 6)


@pytest.mark.parametrize("values", [["a", None], [1, None], [1.0, float("nan")]])
def test_a_row_without_a_group_is_told(values: list[object]) -> None:
    with pytest.raises(SpecError, match=r"data\.group: 'patient' is empty in row 1"):
        group_hashes(pa.table({"patient": values}), "patient")
    with pytest.raises(SpecError, match=r"data\.group: no column 'patint', did you mean 'patient'"):
        group_hashes(pa.table({"patient": values}), "patint")


def test_each_row_is_in_one_fold_and_each_class_is_spread_evenly() -> None:
    table = _table(1003)
    classes = table.column("label").to_numpy()
    folds = k_fold_rows(row_hashes(table), classes, 5)

    counts = np.array([[int(((folds == fold) & (classes == label)).sum()) for label in range(3)] for fold in range(5)])
    assert counts.sum() == 1003
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert np.ptp(counts, axis=0).max() <= 1


def test_equal_rows_are_in_one_fold() -> None:
    values = np.random.default_rng(2).integers(0, 40, size=400)
    folds = k_fold_rows(row_hashes(pa.table({"x": values})), None, 4)

    assert set(folds) == {0, 1, 2, 3}
    assert all(len(set(folds[values == value])) == 1 for value in range(40))


def test_folds_of_groups_keep_each_together_and_differ_little_in_size() -> None:
    table = _patients(1000)
    finding, groups = table.column("finding").to_numpy(), group_hashes(table, "patient")
    folds = k_fold_rows(row_hashes(table), finding, 5, groups=groups)

    assert all(len(set(folds[groups == group])) == 1 for group in np.unique(groups))
    assert np.ptp(np.bincount(folds)) < 0.02 * table.num_rows
    assert all(abs(finding[folds == fold].mean() - finding.mean()) < 0.03 for fold in range(5))


def test_folds_do_not_depend_on_the_order_of_the_rows_but_on_the_seed() -> None:
    table = _table()
    hashes, classes = row_hashes(table), table.column("label").to_numpy()
    order = np.random.default_rng(1).permutation(table.num_rows)
    folds = k_fold_rows(hashes, classes, 5)

    np.testing.assert_array_equal(k_fold_rows(hashes[order], classes[order], 5), folds[order])
    assert (k_fold_rows(hashes, classes, 5, seed=1) != folds).mean() > 0.5


@pytest.mark.parametrize("num_folds", [1, 4])
def test_more_folds_than_groups_are_refused(num_folds: int) -> None:
    with pytest.raises(SpecError, match=rf"data\.k_folds: {num_folds} folds of 3 groups; use 2 to 3"):
        k_fold_rows(np.arange(9, dtype=np.uint64), None, num_folds, groups=np.arange(9, dtype=np.uint64) % 3)


def test_image_files_are_hashed_by_their_bytes_in_all_chunks() -> None:
    chunked = pa.table({"image": pa.chunked_array([[b"\x00", None], [b"\x00", b"\xff" * 3]])})
    hashes = row_hashes(chunked)

    assert hashes[0] == hashes[2]
    assert len(set(hashes.tolist())) == 3
    assert row_hashes(pa.table({"image": chunked.column(0).cast(pa.large_binary())})).tolist() == hashes.tolist()


def test_the_hash_of_a_row_stays_what_it_was() -> None:
    # else a resumed run would train on what its first attempt validated on
    table = pa.table({"x": [1.5, -2.0], "name": ["a", "ü" * 9], "day": pa.array([1, 2], pa.date32())})

    assert row_hashes(table).tolist() == KNOWN_HASHES
