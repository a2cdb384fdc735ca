"""How the ranks of a group agree on what to do at the end of one and the same step (worker).

Each rank may learn of a wish at another moment: rank 0's clock says that a checkpoint is due, a node's drain reaches
one heartbeat before another. A few times a second the ranks exchange what they know, in a collective that runs beside
a step and is read after it, so that it costs the loop next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from bigray.training.commands import Wish

EXCHANGE_EVERY_S = 0.25


class Consensus:
    """Called by every rank after every optimizer step; the answers are equal on all ranks."""

    def __init__(self, world_size: int, group: dist.ProcessGroup | None, own_wish: Callable[[], Wish]) -> None:
        """`group` is a gloo group where the default one is on GPUs. `own_wish` is asked at each exchange."""
        self._world_size, self._group, self._own_wish = world_size, group, own_wish
        self._steps_to_next = 1
        self._steps_since, self._since = 0, time.monotonic()
        self._sent: tuple[torch.Tensor, dist.Work] | None = None

    def at_step(self) -> Wish:
        """What to do now; most often nothing."""
        if self._world_size == 1:
            return self._own_wish()
        self._steps_since += 1
        if self._sent is not None:
            return self._receive()
        self._steps_to_next -= 1
        if self._steps_to_next <= 0:
            self._send()
        return Wish()

    def _send(self) -> None:
        wish = self._own_wish()
        # the largest of each: any rank's wish counts, and the slowest rank's pace (the least number of steps) rules
        known = [float(wish.save), float(wish.stop), float(wish.rest), -self._steps_between()]
        message = torch.tensor(known, dtype=torch.float64, device="cpu")
        self._sent = (message, dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group, async_op=True))

    def _receive(self) -> Wish:
        assert self._sent is not None
        message, work = self._sent
        work.wait()
        self._sent = None
        save, stop, rest, minus_steps = message.tolist()
        self._steps_to_next = max(1, int(-minus_steps))
        return Wish(save=save > 0, stop=stop > 0, rest=rest > 0)

    def _steps_between(self) -> float:
        now = time.monotonic()
        steps_per_s = self._steps_since / max(now - self._since, 1e-6)
        self._steps_since, self._since = 0, now
        return max(1.0, steps_per_s * EXCHANGE_EVERY_S)
