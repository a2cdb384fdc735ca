from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from bigray.data.sources import given_split, is_image, read_split, read_table
from bigray.errors import SpecError


def _png(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 3), value, np.uint8)).save(stream, kind)
    return stream.getvalue()


def _tree(root: Path, *names: str) -> str:
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(value, "PNG" if name.lower().endswith("png") else "JPEG"))
    return str(root)


def test_a_folder_a_class_becomes_images_labels_and_paths(tmp_path: Path) -> None:
    root = _tree(tmp_path, "dog/1.jpg", "cat/b.PNG", "cat/a.jpeg")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "cat/.DS_Store").write_text("")

    table = read_table(root)

    assert table.column("label").to_pylist() == ["cat", "cat", "dog"]
    assert table.column("path").to_pylist() == ["cat/a.jpeg", "cat/b.PNG", "dog/1.jpg"]
    assert table.column("image").to_pylist()[1] == (tmp_path / "cat/b.PNG").read_bytes()
    assert is_image(table.schema.field("image"))
    assert not is_image(table.schema.field("label"))


def test_images_without_class_folders_have_no_label(tmp_path: Path) -> None:
    root = _tree(tmp_path, "b.png", "a.png")

    assert read_table(root).column("path").to_pylist() == ["a.png", "b.png"]
    assert read_table(root).column_names == ["image", "path"]
    assert read_table(f"{root}/a.png").num_rows == 1
    assert read_table(f"file://{root}").column("path").to_pylist() == ["a.png", "b.png"]


def test_a_tree_with_train_and_test_is_a_split_that_is_given(tmp_path: Path) -> None:
    root = _tree(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/dog/3.png")

    assert given_split(root) == (f"{root}/train", f"{root}/test")
    train, test = read_split(*(given_split(root) or ("", "")))
    assert train.column("path").to_pylist() == ["cat/1.png", "dog/2.png"]
    assert test.column("label").to_pylist() == ["dog"]
    assert is_image(train.schema.field("image"))
    assert is_image(test.schema.field("image"))
    assert read_table(root).column("label").to_pylist() == ["dog", "cat", "dog"]


def test_other_sources_give_no_split(tmp_path: Path) -> None:
    root = _tree(tmp_path, "train/1.png", "test/1.png", "extra/1.png")

    assert [given_split(source) for source in (root, f"{root}/train", f"{root}/*", "package.module:load")] == [None] * 4


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cat/1.png", "2.png"), "2.png': expected every picture at folder/class/name.png"),
        (("cat/1.png", "cat/small/2.png"), "cat/small/2.png': expected every picture at"),
        (("cat/1.png", "dog/2.webp"), "dog/2.webp': pictures are read as PNG or JPEG; convert it"),
        (("cat/1.png", "labels.csv"), "holds files of several kinds (.csv, pictures)"),
    ],
)
def test_a_tree_of_another_form_is_told_by_its_file(tmp_path: Path, names: tuple[str, ...], expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_table(_tree(tmp_path, *names))

    assert expected in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("link", ["cat/2.png", "dog"], ids=["a file", "a folder"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path, scheme: str, link: str) -> None:
    _tree(tmp_path / "elsewhere", "secret.png")
    root = _tree(tmp_path / "images", "cat/1.png")
    target = tmp_path / "elsewhere" / ("secret.png" if link.endswith("png") else "")
    (tmp_path / "images" / link).symlink_to(target)

    with pytest.raises(SpecError, match=rf"{link}.*: a link that leads out of the folder"):
        read_table(f"{scheme}{root}")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_links_within_the_folder_and_to_it_are_followed(tmp_path: Path, scheme: str) -> None:
    root = tmp_path / "images"
    _tree(root, "cat/1.png")
    (root / "cat/2.png").symlink_to(root / "cat/1.png")
    (root / "again").symlink_to(root)
    (root / "round").symlink_to(root / "round")
    (tmp_path / "link").symlink_to(root)

    assert read_table(f"{scheme}{tmp_path}/link").column("path").to_pylist() == ["cat/1.png", "cat/2.png"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, _png(1)]),
        pa.array([None, _png(1, "JPEG")], pa.large_binary()),
        pa.array([None, {"bytes": _png(1), "path": "1.png"}]),
        pa.array([b"broken", _png(1)]),
        pa.array([{"path": None, "bytes": None}, {"path": None, "bytes": _png(1)}]),
    ],
    ids=["bytes", "large", "hugging face", "broken first", "other order"],
)
def test_image_files_in_a_column_are_known_by_their_first_bytes(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"photo": column, "label": [0, 1], "raw": [b"a", b"b"]})
    parquet.write_table(table, tmp_path / "rows.parquet")

    table = read_table(str(tmp_path / "rows.parquet"))

    assert [is_image(field) for field in table.schema] == [True, False, False]
    first, second = table.column("photo").to_pylist()
    assert first in (None, b"broken")
    assert Image.open(io.BytesIO(second)).size == (3, 2)


def test_a_given_split_takes_the_order_of_the_first_and_types_that_hold_both(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("x,label\n1,a\n2,b\n")
    (tmp_path / "test.csv").write_text("label,x\na,0.5\n")

    train, test = read_split(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))

    assert train.schema.equals(test.schema)
    assert train.to_pydict() == {"x": [1.0, 2.0], "label": ["a", "b"]}
    assert test.to_pydict() == {"x": [0.5], "label": ["a"]}


def test_a_given_split_with_other_columns_is_told_by_each_of_them(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("x,y,label\n1,2,a\n")
    (tmp_path / "test.csv").write_text("x,z\nmany,2\n")

    with pytest.raises(SpecError) as caught:
        read_split(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))

    place = f"data.test: '{tmp_path}/test.csv':"
    assert caught.value.faults == (
        f"{place} column 'y' is missing, which data.train has",
        f"{place} column 'label' is missing, which data.train has",
        f"{place} column 'z' is not in data.train",
        f"{place} column 'x' is string, in data.train int64",
    )


def test_a_given_split_names_the_part_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("x\n1\n")

    with pytest.raises(SpecError, match=r"data\.test: '.*test\.csv': no such file"):
        read_split(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))
