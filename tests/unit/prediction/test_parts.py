from __future__ import annotations

import pytest

from bigray.errors import SpecError
from bigray.prediction.parts import FEWEST_ROWS, MOST_ROWS, Part, check_same, cut, parts_of, remaining


@pytest.mark.parametrize("num_rows", [0, 1, FEWEST_ROWS, FEWEST_ROWS + 1, 5_000, 100_000, 1_000_003])
def test_parts_hold_every_row_once_in_order(num_rows: int) -> None:
    parts = cut(num_rows)

    assert all(part.start == (parts[part.number - 1].stop if part.number else 0) for part in parts)
    assert sum(part.num_rows for part in parts) == num_rows
    assert all(0 < part.num_rows <= MOST_ROWS for part in parts)
    assert [part.file for part in parts] == sorted(part.file for part in parts)


def test_a_row_group_without_rows_is_no_part() -> None:
    assert parts_of([3, 0, 2]) == (Part(0, 0, 3), Part(1, 3, 5))


def test_what_is_missing_or_was_cut_is_done_again() -> None:
    parts = parts_of([3, 3, 2])

    assert remaining(parts, {}) == parts
    assert remaining(parts, {parts[0].file: 3, parts[1].file: 2, "notes.parquet": 3}) == parts[1:]
    assert remaining(parts, {part.file: part.num_rows for part in parts}) == ()


def test_another_bundle_does_not_go_on_with_the_parts_of_one() -> None:
    record = {"bundle_version": "aaa", "rows": 5, "bigray": "0.1"}
    check_same(record, {"bundle_version": "aaa", "rows": 5}, "out")

    with pytest.raises(SpecError, match=r"--out: out holds predictions of another bundle version \(aaa, now bbb\)"):
        check_same(record, {"bundle_version": "bbb", "rows": 5}, "out")
