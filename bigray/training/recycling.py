"""When a worker process is replaced by a fresh one though nothing is wrong with it (worker). Pure decisions."""

from __future__ import annotations

from bigray.training.commands import Command, TrainStack

_SHARE_OF_NODE = 0.25
_FRESH_SIZES = 2
"""The default limit is never below this many times what a process has before its first trial."""


def rss_limit_bytes(max_rss_gb: float | None, node_bytes: int, workers_on_node: int, fresh_bytes: int) -> int:
    """Resident memory above which a worker is replaced after a command: `scaling.max_rss_gb`, or the default.

    That is a quarter of the node's memory shared out over its workers; but no less than twice `fresh_bytes`, the memory
    of a process that has trained nothing, or a small node would do nothing else but replace them.
    """
    if max_rss_gb is not None:
        return int(max_rss_gb * 1e9)
    return max(int(_SHARE_OF_NODE * node_bytes / max(1, workers_on_node)), _FRESH_SIZES * fresh_bytes)


def subjects(command: Command) -> frozenset[str]:
    """The trials that a command is about."""
    if isinstance(command, TrainStack):
        return frozenset(lane.trial.trial_id for lane in command.lanes)
    trial = getattr(command, "trial", None)
    return frozenset() if trial is None else frozenset([trial.trial_id])


def must_be_fresh(isolate: bool, command: Command, has_trained: frozenset[str]) -> bool:
    """Whether a process that has trained these trials may not carry out a command: `scaling.isolate`."""
    return isolate and bool(has_trained) and not subjects(command) <= has_trained
