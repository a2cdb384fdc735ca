"""Which checkpoints go: decisions only, carried out by `checkpoint_writer`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from bigray.ranking import rank
from bigray.results import TrialResult


def checkpoints_to_drop(
    committed: Collection[int], saved: int, keep_last: int, stale: Collection[int] = ()
) -> tuple[int, ...]:
    """Steps of a trial whose checkpoints go now that step `saved` is committed, oldest first.

    The newest `keep_last` up to `saved` stay, and what is stale goes without being counted. A step after `saved` that
    is not stale is left alone: somebody else's, further on. The best weights need no protection, each checkpoint holds
    them.
    """
    usable = sorted(step for step in committed if step == saved or step not in stale)
    kept = {*[step for step in usable if step <= saved][-keep_last:], *(step for step in usable if step > saved)}
    return tuple(sorted(set(committed) - kept))


def trials_to_trim(
    ended: Iterable[TrialResult], keep_best: int, metric: str, mode: Literal["max", "min"]
) -> tuple[str, ...]:
    """Ended trials of a sweep whose checkpoints shrink to the record: all but the best `keep_best`, as ranked.

    Safe to ask again whenever another trial has ended: who is not among the best now never will be. A failed trial is
    left alone, since running the job again goes on with it.
    """
    ranked = rank(ended, metric, mode)
    return tuple(result.trial_id for result in ranked[keep_best:] if result.status != "failed")
