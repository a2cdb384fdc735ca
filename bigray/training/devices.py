"""What a worker computes on and what its ranks talk over, decided from what Ray has handed out: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from bigray.training.membership import Member


def device_fault(gpu_ids: Sequence[str], visible: str | None, num_devices: int) -> str | None:
    """Why the GPU that Ray assigned to this process cannot be used, in one line; None where it can, or there is none.

    `visible` is `CUDA_VISIBLE_DEVICES`, None where it is not set; `num_devices` is what `torch.cuda` sees through it.
    """
    if not gpu_ids:
        return None
    names = [name.strip() for name in (visible or "").split(",")]
    gpu = gpu_ids[0]
    if gpu not in names:
        return (
            f"Ray has assigned GPU {gpu}, but CUDA_VISIBLE_DEVICES is '{visible or ''}' here: do not set it for workers"
        )
    if names.index(gpu) >= num_devices:
        return (
            f"Ray has assigned GPU {gpu}, but torch.cuda sees {num_devices} of the GPUs '{visible}' here: install the "
            "driver and a torch built for CUDA (bigray doctor tells which), or use gpus_per_worker = 0"
        )
    return None


def backend_of(members: Sequence[Member], device_type: str) -> str:
    """NCCL between GPUs. It refuses two ranks on one GPU, which shares of GPUs may bring about: those use gloo.

    The same on every rank of a generation, whose members are the same.
    """
    places = [(member.node_id, member.gpu) for member in members]
    return "nccl" if device_type == "cuda" and len(set(places)) == len(places) else "gloo"
