"""What a worker group knows from its start. Apart from `worker`, so that the driver need not import torch for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bigray.paths import RunPaths


@dataclass(frozen=True)
class GroupSetup:
    """Sent to each worker by Ray Train."""

    group: int
    """-1 for a spare, which serves any."""
    switchboard: Any
    """Actor handle of `Switchboard`."""
    data: Any
    """Object reference of `TrainingArrays` of the usual split; every worker of a node maps the one copy."""
    num_outputs: int
    paths: RunPaths
    attempt: int
    threads_per_worker: int
    isolate: bool = False
    """`scaling.isolate`; as `max_rss_gb`."""
    max_rss_gb: float | None = None
    folds: tuple[Any, ...] = ()
    """As `data`, of each fold of `data.k_folds`."""
    driver_node: str = ""
    """Where the files are, if inputs are streamed from disk."""
