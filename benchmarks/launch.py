"""How long until the first optimizer step of two workers: bigray, `torchrun`, and `TorchTrainer`.

    python benchmarks/launch.py [--size full|small] [--rounds 3]

Warm: from the call of `execute(TrainTo(...))` on a group that is live, which `train` and `tune` make for each trial;
for `TorchTrainer` from the call of `fit()` on a Ray that is up, with its defaults and tuned (a poll every 0.1 s, no
preemption watcher). The first trial of a process, for which modules are still imported, is printed by itself.

Cold: from the start of the command, `bigray train JOB`, which starts its Ray on the way, and `torchrun`. It is the
model that tells of the first step, so it is a factory of the user's own, for which bigray imports torch before it
starts anything. A row for one of bigray's own models ends with the journal's first report: ten steps, validation, and
the report's way to the driver are in it.

The first step is done when rank 0 begins its second forward pass. The model is an MLP 784-256-10, the batch 64.
`torchrun` has no warm start: its one figure stands beside both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from measuring import (
    TUNED,
    clean_environment,
    print_table,
    read_stamps,
    run_in_own_process,
    spread,
    tell,
    torchrun,
    wait_for,
)
from training_peers.plain_loop import PlainJob, make_rows

LABELS = {
    "bigray warm": "bigray, live group",
    "trainer": "TorchTrainer.fit(), Ray up",
    "trainer tuned": "TorchTrainer.fit(), Ray up, tuned",
    "bigray cold": "bigray train, from the command line",
    "bigray cold mlp": "bigray train with bigray.models:mlp, to its first report",
    "torchrun": "torchrun, from the command line",
}
BESIDE = ("bigray warm", "bigray cold")
IN_CHILD = ("bigray warm", "trainer", "trainer tuned")
CALLS = {"full": {"bigray warm": 8, "trainer": 3, "trainer tuned": 3}, "small": dict.fromkeys(IN_CHILD, 2)}
"""In one process; the first is kept apart."""
ROWS, FEATURES, BATCH = 640, 784, 64
MLP, HIDDEN = "bigray.models:mlp", {"hidden": [256]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CALLS, default="full")
    parser.add_argument("--rounds", type=int, help="default: 3, with --size small 1")
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=IN_CHILD, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure_calls(arguments.peer, CALLS[arguments.size][arguments.peer], Path(folder))))
        return
    firsts: dict[str, list[float]] = {peer: [] for peer in arguments.peers}
    figures: dict[str, list[float]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds or (1 if arguments.size == "small" else 3)):
        for peer in arguments.peers:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(peer, arguments.size, Path(folder))
            if peer in IN_CHILD:
                firsts[peer].append(found.pop(0))
            figures[peer] += found
            tell(f"round {number + 1}: {LABELS[peer]}: {', '.join(f'{seconds:.3f}' for seconds in found)} s")
    show(figures, firsts)


def measure(peer: str, size: str, folder: Path) -> list[float]:
    """Seconds to the first step, of each call."""
    match peer:
        case "bigray cold":
            return [command_of_bigray(folder, make_job(folder / "stamps"))]
        case "bigray cold mlp":
            return [command_of_bigray(folder, replace(make_job(folder), factory=MLP, params=HIDDEN))]
        case "torchrun":
            return [command_of_torchrun(folder)]
        case _:
            more = TUNED if peer == "trainer tuned" else {}
            found: list[float] = run_in_own_process(__file__, "--peer", peer, "--size", size, **more)
            return found


def make_job(stamps: Path) -> PlainJob:
    params = {"factory": MLP, "params": HIDDEN, "path": str(stamps), "at": [2]}
    return PlainJob("training_peers.networks:stamped", params, ROWS, BATCH, [FEATURES])


def has_stepped(stamps: Path) -> bool:
    return any(stamp.rank == 0 for stamp in read_stamps(stamps))


def first_step_at(stamps: Path) -> float:
    """When rank 0 had taken its first step, by `time.monotonic()`."""
    return next(stamp.at_s for stamp in read_stamps(stamps) if stamp.rank == 0)


def measure_calls(peer: str, calls: int, folder: Path) -> list[float]:
    return calls_of_bigray(calls, folder) if peer == "bigray warm" else calls_of_trainer(calls, folder)


def calls_of_bigray(calls: int, folder: Path) -> list[float]:
    import ray
    from training_peers.bigray_group import live_group, own_ray

    seconds = []
    with own_ray(), live_group(ROWS, [FEATURES], folder / "runs", warm_spare=False) as group:
        for number in range(calls):
            stamps = folder / f"stamps-{number}"
            started = time.monotonic()
            ray.get(group.execute(make_job(stamps)))
            seconds.append(first_step_at(stamps) - started)
            time.sleep(0.5)
    return seconds


def calls_of_trainer(calls: int, folder: Path) -> list[float]:
    from training_peers.torch_trainer import fit, start_ray

    start_ray()
    seconds = []
    for number in range(calls):
        stamps = folder / f"stamps-{number}"
        started = time.monotonic()
        fit(make_job(stamps), folder / "runs", f"call-{number}")
        seconds.append(first_step_at(stamps) - started)
    return seconds


def command_of_torchrun(folder: Path) -> float:
    started = time.monotonic()
    with torchrun({"jobs": [asdict(make_job(folder / "stamps"))]}) as process:
        wait_for(lambda: has_stepped(folder / "stamps"), "the first step", lambda: not process.poll())
        process.wait()
    return first_step_at(folder / "stamps") - started


def command_of_bigray(folder: Path, job: PlainJob) -> float:
    import numpy as np

    x, y = make_rows(ROWS * 2, [FEATURES])
    np.savez(folder / "rows.npz", x=x, y=y)
    (folder / "job.toml").write_text(job_file(folder, job))
    command = [sys.executable, "-m", "bigray", "train", str(folder / "job.toml")]
    started, started_on = time.monotonic(), time.time()
    done = subprocess.run(command, env=clean_environment(), cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bigray train failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    if job.factory == MLP:
        return first_report_on(folder / "runs") - started_on
    return first_step_at(folder / "stamps") - started


def first_report_on(runs: Path) -> float:
    """When the first report was written to the only journal there, in seconds since 1970."""
    journal = next(path for path in runs.rglob("*.jsonl"))
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    return float(next(event["time"] for event in events if event["kind"] == "epoch"))


def job_file(folder: Path, job: PlainJob) -> str:
    params = ", ".join(f"{name} = {_toml(value)}" for name, value in job.params.items())
    return f"""
name = "launch"
storage = "{folder / "runs"}"

[data]
source = "{folder / "rows.npz"}"
target = "y"
split = {{ validation = 0.25, holdout = 0.25 }}

[models.mlp]
factory = "{job.factory}"
params = {{ {params} }}

[training]
task = "classification"
epochs = 1
global_batch_size = {job.batch}

[scaling]
num_workers = 2
"""


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    return json.dumps(value)


def show(figures: dict[str, list[float]], firsts: dict[str, list[float]]) -> None:
    middles = {peer: statistics.median(values) for peer, values in figures.items()}
    rows = []
    for peer, values in figures.items():
        first = f"{statistics.median(firsts[peer]):.3f}" if firsts[peer] else ""
        beside = (f"{middles[peer] / middles[ours]:.1f}x" if ours in middles else "" for ours in BESIDE)
        rows.append((LABELS[peer], str(len(values)), *spread(values), first, *beside))
    columns = ("peer", "calls", "s", "least", "most", "first call", *(f"beside {ours}" for ours in BESIDE))
    print_table("seconds to the first optimizer step, 2 workers", columns, rows)


if __name__ == "__main__":
    main()
