"""Batch prediction spread over a real Ray: rows in order, faults as faults of the data, and going on after a kill."""

import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from pyarrow import parquet

from bigray.bundle import ModelBundle
from bigray.data.features import Column
from bigray.data.sources import read_table, table_from_arrays
from bigray.errors import SpecError
from bigray.inference import Predictor
from bigray.prediction.predicting import Answering, predict_source, spread_over_ray
from bigray.prediction.rows import open_rows
from bigray.serve.sample import write_sample_bundle

pytestmark = pytest.mark.usefixtures("four_cpu_ray")

ROWS = 5000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    columns = (Column(name="image", shape=(8, 8)),)
    return write_sample_bundle(str(tmp_path_factory.mktemp("bundle")), columns=columns, params={"hidden": [16]})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tensor column, whose type Ray Data has a reading of its own for."""
    images = np.random.default_rng(0).normal(size=(ROWS, 8, 8)).astype(np.float32)
    path = str(tmp_path_factory.mktemp("data") / "rows.parquet")
    parquet.write_table(table_from_arrays({"image": images, "id": np.arange(ROWS)}), path, row_group_size=700)
    return path


def _check(answers: pa.Table, bundle: str, data: str) -> None:
    expected = Predictor(ModelBundle.load(bundle)).run_table(read_table(data))
    assert answers["label"].to_pylist() == expected.labels
    np.testing.assert_allclose(np.asarray(answers["probabilities"].to_pylist()), expected.probabilities, rtol=1e-4)


def test_rows_spread_over_actors_come_back_in_order(bundle: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "predictions.parquet")
    result = predict_source(bundle, data, out, batch_size=200)

    assert (result.rows, result.parts_done_before) == (ROWS, 0)
    _check(parquet.read_table(out), bundle, data)


def test_row_groups_are_read_where_they_are_answered(bundle: str, data: str) -> None:
    loaded = ModelBundle.load(bundle)
    rows = open_rows(data, loaded.manifest.inputs, large_bytes=0)
    answered = dict(spread_over_ray(Answering(loaded, rows), rows.parts))

    assert sorted(part.number for part in answered) == list(range(8))
    _check(pa.concat_tables([answered[part] for part in rows.parts]), bundle, data)


def test_what_is_left_of_an_interrupted_prediction_is_all_that_is_done(bundle: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "predictions.parquet")

    class Interrupted(Exception):
        """The driver went away."""

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        predict_source(bundle, data, out, on_part=interrupt)
    result = predict_source(bundle, data, out)

    assert result.parts_done_before == 3
    _check(parquet.read_table(out), bundle, data)


def test_an_actor_that_is_killed_costs_no_row(bundle: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "predictions.parquet")
    killed: list[int] = []

    def kill_an_actor(done: int, total: int) -> None:
        actors = [process for process in psutil.process_iter(["cmdline"]) if _is_an_answering_actor(process)]
        if done == 1 and actors:
            killed.append(actors[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    predict_source(bundle, data, out, on_part=kill_an_actor)

    print(f"\nkilled {len(killed)} actors")
    _check(parquet.read_table(out), bundle, data)


def _is_an_answering_actor(process: psutil.Process) -> bool:
    """Ray names an actor's process after its class; only this session's own children count."""
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    title = " ".join(process.info["cmdline"] or ())
    return process.pid in ours and title.startswith("ray::") and "MapBatches(PartActor)" in title


def test_a_bad_row_is_a_fault_of_the_data_and_not_of_ray(tmp_path: Path) -> None:
    columns = (Column(name="a"), Column(name="b"))
    bundle = write_sample_bundle(
        str(tmp_path), columns=columns, class_names=("x", "y"), params={"hidden": [4]}, onnx=False
    )
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n" + "1,2\n" * 700 + "1,\n" + "1,2\n" * 20)

    with pytest.raises(SpecError, match=r"\b700\b"):
        predict_source(bundle, str(path), str(tmp_path / "out.parquet"))
    assert ray.is_initialized()
