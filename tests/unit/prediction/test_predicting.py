"""Batch prediction without Ray: the parts are answered in this process."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigray.bundle import ModelBundle
from bigray.data.features import Column
from bigray.data.sources import read_table, table_from_arrays
from bigray.errors import SpecError, StorageError
from bigray.inference import Predictor
from bigray.prediction.answers import METADATA, answer_schema, answer_table, read_lineage
from bigray.prediction.parts import Part
from bigray.prediction.predicting import Answering, PartActor, answer_here, predict_source
from bigray.prediction.rows import open_rows
from bigray.serve.sample import write_sample_bundle

ROWS = 1000
NAMES = {"classification": ("x", "y", "z"), "binary": (0, 1), "multilabel": ("red", "round"), "regression": ()}


def _bundle(root: Path, task: str = "classification", seed: int = 0) -> str:
    return write_sample_bundle(
        str(root),
        name=f"{task}-{seed}",
        columns=(Column(name="a"), Column(name="b")),
        class_names=NAMES[task],
        params={"hidden": [8]},
        onnx=False,
        seed=seed,
        task=task,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a column that the model does not read, and without its target."""
    generator = np.random.default_rng(0)
    path = str(tmp_path_factory.mktemp("data") / "rows.parquet")
    columns = {"id": np.arange(ROWS), "b": generator.normal(size=ROWS), "a": generator.normal(size=ROWS)}
    parquet.write_table(table_from_arrays(columns), path, row_group_size=150)
    return path


class Interrupted(Exception):
    """The driver went away."""


def _dying_after(parts_done: int):
    def answer(answering: Answering, parts: Sequence[Part]) -> Iterator[tuple[Part, pa.Table]]:
        for count, answered in enumerate(answer_here(answering, parts[::-1])):  # the last ones first: any order will do
            if count == parts_done:
                raise Interrupted
            yield answered

    return answer


def _check_answers(answers: pa.Table, bundle: str, data: str) -> None:
    expected = Predictor(ModelBundle.load(bundle)).run_table(read_table(data))
    assert answers["label"].to_pylist() == expected.labels
    np.testing.assert_allclose(np.asarray(answers["probabilities"].to_pylist()), expected.probabilities, rtol=1e-5)


def test_every_row_is_answered_in_order_and_the_file_says_by_what(bundle: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "predictions.parquet")
    seen: list[tuple[int, int]] = []
    on_part = lambda done, total: seen.append((done, total))  # noqa: E731
    result = predict_source(bundle, data, out, batch_size=100, spread=answer_here, on_part=on_part)
    answers = parquet.read_table(out)

    _check_answers(answers, bundle, data)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.parquet"]
    assert (result.rows, result.parts, result.parts_done_before) == (ROWS, 4, 0)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    loaded = ModelBundle.load(bundle)
    lineage = read_lineage(answers.schema)
    assert lineage == result.lineage
    assert (lineage["bundle_version"], lineage["run"]) == (loaded.version, loaded.manifest.origin.run)
    assert (lineage["trial"], lineage["source"], lineage["rows"]) == (loaded.manifest.origin.trial, data, ROWS)


def test_what_was_interrupted_goes_on_where_it_stopped(bundle: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "predictions.parquet")
    with pytest.raises(Interrupted):
        predict_source(bundle, data, out, spread=_dying_after(2))
    assert not Path(out).exists(), "a reader does not see a part of it"
    cut = sorted(Path(f"{out}.parts").glob("part-*"))[0]
    cut.write_bytes(cut.read_bytes()[:-20])

    result = predict_source(bundle, data, out, spread=answer_here)

    assert result.parts_done_before == 1, "of two, one was cut"
    _check_answers(parquet.read_table(out), bundle, data)
    Path(f"{out}.parts").mkdir()  # as where a process dies between joining them and removing them
    again = predict_source(bundle, data, out, spread=_dying_after(0))
    assert not Path(f"{out}.parts").exists()
    assert again.parts_done_before == again.parts == 4


