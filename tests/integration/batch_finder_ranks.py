"""What the processes of `test_batch_finder` do; a module of its own, so that they can import it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bigray.data.dataset import TrainingArrays
from bigray.errors import TrainingFailed
from bigray.paths import RunPaths
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import open_storage
from bigray.training.batch_finder import find_micro_batch, resolve_batch_size
from bigray.training.loop import Worker

BUDGETS_BYTES = (60_000_000, 12_000_000)
ROW_BYTES = 4 * 1000
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp", "gradient_checkpointing": True},
}


def make_trial(name: str = "auto", **training: Any) -> TrialSpec:
    settings = {"task": "classification", "global_batch_size": "auto", **training}
    return TrialSpec(
        trial_id=name,
        model_name="net",
        model=ModelSpec(factory="bigray.models:mlp", params={"hidden": [50, 50]}),
        training=TrainingSpec.model_validate(settings),
        seed=0,
    )


def make_data() -> TrainingArrays:
    x, y = np.ones((5_000, ROW_BYTES // 4), dtype=np.float32), np.zeros(5_000, dtype=np.int64)
    return TrainingArrays(x, y, x[:2], y[:2])


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    worker, data = Worker(rank, 2, torch.device("cpu")), make_data()
    results: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        results[name] = find_micro_batch(make_trial(**settings), data, 3, worker, budget_bytes=BUDGETS_BYTES[rank])
    try:
        find_micro_batch(make_trial(), data, 3, worker, budget_bytes=(BUDGETS_BYTES[0], 0)[rank])
    except TrainingFailed as error:
        results["refused"] = str(error)
    paths = RunPaths(open_storage(folder / "run"), "run")
    results["resolved"] = resolve_batch_size(
        make_trial(micro_batch_size=8), data, 3, worker, paths, broadcast
    ).training.model_dump(include={"global_batch_size", "micro_batch_size"})
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def broadcast(make: Any) -> Any:
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
