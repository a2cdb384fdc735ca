"""A fault soak: `bigray train` on a cluster of real raylets while its processes are killed, one after the other.

    python -m tests.e2e.faults FOLDER --faults 60 --seed 0

A supervisor in a process of its own: it owns the cluster and the command, strikes at random, runs the command again
where it killed it, and lets the run finish after the last fault. FOLDER then holds the job, the run, what the command
printed (`board.json`) and one line for each fault (`faults.jsonl`); `test_faults.py` judges them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.storage import open_storage
from tests.integration.jobs import write_blobs
from tests.processes import descendants

BIGRAY = str(Path(sys.executable).with_name("bigray"))
KINDS = ("worker", "controller", "driver", "raylet")
CONTROLLER = b"ray::TrainController"
"""The name Ray gives the process."""
STEP_S = 0.05
"""Of one forward pass while faults come; a step is two to four of them."""
EPOCHS_PER_FAULT = 20
"""Enough to be still at it: about 140 steps."""
PATIENCE_S = 180.0
FINISHING_S = 400.0
FRESH_S = 2.0
"""A process that was in a forward pass within this is training."""


@dataclass(frozen=True)
class Fault:
    """One process that was killed, and what came of it."""

    number: int
    kind: str
    pid: int
    step: int
    """The last one told before."""
    committed: int
    """The last step whose checkpoint was told of before."""
    resumed: int
    """Where training first went on."""
    recovery_s: float
    """From the signal to the line in the journal that says so."""

    @property
    def steps_lost(self) -> int:
        """Of those told."""
        return max(0, self.step - self.resumed)


def plan(num_faults: int, seed: int) -> list[str]:
    """Kinds of faults in random order, each as often as the others."""
    generator = random.Random(seed)
    kinds = [kind for _ in range(-(-num_faults // len(KINDS))) for kind in generator.sample(KINDS, len(KINDS))]
    return kinds[:num_faults]


def write_job(folder: Path, num_faults: int) -> Path:
    """A job of `num_faults` times a few hundred steps, at a pace that is read from a file."""
    (folder / "seen").mkdir(parents=True)
    (folder / "pace").write_text(str(STEP_S))
    file = folder / "job.toml"
    file.write_text(f"""
name    = "soak"
storage = "{folder}/runs"
data    = {{ source = "{write_blobs(folder / "blobs.npz")}", target = "label", normalize = "standard" }}

[models.paced]
factory = "tests.integration.user_models:paced_mlp"
params  = {{ pace_file = "{folder}/pace", seen = "{folder}/seen" }}

[training]
task               = "classification"
epochs             = {num_faults * EPOCHS_PER_FAULT}
global_batch_size  = 32
lr                 = 0.05
exact              = true
checkpoint_every_s = 0.5

