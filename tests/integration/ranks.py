"""Processes of torch.distributed, one for each rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import multiprocessing


def run_ranks(run: Callable[[int, Path], None], folder: Path, num_processes: int) -> None:
    """Have each process call `run(rank, folder)`; returns when all have.

    Raises:
        ProcessRaisedException, ProcessExitedException: one has not.
    """
    multiprocessing.spawn(_run_and_end, (run, folder), nprocs=num_processes)


def _run_and_end(rank: int, run: Callable[[int, Path], None], folder: Path) -> None:
    """Not by way of Python's own end: gloo's thread (torch 2.13) lets go of the tensors of the last collective when it
    likes, and a thread that asks for the interpreter's lock then has C++ abort the process. One in four did."""
    run(rank, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
