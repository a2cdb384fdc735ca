"""How long training is held up by the loss of a worker: bigray, `torchrun`, and `TorchTrainer`.

    python benchmarks/recovery.py [--size full|small] [--rounds 2]

One of two workers is ended by SIGKILL; the figure is the time until a new process takes part in a step beyond the last
one before that. Everybody trains the same small network, whose steps take 10 ms and more, and saves its state once a
second: bigray by its own checkpoints, `torchrun --max-restarts 3` by `torch.save`, `TorchTrainer` with
`FailureConfig(max_failures=3)` by `ray.train.report(checkpoint=...)`, with its defaults and tuned (a poll every 0.1 s,
no preemption watcher). The worker is ended half way between two checkpoints, and bigray's once its warm spare is idle.

The model counts the steps in a buffer, so the count goes on where a checkpoint was made: steps that are lost are to be
taken again before the counter passes its old value. bigray's survivor keeps them in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from measuring import TUNED, Stamp, Stamps, print_table, run_in_own_process, spread, tell, torchrun, wait_for
from training_peers.plain_loop import PlainJob

LABELS = {
    "bigray": "bigray, warm spare",
    "bigray no spare": "bigray, warm_spare = false",
    "torchrun": "torchrun --max-restarts 3, torch.save",
    "trainer": "TorchTrainer, max_failures=3",
    "trainer tuned": "TorchTrainer, max_failures=3, tuned",
}
DEFAULT_ROUNDS = {"full": 2, "small": 1}
BATCH, FEATURES = 32, 4
STEPS, STEPS_WITH_SPARE = 1500, 4500
"""A group has its spare after some 20 s."""
SAVE_EVERY = 90
"""Steps in about a second."""
WINDOW = 10
"""Steps half way between two checkpoints in which a worker is ended."""
BUSY_SHARE = 0.05
"""A spare process that uses less of a core than this has done its imports."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=DEFAULT_ROUNDS, default="full", help="small: one round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.peer, Path(folder))))
        return
    figures: dict[str, list[float]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds or DEFAULT_ROUNDS[arguments.size]):
        for peer in arguments.peers:
            more = TUNED if peer == "trainer tuned" else {}
            figures[peer].append(run_in_own_process(__file__, "--peer", peer, **more))
            tell(f"round {number + 1}: {LABELS[peer]}: {figures[peer][-1]:.2f} s")
    show(figures)


def measure(peer: str, folder: Path) -> float:
    """Seconds from the loss of a worker to a step beyond the last."""
    match peer:
        case "torchrun":
            return of_torchrun(folder)
        case "bigray" | "bigray no spare":
            return of_bigray(folder, warm_spare=peer == "bigray")
        case _:
            return of_trainer(folder)


def make_job(folder: Path, steps: int = STEPS) -> PlainJob:
    params = {"path": str(folder / "stamps"), "delay_s": 0.01}
    return PlainJob("training_peers.networks:counted", params, BATCH * steps, BATCH, [FEATURES], save_every=SAVE_EVERY)


def seconds_to_recover(path: Path, is_alive: Callable[[], bool] = lambda: True) -> float:
    """End one worker of a training that is under way, half way between checkpoints, and wait for its replacement."""
    stamps, known, reached = Stamps(path), set[int](), 0

    def half_way() -> Stamp | None:
        nonlocal reached
        newest = None
        for stamp in stamps.new():
            known.add(stamp.pid)
            reached, newest = max(reached, stamp.step), stamp if stamp.rank == 1 else newest
        since_checkpoint = reached % SAVE_EVERY - SAVE_EVERY // 2
        return newest if reached > 3 * SAVE_EVERY and 0 <= since_checkpoint < WINDOW else None

    def beyond() -> Stamp | None:
        # a process that begins the step after the next has seen the next one done by all ranks
        return next((stamp for stamp in stamps.new() if stamp.pid not in known and stamp.step > reached + 1), None)

    victim = wait_for(half_way, "training to be under way", is_alive)
    ended_at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    time.sleep(0.05)  # the survivor may yet begin the step that is broken off
    reached = max([reached, *(stamp.step for stamp in stamps.new())])
    return float(wait_for(beyond, "training to go on", is_alive).at_s - ended_at)


def of_torchrun(folder: Path) -> float:
    document = {"jobs": [asdict(make_job(folder))], "checkpoint": str(folder / "state.pt")}
    with torchrun(document, "--max-restarts", "3") as process:
        return seconds_to_recover(folder / "stamps", lambda: process.poll() is None)


def of_trainer(folder: Path) -> float:
    import ray
    from training_peers.torch_trainer import fit, start_ray

    start_ray()
    arguments = (make_job(folder), folder / "runs", "recovery", 3)
    training = threading.Thread(target=fit, args=arguments, daemon=True)
    training.start()
    seconds = seconds_to_recover(folder / "stamps", training.is_alive)
    training.join()
    ray.shutdown()
    return seconds


def of_bigray(folder: Path, *, warm_spare: bool) -> float:
    import ray
    from training_peers.bigray_group import live_group, own_ray

    job = make_job(folder, STEPS_WITH_SPARE if warm_spare else STEPS)
    with own_ray(), live_group(job.rows, job.shape, folder / "runs", warm_spare=warm_spare) as group:
        result = group.execute(job, checkpoint_every_s=1.0)

        def is_training() -> bool:
            return not ray.wait([result], timeout=0)[0]

        if warm_spare:
            wait_for(spare_is_idle, "the spare process", is_training)
        seconds = seconds_to_recover(folder / "stamps", is_training)
        ray.get(result)
    return seconds


def spare_is_idle() -> bool:
    """Whether bigray's spare process is there and waits for a seat."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # ended while we looked
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::SpareWorker.serve"):
                before = cpu_s(entry)
                time.sleep(2.0)
                return cpu_s(entry) - before < 2.0 * BUSY_SHARE
    return False


def cpu_s(process: Path) -> float:
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(figures: dict[str, list[float]]) -> None:
    ours = statistics.median(next(iter(figures.values())))
    rows = []
    for peer, values in figures.items():
        beside = f"{statistics.median(values) / ours:.1f}x"
        rows.append((LABELS[peer], str(len(values)), *spread(values, "{:.2f}"), beside))
    columns = ("peer", "losses", "s", "least", "most", f"beside {next(iter(figures))}")
    print_table("seconds from SIGKILL of a worker to a step beyond the last, 2 workers", columns, rows)


if __name__ == "__main__":
    main()
