from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bigray.data.splitting import Split, fingerprint, row_hashes, split_rows
from bigray.specs import SplitSpec

SPEC = SplitSpec(validation=0.2, holdout=0.1)


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
