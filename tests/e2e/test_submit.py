"""Jobs sent to a real `ray start --head` with token authentication on."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import Run, free_port

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head of two CPUs on free ports; ended by the pids it started, never by `ray stop`."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
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
    deadline = time.monotonic() + 60
    command = [str(BIN / "ray"), "job", "list", "--address", dashboard]
    while subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, "the dashboard did not come up"
        time.sleep(0.5)


def arguments_of_a_small_job(folder: Path, serve_file: str) -> list[str]:
    settings = [f"storage={folder}/runs", "training.epochs=3"]
    return [
        "examples/digits/job.toml",
        "--serve",
        serve_file,
        *[word for setting in settings for word in ("--set", setting)],
    ]


def test_bigray_submit_runs_the_main_job_on_a_token_protected_head(
    bigray: Run, head: Head, tmp_path: Path, serve_file: str
) -> None:
    arguments = arguments_of_a_small_job(tmp_path, serve_file)
    token = {"RAY_AUTH_TOKEN_PATH": head.environment["RAY_AUTH_TOKEN_PATH"]}
    done = bigray("submit", *arguments, "--address", head.dashboard, "--exit", env=token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"269/269 answers equal", done.stdout), done.stdout
    assert list(tmp_path.glob("runs/digits-*/bundle/manifest.json"))


def test_rays_own_job_submit_runs_bigray_on_the_same_head(head: Head, tmp_path: Path, serve_file: str) -> None:
    arguments = arguments_of_a_small_job(tmp_path, serve_file)
    entrypoint = ["bigray", "run", *arguments, "--exit"]
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *entrypoint]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "269/269 answers equal" in done.stdout


def test_a_job_whose_file_is_wrong_ends_before_it_is_submitted(bigray: Run, head: Head, tmp_path: Path) -> None:
    settings = ("--set", "training.lr=nan", "--set", f"storage={tmp_path}")
    done = bigray("submit", "examples/digits/job.toml", "--address", head.dashboard, *settings)
    assert done.returncode == 2
    assert "submitted" not in done.stderr


def test_a_relative_storage_is_refused_with_what_to_write(bigray: Run, head: Head) -> None:
    done = bigray("submit", "examples/digits/job.toml", "--address", head.dashboard)
    assert done.returncode == 2
    assert "--set storage=/shared/runs" in done.stderr


def test_no_cluster_at_the_address_is_one_line_and_exit_5(bigray: Run, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    done = bigray("submit", "examples/digits/job.toml", "--address", address, "--set", f"storage={tmp_path}")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
