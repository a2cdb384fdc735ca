"""`bigray verify` as a user runs it: a job's own training, with killed workers and a resize, beside itself."""

import json
import os
from pathlib import Path

import pytest

from tests.e2e.conftest import Run, only_json, ray_processes
from tests.integration.jobs import write_blobs

pytestmark = pytest.mark.timeout(500)
"""Three groups start, one after another, and two workers are replaced."""

JOB = """
name    = "blobs"
storage = "{folder}/runs"

[data]
source    = "{source}"
target    = "label"
normalize = "standard"

[models.slow]
factory = "tests.integration.user_models:slow_mlp"

[training]
task   = "classification"
epochs = 20
global_batch_size = 32
lr     = 0.01
exact  = true

[scaling]
num_workers = {workers}
"""


def test_an_exact_job_is_identical_after_two_kills_and_a_resize(bigray: Run, tmp_path: Path) -> None:
    before = ray_processes()
    workers = min(2, len(os.sched_getaffinity(0)))
    file = tmp_path / "job.toml"
    file.write_text(JOB.format(folder=tmp_path, source=write_blobs(tmp_path / "blobs.npz"), workers=workers))
    done = bigray("verify", str(file), "--kills", "2", "--json", timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr
    document = only_json(done.stdout)
    (model,) = document["models"]
    assert model["verdict"] == "identical"
    assert len(model["kills"]) == 2
    assert all(kill["went_on_at_step"] is not None for kill in model["kills"])
    assert model["resize"]["workers_before"] == workers
    assert model["weights"]["is_bit_equal"]
    assert model["metrics"]["largest"] == 0
    assert model["samples"] == model["reference_samples"] == {"lost": 0, "repeated": 0}
    written = json.loads((Path(document["folder"]) / "verification.json").read_text())
    assert written == document, "what was printed is kept beside the runs"
    assert ray_processes() <= before
