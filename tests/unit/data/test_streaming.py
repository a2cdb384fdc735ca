"""Rows that are streamed from Parquet to the disk, against the same rows prepared in memory."""

from __future__ import annotations

import gc
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from bigray.bundle import pack_holdout
from bigray.data.dataset import Dataset, prepare_dataset
from bigray.data.folds import prepare_with_folds
from bigray.data.row_file import RowFile
from bigray.data.streaming import decision, to_stream
from bigray.errors import SpecError
from bigray.host_memory import HostMemory
from bigray.specs import BuiltInTask, DataSpec, JobSpec, TrialSpec
from bigray.training.loop import TrialTraining, Worker
from tests.loop_hooks import RecordingHooks

NUM_ROWS = 3000
SMALL_GB = 1e-6


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some dozens of batches, so that what spans batches is seen; rows go to the test's own folder."""
    monkeypatch.setattr(decision, "MOST_BATCH_ROWS", 97)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def numbers(num_columns: int = 6) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    values = generator.normal(50.0, 20.0, (NUM_ROWS, num_columns)).astype(np.float32)
    values[NUM_ROWS // 2 :][::7] = values[: NUM_ROWS // 2][::7]  # equal rows stay on one side
    columns = {f"x{number}": values[:, number] for number in range(num_columns)}
    return {**columns, "label": [("no", "yes", "perhaps")[int(value) % 3] for value in values[:, 0]]}


def mixed() -> dict[str, Any]:
    generator = np.random.default_rng(1)
    rows = range(NUM_ROWS)
    return {
        "size": pa.array(
            [None if row % 50 == 3 else float(value) for row, value in enumerate(generator.normal(size=NUM_ROWS))]
        ),
        "count": pa.array([row % 17 for row in rows], pa.int32()),
        "flag": pa.array([row % 3 == 0 for row in rows]),
        "colour": pa.array([None if row % 31 == 5 else ("red", "blue", "green")[row % 3] for row in rows]),
        "rare": pa.array(["only" if row == 2999 else ("a", "b")[row % 2] for row in rows]),
        "born": pa.array([f"20{row % 20 + 10}-0{row % 9 + 1}-11" for row in rows]),
        "patient": pa.array([row // 4 for row in rows]),
        "label": pa.array([float(value) for value in generator.normal(size=NUM_ROWS)]),
    }


def pictures() -> dict[str, Any]:
    generator = np.random.default_rng(2)

    def png() -> bytes:
        sink = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (5, 4, 3), np.uint8)).save(sink, "PNG")
        return sink.getvalue()

    return {"picture": [png() for _ in range(300)], "label": [row % 4 for row in range(300)]}


def tensors() -> dict[str, Any]:
    values = np.random.default_rng(3).normal(size=(NUM_ROWS, 2, 3, 4)).astype(np.float32)
    return {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(values), "label": [row % 2 for row in range(NUM_ROWS)]}


def write(folder: Path, rows: dict[str, Any], **spec: Any) -> DataSpec:
    """In two files, of several row groups."""
    table, cut = pa.table(rows), len(rows["label"]) // 3
    for name, part in (("a", table.slice(0, cut)), ("b", table.slice(cut))):
        (folder / "rows").mkdir(exist_ok=True)
        parquet.write_table(part, folder / "rows" / f"{name}.parquet", row_group_size=250)
    return DataSpec.model_validate({"source": str(folder / "rows"), "target": "label", **spec})


def both(spec: DataSpec, task: BuiltInTask = "classification", positive: str | None = None) -> tuple[Dataset, Dataset]:
    in_memory = prepare_dataset(spec, task, positive)
    streamed = prepare_dataset(spec.model_copy(update={"memory_gb": SMALL_GB}), task, positive)
    assert isinstance(streamed.arrays.x_train, RowFile)
    assert not isinstance(in_memory.arrays.x_train, RowFile)
    return in_memory, streamed


def assert_same(in_memory: Dataset, streamed: Dataset, tolerance: float = 0.0) -> None:
    ours, theirs = streamed.arrays, in_memory.arrays
    for mine, other in ((ours.x_train, theirs.x_train), (ours.x_val, theirs.x_val)):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine[:], other, rtol=tolerance, atol=tolerance)
    for targets, expected in ((ours.y_train, theirs.y_train), (ours.y_val, theirs.y_val)):
        assert targets.dtype == expected.dtype
        np.testing.assert_array_equal(targets, expected)
    assert streamed.fingerprint == in_memory.fingerprint
    assert streamed.inputs == in_memory.inputs
    assert streamed.outputs == in_memory.outputs
    assert streamed.example == in_memory.example
    assert streamed.ranges == in_memory.ranges
    assert streamed.num_rows == in_memory.num_rows
    np.testing.assert_array_equal(streamed.golden_rows, in_memory.golden_rows)
    assert streamed.holdout.to_pylist() == in_memory.holdout.to_pylist()
    assert streamed.holdout.schema.equals(in_memory.holdout.schema)
    if not tolerance:
        assert streamed.preprocessing == in_memory.preprocessing


