"""`global_batch_size = "auto"`: the largest micro-batch whose step fits in the memory of every worker (worker).

A copy of the model takes optimizer steps on more and more rows: the number doubles while it fits, then the gap is
halved down to an eighth. A size is tried only where a line through the last two peaks says that it will fit, so that
the machine is not driven out of memory to find out. All ranks try the same sizes, and one "no" counts for all.

Memory decides, not speed: on a CPU a smaller batch is often as fast, and any very large one may learn worse for each
epoch. Where that matters, give a number. For a loop of one's own the step that is tried is bigray's.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from bigray.data.dataset import TrainingArrays
from bigray.errors import StorageError, TrainingFailed
from bigray.host_memory import host_memory, shown
from bigray.models import build_model
from bigray.models.resolve import code_hash
from bigray.paths import RunPaths
from bigray.specs import TrialSpec, digest
from bigray.training.fsdp import shard_module
from bigray.training.loop import Worker
from bigray.training.memory import peak_growth_bytes
from bigray.training.optimization import make_optimizer, make_scaler
from bigray.training.recomputation import recompute_blocks
from bigray.training.tasks import load_task, sample_losses
from bigray.training.tensor_memory import TensorMemory

GPU_SHARE = 0.9
"""Of the GPU's free memory; the rest is for fragmentation."""
CPU_SHARE = 0.5
"""Of the free memory, divided among the workers of the machine; the rest is for checkpoints in memory and for others.
A doubled batch takes at most twice its memory, so a wrong forecast still stays within what is free."""
FIRST_ROWS = 2
"""Batch norm cannot train on one row."""
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}

Broadcast = Callable[[Callable[[], Any]], Any]
"""Call a function on rank 0 and give its result to every rank."""


@dataclass(frozen=True)
class BatchSizes:
    """What was found for a trial. It stays when the number of workers changes: larger shares are then accumulated."""

    global_batch_size: int
    micro_batch_size: int
    """Rows of one forward pass of one worker."""


def resolve_batch_size(
    trial: TrialSpec,
    data: TrainingArrays,
    num_outputs: int,
    worker: Worker,
    paths: RunPaths,
    broadcast: Broadcast,
) -> TrialSpec:
    """The trial with numbers in the place of "auto"; as it is where it has them.

    Collective; before the trial's own module is built. A trial that goes on has the numbers it began with, from its
    folder. A new one takes them from the cache beside the runs, made for this model and these devices; only where that
    has none the search runs.

    Raises:
        TrainingFailed: not even the smallest batch fits; names the rank's need and budget.
        StorageError: the trial's record cannot be read or written.
    """
    if trial.training.global_batch_size != "auto":
        return trial
    sizes: BatchSizes | None = broadcast(lambda: _recorded(paths, trial))
    if sizes is None:
        micro_batch = _cached_micro_batch(trial, data, num_outputs, worker, paths, broadcast)
        sizes = BatchSizes(micro_batch * worker.world_size, micro_batch)
        found = sizes
        broadcast(lambda: _record(paths, trial, found))
    return trial.model_copy(update={"training": trial.training.model_copy(update=asdict(sizes))})


def find_micro_batch(
    trial: TrialSpec,
    data: TrainingArrays,
    num_outputs: int,
    worker: Worker,
    *,
    workers_here: int = 1,
    budget_bytes: float | None = None,
) -> int:
    """The largest number of rows that every rank can take in one training step. Collective; the same on all.

    Builds a copy of the model and leaves nothing of it behind, random numbers included. `workers_here` workers share
    this one's memory. On a CPU `budget_bytes` bounds what a step takes above the model; by default it is `CPU_SHARE`
    of the free memory for each worker.

    On a GPU it bounds everything allocated, `GPU_SHARE` of the free memory by default. Not run on a GPU so far.

    Raises:
        TrainingFailed: not even the smallest batch fits here.
    """
    most_rows = _most_rows(trial, data, worker)
    devices = [worker.device] if worker.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        meter = (_GpuMeter if devices else _CpuMeter)(worker.device, workers_here)
        copy = _TrialCopy(trial, data, num_outputs, worker)
        copy.step(min(FIRST_ROWS, most_rows))  # makes the optimizer's state and what libraries keep
        budget = (meter.budget_bytes() if budget_bytes is None else budget_bytes) - copy.reserved_bytes()
        peaks: dict[int, float] = {}

        def peak_bytes(rows: int) -> float:
            peaks[rows] = meter.peak_bytes(lambda: copy.step(rows))
            return peaks[rows]

        found = largest_that_fits(peak_bytes, budget, most_rows, lambda fits: _all_agree(fits, worker))
    if found == 0:
        rows, peak = next(iter(peaks.items()))
        raise TrainingFailed(
            f"global_batch_size 'auto': {rows} rows of model '{trial.model_name}' need {shown(peak)} on rank "
            f"{worker.rank}, whose budget is {shown(budget)}, or do not fit on another rank; use more memory a worker, "
            "fewer workers a node, or gradient_checkpointing"
        )
    return found