def test_a_folder_keeps_its_parts(bundle: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "predictions"
    predict_source(bundle, data, str(out), spread=answer_here)

    files = sorted(out.glob("*.parquet"))
    assert len(files) == 4
    _check_answers(pa.concat_tables([parquet.read_table(file) for file in files]), bundle, data)
    assert predict_source(bundle, data, str(out), spread=_dying_after(0)).parts_done_before == 4


@pytest.mark.parametrize("out", ["predictions.parquet", "predictions"])
def test_other_rows_or_another_bundle_never_mix(bundle: str, data: str, tmp_path: Path, out: str) -> None:
    place = str(tmp_path / out)
    predict_source(bundle, data, place, spread=answer_here)
    other = str(tmp_path / "other.csv")
    Path(other).write_text("a,b\n1,2\n")

    with pytest.raises(SpecError, match="holds predictions of another bundle version"):
        predict_source(_bundle(tmp_path, seed=1), data, place, spread=answer_here)
    with pytest.raises(SpecError, match="holds predictions of another source fingerprint"):
        predict_source(bundle, other, place, spread=answer_here)


def test_nothing_else_is_written_over(bundle: str, data: str, tmp_path: Path) -> None:
    foreign = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"a": [1]}), foreign)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")

    with pytest.raises(SpecError, match=r"rows\.parquet is no file that `bigray predict` wrote"):
        predict_source(bundle, data, str(foreign), spread=answer_here)
    with pytest.raises(SpecError, match="there is something else here"):
        predict_source(bundle, data, str(tmp_path / "notes"), spread=answer_here)
    assert parquet.read_table(foreign).num_rows == 1


def test_large_parquet_is_read_by_row_groups_and_answered_alike(bundle: str, data: str) -> None:
    loaded = ModelBundle.load(bundle)
    rows = open_rows(data, loaded.manifest.inputs, large_bytes=0)
    assert [part.num_rows for part in rows.parts] == [150] * 6 + [100]
    assert rows.fingerprint == open_rows(data, loaded.manifest.inputs, large_bytes=0).fingerprint

    answered = dict(answer_here(Answering(loaded, copy.copy(rows), batch_size=64), rows.parts))

    _check_answers(pa.concat_tables([answered[part] for part in rows.parts]), bundle, data)


def test_a_table_stays_on_the_driver_when_its_reader_travels(bundle: str, data: str) -> None:
    rows = open_rows(data, ModelBundle.load(bundle).manifest.inputs)
    travelled = copy.copy(rows)  # goes by way of what would be sent

    part = rows.parts[1]
    assert travelled.unpack(part, rows.pack(part)) == read_table(data).select(["a", "b"]).slice(
        part.start, part.num_rows
    )
    with pytest.raises(AttributeError):
        travelled.pack(part)


