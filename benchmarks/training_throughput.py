"""Steady training throughput of two workers: bigray's loop in a live group, and `torchrun` with a plain DDP loop.

    python benchmarks/training_throughput.py [--size full|small] [--rounds 3]

Samples a second from step 50 to step 550 of one epoch, by the clock of rank 0, for an MLP 784-256-10 at batches of 64
and 256, and a CNN with 16 and 32 channels on 28x28. Both sides have the same model, AdamW with one fused kernel, the
whole set in memory, the same rows in the same order, and one thread for each worker. What bigray's loop does besides is
in its figure: the check for NaN, the count of the samples, heartbeat, and the ranks' agreement on checkpoints.

In each round both sides run in processes of their own, one after the other, and warm up by a training that does not
count; bigray's Ray is up only in its turn. The cost of `exact = true` and of `strategy = "fsdp"` is measured beside
bigray's plain loop, in the same group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import Stamp, print_table, read_stamps, run_in_own_process, spread, tell, torchrun, wait_for
from training_peers.plain_loop import PlainJob

MODELS = {
    "mlp 784-256-10": ("bigray.models:mlp", {"hidden": [256]}, [784]),
    "cnn 16, 32": ("bigray.models:cnn", {"channels": [16, 32]}, [28, 28]),
}
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "bigray": ({}, 1),
    "bigray, exact": ({"exact": True}, 2),
    "bigray, fsdp": ({"strategy": "fsdp"}, 1),
}
"""Settings, and passes of a worker in a step: with exact it computes two of the four logical shards."""
MARGIN = 5
"""Steps after the last one that counts."""


@dataclass(frozen=True)
class Size:
    """Models and batches, the steps that count, and how often each is measured in a round."""

    cases: tuple[tuple[str, int], ...]
    first: int
    last: int
    repeats: int


SIZES = {
    "full": Size((("mlp 784-256-10", 64), ("mlp 784-256-10", 256), ("cnn 16, 32", 64)), 50, 550, 2),
    "small": Size((("mlp 784-256-10", 64), ("cnn 16, 32", 64)), 20, 120, 1),
}
Figures = dict[str, list[float]]
"""Samples a second, by case and peer as one name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, help="default: 3, with --size small 1")
    parser.add_argument("--peer", choices=("bigray", "torchrun"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            figures = of_bigray(size, Path(folder)) if arguments.peer == "bigray" else of_torchrun(size, Path(folder))
        print(json.dumps(figures))
        return
    everything: Figures = defaultdict(list)
    for number in range(arguments.rounds or (1 if arguments.size == "small" else 3)):
        for peer in ("bigray", "torchrun"):
            started = time.monotonic()
            found = run_in_own_process(__file__, "--peer", peer, "--size", arguments.size)
            for name, values in found.items():
                everything[name] += values
            tell(f"round {number + 1}: {peer}: {time.monotonic() - started:.0f} s")
    show(size, everything)


def make_job(size: Size, case: tuple[str, int], stamps: Path, passes: int = 1) -> PlainJob:
    model, batch = case
    factory, params, shape = MODELS[model]
    # step n begins with pass n: the time between these two is that of the steps that count
    at = [size.first * passes + 1, size.last * passes + 1]
    return PlainJob(
        factory="training_peers.networks:stamped",
        params={"factory": factory, "params": params, "path": str(stamps), "at": at},
        rows=batch * (size.last + MARGIN),
        batch=batch,
        shape=shape,
    )


def rate(size: Size, case: tuple[str, int], stamps: list[Stamp]) -> float:
    """Samples a second of rank 0."""
    first, last = (stamp.at_s for stamp in stamps if stamp.rank == 0)
    return case[1] * (size.last - size.first) / (last - first)


def name_of(case: tuple[str, int], peer: str) -> str:
    return f"{case[0]}, batch {case[1]}|{peer}"


def of_bigray(size: Size, folder: Path) -> Figures:
    import ray
    from training_peers.bigray_group import live_group, own_ray

    figures: Figures = defaultdict(list)
    with own_ray():
        for case in size.cases:
            job = make_job(size, case, folder)
            with live_group(job.rows, job.shape, folder / name_of(case, "runs"), warm_spare=False) as group:
                # Ray is still starting idle processes when the first trial begins
                ray.get(group.execute(make_job(size, case, folder / "warm-up")))
                for repeat in range(size.repeats):
                    for variant, (settings, passes) in VARIANTS.items():
                        stamps = folder / f"{name_of(case, variant)}-{repeat}"
                        ray.get(group.execute(make_job(size, case, stamps, passes), **settings))
                        figures[name_of(case, variant)].append(rate(size, case, read_stamps(stamps)))
    return figures


def of_torchrun(size: Size, folder: Path) -> Figures:
    figures: Figures = defaultdict(list)
    repeats = range(1 + size.repeats)
    stamps = {
        (case, repeat): folder / f"{name_of(case, 'torchrun')}-{repeat}" for case in size.cases for repeat in repeats
    }
    jobs = [asdict(make_job(size, case, path)) for (case, _), path in stamps.items()]
    with torchrun({"jobs": jobs}) as process:
        wait_for(lambda: process.poll() is not None, "the end of torchrun")
    for (case, repeat), path in stamps.items():
        if repeat:  # the first is the warm-up
            figures[name_of(case, "torchrun")].append(rate(size, case, read_stamps(path)))
    return figures


def show(size: Size, figures: Figures) -> None:
    rows = []
    for case in size.cases:
        plain = statistics.median(figures[name_of(case, "bigray")])
        peer = statistics.median(figures[name_of(case, "torchrun")])
        for name in ("torchrun", *VARIANTS):
            values = figures[name_of(case, name)]
            middle = statistics.median(values)
            beside_plain = f"{middle / plain:.2f}x" if name.startswith("bigray,") else ""
            ratios = f"{middle / peer:.3f}x" if name == "bigray" else "", beside_plain
            label = f"{case[0]}, batch {case[1]}: {name}"
            rows.append((label, str(len(values)), *spread(values, "{:,.0f}"), *ratios))
    columns = ("model and loop", "runs", "samples/s", "least", "most", "bigray / torchrun", "beside bigray plain")
    print_table(f"training samples a second, 2 workers, steps {size.first} to {size.last}", columns, rows)


if __name__ == "__main__":
    main()