def largest_that_fits(
    peak_bytes: Callable[[int], float],
    budget_bytes: float,
    most_rows: int,
    all_agree: Callable[[bool], bool] = lambda fits: fits,
) -> int:
    """Largest number of rows found whose `peak_bytes(rows)` is within the budget, to about an eighth; 0 for none.

    `all_agree` makes one answer out of those of all ranks, which then ask for the same sizes in the same order.
    """
    peaks: dict[int, float] = {}

    def fits(rows: int) -> bool:
        if not all_agree(forecast(peaks, rows) <= budget_bytes):
            return False
        peak = peak_bytes(rows)
        if math.isfinite(peak):  # infinite: it ran out of memory, which tells nothing about other sizes
            peaks[rows] = peak
        return all_agree(peak <= budget_bytes)

    good, bad = 0, most_rows + 1
    rows = min(FIRST_ROWS, most_rows)
    while rows > good and fits(rows):
        good, rows = rows, min(2 * rows, most_rows)
    if good in (0, most_rows):
        return good
    bad = rows
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def forecast(peaks: dict[int, float], rows: int) -> float:
    """Peak of a step on `rows`, on the line through the two largest sizes measured; one alone draws no line.

    With none measured nothing speaks against a try.
    """
    if not peaks:
        return -math.inf
    *smaller, last = sorted(peaks)
    if not smaller:
        return peaks[last]
    slope = (peaks[last] - peaks[smaller[-1]]) / (last - smaller[-1])
    return peaks[last] + max(0.0, slope) * (rows - last)


class _TrialCopy:
    """A model and optimizer like the trial's, to be thrown away. It computes as the trial will, but for itself."""

    def __init__(self, trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker) -> None:
        self._spec, self._data, self._worker = trial.training, data, worker
        module = build_model(trial.model.factory, trial.model.params, data.x_train.shape[1:], num_outputs)
        if self._spec.gradient_checkpointing:
            recompute_blocks(module)
        is_sharded = self._spec.strategy == "fsdp"
        self._module = shard_module(module, worker, self._spec.precision) if is_sharded else module.to(worker.device)
        self._optimizer = make_optimizer(self._spec, self._module)
        self._scaler = make_scaler(self._spec.precision, worker.device)
        self._task = load_task(self._spec, num_outputs, data.y_train)

    def step(self, rows: int) -> None:
        """Forward, backward and optimizer step on the first `rows` rows."""
        device, precision = self._worker.device, self._spec.precision
        x = torch.tensor(self._data.x_train[:rows], device=device)
        y = torch.tensor(self._data.y_train[:rows], device=device)
        self._module.train()
        autocast = self._spec.strategy == "ddp" and precision in LOW_PRECISION
        with torch.autocast(device.type, dtype=LOW_PRECISION.get(precision, torch.bfloat16), enabled=autocast):
            outputs = self._module(x)
        loss = sample_losses(self._task, outputs, y).sum() / rows
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def reserved_bytes(self) -> int:
        """What the trial will hold beside this copy: the gradients' buckets of DDP, the averaged weights."""
        parameters = self._module.parameters()
        local = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]
        copies = int(self._spec.strategy == "ddp" and self._worker.world_size > 1)
        copies += int(self._spec.ema_decay is not None)
        return copies * sum(parameter.numel() * parameter.element_size() for parameter in local)


class _CpuMeter:
    """Resident memory that a step takes above the model. Not what stays after it: libraries keep a little a shape.

    No less than its tensors take: what others in this process free meanwhile, and free memory within the heap that the
    step uses again, hide a part of the rise.
    """

    def __init__(self, device: torch.device, workers_here: int) -> None:
        self._workers_here = workers_here

    def budget_bytes(self) -> float:
        return CPU_SHARE * host_memory().free_bytes / self._workers_here

    def peak_bytes(self, step: Callable[[], None]) -> float:
        try:
            with (tensors := TensorMemory()):
                growth = peak_growth_bytes(step)
            return max(growth, tensors.peak_bytes)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # the CPU allocator has no exception of its own
                raise
            return math.inf