def test_a_bad_row_is_named_by_its_number_in_the_whole_source(bundle: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n" + "1,2\n" * 700 + "1,\n" + "1,2\n" * 20)
    loaded = ModelBundle.load(bundle)
    rows = open_rows(str(path), loaded.manifest.inputs)

    with pytest.raises(SpecError, match=r"\b700\b"):
        predict_source(bundle, str(path), str(tmp_path / "out.parquet"), spread=answer_here)

    actor = PartActor(Answering(loaded, rows), rows.parts)
    packed = pa.array([rows.pack(part) for part in rows.parts], pa.large_binary())
    returned = actor(pa.table({"part": range(len(rows.parts)), "packed": packed}))
    assert [bool(error) for error in returned["error"].to_pylist()] == [False, False, True]
    assert "700" in returned["error"][2].as_py()


@pytest.mark.parametrize(("content", "message"), [("a,c\n1,2\n", "has no column 'b'"), ("a,b\n", "holds no rows")])
def test_rows_that_do_not_suit_the_model_are_told_before_anything_is_written(
    bundle: str, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "rows.csv").write_text(content)

    with pytest.raises(SpecError, match=message):
        predict_source(bundle, str(tmp_path / "rows.csv"), str(tmp_path / "out" / "p.parquet"), spread=answer_here)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_not_there_is_told(data: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no bundle here"):
        predict_source(str(tmp_path), data, str(tmp_path / "p.parquet"), spread=answer_here)


@pytest.mark.parametrize(
    ("task", "types"),
    [
        ("classification", {"label": pa.string(), "probabilities": pa.list_(pa.float32())}),
        ("binary", {"label": pa.int64(), "probabilities": pa.list_(pa.float32())}),
        ("multilabel", {"label": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32())}),
        ("regression", {"value": pa.float32()}),
    ],
)
def test_each_task_has_its_columns(tmp_path: Path, task: str, types: dict[str, pa.DataType]) -> None:
    loaded = ModelBundle.load(_bundle(tmp_path, task))
    rows = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    predictions = Predictor(loaded).run(rows)
    table = answer_table(predictions, loaded.manifest.outputs)

    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == types
    assert table.schema == answer_schema(loaded.manifest.outputs)
    assert table.num_rows == 7
    name = "value" if task == "regression" else "label"
    expected = predictions.values.tolist() if predictions.values is not None else predictions.labels
    assert table[name].to_pylist() == expected


def test_a_file_of_another_tool_has_no_lineage() -> None:
    assert read_lineage(pa.schema([])) is None
    assert read_lineage(pa.schema([], metadata={METADATA: b"not json"})) is None


def test_parts_that_something_else_made_are_done_again(bundle: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "predictions"
    predict_source(bundle, data, str(out), spread=answer_here)
    first, *_ = sorted(out.glob("*.parquet"))
    table = parquet.read_table(first)
    parquet.write_table(table.replace_schema_metadata({METADATA: b'{"bundle_version": "another"}'}), first)

    result = predict_source(bundle, data, str(out), spread=answer_here)

    assert result.parts_done_before == 3, "its number of rows alone is no proof"
    _check_answers(pa.concat_tables([parquet.read_table(file) for file in sorted(out.glob("*.parquet"))]), bundle, data)


def test_a_folder_beside_the_file_that_is_no_ones_parts_is_left_alone(bundle: str, data: str, tmp_path: Path) -> None:
    mine = tmp_path / "p.parquet.parts" / "part-000000.parquet"
    mine.parent.mkdir()
    parquet.write_table(pa.table({"a": range(256)}), mine)

    with pytest.raises(SpecError, match="there is something else here"):
        predict_source(bundle, data, str(tmp_path / "p.parquet"), spread=answer_here)
    assert mine.exists()


@pytest.mark.parametrize("out", ["p.parquet", "p"])
def test_a_process_that_died_in_its_first_write_is_no_obstacle(
    bundle: str, data: str, tmp_path: Path, out: str
) -> None:
    parts = tmp_path / (f"{out}.parts" if out.endswith(".parquet") else out)
    parts.mkdir()
    (parts / "._predictions.json.123.tmp").write_text("{")

    assert predict_source(bundle, data, str(tmp_path / out), spread=answer_here).rows == ROWS


def test_a_place_that_cannot_be_written_in_the_end_is_one_line(bundle: str, data: str, tmp_path: Path) -> None:
    (tmp_path / ".p.parquet.tmp").mkdir()

    with pytest.raises(StorageError, match=r"--out: .*p\.parquet: cannot be written: "):
        predict_source(bundle, data, str(tmp_path / "p.parquet"), spread=answer_here)


def test_a_large_file_that_was_written_again_is_of_other_rows(bundle: str, tmp_path: Path) -> None:
    """Sizes and statistics of the columns are the same ones: only the rows between the ends have changed."""
    inputs, path = ModelBundle.load(bundle).manifest.inputs, tmp_path / "rows.parquet"
    (tmp_path / "_SUCCESS").touch()
    found = []
    for a in ([0.0, 1.0, 2.0, 9.0], [0.0, 2.0, 1.0, 9.0]):
        parquet.write_table(pa.table({"a": a, "b": a}), path, use_dictionary=False, compression="none")
        found.append(open_rows(str(tmp_path), inputs, large_bytes=0))

    assert all(len(rows.parts) == 1 and type(rows).__name__ == "ParquetRows" for rows in found)
    assert found[0].fingerprint != found[1].fingerprint
