"""The plain DDP script that `torchrun` starts: `torchrun_ddp.py '{"jobs": [...], "checkpoint": null}'`.

With a checkpoint, rank 0 saves every few steps by `torch.save`, and a restart goes on from there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_peers.plain_loop import PlainJob, Saved, train


def main() -> None:
    document = json.loads(sys.argv[1])
    checkpoint = document.get("checkpoint")
    dist.init_process_group("gloo")
    for job in document["jobs"]:
        run(PlainJob(**job), None if checkpoint is None else Path(checkpoint))
    dist.destroy_process_group()


def run(job: PlainJob, checkpoint: Path | None) -> None:
    rank = dist.get_rank()

    def save(saved: Saved) -> None:
        if checkpoint is not None and rank == 0:
            made = checkpoint.with_suffix(".new")
            torch.save(vars(saved), made)
            os.replace(made, checkpoint)

    found = checkpoint is not None and checkpoint.exists()
    saved = Saved(**torch.load(checkpoint)) if found else None
    train(job, rank, dist.get_world_size(), saved, save)


if __name__ == "__main__":
    main()
