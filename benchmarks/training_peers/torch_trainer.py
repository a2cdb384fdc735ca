"""The plain loop under Ray Train's `TorchTrainer`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training_peers.plain_loop import PlainJob


def start_ray() -> None:
    """A Ray of two logical CPUs, with Ray's own settings."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


def fit(job: PlainJob, folder: Path, name: str, max_failures: int = 0) -> None:
    """Train on two workers; on each checkpoint `ray.train.report` is called with it."""
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        worker,
        train_loop_config=asdict(job),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from training_peers.plain_loop import Saved, train

    context = ray.train.get_context()
    rank = context.get_world_rank()

    def save(saved: Saved) -> None:
        with tempfile.TemporaryDirectory() as made:
            if rank == 0:
                torch.save(vars(saved), Path(made, "state.pt"))
            checkpoint = ray.train.Checkpoint.from_directory(made) if rank == 0 else None
            ray.train.report({"step": saved.step}, checkpoint=checkpoint)

    saved = None
    if (newest := ray.train.get_checkpoint()) is not None:
        with newest.as_directory() as found:
            saved = Saved(**torch.load(Path(found, "state.pt")))
    train(PlainJob(**config), rank, context.get_world_size(), saved, save)
