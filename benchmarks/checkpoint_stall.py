"""How long a checkpoint holds up the training loop: bigray, `torch.save`, `ray.train.report` SYNC and ASYNC.

    python benchmarks/checkpoint_stall.py [--size full|small] [--rounds 2] [--peers bigray torch.save]

The state is a module of 50 million fp32 numbers, 200 MB (small: 8 MB), without an optimizer. Each peer runs in a
process of its own, in turns, and trains between its checkpoints for long enough that the last one is written. The
stall is the time of the call that the loop makes: for bigray the copy in memory, for the others `torch.save` to a
temporary folder and the report, as documented. The rate is how fast training goes on in the seconds after a checkpoint,
when a thread may be writing it, as a share of the rate without checkpoints.

Only bigray's file is hashed, synced to the disk and committed by a manifest; a peer's may be in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

LABELS = {
    "bigray": "bigray, CheckpointSaver",
    "torch.save": "torch.save to a file",
    "ray sync": "ray.train.report(checkpoint), SYNC",
    "ray async": "ray.train.report(checkpoint), ASYNC",
}


@dataclass(frozen=True)
class Size:
    """What is saved, how often, and the seconds of training around each checkpoint."""

    layers: int
    width: int
    checkpoints: int
    pause_s: float


SIZES = {"full": Size(12, 2048, 6, 6.0), "small": Size(2, 1024, 3, 0.5)}


@dataclass(frozen=True)
class Figures:
    """Of one peer in one process."""

    stalls_s: list[float]
    rate: float
    """Training steps a second after checkpoints, as a share of those before the first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(asdict(measure(arguments.peer, SIZES[arguments.size]))))
        return
    figures: dict[str, list[Figures]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds):
        for peer in arguments.peers:
            figures[peer].append(run_in_own_process(peer, arguments.size))
            stall = statistics.median(figures[peer][-1].stalls_s)
            print(f"round {number + 1}: {LABELS[peer]}: {stall * 1e3:.0f} ms", file=sys.stderr)
    print_table(figures, SIZES[arguments.size])


def run_in_own_process(peer: str, size: str) -> Figures:
    command = [sys.executable, __file__, "--peer", peer, "--size", size]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{peer} failed:\n{done.stderr[-4000:]}")
    return Figures(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(peer: str, size: Size) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        match peer:
            case "bigray":
                return of_bigray(Path(folder), size)
            case "torch.save":
                return of_torch_save(Path(folder), size)
            case _:
                return of_ray(Path(folder), size, peer)


def stalls_while_training(size: Size, checkpoint: Callable[[Any, int], None]) -> Figures:
    """Train, and call `checkpoint` with the module and the number of the checkpoint from time to time."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    module = torch.nn.Sequential(*(torch.nn.Linear(size.width, size.width) for _ in range(size.layers)))
    train_for(size.pause_s, module)  # warm-up
    alone = train_for(size.pause_s, module)
    stalls, rates = [], []
    for number in range(1, size.checkpoints + 1):
        started = time.perf_counter()
        checkpoint(module, number)
        stalls.append(time.perf_counter() - started)
        rates.append(train_for(size.pause_s, module))
    # the first checkpoint of a process allocates what the later ones use again; it is counted like the others
    return Figures(stalls, statistics.median(rates) / alone)


def train_for(seconds: float, module: Any) -> float:
    """Steps a second."""
    import torch

    x = torch.ones(8, module[0].in_features)
    started = time.perf_counter()
    steps = 0
    while time.perf_counter() - started < seconds:
        module.zero_grad()
        module(x).mean().backward()
        steps += 1
    return steps / (time.perf_counter() - started)


def of_bigray(folder: Path, size: Size) -> Figures:
    from bigray.paths import RunPaths
    from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
    from bigray.storage import open_storage
    from bigray.training.checkpoint import Progress, Snapshot, SnapshotBuffers
    from bigray.training.saver import CheckpointSaver

    trial = TrialSpec(
        trial_id="0-net",
        model_name="net",
        model=ModelSpec(factory="bigray.models:mlp"),
        training=TrainingSpec(task="classification"),
        seed=0,
    )
    committed: list[int] = []
    saver = CheckpointSaver(RunPaths(open_storage(folder), "stall"), trial, 1, committed.append)

    def checkpoint(module: Any, number: int) -> None:
        def take(buffers: SnapshotBuffers) -> Snapshot:
            return Snapshot(Progress(step=number), {"model": buffers.copy("model", module.state_dict())})

        saver.submit(take)

    figures = stalls_while_training(size, checkpoint)
    saver.wait()
    assert committed == list(range(1, size.checkpoints + 1))
    return figures


def of_torch_save(folder: Path, size: Size) -> Figures:
    import torch

    return stalls_while_training(size, lambda module, _: torch.save(module.state_dict(), folder / "model.pt"))


def of_ray(folder: Path, size: Size, peer: str) -> Figures:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    def worker(config: dict[str, Any]) -> None:
        import torch

        mode = ray.train.CheckpointUploadMode[config["mode"]]

        def checkpoint(module: Any, number: int) -> None:
            made = tempfile.mkdtemp(dir=config["folder"])
            torch.save(module.state_dict(), Path(made, "model.pt"))
            ray.train.report(
                {"number": number},
                checkpoint=ray.train.Checkpoint.from_directory(made),
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=True,
            )

        figures = stalls_while_training(Size(**config["size"]), checkpoint)
        Path(config["folder"], "figures.json").write_text(json.dumps(asdict(figures)))

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        worker,
        train_loop_config={"mode": peer.split()[1].upper(), "folder": str(folder), "size": asdict(size)},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name="stall",
            storage_path=str(folder / "runs"),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()
    ray.shutdown()
    return Figures(**json.loads((folder / "figures.json").read_text()))


def print_table(figures: dict[str, list[Figures]], size: Size) -> None:
    from rich.console import Console
    from rich.table import Table

    megabytes = 4 * size.layers * (size.width**2 + size.width) / 1e6
    stalls = {peer: [stall for one in of_peer for stall in one.stalls_s] for peer, of_peer in figures.items()}
    first = statistics.median(next(iter(stalls.values())))
    table = Table(title=f"stall of the training loop by a checkpoint of {megabytes:.0f} MB")
    for name in ("peer", "checkpoints", "median", "least", "most", f"beside {next(iter(stalls))}", "rate after"):
        table.add_column(name, justify="left" if name == "peer" else "right")
    for peer, values in stalls.items():
        middle = statistics.median(values)
        milliseconds = (f"{value * 1e3:.0f} ms" for value in (middle, min(values), max(values)))
        rate = statistics.median(one.rate for one in figures[peer])
        table.add_row(LABELS[peer], str(len(values)), *milliseconds, f"{middle / first:.1f}x", f"{rate:.0%}")
    console = Console(width=120)
    console.print(table)
    versions = ", ".join(f"{name} {version(name)}" for name in ("bigray", "ray", "torch"))
    console.print(f"{versions}, Python {platform.python_version()}; {os.cpu_count()} CPUs, {platform.platform()}")


if __name__ == "__main__":
    main()
