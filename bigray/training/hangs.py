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
UNHEARD_AFTER_S = 35.0
"""One that was never heard in a generation: forming its process group may take 20 s, and only then it beats."""
STUCK_AFTER_S = 20.0
"""A worker that beats but makes no progress is named after this long."""
LOADING_TIMEOUT_S = 120.0
"""The least that a worker has for its first imports, the model and the checkpoint, whatever the timeout of a step."""


@dataclass(frozen=True)
class Hang:
    """One worker that holds up its group."""

    member: Member
    rank: int
    beat: Beat
    """Its last one."""
    waited_s: float
    is_silent: bool
    must_end: bool

    @property
    def innermost_frame(self) -> str:
        return self.beat.stack.rpartition(" > ")[2]

    def describe(self) -> str:
        how = "has not been heard" if self.is_silent else "makes no progress"
        place = f"rank {self.rank} (pid {self.member.pid} on {self.member.node_ip})"
        return f"{place} {how} for {self.waited_s:.0f} s, in {self.beat.phase}, at {self.beat.stack}"


def find_hangs(
    seated: Sequence[Member],
    beats: Mapping[Member, tuple[float, Beat]],
    unheard: Sequence[Member],
    since_seated_s: float,
    now_s: float,
    hang_timeout_s: float,
) -> Iterable[Hang]:
    """The workers the others wait for; none while the group makes progress.

    `unheard` are those that are still in the generation and have not beaten in it yet. Until they do, or are given up,
    nobody else is to blame.

    `beats` holds those that are still in the generation, each with its last beat and when that came. A silent one
    cannot be at work: its process is stopped or out of reach. Where all are heard and none moves on, it is those that
    are not inside a collective and have come least far: the others wait for them.
    """
    silent = [(m, now_s - at, beat) for m, (at, beat) in beats.items() if now_s - at > SILENT_AFTER_S]
    if silent:
        for member, silent_s, beat in silent:
            yield Hang(member, seated.index(member), beat, silent_s, is_silent=True, must_end=True)
        return
    if unheard:
        for member in unheard if since_seated_s > UNHEARD_AFTER_S else ():
            beat = Beat(0, 0, "forming", since_seated_s, "its process group, or before it")
            yield Hang(member, seated.index(member), beat, since_seated_s, is_silent=True, must_end=True)
        return
    busy = {m: beat for m, (_, beat) in beats.items() if beat.phase != "idle"}
    if not busy or any(beat.since_tick_s < STUCK_AFTER_S for beat in busy.values()):
        return
    suspects = {m: beat for m, beat in busy.items() if not _is_in_collective(beat)} or busy
    least = min((beat.num_steps, beat.num_ticks) for beat in suspects.values())
    for member, beat in suspects.items():
        if (beat.num_steps, beat.num_ticks) == least:
            timeout_s = max(hang_timeout_s, LOADING_TIMEOUT_S) if beat.phase == "loading" else hang_timeout_s
            must_end = beat.since_tick_s > timeout_s
            yield Hang(member, seated.index(member), beat, beat.since_tick_s, is_silent=False, must_end=must_end)


def _is_in_collective(beat: Beat) -> bool:
    """Whether its innermost frame is torch's; the collectives of DDP's backward pass have no frame of their own."""
    return "distributed_c10d.py" in beat.stack.rpartition(" > ")[2]


def kill_process(member: Member, here_node_id: str) -> None:
    """End a worker's process on its node (blocking; a few milliseconds here, a task's start elsewhere)."""
    if member.node_id == here_node_id:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(member.pid, signal.SIGKILL)
        return
    there = NodeAffinitySchedulingStrategy(member.node_id, soft=False)
    kill = ray.remote(num_cpus=0, scheduling_strategy=there)(_kill)
    with contextlib.suppress(ray.exceptions.RayError):  # the node is gone, and the process with it
        ray.get(kill.remote(member.pid), timeout=30)


def _kill(pid: int) -> None:
    """`os.kill` itself is none of the functions that Ray takes."""
    os.kill(pid, signal.SIGKILL)
