"""In place of Ray Train's synchronization actor: bigray's workers meet in their own process groups alone.

Ray Train's imports all of Ray Train, seconds of a core at the start of every group.
"""

from __future__ import annotations

from collections.abc import Collection


class NoBarrier:
    """Ray actor: what Ray Train's controller asks of a barrier at which nobody waits."""

    def __init__(self, timeout_s: float | None, warn_interval_s: float) -> None: ...

    def reset(self) -> None: ...

    def set_required_ranks(self, ranks: Collection[int] | None) -> bool:
        """False: nothing was relaxed."""
        return False
