"""`bigray data` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bigray import cli

ROOT = Path(__file__).parents[2]
JOB = """
name = "shop"
storage = "{folder}/runs"
[data]
source = "{source}"
target = "left"
[models.linear]
factory = "bigray.models:linear"
[training]
task = "{task}"
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    rows = [f"{n if n % 9 else ''},{n / 7:.3f},{'ab'[n % 2]},{'no' if n % 3 else 'yes'}" for n in range(90)]
    (tmp_path / "rows.csv").write_text("\n".join(["visits,weight,plan,left", *rows, rows[1]]) + "\n")
    return _write(tmp_path, tmp_path / "rows.csv", "binary")


def _write(folder: Path, source: Path, task: str) -> str:
    (folder / "job.toml").write_text(JOB.format(folder=folder, source=source, task=task))
    return str(folder / "job.toml")


def _shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.app(("data", *arguments), standalone_mode=False)
    return capsys.readouterr().out


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.app(("data", *arguments))
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    return printed.err


def test_a_table_is_shown_with_its_columns_classes_and_oddities(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [" ".join(line.split()) for line in _shown(capsys, job).splitlines()]

    assert lines[0].startswith("data of shop: 91 rows: ")
    assert "visits number int64 10 80 1 to 89, mean 44.46 0" in lines
    assert "plan category string 0 2 b (46), a (45) 0" in lines
    assert "rows 1 duplicates, 0 contradictions, leaks: none" in lines
    assert sum(line.startswith('example 0 {"visits": ') for line in lines) == 1
    assert lines[-2].startswith("warning: column 'visits' has 10 empty values, which training refuses")
    assert lines[-1] == "warning: 1 rows are there more than once"


def test_a_script_gets_one_document(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(_shown(capsys, job, "--json", "--set", "data.missing=mean"))

    assert (document["job"], document["task"], sum(document["rows"].values())) == ("shop", "binary", 91)
    assert [column["missing"] for column in document["columns"]] == [10, 0, 0]
    assert document["warnings"] == ["1 rows are there more than once"]


def test_a_text_is_shown_by_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("to be or not " * 300)
    shown = _shown(capsys, _write(tmp_path, tmp_path / "a.txt", "language"))

    assert 'vocabulary 7: " benort"' in shown
    assert "a token is a character" in shown
    assert 'begins "to be or not to be' in shown


def test_pictures_are_written_as_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(24):
        (tmp_path / f"pictures/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 10, 0, 0)).save(tmp_path / f"pictures/{number % 2}/{number}.png")
    file = _write(tmp_path, tmp_path / "pictures", "classification")
    shown = _shown(capsys, file, "--sheet", str(tmp_path / "sheet.png"), "--set", "data.target=label")

    assert "image image binary 0 - 3x8x8 0" in [" ".join(line.split()) for line in shown.splitlines()]
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


def test_what_cannot_be_shown_is_one_line_and_exit_2(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(capsys, job, "--sheet", "nowhere/a.png") == "error: --sheet: nowhere: no such folder\n"
    assert "--sheet: is for images" in _refused(capsys, job, "--sheet", f"{Path(job).parent}/a.png")
    assert not (Path(job).parent / "a.png").exists()
    assert "data.target: no column 'leaf', did you mean 'left'" in _refused(capsys, job, "--set", "data.target=leaf")


def test_data_is_shown_without_ray_and_torch(job: str) -> None:
    code = f"""
import sys
from bigray import cli
cli.app(("data", {job!r}), standalone_mode=False)
assert not {{"torch", "ray", "onnxruntime"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
