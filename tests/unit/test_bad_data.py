"""Data that cannot be trained on, as a user meets it: `bigray train` ends with one line and exit code 2, no run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from bigray import cli

JOB = """
name = "job"
storage = "{folder}/runs"
[data]
target = "label"
split = {{ validation = 0.2, holdout = 0.2 }}
[models.linear]
factory = "bigray.models:linear"
[training]
task = "classification"
global_batch_size = 4
"""
ROWS = 40
RAN: list[Any] = []
"""What reading a file has unpickled."""

Refused = Callable[..., str]


class Trusting(pa.ExtensionType):
    """Unpickles whatever stands beside its name, as some types that are registered do."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "test.trusting-too")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps("anything")

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Trusting:
        RAN.append(pickle.loads(serialized))
        return cls()


@pytest.fixture
def trusting() -> Iterator[Trusting]:
    pa.register_extension_type(Trusting())
    yield Trusting()
    pa.unregister_extension_type("test.trusting-too")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `bigray train` with these settings; the line it ends with."""
    (tmp_path / "job.toml").write_text(JOB.format(folder=tmp_path))

    def run(*settings: str) -> str:
        overrides = [part for setting in settings for part in ("--set", setting)]
        with pytest.raises(SystemExit) as ended:
            cli.app(("train", str(tmp_path / "job.toml"), *overrides))
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert (ended.value.code, printed.out) == (2, "")
        assert line.startswith("error: ")
        assert not list((tmp_path / "runs").glob("*")), "a run was begun"
        return line

    return run


def _table(**columns: Any) -> pa.Table:
    return pa.table({"a": np.arange(ROWS, dtype=np.float64), "label": np.arange(ROWS) % 2, **columns})


def _parquet(folder: Path, **columns: Any) -> Path:
    parquet.write_table(_table(**columns), folder / "rows.parquet")
    return folder / "rows.parquet"


def _text(folder: Path, content: str | bytes, name: str = "rows.csv") -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def _cut(folder: Path) -> Path:
    path = _parquet(folder)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def _objects(folder: Path) -> Path:
    np.savez(folder / "rows.npz", a=np.array([{}] * ROWS, dtype=object), label=np.arange(ROWS) % 2)
    return folder / "rows.npz"


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def _pictures(folder: Path, count: int) -> Path:
    files = [_png(value) for value in range(200)]
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(count // 2):
            (folder / "images" / name / f"{number:05d}.png").write_bytes(files[number % len(files)])
    return folder / "images"


def _link(folder: Path) -> Path:
    images = _pictures(folder, ROWS)
    (folder / "secret.png").write_bytes(_png(0))
    (images / "cat" / "secret.png").symlink_to(folder / "secret.png")
    return images


NAN_LABELS = [float("nan") if row == 7 else float(row) for row in range(ROWS)]
Case = tuple[Callable[[Path], Path], str]
CASES: dict[str, Case] = {
    "an empty file": (lambda folder: _text(folder, ""), "rows.csv': is empty"),
    "a cut Parquet file": (_cut, "rows.parquet': cannot be read: "),
    "a ragged CSV file": (lambda folder: _text(folder, "a,label\n1,0\n2\n"), "rows.csv': line 3 has 1 values"),
    "a CSV file in UTF-16": (lambda folder: _text(folder, "a,label\n1,0\n".encode("utf-16")), "is UTF-16; save it as"),
    "objects in NPZ": (_objects, "rows.npz': array 'a' holds Python objects"),
    "labels that are NaN": (
        lambda folder: _parquet(folder, label=NAN_LABELS),
        "data.target: column 'label' has 1 empty values (in row 7)",
    ),
    "one label": (lambda folder: _parquet(folder, label=["cat"] * ROWS), "data.target: 'label' "),
    "a link out of the folder": (_link, "cat/secret.png': a link that leads out of the folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_data_that_cannot_be_trained_on_is_one_line_and_exit_2(tmp_path: Path, refused: Refused, case: str) -> None:
    write, expected = CASES[case]

    assert expected in refused(f"data.source={write(tmp_path)}")


def test_no_code_in_a_parquet_file_is_run(tmp_path: Path, refused: Refused, trusting: Trusting) -> None:
    path = _parquet(tmp_path, a=pa.ExtensionArray.from_storage(trusting, pa.array(range(ROWS))))
    RAN.clear()
    line = refused(f"data.source={path}")

    assert "rows.parquet': " in line
    assert "column 'a' is of the extension type 'test.trusting-too'" in line
    assert not RAN
    parquet.read_table(path)
    assert RAN, "pyarrow by itself runs it, else nothing is tested here"


def test_one_broken_image_in_a_folder_of_ten_thousand_is_named_and_can_be_skipped(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    images = _pictures(tmp_path, 10_000)
    (images / "dog" / "01234.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    source = f"data.source={images}"
    broken = "row 6234 (dog/01234.png): not a PNG or JPEG that can be read"

    assert broken in refused(source)
    settings = [part for one in (source, "data.bad_images=skip") for part in ("--set", one)]
    cli.app(("data", str(tmp_path / "job.toml"), *settings), standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "9,999 rows" in shown
    assert broken in shown


def test_a_class_that_only_the_holdout_has_is_told_with_its_file_and_rows(tmp_path: Path, refused: Refused) -> None:
    train, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    parquet.write_table(_table(), train)
    parquet.write_table(_table(a=np.arange(ROWS) + 100.0, label=[2] * 2 + [0] * (ROWS - 2)), test)
    line = refused(f"data.train={train}", f"data.test={test}")

    assert "'2' of 'label' is in no training row, only in rows 0, 1 of data.test" in line


def test_fewer_rows_than_workers_are_refused(tmp_path: Path, refused: Refused) -> None:
    line = refused(f"data.source={_parquet(tmp_path)}", "scaling.num_workers=200")

    assert "scaling.num_workers: 200 workers, but only " in line
    assert "training rows" in line


def test_a_byte_order_mark_is_no_part_of_a_columns_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.toml").write_text(JOB.format(folder=tmp_path))
    rows = "".join(f"{row % 2},{row}\n" for row in range(ROWS))
    path = _text(tmp_path, b"\xef\xbb\xbf" + f"label,a\n{rows}".encode())
    cli.app(("data", str(tmp_path / "job.toml"), "--set", f"data.source={path}"), standalone_mode=False)

    assert "data of job: 40 rows" in " ".join(capsys.readouterr().out.split())
