"""Jobs sent to a real `ray start --head` with token authentication on."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import BIGRAY, free_port, only_json
from tests.full_size import full_size
from tests.integration.jobs import write_blobs
from tests.waiting import wait_until

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
TOKEN = "0123456789abcdef0123456789abcdef"
pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Head:
    dashboard: str
    environment: dict[str, str]
    """Of its processes, and of a client that has its token."""

    def bigray(self, folder: Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in a folder, as a user of this cluster."""
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard, **more}
        command = [BIGRAY, *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head of two CPUs on free ports; ended by the pids it started, never by `ray stop`."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **clean,
        "PATH": f"{BIN}:{clean['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",  # nothing is left to drain when the tests end the head
    }
    ports = {"--port": free_port(), "--dashboard-port": free_port(), "--ray-client-server-port": free_port()}
    options = [f"{name}={port}" for name, port in ports.items()]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true", *options]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
    try:
        wait_for_dashboard(dashboard, environment)
        yield Head(dashboard, environment)
    finally:
        process.terminate()  # `ray start --block` ends everything it started
        process.wait(timeout=60)


def wait_for_dashboard(dashboard: str, environment: dict[str, str]) -> None:
    command = [str(BIN / "ray"), "job", "list", "--address", dashboard]

    def answers() -> bool:
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

    wait_until(answers, "the dashboard did not come up", timeout_s=60)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's own folder: the example, a serve file on a free port, a secret, and a model whose pace a file holds."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "examples/digits", folder / "examples/digits")
    text = (ROOT / "serve/local.yaml").read_text()
    (folder / "serve.yaml").write_text(text.replace("port: 8000", f"port: {free_port()}"))
    (folder / ".env").write_text("PLANTED=planted-in-a-file")
    (folder / "own_paced_model.py").write_text(PACED_MODEL)
    (folder / "paced.toml").write_text(paced_job(tmp_path))
    return folder


PACED_MODEL = """
import time
from pathlib import Path

from torch import nn


class Paced(nn.Module):
    def __init__(self, width, num_outputs, pace_file):
        super().__init__()
        self.layer = nn.Linear(width, num_outputs)
        self.pace_file = pace_file

    def forward(self, inputs):
        if self.training:
            time.sleep(float(Path(self.pace_file).read_text() or 0))  # empty while it is being written
        return self.layer(inputs)


def build(input_shape, num_outputs, pace_file):
    return Paced(input_shape[0], num_outputs, pace_file)
"""


def paced_job(folder: Path) -> str:
    (folder / "pace").write_text("0.05")
    return f"""
name    = "paced"
storage = "{folder}/runs"
data    = {{ source = "{write_blobs(folder / "blobs.npz")}", target = "label", normalize = "standard" }}

[models.paced]
factory = "own_paced_model:build"
params  = {{ pace_file = "{folder}/pace" }}

[training]
task              = "classification"
epochs            = 100
global_batch_size = 32
lr                = 0.05
checkpoint_every_s = 3600.0

[scaling]
num_workers = 2
"""


def arguments_of_a_small_job(folder: Path) -> list[str]:
    settings = [f"storage={folder}/runs", "training.epochs=3"]
    options = ["--serve", "serve.yaml", "--exit"]
    return ["examples/digits/job.toml", *options, *[word for setting in settings for word in ("--set", setting)]]


def has_trained(folder: Path, epochs: int) -> bool:
    """Whether the one run of the paced job has told of so many epochs."""
    text = "".join(file.read_text() for file in folder.glob("runs/paced-*/journal/*.jsonl"))
    return text.count('"kind": "epoch"') >= epochs


