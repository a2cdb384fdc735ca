"""cluster/slurm/bigray.sbatch with Ray and bigray as they are; of Slurm there are stand-ins, with one machine as nodes.

What Slurm itself does with the file (time limits, steps, queues) is tested where there is one: tests/hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.full_size import full_size

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster/slurm/bigray.sbatch"
TIMEOUT_S = 150.0

SLURM = {
    "scontrol": """
case "$2" in
  hostnames) printf '%s\\n' $SLURM_JOB_NODELIST ;;
  node) echo "   NodeAddr=127.0.0.1 NodeHostName=$3" ;;
  *) echo "$*" >>"$RECORD/scontrol" ;;
esac""",
    "squeue": "echo RUNNING",
    "srun": 'while [ "$1" != bash ] && [ "$1" != rm ]; do shift; done; exec "$@"',
}


class _Job:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in SLURM.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        self.number = str(os.getpid())
        self.temp = Path(f"/tmp/bigray-{self.number}-0")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, nodes: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))},
            "PATH": f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RECORD": str(self.folder),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": self.number,
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_CPUS_ON_NODE": "2",
            "BIGRAY_RAY_OPTIONS": "--object-store-memory=100000000",
        }
        output = (self.folder / "out").open("wb")
        self.process = subprocess.Popen(
            ["bash", FILE, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        return self.process

    @property
    def output(self) -> str:
        logs = sorted(self.folder.glob("bigray-*/*.log"))
        return "\n".join(path.read_text(errors="replace") for path in (self.folder / "out", *logs))

    def processes(self) -> list[int]:
        """Those of Ray that this job has started, by its temporary folder in their command lines."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and str(self.temp).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        if self.process is not None:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its own session
            self.process.wait()
        shutil.rmtree(self.temp, ignore_errors=True)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[_Job]:
    job = _Job(tmp_path)
    yield job
    job.end()


@full_size
def test_two_nodes_train_a_job_and_nothing_is_left_behind(job: _Job) -> None:
    storage = job.folder / "runs"
    process = job.start("here there", "train", "examples/linear/job.toml", "--set", f"storage={storage}", "--json")

    assert process.wait(TIMEOUT_S) == 0, job.output
    assert list(storage.glob("linear-*")), job.output
    assert job.processes() == []
    assert not job.temp.exists()
    assert not list(job.folder.glob("bigray-*"))


@full_size
def test_slurms_signal_ends_the_run_in_order_and_queues_the_job_again(job: _Job) -> None:
    storage = job.folder / "runs"
    settings = ("--set", f"storage={storage}", "--set", "training.epochs=100000")
    process = job.start("here", "train", "examples/linear/job.toml", *settings)
    deadline = time.monotonic() + TIMEOUT_S
    while not list(storage.glob("linear-*/trials/*")) and not list(storage.glob("linear-*/*/*")):
        assert process.poll() is None and time.monotonic() < deadline, job.output
        time.sleep(0.2)

    process.send_signal(signal.SIGTERM)

    assert process.wait(TIMEOUT_S) == 143, job.output
    assert (job.folder / "scontrol").read_text() == f"requeue {job.number}\n"
    assert job.processes() == []
    assert not (job.folder / f"bigray-{job.number}" / "token").exists()


def test_a_command_that_is_refused_gives_its_exit_code(job: _Job) -> None:
    process = job.start("here", "train", "examples/linear/none.toml")

    assert process.wait(TIMEOUT_S) == 2, job.output
    assert "no such file" in job.output
    assert job.processes() == []
