"""A trial that has no memory for its forward and backward passes: how that is told, and with what it is tried again."""

from __future__ import annotations

import math

from bigray.specs import TrialSpec


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, on a GPU or off it (worker). On the CPU torch raises a plain RuntimeError."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OutOfMemoryError", "MemoryError"}:
        return True
    text = str(error)
    return "RuntimeError" in kinds and ("can't allocate memory" in text or "DefaultCPUAllocator" in text)


def halved(trial: TrialSpec, rows: int) -> TrialSpec | None:
    """The trial with half the rows in a forward pass and the same global batch; None where nothing is left to halve.

    `rows`: of the largest pass that did not fit (`OutOfMemory.rows`), also where the job set the micro-batch. That a
    trial is halved once only is up to who calls. The curve stays the same to rounding, but for what a model does to the
    rows of a pass together (batch norm) and the random numbers it draws for them (dropout).
    """
    if rows <= 1:
        return None
    training = trial.training.model_copy(update={"micro_batch_size": math.ceil(rows / 2)})
    return trial.model_copy(update={"training": training})