def test_bigray_submit_runs_the_main_job_on_a_token_protected_head(head: Head, project: Path, tmp_path: Path) -> None:
    done = head.bigray(project, "submit", *arguments_of_a_small_job(tmp_path), AWS_SECRET_ACCESS_KEY="planted-here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"269/269 answers equal", done.stdout), done.stdout
    assert "not sent: .env: it holds secrets by its name" in done.stderr
    assert list(tmp_path.glob("runs/digits-*/bundle/manifest.json"))
    listed = subprocess.run(
        [str(BIN / "ray"), "job", "list", "--address", head.dashboard],
        env=head.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "planted" not in listed.stdout
    assert TOKEN not in listed.stdout

    again = head.bigray(project, "submit", *arguments_of_a_small_job(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "(attempt 2)" in again.stderr


@full_size
def test_rays_own_job_submit_runs_bigray_on_the_same_head(head: Head, project: Path, tmp_path: Path) -> None:
    entrypoint = ["bigray", "run", *arguments_of_a_small_job(tmp_path)]
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *entrypoint]
    done = subprocess.run(
        command, cwd=project, env=head.environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "269/269 answers equal" in done.stdout


def test_a_job_that_is_stopped_has_a_checkpoint_and_goes_on_from_its_folder_alone(
    head: Head, project: Path, tmp_path: Path
) -> None:
    submit = ("submit", "paced.toml", "--serve", "serve.yaml", "--id", "night", "--no-wait", "--json")
    started = head.bigray(project, *submit)
    assert started.returncode == 0, started.stderr
    wait_until(lambda: has_trained(tmp_path, 5), timeout_s=PATIENCE_S)
    assert only_json(head.bigray(project, *submit).stdout)["is_running"]

    stopped = head.bigray(project, "stop", "night")
    assert stopped.returncode == 0, stopped.stderr
    assert "night has ended: STOPPED" in stopped.stderr
    assert "told to end (SIGTERM)" in head.bigray(project, "logs", "night").stdout
    (run,) = tmp_path.glob("runs/paced-*")
    assert list(run.glob("trials/paced/ckpt-*/manifest.json")), "a checkpoint was due only at the end"

    (tmp_path / "pace").write_text("0")
    (project / "paced.toml").unlink()
    resumed = head.bigray(project, "resume", str(run))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert re.search(r"resuming paced-\w+ at step [1-9]", resumed.stdout), resumed.stdout
    assert (run / "bundle/manifest.json").exists()
    assert "is complete; deploy it with bigray deploy" in head.bigray(project, "resume", str(run)).stderr


@full_size
def test_ctrl_c_leaves_the_job_running(head: Head, project: Path, tmp_path: Path) -> None:
    command = [BIGRAY, "submit", "paced.toml", "--serve", "serve.yaml", "--address", head.dashboard, "--id", "left"]
    process = subprocess.Popen(command, cwd=project, env=head.environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: has_trained(tmp_path, 1) or process.poll() is not None, timeout_s=PATIENCE_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"end it with bigray stop left --address {head.dashboard}" in errors
    jobs = {job["id"]: job["status"] for job in only_json(head.bigray(project, "jobs", "--json").stdout)}
    assert jobs["left"] == "RUNNING"
    assert head.bigray(project, "stop", "left").returncode == 0


def test_a_job_that_fails_ends_the_command_with_its_own_code(head: Head, project: Path) -> None:
    # it is right where it is sent from, and finds no such file where it runs: 2, not the 5 of a cluster that fails
    command = ["python", "-m", "bigray", "train", "none.toml"]
    submit = [
        str(BIN / "ray"),
        "job",
        "submit",
        "--address",
        head.dashboard,
        "--submission-id",
        "bad",
        "--no-wait",
        "--",
    ]
    subprocess.run([*submit, *command], env=head.environment, capture_output=True, check=True)
    done = head.bigray(project, "logs", "bad", "-f")
    assert done.returncode == 2, done.stderr
    assert "error: bad FAILED: Job entrypoint command failed with exit code 2" in done.stderr


def test_a_token_that_others_can_read_and_a_wrong_one_are_one_line_each(
    head: Head, project: Path, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("f" * 32)
    for mode, expected in ((0o644, f"chmod 600 {file}"), (0o600, f"refuses the token in {file}")):
        file.chmod(mode)
        done = head.bigray(project, "jobs", RAY_AUTH_TOKEN_PATH=str(file))
        assert done.returncode == 5
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1


REFUSED = {
    "wrong": (("--set", "training.lr=nan"), "training.lr"),
    "relative storage": (("--set", "storage=runs"), "--set storage=/shared/runs"),
    "elsewhere": (("--serve", "../serve.yaml"), "is outside of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_job_that_would_not_run_is_refused_before_it_is_submitted(case: str, head: Head, project: Path) -> None:
    arguments, message = REFUSED[case]
    shutil.copy(project / "serve.yaml", project.parent / "serve.yaml")
    done = head.bigray(project, "submit", "paced.toml", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "submitted" not in done.stderr


def test_no_cluster_at_the_address_is_one_line_and_exit_5(head: Head, project: Path) -> None:
    done = head.bigray(project, "submit", "paced.toml", "--address", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert "nothing answers" in done.stderr.splitlines()[-1]
