"""Runs of bigray on a cluster of hosts, followed by their journals on shared storage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigray.journal import read_journal
from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.storage import open_storage
from tests.hosts.hosts import Host
from tests.hosts.ray_hosts import RayHosts
from tests.integration.jobs import last_weights, weights_of_one_process, write_blobs
from tests.waiting import wait_until

PATIENCE_S = 150.0
ENDING_S = 300.0
STEP_S = 0.03
"""Of one forward pass, until `let_run`: faults come while a run is at it."""
WORKER = "RayTrainWorker"
"""In the name that Ray gives the process."""


def write_job(
    folder: Path, *, workers: str = "[1, 2]", epochs: int = 400, storage: Path | None = None, **training: str
) -> Path:
    """A job "paced" on blobs, bit-equal at any number of workers, whose pace is read from a file at each step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pace").write_text(str(STEP_S))
    more = "\n".join(f"{name} = {value}" for name, value in training.items())
    file = folder / "job.toml"
    file.write_text(f"""
name    = "paced"
storage = "{storage or folder / "runs"}"
data    = {{ source = "{write_blobs(folder / "blobs.npz")}", target = "label", normalize = "standard" }}

[models.paced]
factory = "tests.integration.user_models:paced_mlp"
params  = {{ pace_file = "{folder}/pace" }}

[training]
task               = "classification"
epochs             = {epochs}
global_batch_size  = 32
lr                 = 0.05
exact              = true
checkpoint_every_s = 1.0
{more}

[scaling]
num_workers = {workers}
""")
    return file


@dataclass(frozen=True)
class Run:
    """A `bigray` command that trains, on the head of a cluster, and the one run that it makes."""

    ray: RayHosts
    folder: Path
    """Of the job file, with the runs in `runs`."""
    process: subprocess.Popen[bytes]
    log: str

    @classmethod
    def start(cls, ray: RayHosts, folder: Path, *arguments: str, log: str = "bigray") -> Run:
        """`arguments`: from the name of the command on."""
        command = [sys.executable, "-m", "bigray", *arguments, "--address", ray.address, "--json"]
        return cls(ray, folder, ray.head.start(log, command, environment=ray.environment), log)

    @property
    def paths(self) -> RunPaths:
        (run,) = (self.folder / "runs").glob("*-*")
        return RunPaths(open_storage(str(run)), run.name)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Those told so far, of every attempt, oldest first."""
        if not list((self.folder / "runs").glob("*-*/journal")):
            return []
        return [event for event in read_journal(self.paths) if event["kind"] in kinds]

    def wait_for(
        self, kind: str, is_the_one: Callable[[dict[str, Any]], bool] = lambda _: True, count: int = 1
    ) -> dict[str, Any]:
        """The `count`-th event of a kind that is such."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = [event for event in self.events(kind) if is_the_one(event)]
            if len(found) >= count:
                return found[count - 1]
            assert self.process.poll() is None, f"ended without '{kind}': {self.ray.head.log(self.log)}"
            assert time.monotonic() < deadline, f"no '{kind}': {self.ray.head.log(self.log)}"
            time.sleep(0.1)

    def last_step(self) -> int:
        """The last one that was told."""
        return max((int(event["step"]) for event in self.events("epoch")), default=0)

    def seconds_until_past(self, step: int) -> float:
        """Wait until it trains beyond a step."""
        started = time.monotonic()
        self.wait_for("epoch", lambda event: event["step"] > step)
        return time.monotonic() - started

    def let_run(self) -> None:
        """As fast as it can from now on."""
        (self.folder / "pace").write_text("0")

    def board(self, timeout_s: float = ENDING_S) -> dict[str, Any]:
        """The leaderboard that it ends with."""
        exit_code = self.process.wait(timeout_s)
        assert exit_code == 0, self.ray.head.log(self.log)
        document: dict[str, Any] = json.loads(self.ray.head.output(self.log))
        leaderboard: dict[str, Any] = document["leaderboard"]
        return leaderboard

    def end(self) -> None:
        """Tell it to end, and wait."""
        self.ray.head.signal(self.process, signal.SIGTERM)
        self.process.wait(60)

    def assert_weights_are_those_of_one_process(self) -> None:
        """To the last bit; of a job that is `exact`."""
        undisturbed = weights_of_one_process(load_job(self.folder / "job.toml"))
        disturbed = last_weights(self.paths, "paced")
        assert disturbed.keys() == undisturbed.keys()
        for name, tensor in undisturbed.items():
            assert np.array_equal(disturbed[name], tensor.numpy()), name


def workers_on(host: Host) -> list[int]:
    """Processes that train, on one host."""
    return [pid for pid, command in host.processes().items() if WORKER in command]


def wait_for_no_workers(hosts: Iterator[Host] | list[Host], timeout_s: float = 60.0) -> None:
    """30 seconds after a run no process of it is left on any host; a minute here, on a machine that is shared."""
    hosts = list(hosts)
    left = "workers are left on a host after the run"
    wait_until(lambda: not any(workers_on(host) for host in hosts), left, timeout_s)