[scaling]
num_workers  = [1, 2]
max_failures = {10 * num_faults}
""")
    return file


def paths_of(folder: Path) -> RunPaths:
    """The one run in the folder."""
    (run,) = (folder / "runs").glob("soak-*")
    return RunPaths(open_storage(str(run)), run.name)


class Machines:
    """A head and one more node with one CPU each: real raylets, children of this process."""

    def __init__(self, *, include_dashboard: bool) -> None:
        """With no dashboard Ray Train leaves a process behind for each controller that is killed."""
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": include_dashboard}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._other = self._cluster.add_node(num_cpus=1)
        self.address: str = self._cluster.address

    @property
    def other_raylet(self) -> int:
        """The pid of the raylet that can be lost: without the head there is no cluster."""
        process = self._other.all_processes["raylet"][0].process
        return int(process.pid)

    def replace_the_lost(self) -> None:
        """Take what is left of the lost node away, and add another."""
        self._cluster.remove_node(self._other, allow_graceful=False)
        self._other = self._cluster.add_node(num_cpus=1)

    def shutdown(self) -> None:
        self._cluster.shutdown()


class Command:
    """`bigray train`, which is run again in the same way where it was killed."""

    def __init__(self, folder: Path, job: Path, address: str) -> None:
        self._folder = folder
        self._command = [BIGRAY, "train", str(job), "--address", address, "--json"]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        output = (self._folder / "board.json").open("wb")
        errors = (self._folder / "errors.txt").open("ab")
        return subprocess.Popen(self._command, stdout=output, stderr=errors)

    def start_again(self) -> None:
        self.process.wait()
        self.process = self._start()

    def check_is_running(self) -> None:
        if self.process.poll() is not None:
            errors = (self._folder / "errors.txt").read_text()
            raise RuntimeError(f"the command ended with {self.process.returncode}: {errors[-3000:]}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Soak:
    """Strikes at what runs, and waits until training goes on."""

    def __init__(self, folder: Path, machines: Machines, command: Command, generator: random.Random) -> None:
        self._folder, self._machines, self._command, self._random = folder, machines, command, generator

    def strike(self, number: int, kind: str) -> Fault:
        """Kill one process of this kind in the middle of training."""
        pid = self._wait_for(lambda: self._target(kind), f"a {kind} to kill")
        told = self._events()
        struck_at = time.time()
        os.kill(pid, signal.SIGKILL)
        if kind == "driver":
            self._command.start_again()
        elif kind == "raylet":
            time.sleep(self._random.uniform(2, 5))
            self._machines.replace_the_lost()
        resumed = self._wait_for(lambda: self._resumed_since(struck_at), f"training to go on after {kind}")
        return Fault(
            number,
            kind,
            pid,
            step=max(e["step"] for e in told if "step" in e),
            committed=max(e["step"] for e in told if e["kind"] == "checkpoint"),
            resumed=resumed["step"],
            recovery_s=round(resumed["time"] - struck_at, 1),
        )

    def train_on(self) -> None:
        """Let some steps pass, of a seeded number of seconds, and be sure that they do."""
        time.sleep(self._random.uniform(1, 4))
        self._wait_for(self._training, "a process in training")

    def _target(self, kind: str) -> int | None:
        training = self._training()
        if not training or not any(event["kind"] == "checkpoint" for event in self._events()):
            return None
        if kind == "worker":
            return self._random.choice(training)
        if kind == "driver":
            return self._command.process.pid
        if kind == "raylet":
            return self._machines.other_raylet
        return next((pid for pid, title in descendants() if title.startswith(CONTROLLER)), None)

    def _training(self) -> list[int]:
        """Pids of this cluster's processes that were in a forward pass just now."""
        ours, now = {pid for pid, _ in descendants()}, time.time()
        seen = {int(file.name): file.stat().st_mtime for file in (self._folder / "seen").iterdir()}
        return sorted(pid for pid, at in seen.items() if now - at < FRESH_S and pid in ours)

    def _resumed_since(self, struck_at: float) -> dict[str, Any] | None:
        found = (e for e in self._events() if e["kind"] == "resumed" and e["time"] >= struck_at)
        return next(found, None) if self._training() else None

    def _events(self) -> list[dict[str, Any]]:
        return list(read_journal(paths_of(self._folder))) if list(self._folder.glob("runs/soak-*")) else []

    def _wait_for(self, found: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (answer := found()):
            self._command.check_is_running()
            if time.monotonic() > deadline:
                told = [e for e in self._events() if e["kind"] not in ("epoch", "checkpoint")]
                raise RuntimeError(f"waited for {what} in vain: {told[-12:]}")
            time.sleep(0.1)
        return answer

    def finish(self) -> None:
        """Let the run finish as fast as it can."""
        (self._folder / "pace").write_text("0")
        self._command.process.wait(FINISHING_S)
        if self._command.process.returncode != 0:
            self._command.check_is_running()


def run(folder: Path, num_faults: int, seed: int) -> None:
    """The whole soak. Raises where training does not go on."""
    job = write_job(folder, num_faults)
    machines = Machines(include_dashboard=num_faults > len(KINDS))
    command = Command(folder, job, machines.address)
    try:
        soak = Soak(folder, machines, command, random.Random(seed))
        with (folder / "faults.jsonl").open("w") as lines:
            for number, kind in enumerate(plan(num_faults, seed), start=1):
                fault = soak.strike(number, kind)
                print(f"{asdict(fault)}", file=sys.stderr, flush=True)
                print(json.dumps(asdict(fault)), file=lines, flush=True)
                soak.train_on()
        soak.finish()
    finally:
        command.end()
        machines.shutdown()


def read_faults(folder: Path) -> list[Fault]:
    return [Fault(**json.loads(line)) for line in (folder / "faults.jsonl").read_text().splitlines()]


def table_of(faults: Sequence[Fault]) -> str:
    """One row for each fault."""
    rows = [f"{'fault':>5}  {'killed':<10}  {'at step':>8}  {'recovery s':>10}  {'steps lost':>10}"]
    rows += [f"{f.number:>5}  {f.kind:<10}  {f.step:>8}  {f.recovery_s:>10.1f}  {f.steps_lost:>10}" for f in faults]
    return "\n".join(rows)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray is imported: the cluster's own processes have no token
    run(options.folder.resolve(), options.faults, options.seed)
    print(table_of(read_faults(options.folder)))


if __name__ == "__main__":
    main()
