"""Where Ray enters a worker process. Imports no torch: the driver and Ray Train's controller know these names too."""

from __future__ import annotations

from typing import Any

from bigray.training.setup import GroupSetup


def run_worker(config: dict[str, Any]) -> None:
    """`train_loop_per_worker`: serve the group until the run is over."""
    import os

    import ray.train.torch
    import torch

    from bigray.training.devices import device_fault
    from bigray.training.worker import run_worker

    setup: GroupSetup = config["setup"]
    gpu_ids = [str(gpu) for gpu in ray.get_gpu_ids()]
    fault = device_fault(gpu_ids, os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    if fault is not None:  # to raise would have Ray Train start another such worker, for ever
        ray.get(setup.switchboard.group_ended.remote(setup.group, fault))
        return
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL and anything else of CUDA: they go by the thread's device
    run_worker(config)


class Spare:
    """Ray actor: an idle process with everything imported, which takes the seat of a worker that died (CPU only)."""

    def serve(self, setup: GroupSetup) -> None:
        """Wait for a seat in any group, and serve there; returns when the run is over."""
        from bigray.training.worker import SpareWorker

        SpareWorker().serve(setup)
