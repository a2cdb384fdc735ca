from __future__ import annotations

from pathlib import Path

import pytest

from bigray.data.sources import read_table
from bigray.errors import SpecError


def _read(folder: Path, content: str | bytes) -> dict[str, list[object]]:
    (folder / "rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(str(folder / "rows.csv")).to_pydict()


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    assert _read(tmp_path, b"\xef\xbb\xbfa,b\n1,x\n") == {"a": [1], "b": ["x"]}


def test_a_quoted_value_may_hold_line_breaks_and_commas(tmp_path: Path) -> None:
    assert _read(tmp_path, 'a,b\n1,"x,\ny ""z"""\n2,w\n') == {"a": [1, 2], "b": ['x,\ny "z"', "w"]}


def test_an_empty_cell_is_missing_and_a_text_of_two_letters_is_not(tmp_path: Path) -> None:
    found = _read(tmp_path, "age,country\n31,NA\n,\nNA,DE\n")

    assert found == {"age": [31, None, None], "country": ["NA", None, "DE"]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n3\n", "line 3 has 1 values, the header has 2"),
        ("a,b\n1,2\n3,4,5\n", "line 3 has 3 values, the header has 2"),
        ('a,b\n1,"x\ny"\n\n2\n', "line 5 has 1 values, the header has 2"),
        (b"\xef\xbb\xbfa,b\n1\n", "line 2 has 1 values, the header has 2"),
        ('a,b\n1,x\n2,"y\n3,z\n', "line 3 opens a quote that nothing closes"),
        (b"a,b\n1,x\n2,\xfc\n", "line 3 is not UTF-8"),
        ("a,b\n1,x\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a;b\n1;2\n", "its values are parted by semicolons; save it with commas"),
        ("a,b,a\n1,2,3\n", "2 columns are named 'a'"),
        (",a\n0,1\n", "column 1 has no name"),
        ("a,b\n", "holds no rows"),
        ("\n\n", "cannot be read"),
    ],
)
def test_a_fault_is_told_by_file_and_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        _read(tmp_path, content)

    assert str(caught.value).startswith(f"'{tmp_path}/rows.csv': {expected}")
    assert "\n" not in str(caught.value)


def test_a_type_that_shows_only_late_is_that_of_the_whole_column(tmp_path: Path) -> None:
    # pyarrow reads a megabyte at a time
    found = _read(tmp_path, "a,b\n" + "1,2\n" * 300_000 + "1.5,x\n")

    assert (found["a"][0], found["a"][-1], found["b"][0], found["b"][-1]) == (1.0, 1.5, "2", "x")
