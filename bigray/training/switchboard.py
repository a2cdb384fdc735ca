"""The actor between the driver, the Tune trials and the worker groups.

It holds, for each group, who its processes are and the one command they are working on. When a process is lost it seats
the next generation, which is handed that same command. Reports are pushed through it, so nobody polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from bigray.errors import BigrayError, Preempted, TrainingFailed
from bigray.training.commands import Command, Event, Stop, TrainTo, Wish
from bigray.training.hangs import Hang, find_hangs, kill_process
from bigray.training.heartbeat import Beat
from bigray.training.membership import Member, Place, Roster

HEARTBEAT_S = 20.0
"""A waiting group wakes this often, so that no collective of an idle group nears its time limit."""
GRACE_S = 2.0
"""Once a generation is broken, members that have not come back after this long are taken for lost. On the switchboard's
own node the kernel tells of a death at once; this is for the others."""
WATCH_EVERY_S = 2.0
YIELD_TIMEOUT_S = 60.0


@dataclass
class _Group:
    """One worker group as the switchboard sees it."""

    number: int
    roster: Roster = field(default_factory=Roster)
    command: tuple[int, Command] | None = None
    has_command: asyncio.Event = field(default_factory=asyncio.Event)
    result: tuple[int, asyncio.Future[Any]] | None = None
    addresses: dict[int, Any] = field(default_factory=dict)
    """Store address of each generation."""
    beats: dict[tuple[str, int], tuple[float, Beat]] = field(default_factory=dict)
    """The last beat of each member, and when it came."""
    wish: Wish = field(default_factory=Wish)
    has_yielded: bool = False
    is_held: bool = False
    """No generation begins: Ray Train is about to replace every worker."""
    is_excused: bool = False
    """The next generation is no worker's death: a command failed by its own error, a resize, or a preemption."""
    told_hangs: set[tuple[Any, int]] = field(default_factory=set)
    num_deaths: int = 0
    """Losses of workers under the current command."""
    ended: str | None = None

    @property
    def trial_id(self) -> str:
        return getattr(getattr(self.command[1], "trial", None), "trial_id", "") if self.command else ""

    @property
    def is_stopping(self) -> bool:
        return self.command is not None and isinstance(self.command[1], Stop)


