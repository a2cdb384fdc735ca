"""Training on rows that are streamed from disk: the same steps as from memory, in bounded memory, on several nodes.

With BIGRAY_FULL=1 the large set has 2 GB, by default a fifth of that; in memory either takes more than is allowed here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigray.bundle import ModelBundle
from bigray.data.scratch import scratch_root
from bigray.specs import JobSpec
from bigray.training.runner import train
from tests.full_size import IS_FULL, full_size
from tests.integration.raylets import ray_cluster

LARGE_BYTES = 2_000_000_000 if IS_FULL else 400_000_000
BUDGET_BYTES = 1_000_000_000
NUM_COLUMNS = 64
pytestmark = pytest.mark.timeout(600)


def write_rows(path: Path, num_rows: int, num_columns: int, at_once: int = 100_000) -> str:
    """Learnable rows: the label tells whether the first two numbers have a positive sum."""
    generator = np.random.default_rng(0)
    names = [f"x{number}" for number in range(num_columns)]
    schema = pa.schema([*((name, pa.float32()) for name in names), ("label", pa.int64())])
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, num_rows, at_once):
            values = generator.standard_normal((min(at_once, num_rows - start), num_columns), np.float32)
            labels = (values[:, 0] + values[:, 1] > 0).astype(np.int64)
            writer.write_table(pa.table([*values.T, labels], schema=schema))
    return str(path)


def job_of(folder: Path, source: str, name: str, workers: int = 1, **data: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": name,
            "storage": str(folder / "runs" / name),
            "data": {"source": source, "target": "label", **data},
            "models": {"mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [16]}}},
            "training": {"task": "classification", "epochs": 2, "global_batch_size": 64, "lr": 0.05},
            "scaling": {"num_workers": workers},
        }
    )


def left_behind() -> list[Path]:
    return list(scratch_root().iterdir())


# the first of the file: the Ray of the others stays up until the file's end
@pytest.fixture
def two_nodes() -> Iterator[None]:
    """A head without room for a worker, and a node with room for two."""
    with ray_cluster({"num_cpus": 1}, {"num_cpus": 4}):
        yield


@full_size
@pytest.mark.usefixtures("two_nodes")
def test_a_node_without_the_files_copies_them_once_and_takes_the_same_steps(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.parquet", 3000, 5)
    boards = []
    copies: set[str] = set()
    for name, limit in (("whole", {}), ("streamed", {"memory_gb": 1e-6})):
        job = job_of(tmp_path, source, name, 2, normalize="minmax", **limit)
        scaling = job.scaling.model_copy(update={"cpus_per_worker": 2.0})  # which the head does not have
        job = job.model_copy(update={"scaling": scaling})
        boards.append(
            train(job, listener=lambda _: copies.update(path.name for path in left_behind() if "-" in path.name))
        )
    whole, streamed = (ModelBundle.load(board.bundle) for board in boards)
    assert whole.weights == streamed.weights
    assert len(copies) == 1


@pytest.mark.usefixtures("four_cpu_ray")
@pytest.mark.parametrize("workers", [pytest.param(1, marks=full_size), 2])
def test_rows_from_disk_give_the_same_losses_and_weights_as_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the driver alone: Ray runs, and its sockets need short paths
    source = write_rows(tmp_path / "rows.parquet", 3000, 5)
    boards = [
        train(job_of(tmp_path, source, name, workers, normalize="minmax", **limit))
        for name, limit in (("whole", {}), ("streamed", {"memory_gb": 1e-6}))
    ]
    whole, streamed = (ModelBundle.load(board.bundle) for board in boards)
    assert boards[0].winner.metrics == boards[1].winner.metrics
    assert whole.weights == streamed.weights
    assert whole.manifest.preprocessing == streamed.manifest.preprocessing
    assert whole.manifest.card.rows == streamed.manifest.card.rows
    assert (boards[1].samples_lost, boards[1].samples_repeated) == (0, 0)
    assert any("streamed" in note for note in boards[1].notes)
    assert not left_behind()


def test_more_rows_than_the_budget_are_trained_on_within_it(tmp_path: Path) -> None:
    row_bytes = 4 * NUM_COLUMNS + 8
    source = write_rows(tmp_path / "rows.parquet", LARGE_BYTES // row_bytes, NUM_COLUMNS)
    job = job_of(tmp_path, source, "large", 2, normalize="standard", memory_gb=BUDGET_BYTES / 1e9)
    training = job.training.model_copy(update={"epochs": 1, "global_batch_size": 4096})
    before = set(left_behind())
    (tmp_path / "job.json").write_text(job.model_copy(update={"training": training}).model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.streaming_driver", str(tmp_path / "job.json")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["driver"] < BUDGET_BYTES
    assert found["workers"] < BUDGET_BYTES
    assert found["metrics"]["val_accuracy"] > 0.9
    assert set(left_behind()) <= before
