"""A loop that does nothing but report, for bigray and for Ray Train."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigray.training.context import LoopContext


def train(context: LoopContext) -> None:
    """`loop` of a bigray job; what it measures goes to a file of rank 0."""
    params = context.params
    module = context.build_model()
    context.report({"val_loss": 1.0, "number": -1.0}, epoch=1, model=module)
    figures = report_for(
        params["seconds"],
        params["compute_s"],
        lambda number: context.report({"val_loss": 1.0, "number": float(number)}, epoch=1),
    )
    if context.rank == 0:
        Path(params["path"]).write_text(json.dumps(figures))


def train_under_ray(config: dict[str, Any]) -> None:
    """`train_loop_per_worker` of a `TorchTrainer`."""
    import ray.train

    figures = report_for(
        config["seconds"],
        config["compute_s"],
        lambda number: ray.train.report({"val_loss": 1.0, "number": float(number)}),
        most=config["most"],
    )
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["path"]).write_text(json.dumps(figures))


def report_for(
    seconds: float, compute_s: float, report: Callable[[int], object], most: int | None = None
) -> dict[str, float]:
    """Report again and again, with `compute_s` of work in between; both ranks of a peer may need equal counts: `most`.

    Returns how many reports there were, when the loop began (`time.monotonic()`), how long it took, and how much of
    that was spent in `report`.
    """
    number, in_report_s, began = 0, 0.0, time.perf_counter()
    began_at = time.monotonic()
    while number < most if most is not None else time.perf_counter() - began < seconds:
        until = time.perf_counter() + compute_s
        while time.perf_counter() < until:
            pass
        before = time.perf_counter()
        report(number)
        in_report_s += time.perf_counter() - before
        number += 1
    loop_s = time.perf_counter() - began
    return {"reports": number, "began_at_s": began_at, "loop_s": loop_s, "in_report_s": in_report_s}
