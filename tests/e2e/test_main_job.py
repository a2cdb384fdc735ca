"""The main job as a user runs it: job file in, endpoint checked over HTTP, nothing left behind."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from bigray.bundle import ModelBundle
from bigray.data.features import Column
from bigray.serve.sample import write_sample_bundle
from tests.e2e.conftest import BIGRAY, Run, only_json, ray_processes

pytestmark = pytest.mark.timeout(400)  # a guard against hangs; 145 s were seen on two cores with other work

DIGITS = "examples/digits/job.toml"


def small_search(folder: Path, trials: int = 6) -> str:
    file = folder / "search.toml"
    text = Path("tuning/lr_batch.toml").read_text()
    file.write_text(text.replace("trials    = 24", f"trials    = {trials}"))
    return str(file)


def test_run_trains_deploys_and_answers_every_holdout_row_as_offline_and_leaves_nothing(
    bigray: Run, tmp_path: Path, serve_file: str
) -> None:
    before = ray_processes()
    files = ("--search", small_search(tmp_path), "--serve", serve_file)
    done = bigray("run", DIGITS, *files, "--set", f"storage={tmp_path}/runs", "--exit", "--json")
    assert done.returncode == 0, done.stderr
    document = only_json(done.stdout)
    holdout = document["holdout"]
    assert len(document["leaderboard"]["trials"]) == 6
    assert holdout["num_rows"] == 269
    assert holdout["num_equal"] == holdout["num_rows"]
    assert holdout["metrics"]["accuracy"] > 0.95
    assert ray_processes() <= before, "no process of Ray's or HAProxy's is left"
    check_deploying_the_run_again(bigray, document["leaderboard"]["folder"], tmp_path, serve_file)


def check_deploying_the_run_again(bigray: Run, folder: str, tmp_path: Path, serve_file: str) -> None:
    """`deploy` in one terminal; `status`, `predict` and `delete` in another."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [BIGRAY, "deploy", folder, "--config", serve_file],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = next(line for line in process.stdout if line.startswith("serving")).split()[-1]
        curl = next(line for line in process.stdout if line.startswith("curl"))
        rows = tmp_path / "rows.json"
        rows.write_text(curl.split(" -d ", 1)[1].strip().strip("'"))
        status, predicted = bigray("status"), bigray("predict", url, str(rows))
        assert "RUNNING" in status.stdout, status.stderr
        assert '"label"' in predicted.stdout, predicted.stderr
        check_another_version(bigray, url, folder, tmp_path, serve_file)
        deleted, after = bigray("delete", "model"), bigray("status")
        assert deleted.returncode == 0, deleted.stderr
        assert "nothing is served" in after.stdout
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def check_another_version(bigray: Run, url: str, folder: str, tmp_path: Path, serve_file: str) -> None:
    """A version with other answers is refused, forced in, seen, traced and taken back, from other terminals."""
    live = ModelBundle.load(f"{folder}/bundle").version
    columns = (Column(name="image", shape=(8, 8)),)
    letters = tuple("abcdefghij")
    other = write_sample_bundle(str(tmp_path), name="other", columns=columns, class_names=letters, onnx=False)
    deploy = ("deploy", other, "--address", "auto", "--config", serve_file)
    refused = bigray(*deploy)
    assert refused.returncode == 6, refused.stderr
    assert "refused by the gate" in refused.stderr
    forced = only_json(bigray(*deploy, "--force", "--json").stdout)["deployment"]
    assert forced["version"] == ModelBundle.load(other).version
    assert only_json(bigray("top", url, "--json").stdout)["versions"]["live"] == forced["version"]
    assert only_json(bigray("trace", live, "--storage", str(tmp_path / "runs"), "--json").stdout)["model"] in (
        "mlp",
        "cnn",
    )
    assert only_json(bigray("rollback", "model", "--json").stdout)["live"] == live
    history = only_json(bigray("versions", "model", "--json").stdout)["history"]
    assert [entry["action"] for entry in history] == ["deployed", "forced", "rolled back"]
