"""How much a sweep may use: wall time, or GPU time. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bigray.errors import SpecError
from bigray.specs import ScalingSpec

_WALL_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
_GPU_UNITS_S = {"gpum": 60.0, "gpuh": 3600.0}
_UNITS = "s, m, h, gpum (minutes of one GPU) or gpuh (hours of one GPU)"


@dataclass(frozen=True)
class Budget:
    """One of the two is set: wall time of the sweep, or GPUs held x time."""

    wall_s: float | None
    gpu_s: float | None
    text: str
    """As it was asked for."""

    def is_used(self, wall_s: float, gpu_s: float) -> bool:
        """Whether a sweep that has taken this long, and this much GPU time, has to end."""
        return self._fraction_used(wall_s, gpu_s) >= 1.0

    def _fraction_used(self, wall_s: float, gpu_s: float) -> float:
        if self.wall_s is not None:
            return wall_s / self.wall_s
        assert self.gpu_s is not None
        return gpu_s / self.gpu_s


def parse_budget(text: str) -> Budget:
    """`90s`, `10m`, `1.5h`, `30gpum` or `3gpuh`.

    Raises:
        SpecError: it is not a number above 0 with one of these units.
    """
    found = re.fullmatch(r"([+-]?\d+(?:\.\d+)?|[+-]?\.\d+)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    if found is None:
        raise SpecError(f"budget: '{text}' is not a number with a unit, such as 10m or 3gpuh; units are {_UNITS}")
    amount, unit = float(found[1]), found[2]
    if not 0 < amount < math.inf:
        raise SpecError(f"budget: '{text}' must be more than 0")
    if unit not in _WALL_UNITS_S and unit not in _GPU_UNITS_S:
        what = f"'{unit}' is not a unit" if unit else "a unit is missing"
        raise SpecError(f"budget: '{text}': {what}; units are {_UNITS}")
    if unit in _WALL_UNITS_S:
        return Budget(amount * _WALL_UNITS_S[unit], None, text)
    return Budget(None, amount * _GPU_UNITS_S[unit], text)


def budget_faults(budget: Budget, scaling: ScalingSpec) -> list[str]:
    """Why a budget does not suit a job: GPU time of a job without GPUs is never used up."""
    if budget.gpu_s is None or scaling.gpus_per_worker:
        return []
    return [
        f"budget: '{budget.text}' is GPU time, but scaling.gpus_per_worker is 0; give wall time, such as 10m, or GPUs"
    ]


@dataclass(frozen=True)
class Used:
    """What a run has taken so far."""

    wall_s: float
    gpu_s: float


def used_before(events: Iterable[Mapping[str, Any]]) -> Used:
    """By the attempts of a journal: each from its first trial's start to the last that was heard of it."""
    gpus: dict[int, float] = {}
    spans: dict[int, tuple[float, float]] = {}
    for event in events:
        attempt, time = event["attempt"], event["time"]
        if event["kind"] == "attempt":
            gpus[attempt] = event["plan"]["gpus"]
        elif event["kind"] == "started" or attempt in spans:
            first, _ = spans.get(attempt, (time, time))
            spans[attempt] = (first, time)
    walls = {attempt: last - first for attempt, (first, last) in spans.items()}
    return Used(sum(walls.values()), sum(wall_s * gpus.get(attempt, 0.0) for attempt, wall_s in walls.items()))
