"""Reading a training set that fits in memory: bigray's index slices, and torch's `DataLoader`; and how many copies.

    python benchmarks/input_pipeline.py [--size full|small] [--rounds 3]

Speed: samples a second of one worker that reads an epoch of 60,000 x 784 float32 in batches of 64, shuffled, and does
nothing else. bigray's side makes the calls that its training loop makes for each batch, on the array that Ray's object
store holds, the count of the samples included. Peers: `DataLoader(TensorDataset, shuffle=True)` with no workers and
with two that stay up between epochs, and slices of a tensor by a permutation, written by hand. One thread everywhere.

Memory: what eight processes that read a set of 1 GB (small: 100 MB) add to the memory of all processes, over the size
of one copy: from Ray's object store, and by `numpy.load` in each. It is the sum of the proportional set sizes
(`/proc/*/smaps_rollup`) of the readers, the driver and Ray's own processes, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from measuring import print_table, run_in_own_process, spread, tell

BATCH, FEATURES = 64, 784
READERS = 8
LOADERS = {
    "bigray": "bigray, index slices of the object store",
    "loader 0": "DataLoader(TensorDataset), num_workers=0",
    "loader 2": "DataLoader(TensorDataset), num_workers=2, persistent",
    "by hand": "x[permutation[a:b]], written by hand",
}
MEMORY = {"memory bigray": "Ray's object store, mapped", "memory load": "numpy.load in each"}


@dataclass(frozen=True)
class Size:
    """Rows of an epoch, epochs of a process, bytes of the set that is shared."""

    rows: int
    epochs: int
    shared_bytes: int


SIZES = {"full": Size(60_000, 3, 10**9), "small": Size(20_000, 1, 10**8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, help="default: 3, with --size small 1")
    parser.add_argument("--peer", choices=(*LOADERS, *MEMORY), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.peer, size, Path(folder))))
        return
    rates: dict[str, list[float]] = {peer: [] for peer in LOADERS}
    for number in range(arguments.rounds or (1 if arguments.size == "small" else 3)):
        for peer in LOADERS:
            rates[peer] += run_in_own_process(__file__, "--peer", peer, "--size", arguments.size)
            tell(f"round {number + 1}: {LOADERS[peer]}: {rates[peer][-1]:,.0f} samples/s")
    show_rates(rates)
    copies = {peer: run_in_own_process(__file__, "--peer", peer, "--size", arguments.size) for peer in MEMORY}
    show_copies(size, copies)


def measure(peer: str, size: Size, folder: Path) -> Any:
    match peer:
        case "bigray":
            return of_bigray(size)
        case "memory bigray":
            return copies_in_object_store(size)
        case "memory load":
            return copies_by_loading(size, folder)
        case _:
            return of_torch(peer, size)


def rates_of(size: Size, read_epoch: Callable[[], int]) -> list[float]:
    """Samples a second of each epoch, after one that warms up."""
    rates = []
    for epoch in range(1 + size.epochs):
        started = time.perf_counter()
        num_rows = read_epoch()
        taken = time.perf_counter() - started
        assert num_rows == size.rows
        rates += [num_rows / taken] if epoch else []
    return rates


def make_rows(num_rows: int) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.standard_normal(size=(num_rows, FEATURES), dtype=np.float32)
    return x, generator.integers(0, 10, num_rows)


def of_bigray(size: Size) -> list[float]:
    import itertools

    import ray
    import torch

    from bigray.data.batches import epoch_order, global_batch, steps_per_epoch, worker_share
    from bigray.data.dataset import TrainingArrays
    from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
    from bigray.training.loop import LoopHooks, TrialTraining, Worker

    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    x, y = make_rows(size.rows)
    data: TrainingArrays = ray.get(ray.put(TrainingArrays(x, y, x[:64].copy(), y[:64].copy())))
    trial = TrialSpec(
        trial_id="0-net",
        model_name="net",
        model=ModelSpec(factory="bigray.models:linear"),
        training=TrainingSpec(task="classification", global_batch_size=BATCH),
        seed=0,
    )
    training = TrialTraining(trial, data, 10, Worker(0, 1, torch.device("cpu")), cast(LoopHooks, None))
    epochs = itertools.count()

    def read_epoch() -> int:
        # the calls of `TrialTraining._train_epoch`, `_gradients` and `_pass`, without those that compute
        num_read = 0
        order = epoch_order(0, next(epochs), size.rows)
        for batch in range(steps_per_epoch(size.rows, BATCH)):
            share = worker_share(global_batch(order, batch, BATCH), 0, 1)
            training._ledger.load(share)
            inputs, _ = training._load(data.x_train, share), training._load(data.y_train, share)
            training._ledger.commit()
            num_read += len(inputs)
        return num_read

    rates = rates_of(size, read_epoch)
    ray.shutdown()
    return rates


def of_torch(peer: str, size: Size) -> list[float]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    x, y = (torch.from_numpy(array) for array in make_rows(size.rows))
    if peer == "by hand":

        def read_by_hand() -> int:
            order = torch.randperm(len(x))
            return sum(len((x[rows], y[rows])[0]) for rows in order.split(BATCH))

        return rates_of(size, read_by_hand)
    num_workers = int(peer.split()[1])
    loader = DataLoader(
        TensorDataset(x, y),
        batch_size=BATCH,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return rates_of(size, lambda: sum(len(inputs) for inputs, _ in loader))


def copies_in_object_store(size: Size) -> dict[str, float]:
    import ray

    x, _ = make_rows(size.shared_bytes // (4 * FEATURES))
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2 * x.nbytes
    )
    return copies(x, lambda: (x.nbytes, ray.put(x)))


def copies_by_loading(size: Size, folder: Path) -> dict[str, float]:
    import numpy as np
    import ray

    x, _ = make_rows(size.shared_bytes // (4 * FEATURES))
    np.save(folder / "x.npy", x)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    return copies(x, lambda: (x.nbytes, str(folder / "x.npy")))


def copies(x: Any, share: Callable[[], tuple[int, Any]]) -> dict[str, float]:
    """Copies of `x` in memory once every reader has read all of it: beside one, of the readers and of all processes."""
    import ray

    @ray.remote(num_cpus=0)
    class Reader:
        def pid(self) -> int:
            import numpy as np

            np.ones(1).sum()
            return os.getpid()

        def read(self, source: list[Any]) -> float:
            import numpy as np

            found = source[0] if isinstance(source[0], str) else ray.get(source[0])
            self.x = np.load(found) if isinstance(found, str) else found
            return float(self.x.sum())

    readers = [Reader.remote() for _ in range(READERS)]
    pids = ray.get([reader.pid.remote() for reader in readers])
    time.sleep(2.0)
    before, before_all = pss_bytes(pids), pss_bytes(process_tree())
    num_bytes, source = share()
    sums = ray.get([reader.read.remote([source]) for reader in readers])
    assert len(set(sums)) == 1
    after, after_all = pss_bytes(pids), pss_bytes(process_tree())
    ray.shutdown()
    return {"readers": (after - before) / num_bytes, "all": (after_all - before_all) / num_bytes}


def process_tree() -> list[int]:
    """This process and its descendants, Ray's processes among them."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # ended while we looked
                continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def pss_bytes(pids: list[int]) -> int:
    """Sum of their proportional set sizes: a page that several processes map counts once in all."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def show_rates(rates: dict[str, list[float]]) -> None:
    ours = statistics.median(rates["bigray"])
    rows = [
        (label, str(len(values)), *spread(values, "{:,.0f}"), f"{ours / statistics.median(values):.2f}x")
        for label, values in ((LOADERS[peer], values) for peer, values in rates.items())
    ]
    columns = ("loader", "epochs", "samples/s", "least", "most", "bigray / loader")
    print_table(f"an epoch of rows x {FEATURES} float32, batches of {BATCH}", columns, rows)


def show_copies(size: Size, found: dict[str, dict[str, float]]) -> None:
    ours = found["memory bigray"]["all"]
    rows = [
        (MEMORY[peer], f"{one['all']:.2f}", f"{one['readers']:.2f}", f"{one['all'] / ours:.1f}x")
        for peer, one in found.items()
    ]
    columns = (f"{READERS} readers of {size.shared_bytes / 1e6:.0f} MB", "copies", "in the readers", "beside bigray")
    print_table("copies of the set in memory (added proportional set size / size of the set)", columns, rows)


if __name__ == "__main__":
    main()