class _GpuMeter:
    """Everything this process has allocated on its GPU. Not run on a GPU so far."""

    def __init__(self, device: torch.device, workers_here: int) -> None:
        self._device = device
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        # what this process holds already is counted in the peaks too
        self._budget_bytes = GPU_SHARE * (free_bytes + torch.cuda.memory_allocated(device)) / workers_here

    def budget_bytes(self) -> float:
        return self._budget_bytes

    def peak_bytes(self, step: Callable[[], None]) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            step()
        except torch.OutOfMemoryError:
            return math.inf
        return torch.cuda.max_memory_allocated(self._device)


def _most_rows(trial: TrialSpec, data: TrainingArrays, worker: Worker) -> int:
    """No more than one epoch has for this many workers, or than the job allows."""
    rows = max(1, len(data.x_train) // worker.world_size)
    return min(rows, trial.training.micro_batch_size or rows)


def _all_agree(fits: bool, worker: Worker) -> bool:
    if worker.world_size == 1:
        return fits
    answer = torch.tensor([int(fits)], device=worker.device)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def _cached_micro_batch(
    trial: TrialSpec,
    data: TrainingArrays,
    num_outputs: int,
    worker: Worker,
    paths: RunPaths,
    broadcast: Broadcast,
) -> int:
    places = _places(worker)
    conditions = _conditions(trial, data, num_outputs, worker, places)
    known: int | None = broadcast(lambda: _read_cache(paths, conditions))
    if known is not None:
        return known
    found = find_micro_batch(trial, data, num_outputs, worker, workers_here=places.count(places[worker.rank]))
    broadcast(lambda: _write_cache(paths, conditions, found))
    return found


def _places(worker: Worker) -> list[tuple[str, ...]]:
    """For each rank the memory it uses, as (host, kind, size): equal entries share it."""
    here: tuple[str, ...]
    if worker.device.type == "cuda":
        device = torch.cuda.get_device_properties(worker.device)
        here = (f"{socket.gethostname()}/{device.uuid}", device.name, str(device.total_memory))
    else:
        here = (socket.gethostname(), "cpu", str(host_memory().limit_bytes))
    if worker.world_size == 1:
        return [here]
    places: list[Any] = [None] * worker.world_size
    dist.all_gather_object(places, here)
    return places


def _conditions(
    trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker, places: list[tuple[str, ...]]
) -> dict[str, Any]:
    """All that the number depends on. The free memory is not among it: it is another one each time."""
    spec = trial.training
    kinds = sorted({(kind, size, places.count((host, kind, size))) for host, kind, size in places})
    return {
        "factory": trial.model.factory,
        "code": code_hash(trial.model.factory),
        "params": trial.model.params,
        "input_shape": data.x_train.shape[1:],
        "num_outputs": num_outputs,
        "task": spec.task,
        "precision": spec.precision,
        "strategy": spec.strategy,
        "optimizer": [spec.optimizer, spec.momentum > 0, spec.optimizer_params],
        "ema": spec.ema_decay is not None,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "world_size": worker.world_size,
        "most_rows": _most_rows(trial, data, worker),
        "devices": [{"kind": kind, "bytes": size, "workers": workers} for kind, size, workers in kinds],
        "torch": torch.__version__,
    }


def _read_cache(paths: RunPaths, conditions: dict[str, Any]) -> int | None:
    """A file that cannot be read costs a search, nothing more."""
    name = paths.micro_batch_file(digest(conditions))
    try:
        return int(json.loads(paths.shared.read_bytes(name))["micro_batch_size"]) if paths.shared.exists(name) else None
    except (StorageError, ValueError, KeyError, TypeError):
        return None


def _write_cache(paths: RunPaths, conditions: dict[str, Any], micro_batch: int) -> None:
    document = {"micro_batch_size": micro_batch, "for": conditions}
    name = paths.micro_batch_file(digest(conditions))
    paths.shared.write_bytes(name, json.dumps(document, indent=2).encode())


def _recorded(paths: RunPaths, trial: TrialSpec) -> BatchSizes | None:
    name = paths.batch_size_file(trial.trial_id)
    if not paths.storage.exists(name):
        return None
    try:
        return BatchSizes(**json.loads(paths.storage.read_bytes(name)))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{paths.storage.uri}/{name}: expected the trial's batch sizes, found {error}") from error


def _record(paths: RunPaths, trial: TrialSpec, sizes: BatchSizes) -> None:
    paths.storage.write_bytes(paths.batch_size_file(trial.trial_id), json.dumps(asdict(sizes)).encode())