@pytest.mark.parametrize("settings", [{}, {"normalize": "minmax"}, {"normalize": "standard"}, {"features": ["x2"]}])
def test_numbers_are_prepared_to_the_same_bits_as_in_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_same(*both(write(tmp_path, numbers(), **settings)))


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"missing": "drop", "normalize": "minmax"}, 0.0),
        ({"missing": "mean", "missing_indicator": True, "normalize": "minmax"}, 1e-6),
        ({"missing": "mean", "categories": "embedding", "normalize": "standard", "group": "patient"}, 1e-6),
        ({"missing": "constant", "missing_value": "2001-01-01", "features": ["colour", "born"]}, 0.0),
    ],
)
def test_columns_of_all_kinds_are_prepared_as_in_memory(
    tmp_path: Path, settings: dict[str, Any], tolerance: float
) -> None:
    assert_same(*both(write(tmp_path, mixed(), **settings), "regression"), tolerance)


@pytest.mark.parametrize("settings", [{}, {"normalize": "standard"}, {"image_size": [3, 3], "image_channels": 1}])
def test_pictures_are_decoded_batch_by_batch_to_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_same(*both(write(tmp_path, pictures(), **settings)))


def test_tensors_are_scaled_by_channel_as_in_memory(tmp_path: Path) -> None:
    assert_same(*both(write(tmp_path, tensors(), normalize="standard"), "binary"), 1e-6)


def test_a_given_holdout_stays_one_and_categories_are_those_of_training_rows(tmp_path: Path) -> None:
    table = pa.table(mixed())
    parquet.write_table(table.slice(0, 2000), tmp_path / "train.parquet", row_group_size=300)
    parquet.write_table(table.slice(2000), tmp_path / "test.parquet")
    columns = {"rare": {"unknown_category": "ignore"}}
    given = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.parquet"), "target": "colour"}
    features = ["count", "rare"]
    spec = DataSpec.model_validate({**given, "features": features, "columns": columns})
    with pytest.raises(SpecError, match=r"column 'colour' has 97 empty values \(in rows 5, 36, 67, 98, 129 and 92"):
        prepare_dataset(spec.model_copy(update={"memory_gb": SMALL_GB}), "classification")
    in_memory, streamed = both(spec.model_copy(update={"target": "flag"}))
    assert_same(in_memory, streamed)
    assert streamed.inputs.columns[1].categories == ("a", "b")
    assert streamed.num_rows["holdout"] == 1000


def test_the_sealed_sample_is_the_one_that_a_bundle_takes_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigray.bundle.HOLDOUT_ROWS", 50)
    monkeypatch.setattr("bigray.data.streaming.preparing.HOLDOUT_ROWS", 50)
    in_memory, streamed = both(write(tmp_path, numbers()))
    assert streamed.holdout.num_rows == 50
    assert streamed.num_rows == in_memory.num_rows
    sealed = [pa.ipc.open_file(pack_holdout(one.holdout)).read_all().to_pylist() for one in (in_memory, streamed)]
    assert sealed[0] == sealed[1]


