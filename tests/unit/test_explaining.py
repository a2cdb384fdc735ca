from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigray.data.features import Column
from bigray.errors import SpecError
from bigray.explaining import explain_file
from bigray.serve.sample import write_sample_bundle


@pytest.fixture(scope="module")
def table_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    columns = (Column(name="a"), Column(name="b"))
    root = str(tmp_path_factory.mktemp("table"))
    return write_sample_bundle(root, columns=columns, class_names=("x", "y"), params={"hidden": [4]}, onnx=False)


@pytest.fixture(scope="module")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    columns = (Column(name="image", shape=(8, 8)),)
    return write_sample_bundle(
        str(tmp_path_factory.mktemp("image")), columns=columns, params={"hidden": [4]}, onnx=False
    )


def test_rows_of_a_csv_and_the_same_as_json_are_explained_alike(table_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b,more\n1,2,x\n3.5,-1,y\n")
    (tmp_path / "rows.json").write_text(json.dumps([{"a": 1, "b": 2}, {"a": 3.5, "b": -1}]))
    of_csv, of_json = (explain_file(table_bundle, str(tmp_path / name)) for name in ("rows.csv", "rows.json"))

    assert of_csv.to_json() == of_json.to_json()
    assert [record["row"] for record in of_csv.to_json()["explanations"]] == [0, 1]
    one = explain_file(table_bundle, str(tmp_path / "rows.csv"), row=1)
    assert one.to_json()["explanations"][0]["attributions"] == pytest.approx(
        of_csv.to_json()["explanations"][1]["attributions"], rel=1e-3, abs=1e-4
    )
    assert one.picture().startswith(b"\x89PNG")


def test_a_picture_is_a_row(image_bundle: str, tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "picture.png")
    found = explain_file(image_bundle, str(tmp_path / "picture.png"))

    assert found.explanation.attributions.shape == (1, 8, 8)
    assert Image.open(io.BytesIO(found.picture())).size == (256, 256)


@pytest.mark.parametrize(
    ("name", "content", "row", "message"),
    [
        ("rows.csv", b"a,b\n1,2\n", 1, r"--row 1: .*rows\.csv has rows 0 to 0"),
        ("rows.csv", b"a,c\n1,2\n", None, r"rows\.csv: .*'b'"),
        ("rows.json", b'[{"a": 1}]', None, r"rows\.json: records\[0\]: missing 'b'"),
        (
            "rows.csv",
            b"a,b\n" + b"1,2\n" * 1001,
            None,
            r"rows\.csv: has 1,001 rows, more than 1,000; choose one by --row",
        ),
        ("none.csv", None, None, "no such file"),
        ("picture.png", b"not a picture", None, r"picture\.png: "),
    ],
)
def test_a_file_that_has_no_such_rows_is_told_in_one_line(
    table_bundle: str, tmp_path: Path, name: str, content: bytes | None, row: int | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(SpecError, match=message) as caught:
        explain_file(table_bundle, str(tmp_path / name), row=row)

    assert len(caught.value.faults) == 1
