"""Reading pictures that are JPEG files: bigray's decode-once, and a `DataLoader` that decodes in every epoch.

    python benchmarks/image_decoding.py [--data FILE.parquet] [--size full|small] [--rounds 2]

Samples a second of an epoch, shuffled, in batches of 128, normalised, ending as float32 tensors; nothing is trained.
`--data` is a Parquet file with columns `image` (JPEG or PNG files) and `label`, such as CIFAR-10's 50,000 training
pictures; without it, as many JPEGs of 32 x 32 are made of noise that was smoothed.

bigray: `prepare_dataset` decodes all of them, which is the first epoch's price, and Ray's object store holds them from
then on; later epochs make the calls of the training loop for each batch. Peers, with the decoder that bigray has
(Pillow): a map-style dataset as tutorials write it, one picture a call; and tuned, where `__getitems__` decodes a
batch into one array that is normalised at once. Each without workers, and with two that stay up between epochs.
One thread of torch everywhere. bigray's epoch is read by one process.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from measuring import print_table, run_in_own_process, spread, tell

BATCH, SIDE = 128, 32
LABELS = {
    "bigray": "bigray, decoded once",
    "tutorial 0": "DataLoader, a picture a call, num_workers=0",
    "tutorial 2": "DataLoader, a picture a call, num_workers=2, persistent",
    "tuned 0": "DataLoader, a batch a call, num_workers=0",
    "tuned 2": "DataLoader, a batch a call, num_workers=2, persistent",
}


@dataclass(frozen=True)
class Size:
    """Pictures, and epochs after the first."""

    pictures: int
    epochs: int


SIZES = {"full": Size(50_000, 2), "small": Size(2_000, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a Parquet file of pictures; default: made")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, help="default: 2, with --size small 1")
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.peer:
        print(json.dumps(measure(arguments.peer, size, Path(arguments.data))))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = cut(Path(folder) / "pictures.parquet", arguments.data, size.pictures)
        times: dict[str, list[list[float]]] = {peer: [] for peer in LABELS}
        for number in range(arguments.rounds or (1 if arguments.size == "small" else 2)):
            for peer in LABELS:
                found = run_in_own_process(__file__, "--peer", peer, "--size", arguments.size, "--data", str(data))
                times[peer].append(found)
                told = ", ".join(f"{seconds:.2f}" for seconds in found)
                tell(f"round {number + 1}: {LABELS[peer]}: epochs of {told} s")
    show(times, size.pictures)


def cut(path: Path, source: str | None, count: int) -> Path:
    """The first pictures of a file, or ones that are made."""
    import pyarrow as pa
    from pyarrow import parquet

    table = made(count) if source is None else parquet.read_table(source).slice(0, count)
    if table.num_rows < count:
        raise SystemExit(f"--data: {source} holds {table.num_rows} pictures; {count} are wanted")
    table = table.set_column(1, "label", pa.array([f"class {i % 10}" for i in range(count)])).select(["image", "label"])
    parquet.write_table(table, path)
    return path


def made(count: int) -> Any:
    import numpy as np
    import pyarrow as pa
    from PIL import Image

    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        with io.BytesIO() as file:
            coarse.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
    return pa.table({"image": files, "label": ["" for _ in files]})


def measure(peer: str, size: Size, data: Path) -> list[float]:
    """Seconds of each epoch, the first with all that goes before it."""
    import torch

    torch.set_num_threads(1)
    return of_bigray(size, data) if peer == "bigray" else of_torch(peer, size, data)


def of_bigray(size: Size, data: Path) -> list[float]:
    import ray
    import torch

    from bigray.data.batches import epoch_order, global_batch, steps_per_epoch, worker_share
    from bigray.data.dataset import TrainingArrays, prepare_dataset
    from bigray.specs import DataSpec, ModelSpec, SplitSpec, TrainingSpec, TrialSpec
    from bigray.training.loop import LoopHooks, TrialTraining, Worker

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    # a split has rows to validate on; they are decoded too, and a fiftieth of all
    spec = DataSpec(
        source=str(data), target="label", normalize="standard", split=SplitSpec(validation=0.02, holdout=0.0)
    )
    started = time.perf_counter()
    arrays: TrainingArrays = ray.get(ray.put(prepare_dataset(spec, "classification").arrays))
    decoded_s = time.perf_counter() - started
    trial = TrialSpec(
        trial_id="0-net",
        model_name="net",
        model=ModelSpec(factory="bigray.models:linear"),
        training=TrainingSpec(task="classification", global_batch_size=BATCH),
        seed=0,
    )
    training = TrialTraining(trial, arrays, 10, Worker(0, 1, torch.device("cpu")), cast(LoopHooks, None))
    num_rows, epochs = len(arrays.x_train), itertools.count()

    def read_epoch() -> int:
        # the calls of `TrialTraining._train_epoch`, `_gradients` and `_pass`, without those that compute
        order = epoch_order(0, next(epochs), num_rows)
        num_read = 0
        for batch in range(steps_per_epoch(num_rows, BATCH)):
            share = worker_share(global_batch(order, batch, BATCH), 0, 1)
            training._ledger.load(share)
            inputs, _ = training._load(arrays.x_train, share), training._load(arrays.y_train, share)
            training._ledger.commit()
            num_read += len(inputs)
        return num_read

    seconds = epochs_of(size, read_epoch, num_rows)
    ray.shutdown()
    scaled = size.pictures / num_rows  # the few that are validated on are read by nobody here
    return [decoded_s + seconds[0] * scaled, *(each * scaled for each in seconds[1:])]


def of_torch(peer: str, size: Size, data: Path) -> list[float]:
    kind, _, num_workers = peer.partition(" ")
    started = time.perf_counter()
    from pyarrow import parquet
    from torch.utils.data import DataLoader

    table = parquet.read_table(data)
    pictures = (Tutorial if kind == "tutorial" else Tuned)(table)
    loader: Any = DataLoader(
        cast(Any, pictures),
        batch_size=BATCH,
        shuffle=True,
        num_workers=int(num_workers),
        persistent_workers=num_workers != "0",
        collate_fn=None if kind == "tutorial" else lambda batch: batch,
    )
    read_s = time.perf_counter() - started
    seconds = epochs_of(size, lambda: sum(len(inputs) for inputs, _ in loader), size.pictures)
    return [read_s + seconds[0], *seconds[1:]]


class Tutorial:
    """One picture a call."""

    def __init__(self, table: Any) -> None:
        self._files, self._labels = table.column("image").to_pylist(), list(range(table.num_rows))
        import torch

        self._mean = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)
        self._std = torch.tensor([0.2470, 0.2435, 0.2616]).reshape(3, 1, 1)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        import numpy as np
        import torch
        from PIL import Image

        image = np.array(Image.open(io.BytesIO(self._files[row])).convert("RGB"))
        tensor = torch.from_numpy(image).permute(2, 0, 1).float().div(255)
        return (tensor - self._mean) / self._std, self._labels[row]


class Tuned(Tutorial):
    """A batch a call, decoded into one array."""

    def __getitems__(self, rows: list[int]) -> tuple[Any, Any]:
        import numpy as np
        import torch
        from PIL import Image

        pixels = np.empty((len(rows), SIDE, SIDE, 3), np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = Image.open(io.BytesIO(self._files[row]))
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().mul_(1 / 255)
        return tensor.sub_(self._mean).div_(self._std), torch.tensor([self._labels[row] for row in rows])


def epochs_of(size: Size, read_epoch: Callable[[], int], num_rows: int) -> list[float]:
    seconds = []
    for _ in range(1 + size.epochs):
        started = time.perf_counter()
        found = read_epoch()
        seconds.append(time.perf_counter() - started)
        assert found == num_rows, (found, num_rows)
    return seconds


def show(times: dict[str, list[list[float]]], num_pictures: int) -> None:
    first = {peer: [found[0] for found in rounds] for peer, rounds in times.items()}
    later = {peer: [seconds for found in rounds for seconds in found[1:]] for peer, rounds in times.items()}
    ours = sorted(later["bigray"])[len(later["bigray"]) // 2]
    rows = []
    for peer, label in LABELS.items():
        median = sorted(later[peer])[len(later[peer]) // 2]
        rows.append((label, spread(first[peer], "{:.2f}")[0], *spread(later[peer], "{:.3f}"), f"{median / ours:.1f}x"))
    print_table(
        f"an epoch of {num_pictures:,} pictures, seconds",
        ("who reads", "first epoch", "later: median", "least", "most", "of bigray's"),
        rows,
        packages=("bigray", "ray", "torch", "pillow", "pyarrow", "numpy"),
    )


if __name__ == "__main__":
    main()