@pytest.mark.parametrize(
    ("columns", "settings", "line"),
    [
        ("numbers", {"normalize": "robust"}, r"data.normalize: 'robust' needs all rows in memory, about .* use 'stan"),
        (
            "numbers",
            {"pca": 2},
            r"data.pca: needs all rows in memory, about \d+ kB; leave it out, or raise data.memory_",
        ),
        (
            "mixed",
            {"missing": "median"},
            r"data.missing: 'median' of column 'size' needs all rows .* use 'mean'",
        ),
        ("pictures", {"bad_images": "skip"}, "data.bad_images: 'skip' needs all rows"),
        ("mixed", {}, r"column 'size' has 60 empty values \(in rows 3, 53, 103, 153, 203 and 55 more\); fill them"),
        ("broken number", {}, "column 'x1' holds NaN or infinite values, first in row 1711 of 1 such rows"),
        ("broken picture", {}, "column 'picture': row 211: not a PNG or JPEG"),
        ("one class", {}, "'label' has a single class"),
    ],
)
def test_what_cannot_be_streamed_or_learnt_from_is_one_line_and_leaves_no_file(
    tmp_path: Path, columns: str, settings: dict[str, Any], line: str
) -> None:
    made = {"numbers": numbers, "mixed": mixed, "pictures": pictures}.get(columns, numbers)()
    if columns == "broken number":
        made["x1"] = np.where(np.arange(NUM_ROWS) == 1711, np.inf, made["x1"])
    if columns == "broken picture":
        made = pictures()
        made["picture"][211] = b"\x89PNG\r\n\x1a\n"
    if columns == "one class":
        made["label"] = ["yes"] * NUM_ROWS
    task: BuiltInTask = "regression" if columns == "mixed" else "classification"
    with pytest.raises(SpecError, match=line):
        prepare_dataset(write(tmp_path, made, memory_gb=SMALL_GB, **settings), task)
    gc.collect()
    assert not list(tmp_path.glob("bigray-rows-*/*"))


def test_folds_are_refused_where_rows_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"data\.k_folds: needs all rows in memory"):
        prepare_with_folds(write(tmp_path, numbers(), memory_gb=SMALL_GB, k_folds=3), "classification")


def test_by_default_only_what_is_larger_than_the_free_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write(tmp_path, numbers(), normalize="robust")
    source = to_stream(spec.model_copy(update={"normalize": "none", "memory_gb": SMALL_GB}), "classification")
    assert source is not None
    monkeypatch.setattr(decision, "host_memory", lambda: HostMemory(10**12, source.needed_bytes))
    assert to_stream(spec, "classification") is None
    assert to_stream(spec.model_copy(update={"normalize": "none"}), "classification") is not None
    monkeypatch.setattr(decision, "host_memory", lambda: HostMemory(10**12, source.needed_bytes - 1))
    with pytest.raises(SpecError, match="robust"):
        to_stream(spec, "classification")


def test_the_limit_does_not_decide_which_run_it_is(tmp_path: Path) -> None:
    document = {
        "name": "j",
        "data": {"source": "rows.parquet", "target": "label"},
        "models": {"m": {"factory": "bigray.models:linear"}},
        "training": {"task": "regression", "epochs": 1, "global_batch_size": 2, "lr": 0.1},
    }
    job = JobSpec.model_validate(document)
    limited = JobSpec.model_validate({**document, "data": {**document["data"], "memory_gb": 1.0}})  # type: ignore[dict-item]
    assert job.fixed_by() == limited.fixed_by()


def test_files_take_no_room_in_the_object_store_travel_without_their_owner_and_go_with_the_data_set(
    tmp_path: Path,
) -> None:
    _, streamed = both(write(tmp_path, numbers()))
    arrays = streamed.arrays
    assert arrays.nbytes == arrays.y_train.nbytes + arrays.y_val.nbytes
    copied = pickle.loads(pickle.dumps(arrays))
    rows = np.asarray([5, 0, 5])
    np.testing.assert_array_equal(copied.x_train[rows], arrays.x_train[rows])
    assert copied.x_train.owner is None
    path = Path(arrays.x_train.path)  # type: ignore[union-attr]
    assert path.exists()
    del streamed, arrays
    gc.collect()
    assert not path.parent.exists()


def test_training_takes_the_same_steps_from_the_disk_as_from_memory(tmp_path: Path) -> None:
    spec = write(tmp_path, numbers(), normalize="minmax")
    weights = []
    for data in (one.arrays for one in both(spec)):
        trial = TrialSpec.model_validate(
            {
                "trial_id": "m",
                "model_name": "m",
                "model": {"factory": "bigray.models:mlp", "params": {"hidden": [8]}},
                "training": {"task": "classification", "epochs": 2, "global_batch_size": 64, "lr": 0.05},
                "seed": 3,
            }
        )
        training = TrialTraining(trial, data, 3, Worker(0, 1, torch.device("cpu")), RecordingHooks())
        training.train_to(2)
        weights.append([value.clone() for value in training.module.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
