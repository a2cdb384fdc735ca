"""Which worker of a group hangs: a pure decision over their heartbeats, and the means to end one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bigray.training.heartbeat import Beat
from bigray.training.membership import Member

SILENT_AFTER_S = 15.0
"""A worker that was heard every second and then not for this long is stopped, or its node cannot be reached."""
STUCK_AFTER_S = 20.0
"""A worker that beats but makes no progress is named after this long."""


@dataclass(frozen=True)
class Hang:
    """One worker that holds up its group."""

    member: Member
    rank: int
    num_ticks: int
    phase: str
    stack: str
    waited_s: float
    is_silent: bool
    must_end: bool

    def describe(self) -> str:
        how = "has not been heard" if self.is_silent else "makes no progress"
        place = f"rank {self.rank} (pid {self.member.pid} on {self.member.node_ip})"
        return f"{place} {how} for {self.waited_s:.0f} s, in {self.phase}, at {self.stack}"


def find_hangs(
    seated: Sequence[Member], beats: Mapping[Member, tuple[float, Beat]], now_s: float, hang_timeout_s: float
) -> Iterable[Hang]:
    """The workers the others wait for; none while the group makes progress.

    A silent one cannot be at work: its process is stopped or out of reach. Where all are heard and none moves on, it is
    those with the fewest progress marks: the others have gone further and wait for them in a collective.
    """
    silent = [(m, now_s - at, beat) for m, (at, beat) in beats.items() if now_s - at > SILENT_AFTER_S]
    if silent:
        for member, silent_s, beat in silent:
            rank = seated.index(member)
            yield Hang(member, rank, beat.num_ticks, beat.phase, beat.stack, silent_s, is_silent=True, must_end=True)
        return
    if not beats or any(beat.since_tick_s < STUCK_AFTER_S for _, beat in beats.values()):
        return
    fewest = min(beat.num_ticks for _, beat in beats.values())
    for member, (_, beat) in beats.items():
        if beat.num_ticks == fewest:
            must_end = beat.since_tick_s > hang_timeout_s
            rank, waited_s = seated.index(member), beat.since_tick_s
            yield Hang(member, rank, fewest, beat.phase, beat.stack, waited_s, is_silent=False, must_end=must_end)


def kill_process(member: Member, here_node_id: str) -> None:
    """End a worker's process on its node (blocking; a few milliseconds here, a task's start elsewhere)."""
    if member.node_id == here_node_id:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(member.pid, signal.SIGKILL)
        return
    there = NodeAffinitySchedulingStrategy(member.node_id, soft=False)
    with contextlib.suppress(ray.exceptions.RayError):  # the node is gone, and the process with it
        ray.get(
            ray.remote(num_cpus=0, scheduling_strategy=there)(os.kill).remote(member.pid, signal.SIGKILL), timeout=30
        )