class Switchboard:
    """Async Ray actor, one for each run. Every method runs on its event loop, so none needs a lock."""

    def __init__(self, num_groups: int, max_failures: int) -> None:
        self._groups = [_Group(number) for number in range(num_groups)]
        self._max_failures = max_failures
        self._serials = itertools.count(1)
        self._free = deque(range(num_groups))
        self._lease_changed = asyncio.Condition()
        self._changed = asyncio.Condition()
        """Notified when a generation begins or breaks, its store is known, it yields, or all is over."""
        self._events: list[Event] = []
        self._event_added = asyncio.Event()
        self._node_id = ray.get_runtime_context().get_node_id()
        self._draining: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_watching = False
        self._watched: set[tuple[str, int]] = set()
        """Processes whose end the kernel tells."""

    async def lease(self) -> int:
        """Wait for a free group and take it (Tune trial, driver).

        Raises:
            TrainingFailed: every group has ended.
        """
        async with self._lease_changed:
            await self._lease_changed.wait_for(lambda: self._free or all(g.ended for g in self._groups))
            if not self._free:
                raise TrainingFailed(f"no worker group is left: {self._groups[0].ended}")
            return self._free.popleft()

    async def release(self, group: int) -> None:
        """Give a group back."""
        async with self._lease_changed:
            if self._groups[group].ended is None and group not in self._free:
                self._free.append(group)
            self._lease_changed.notify_all()

    async def execute(self, group: int, command: Command) -> Any:
        """Hand a leased group a command and wait for its result (Tune trial, driver).

        Raises:
            TrainingFailed: a worker reported an error, its workers died too often, or the group ended.
        """
        it = self._groups[group]
        if it.ended is not None:
            raise TrainingFailed(it.ended)
        result = asyncio.get_running_loop().create_future()
        it.result = (self._assign(it, command), result)
        return await result

    async def next_command(self, group: int) -> tuple[int, Command] | None:
        """The group's current command and its serial; None after a while without one (rank 0 of the group)."""
        it = self._groups[group]
        if it.command is None:
            it.has_command.clear()
            try:
                await asyncio.wait_for(it.has_command.wait(), HEARTBEAT_S)
            except TimeoutError:
                return None
        return it.command

    async def complete(self, group: int, serial: int, result: Any) -> None:
        """The command is done (rank 0 of the group)."""
        if self._is_awaited(group, serial):
            self._settle(self._groups[group], result=result)

    async def fail(self, group: int, serial: int, failure: BigrayError) -> None:
        """The command cannot be done; the group goes on without it (any rank of the group).

        Each rank may tell of the same failure; by the time the last one does, the group may have its next command.
        """
        if self._is_awaited(group, serial):
            self._groups[group].is_excused = True
            self._settle(self._groups[group], failure=failure)

    async def group_ended(self, group: int, message: str) -> None:
        """The group's Ray Train run is over (driver)."""
        it = self._groups[group]
        async with self._lease_changed:
            it.ended = message
            if group in self._free:
                self._free.remove(group)
            self._settle(it, failure=TrainingFailed(message))
            self._lease_changed.notify_all()
        await self._notify()

    async def stop_all(self) -> None:
        """Tell every group to leave its command loop."""
        for it in self._groups:
            self._assign(it, Stop())
            await self._notify()

    async def join(self, group: int | None, member: Member) -> tuple[int, Place] | None:
        """Wait for a seat in a generation; its group and place, or None where the run is over (worker).

        A spare gives no group and sits down in the first one that lacks a member.

        Raises:
            Preempted: the member's node is about to go away.
        """
        groups = self._groups if group is None else [self._groups[group]]
        if member.node_id in self._draining:
            raise Preempted(f"node {member.node_id[:8]} is being drained")
        self._watch()
        for it in groups:
            it.is_held = it.is_held and it.roster.generation > 0 and member in it.roster.seated
            it.roster.arrive(member)
            await self._after_arrival(it)
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_news(groups, member))
        if member.node_id in self._draining:
            raise Preempted(f"node {member.node_id[:8]} is being drained")
        for it in groups:
            if it.roster.is_seated(member):
                return it.number, Place(it.roster.generation, it.roster.seated.index(member), it.roster.seated)
        return None

    def _has_news(self, groups: list[_Group], member: Member) -> bool:
        is_over = all(it.is_stopping or it.ended for it in groups)
        return is_over or member.node_id in self._draining or any(it.roster.is_seated(member) for it in groups)

    async def all_seated(self) -> None:
        """Wait until every group has begun its first generation (driver)."""
        async with self._changed:
            await self._changed.wait_for(lambda: all(it.roster.generation or it.ended for it in self._groups))

    async def publish(self, group: int, generation: int, address: Any) -> None:
        """Where the store of a generation is (its rank 0)."""
        it = self._groups[group]
        it.addresses = {generation: address}
        await self._notify()

    async def look_up(self, group: int, generation: int) -> Any:
        """The address of a generation's store; None where that generation is broken already (its other ranks)."""
        it = self._groups[group]
        async with self._changed:
            await self._changed.wait_for(
                lambda: generation in it.addresses or it.roster.generation != generation or it.roster.is_broken
            )
        return it.addresses.get(generation)

    async def beat(self, group: int, member: Member, beat: Beat) -> Wish:
        """A worker's sign of life (its heartbeat thread, every second); returns what the group is asked to do."""
        it = self._groups[group]
        it.beats[member.key] = (asyncio.get_running_loop().time(), beat)
        return it.wish

    async def yielded(self, group: int) -> None:
        """The group has committed a checkpoint and left training, as it was asked to (rank 0)."""
        it = self._groups[group]
        it.has_yielded, it.wish = True, Wish()
        await self._notify()

    async def hold(self, group: int, timeout_s: float = YIELD_TIMEOUT_S) -> bool:
        """Have a group commit a checkpoint at its next step and stop there (Ray Train's controller, driver).

        It goes on when a new process joins it. What is lost meanwhile is not charged to `max_failures`. Returns
        whether a checkpoint was committed; at once where nothing is being trained.
        """
        it = self._groups[group]
        if it.command is None or not isinstance(it.command[1], TrainTo) or it.roster.is_broken or it.is_held:
            return False
        it.is_held = it.is_excused = True
        it.has_yielded, it.wish = False, Wish(save=True, stop=True)
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: it.has_yielded or it.command is None or it.roster.is_broken)
        except TimeoutError:
            pass
        it.wish = Wish()
        return it.has_yielded

    async def hold_all(self, timeout_s: float) -> int:
        """Have every group commit a checkpoint and stop (driver, before it ends); returns how many did."""
        return sum(await asyncio.gather(*[self.hold(it.number, timeout_s) for it in self._groups]))

    async def drain(self, node_ids: list[str]) -> None:
        """These nodes are about to go away: groups with a worker there save, and go on without it (driver)."""
        fresh = set(node_ids) - self._draining
        self._draining = set(node_ids)
        for it in self._groups:
            leaving = [m for m in it.roster.seated if m.node_id in fresh]
            if leaving:
                self._background(self._move_away(it, leaving))

    async def push_all(self, events: list[Event]) -> None:
        """Add events to the stream."""
        self._events += events
        self._event_added.set()

    async def push(self, event: Event) -> None:
        """Add an event to the stream."""
        await self.push_all([event])

    async def take_events(self, wait_s: float) -> list[Event]:
        """The events since the last call; waits up to `wait_s` for one (driver)."""
        if not self._events:
            self._event_added.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._event_added.wait(), wait_s)
        taken, self._events = self._events, []
        return taken

    def _is_awaited(self, group: int, serial: int) -> bool:
        result = self._groups[group].result
        return result is not None and result[0] == serial

    def _assign(self, it: _Group, command: Command) -> int:
        serial = next(self._serials)
        it.command, it.num_deaths = (serial, command), 0
        it.has_command.set()
        return serial

    def _settle(self, it: _Group, *, result: Any = None, failure: BigrayError | None = None) -> None:
        if not it.is_stopping:
            it.command = None
        _, waiting = it.result or (0, None)
        it.result = None
        if waiting is None or waiting.done():
            return
        if failure is None:
            waiting.set_result(result)
        else:
            waiting.set_exception(failure)

    async def _after_arrival(self, it: _Group) -> None:
        was_broken_before = it.roster.is_broken
        await self._try_to_seat(it)
        if was_broken_before and it.roster.is_broken:
            self._background(self._give_up_on_missing(it, it.roster.generation))

    async def _try_to_seat(self, it: _Group) -> None:
        if it.is_held or it.is_stopping:
            return
        before = it.roster.seated
        seated = it.roster.seat()
        if seated is None:
            return
        self._charge(it, before)
        it.beats.clear()
        it.is_excused = False
        for member in seated:
            self._watch_process(it, member)
            for other in self._groups:  # a spare waits for all of them
                if other is not it:
                    other.roster.waiting.pop(member.key, None)
        await self._notify()

    def _charge(self, it: _Group, before: tuple[Member, ...]) -> None:
        """Count a re-formation under the same command as a death, and end the command where they are too many."""
        if not before:
            return
        replaced = [rank for rank, member in enumerate(before) if member not in it.roster.seated]
        values = {"generation": it.roster.generation, "workers": len(it.roster.seated), "replaced": replaced}
        self._tell(Event("regrouped", it.trial_id, values))
        if it.command is None or it.is_excused:
            return
        it.num_deaths += 1
        if it.num_deaths > self._max_failures and not it.is_stopping:
            text = f"its workers died {it.num_deaths} times, more than scaling.max_failures = {self._max_failures}"
            self._settle(it, failure=TrainingFailed(text))

    async def _lost(self, it: _Group, member: Member, how: str) -> None:
        if member in it.roster.seated and member.key not in it.roster.gone:
            rank = it.roster.seated.index(member)
            values = {"rank": rank, "pid": member.pid, "node": member.node_ip, "how": how}
            if not it.is_stopping:
                self._tell(Event("lost", it.trial_id, values))
        it.roster.lose(member)
        await self._try_to_seat(it)
        await self._notify()

    async def _give_up_on_missing(self, it: _Group, generation: int) -> None:
        await asyncio.sleep(GRACE_S)
        if it.roster.generation == generation and it.roster.is_broken:
            it.roster.presume_lost()
            await self._try_to_seat(it)

    async def _move_away(self, it: _Group, leaving: list[Member]) -> None:
        await self.hold(it.number)
        it.is_held, it.is_excused = False, True
        for member in leaving:
            await self._lost(it, member, "its node is being drained")

    def _watch_process(self, it: _Group, member: Member) -> None:
        """Learn of the death of a process on this node from the kernel, at once."""
        if member.node_id != self._node_id or member.key in self._watched:
            return
        try:
            descriptor = os.pidfd_open(member.pid)
        except OSError:  # it is gone already, or the kernel is older than 5.3
            return
        loop = asyncio.get_running_loop()
        self._watched.add(member.key)

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._background(self._lost(it, member, "its process ended"))

        loop.add_reader(descriptor, ended)

    def _watch(self) -> None:
        """Start looking for workers that hang, once."""
        if not self._is_watching:
            self._is_watching = True
            self._background(self._look_for_hangs())

    async def _look_for_hangs(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            now = asyncio.get_running_loop().time()
            for it in self._groups:
                if it.command is None or it.roster.is_broken or not isinstance(it.command[1], TrainTo):
                    continue
                limit_s = it.command[1].trial.training.hang_timeout_s
                beats = {m: it.beats[m.key] for m in it.roster.seated if m.key in it.beats}
                for hang in find_hangs(it.roster.seated, beats, now, limit_s):
                    await self._deal_with(it, hang)

    async def _deal_with(self, it: _Group, hang: Hang) -> None:
        key = (hang.member.key, hang.num_ticks)
        if key not in it.told_hangs:
            it.told_hangs.add(key)
            self._tell(Event("hang", it.trial_id, {"rank": hang.rank, "pid": hang.member.pid, "text": hang.describe()}))
        if hang.must_end:
            await asyncio.to_thread(kill_process, hang.member, self._node_id)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._event_added.set()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)


def ask(reference: Any) -> Any:
    """`ray.get` for calls of the switchboard: raises the actor's own error, without Ray's wrapping around it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, BigrayError):
            raise error.cause from None
        raise
