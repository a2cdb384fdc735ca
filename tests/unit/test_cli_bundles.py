"""The commands for a finished bundle, as a user types them; none of them starts Ray here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet

from bigray import cli
from bigray.data.features import Column
from bigray.serve.sample import write_sample_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    columns = (Column(name="a"), Column(name="b"))
    root = str(tmp_path_factory.mktemp("bundle"))
    return write_sample_bundle(root, columns=columns, class_names=("x", "y", "z"), params={"hidden": [16]}, onnx=False)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3.5,-1\n")
    return str(tmp_path / "rows.csv")


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.app(arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return int(ended.value.code or 0), printed.err


def _shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    cli.app(arguments, standalone_mode=False)
    printed = capsys.readouterr()
    return printed.out, printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --int8, --prune SHARE and --low-rank SHARE"),
        (("--int8", "--prune", "0.5"), "give one of --int8, --prune SHARE and --low-rank SHARE"),
        (("--low-rank", "1"), "--low-rank: use a share between 0 and 1, got 1"),
        (("--prune", "0.5", "--max-drop", "-1"), "--max-drop: use a number from 0, got -1"),
        (("--prune", "0.5", "--epochs", "2"), "--epochs: is for --fine-tune JOB"),
        (("--prune", "0.5", "--set", "training.lr=0.1"), "--set: is for --fine-tune JOB"),
        (("--prune", "0.5", "--fine-tune", "no.toml"), "no.toml: no such file"),
        (
            ("--int8", "--fine-tune", "examples/digits/job.toml"),
            "--fine-tune: is for --prune SHARE, whose zeros it keeps; leave it out with --int8",
        ),
        (
            ("--prune", "0.5", "--fine-tune", "examples/linear/job.toml"),
            "--fine-tune: the bundle is of model 'mlp', which the job does not have; known: linear",
        ),
    ],
)
def test_what_a_compression_cannot_be_is_one_line_and_exit_2(
    bundle: str, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert _refused(capsys, "compress", bundle, *options) == (2, f"error: {message}\n")


def test_a_compression_that_costs_too_much_is_exit_6(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.compression.change.export_onnx", lambda module, rows: (None, "not asked for"))
    code, err = _refused(capsys, "compress", bundle, "--prune", "0.99", "--max-drop", "0")

    assert code == 6
    assert "nothing was written" in err


def test_a_compression_is_a_table_or_a_document(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.compression.change.export_onnx", lambda module, rows: (None, "not asked for"))
    command = ("compress", bundle, "--prune", "0.1", "--max-drop", "1", "--out", str(tmp_path / "small"))
    out, _ = _shown(capsys, *command)
    assert "accuracy, 200 rows" in out
    assert f"bundle: {tmp_path / 'small'}" in out

    document = json.loads(_shown(capsys, *command, "--json")[0])
    assert document["score"]["metric"] == "accuracy"
    assert set(document["latency_ms"]) == {"1", "64"}


def test_explanations_are_tables_a_document_and_a_picture(
    bundle: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = _shown(capsys, "explain", bundle, rows)
    assert out.startswith("row 0: ")
    assert "row 1: " in out
    document = json.loads(_shown(capsys, "explain", bundle, rows, "--row", "1", "--json")[0])
    assert [set(record["attributions"]) for record in document["explanations"]] == [{"a", "b"}]

    picture = tmp_path / "why.png"
    _, err = _shown(capsys, "explain", bundle, rows, "--row", "1", "--out", str(picture))
    assert err == f"wrote {picture}\n"
    assert Image.open(picture).format == "PNG"
    code, err = _refused(capsys, "explain", bundle, rows, "--out", str(picture))
    assert (code, err) == (2, f"error: --out: {rows} has 2 rows; choose one by --row\n")


def test_a_bundle_predicts_into_a_file_without_an_endpoint(
    bundle: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "predictions.parquet")
    out, _ = _shown(capsys, "predict", bundle, rows, "--out", place, "--here")
    assert out.splitlines()[0] == "2 rows in 1 parts"
    assert parquet.read_table(place).num_rows == 2

    document = json.loads(_shown(capsys, "predict", bundle, rows, "--out", place, "--here", "--json")[0])
    assert (document["parts_done_before"], document["lineage"]["rows"]) == (1, 2)


def test_a_bundle_without_a_place_for_its_predictions_is_told(
    bundle: str, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = _refused(capsys, "predict", bundle, rows)

    assert code == 2
    assert err.startswith(f"error: --out: say where the predictions of {bundle} go")


def test_an_endpoint_with_a_place_for_predictions_is_told(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = _refused(capsys, "predict", "http://127.0.0.1:8000", rows, "--out", str(tmp_path / "out.parquet"))

    assert code == 2
    assert err.startswith("error: --out: is for a bundle, and http://127.0.0.1:8000 is an endpoint")


def test_a_picture_that_cannot_be_written_is_one_line(
    bundle: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = _refused(capsys, "explain", bundle, rows, "--row", "1", "--out", str(tmp_path))

    assert (code, err) == (4, f"error: --out: {tmp_path}: cannot be written: Is a directory\n")
