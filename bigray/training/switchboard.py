"""The actor between the driver, the Tune trials and the worker groups.

It holds, for each group, who its processes are and the one command they are working on. When a process is lost it seats
the next generation, which is handed that same command. Reports are pushed through it, so nobody polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from bigray.errors import BigrayError, GroupLost, Preempted, StorageError, TrainingFailed
from bigray.specs import TrialSpec
from bigray.training.commands import Command, Event, ExportBundle, ProbeStack, Stop, TrainStack, TrainTo, Wish
from bigray.training.hangs import Hang, find_hangs, kill_process
from bigray.training.heartbeat import Beat
from bigray.training.membership import Member, Place, Roster
from bigray.training.recycling import subjects

HEARTBEAT_S = 20.0
"""A waiting group wakes this often, so that no collective of an idle group nears its time limit."""
GRACE_S = 2.0
"""Once a generation is broken, members that have neither come back nor been heard for this long are taken for lost. On
the switchboard's own node the kernel tells of a death at once; this is for the others."""
FORMING_TIMEOUT_S = 20.0
"""A generation whose rank 0 has not told of its store after this long does not come about."""
STAYS_AWAY_S = 60.0
"""One that was given up on is ended after this long: longer than a process group takes that cannot be formed, and than
a checkpoint under way."""
WATCH_EVERY_S = 2.0
YIELD_TIMEOUT_S = 60.0


@dataclass
class _Group:
    """One worker group as the switchboard sees it."""

    number: int
    roster: Roster = field(default_factory=Roster)
    command: tuple[int, Command] | None = None
    result: tuple[int, asyncio.Future[Any]] | None = None
    addresses: dict[int, Any] = field(default_factory=dict)
    """Store address of each generation."""
    beats: dict[tuple[str, int], tuple[float, Beat]] = field(default_factory=dict)
    """The last beat of each member that is in the current generation, and when it came."""
    seated_at: float = 0.0
    """When the current generation began."""
    wish: Wish = field(default_factory=Wish)
    has_yielded: bool = False
    is_held: bool = False
    """No generation begins: Ray Train is about to replace every worker."""
    looked_after: int = 0
    """The broken generation whose missing members are looked after."""
    is_excused: bool = False
    """The next generation is no worker's death: a command failed by its own error, a resize, or a preemption."""
    told_hangs: set[tuple[Any, ...]] = field(default_factory=set)
    last_loss: str = ""
    """Who was lost last, and how."""
    ended: str | None = None
    must_rest: bool = False
    """The command under way is to end with its epoch."""
    last_trials: frozenset[str] = frozenset()
    """Of its newest command: they may still be in the memory of its workers."""

    @property
    def trial_id(self) -> str:
        """Of the trial that the command is about; empty where it is about several."""
        return getattr(getattr(self.command[1], "trial", None), "trial_id", "") if self.command else ""

    @property
    def charged(self) -> str:
        """Under which name the deaths of its workers count: a trial's, or that of work for several."""
        command = self.command[1] if self.command else None
        if isinstance(command, TrainStack):
            return command.name
        return f"probe of {self.trial_id}" if isinstance(command, ProbeStack) else self.trial_id

    @property
    def trained(self) -> TrialSpec | None:
        """The trial, or the first of those, that the command trains; None where it trains none."""
        command = self.command[1] if self.command else None
        if isinstance(command, TrainStack):
            return command.lanes[0].trial
        return command.trial if isinstance(command, TrainTo | ProbeStack) else None

    @property
    def is_stopping(self) -> bool:
        return self.command is not None and isinstance(self.command[1], Stop)


class Switchboard:
    """Async Ray actor, one for each run. Every method runs on its event loop, so none needs a lock."""

    def __init__(self, num_groups: int, max_failures: int, node_id: str) -> None:
        """`node_id`: of the node this actor runs on."""
        self._groups = [_Group(number) for number in range(num_groups)]
        self._max_failures, self._node_id = max_failures, node_id
        self._num_deaths: Counter[str] = Counter()
        """Losses of workers under each trial, whatever its commands and groups."""
        self._serials = itertools.count(1)
        self._storage_failure: StorageError | None = None
        self._free = deque(range(num_groups))
        self._freed = asyncio.Condition()
        self._works: dict[str, asyncio.Task[tuple[int, float, Any]]] = {}
        """By their key: under way, or done."""
        self._offers: dict[int, Any] = {}
        self._concluded: dict[int, Any] = {}
        """What became of them."""
        self._is_resting = False
        """The budget is used up."""
        self._changed = asyncio.Condition()
        """Notified when a generation begins, breaks, knows its store or yields, or a command comes or ends."""
        self._events: list[Event] = []
        self._event_added = asyncio.Event()
        self._draining: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_watching = False
        self._watched: set[tuple[str, int]] = set()
        """Processes whose end the kernel tells."""

    async def check_storage(self) -> None:
        """Raise what kept a worker from writing or reading the run's folder: no other trial will fare better."""
        if self._storage_failure is not None:
            raise self._storage_failure

    async def take(self, trials: frozenset[str] = frozenset()) -> int:
        """Wait for a free group and take it; rather one that has just trained these trials.

        Raises:
            GroupLost: every group has ended.
            StorageError: as for `check_storage`.
        """
        await self.check_storage()
        async with self._freed:
            await self._freed.wait_for(lambda: self._pickable() or all(it.ended for it in self._groups))
            if not self._pickable():
                raise GroupLost(f"no worker group is left: {self._groups[0].ended}")
            return self._pick(trials)

    def _pickable(self) -> list[int]:
        """Free groups that have begun: starting one is not the time of a trial, and another may be up before it."""
        return [group for group in self._free if self._groups[group].roster.generation]

    def _pick(self, trials: frozenset[str]) -> int:
        """Of the free groups one that has just trained these trials, else the one that has been free the longest.

        One that waits for a worker is the last choice.
        """
        begun = self._pickable()
        ready = [group for group in begun if not self._groups[group].roster.is_broken] or begun
        group = next((group for group in ready if trials & self._groups[group].last_trials), ready[0])
        self._free.remove(group)
        return group

    async def work(self, key: str, command: Command) -> tuple[int, float, Any]:
        """Have a free group carry out a command; returns the group, how long it was waited for, and the result.

        Called again with the same key, it joins what is under way, or returns the same outcome: whoever asked may be
        killed and ask again, and never holds a group. An outcome is kept for as long as the run lasts, an error too:
        what is to be tried again needs another key.

        Raises:
            TrainingFailed: as for `take` and `execute`; the group is free again.
            StorageError: as for `check_storage`.
        """
        if key not in self._works:
            self._works[key] = asyncio.get_running_loop().create_task(self._work(command))
        return await asyncio.shield(self._works[key])

    async def _work(self, command: Command) -> tuple[int, float, Any]:
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        while True:
            group = await self.take(subjects(command))
            try:
                waited_s = loop.time() - asked_at
                if not isinstance(command, ExportBundle | ProbeStack):
                    for trial_id in sorted(subjects(command)):
                        self._tell(Event("started", trial_id, {"group": group}))
                return group, waited_s, await self.execute(group, command)
            except GroupLost:
                if all(it.ended or it.is_stopping for it in self._groups):
                    raise
            finally:
                await self.release(group)

    async def offer(self, number: int, work: Any) -> None:
        """Lay something down under a number (driver), for whoever carries it out to take up."""
        self._offers[number] = work
        await self._notify()

    async def offered(self, number: int) -> Any:
        """What was laid down under a number (Tune's actors); waits for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._offers)
        return self._offers[number]

    async def conclude(self, number: int, outcome: Any, events: list[Event]) -> Any:
        """Take down what became of an offer, with its events; returns that, or what had been taken down before.

        An actor may die between telling and returning: the next one's account of the same work is not counted again.
        """
        if number not in self._concluded:
            self._concluded[number] = outcome
            await self.push_all(events)
        return self._concluded[number]

    async def rest_all(self) -> int:
        """Have every group that trains end its command with the epoch under way (driver); returns how many do.

        What is handed to a group after that, since it was waiting for one, ends with its first epoch.
        """
        self._is_resting = True
        training = [it for it in self._groups if it.trained is not None and it.result is not None]
        for it in training:
            it.must_rest = True
        return len(training)

    async def release(self, group: int) -> None:
        """Give a group back."""
        async with self._freed:
            if self._groups[group].ended is None and group not in self._free:
                self._free.append(group)
            self._freed.notify_all()

    async def execute(self, group: int, command: Command) -> Any:
        """Hand a leased group a command and wait for its result (Tune trial, driver).

        Raises:
            TrainingFailed: a worker reported an error, its workers died too often, or the group ended.
        """
        it = self._groups[group]
        if it.ended is not None or it.is_stopping:
            raise GroupLost(it.ended or "the run is being stopped")
        result = asyncio.get_running_loop().create_future()
        serial = next(self._serials)
        it.command, it.result, it.last_loss = (serial, command), (serial, result), ""
        it.must_rest = self._is_resting and it.trained is not None
        it.last_trials = subjects(command)
        await self._notify()
        return await result

    async def next_command(self, group: int, generation: int) -> tuple[int, Command] | None:
        """The group's current command and its serial (rank 0 of that generation).

        None after a while without one, or where the generation breaks: talking to its peers, rank 0 will notice. Where
        another generation has begun, the command is to stop.

        Raises:
            Preempted: rank 0's node is about to go away, and its seat is another's by now.
        """
        it = self._groups[group]
        first, was_broken = it.roster.seated[:1], it.roster.is_broken

        def has_news() -> bool:
            is_over = it.roster.generation != generation or (it.roster.is_broken and not was_broken)
            return it.command is not None or is_over

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S), self._changed:
                await self._changed.wait_for(has_news)
        for member in first:
            if not it.roster.is_seated(member):
                self._refuse_drained(member)
        return it.command if it.roster.generation == generation else (0, Stop())

    async def complete(self, group: int, serial: int, result: Any) -> None:
        """The command is done (rank 0 of the group)."""
        if self._is_awaited(group, serial):
            self._settle(self._groups[group], result=result)
            await self._notify()

    async def fail(self, group: int, serial: int, failure: BigrayError) -> None:
        """The command cannot be done; the group goes on without it (any rank of the group).

        Each rank may tell of the same failure; by the time the last one does, the group may have its next command.
        """
        if isinstance(failure, StorageError) and self._storage_failure is None:
            self._storage_failure = failure
        if self._is_awaited(group, serial):
            self._groups[group].is_excused = True
            self._settle(self._groups[group], failure=failure)
            await self._notify()

    async def group_ended(self, group: int, message: str) -> None:
        """The group's Ray Train run is over (driver), or can never train (worker); the first message counts."""
        it = self._groups[group]
        async with self._freed:
            it.ended, it.roster = it.ended or message, Roster()  # a spare in it looks for a seat elsewhere
            if group in self._free:
                self._free.remove(group)
            self._settle(it, failure=GroupLost(message))
            self._freed.notify_all()
        await self._notify()

    async def stop_all(self) -> None:
        """Tell every group to leave its command loop."""
        for it in self._groups:
            it.command = next(self._serials), Stop()
        await self._notify()

    async def join(self, group: int | None, member: Member) -> tuple[int, Place] | None:
        """Wait for a seat in a generation; its group and place, or None where the run is over (worker).

        A spare gives no group and sits down in the first one that lacks a member.

        Raises:
            Preempted: the member's node is about to go away.
        """
        groups = self._groups if group is None else [self._groups[group]]
        self._refuse_drained(member)
        self._watch()
        self._watch_process(member)
        # a spare that comes back from a generation is still one of its members
        for it in [it for it in groups if member in it.roster.seated and member.key not in it.roster.gone] or groups:
            await self._arrive(it, member)
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_news(groups, member))
        if member.node_id in self._draining:
            await self._lost_everywhere(member, "its node is being drained")
            self._refuse_drained(member)
        for it in groups:
            if it.roster.is_seated(member):
                return it.number, Place(it.roster.generation, it.roster.seated.index(member), it.roster.seated)
        return None

    def _refuse_drained(self, member: Member) -> None:
        if member.node_id in self._draining:
            raise Preempted(f"node {member.node_id[:8]} is being drained")

    def _has_news(self, groups: list[_Group], member: Member) -> bool:
        is_over = all(it.is_stopping or it.ended for it in groups)
        return is_over or member.node_id in self._draining or any(it.roster.is_seated(member) for it in groups)

    async def all_seated(self) -> None:
        """Wait until every group has begun its first generation (driver)."""
        async with self._changed:
            await self._changed.wait_for(lambda: all(it.roster.generation or it.ended for it in self._groups))

    async def is_over(self) -> bool:
        """Whether no group is wanted any longer (Ray Train's controllers, between two attempts to place one)."""
        return all(it.is_stopping or it.ended for it in self._groups)

    async def has_begun(self) -> bool:
        """Whether any group is up (driver)."""
        return any(it.roster.generation for it in self._groups)

    async def members(self, group: int) -> tuple[Member, ...]:
        """The processes of a group by rank; none between two generations (driver)."""
        roster = self._groups[group].roster
        return () if roster.is_broken else roster.seated

    async def workers_on(self, node_id: str) -> int:
        """Workers of all groups on a node (worker)."""
        return sum(member.node_id == node_id for it in self._groups for member in it.roster.seated)

    async def recycle(self, group: int, member: Member, why: str) -> None:
        """A worker is about to end so that a fresh process takes its seat; nobody's trial is charged (that worker)."""
        it = self._groups[group]
        if not it.roster.is_seated(member):
            return
        it.is_excused = True
        values = {"rank": it.roster.seated.index(member), "pid": member.pid, "why": why}
        self._tell(Event("recycled", "", values))
        it.beats.pop(member.key, None)
        it.roster.lose(member)
        await self._reseat(it)

    async def publish(self, group: int, generation: int, address: Any) -> None:
        """Where the store of a generation is (its rank 0)."""
        it = self._groups[group]
        if it.roster.generation == generation:  # else it comes too late
            it.addresses = {generation: address}
            await self._notify()

    async def look_up(self, group: int, generation: int) -> Any:
        """The address of a generation's store; None where that generation is broken already (its other ranks)."""
        it = self._groups[group]

        def is_over() -> bool:
            return it.roster.generation != generation or it.roster.is_broken

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FORMING_TIMEOUT_S), self._changed:
                await self._changed.wait_for(lambda: generation in it.addresses or is_over())
        return None if is_over() else it.addresses.get(generation)

    async def beat(self, group: int, member: Member, beat: Beat) -> Wish:
        """A worker's sign of life (its heartbeat thread, every second); returns what the group is asked to do."""
        it = self._groups[group]
        if it.roster.is_seated(member):
            it.beats[member.key] = (asyncio.get_running_loop().time(), beat)
        must_rest = it.must_rest and it.command is not None and it.command[0] == beat.command
        leave = not it.roster.is_seated(member) or it.roster.is_broken
        return replace(it.wish, rest=must_rest, leave=leave)

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
        if it.trained is None:
            return False
        it.is_held = True
        return await self._ask_to_yield(it, timeout_s)

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
        await self._notify()

    async def nodes_gone(self, node_ids: list[str]) -> None:
        """These nodes cannot be reached any more: their workers are lost, though nothing has said so (Ray Train's
        controller)."""
        # all of them before anybody is seated: one that waits there would be given the seat of another
        for it in self._groups:
            for member in dict.fromkeys((*it.roster.waiting.values(), *it.roster.seated)):
                if member.node_id in node_ids:
                    self._lose(it, member, "its node cannot be reached")
        for it in self._groups:
            await self._reseat(it)

    async def starts_whole(self, group: int) -> None:
        """Ray Train has started the group, and every slot will be filled (Ray Train's controller)."""
        self._groups[group].roster.empty_slots.clear()

    async def go_on_without(self, group: int, slots: list[int], gone: list[str]) -> None:
        """The workers in these slots are lost, and no others come for them: who is left goes on (Ray Train's
        controller, of an elastic group).

        `gone`: their nodes, but for those that are being drained: on these a worker may still be saving, and leaves its
        seat by itself.
        """
        it = self._groups[group]
        it.roster.empty_slots.update(slots)
        await self.nodes_gone(gone)

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

    def _settle(self, it: _Group, *, result: Any = None, failure: BigrayError | None = None) -> None:
        if not it.is_stopping:
            it.command = None
        it.must_rest = False
        _, waiting = it.result or (0, None)
        it.result = None
        if waiting is None or waiting.done():
            return
        if failure is None:
            waiting.set_result(result)
        else:
            waiting.set_exception(failure)

    async def _arrive(self, it: _Group, member: Member) -> None:
        if any(other.roster.is_seated(member) for other in self._groups if other is not it):
            return  # a spare has found a seat meanwhile
        replaced = it.roster.superseded_by(member)
        if it.is_held and member.slot is not None and member not in it.roster.seated:
            it.is_held, replaced = False, it.roster.holders  # the first of the workers that replace all of them
        for other in replaced:
            self._lose(it, other, "it was replaced")
        it.beats.pop(member.key, None)
        it.roster.arrive(member)
        await self._reseat(it)

    async def _reseat(self, it: _Group) -> None:
        """Begin the next generation, or look after those it waits for."""
        self._try_to_seat(it)
        generation = it.roster.generation
        if it.roster.missing and it.roster.is_broken and it.looked_after != generation:
            it.looked_after = generation
            self._background(self._give_up_on_missing(it, generation))
        async with self._freed:
            self._freed.notify_all()
        await self._notify()

    def _try_to_seat(self, it: _Group) -> None:
        if it.is_held or it.is_stopping or it.ended:
            return
        before = it.roster.seated
        seated = it.roster.seat()
        if seated is None:
            return
        it.beats.clear()
        it.seated_at = asyncio.get_running_loop().time()
        it.told_hangs.clear()
        it.wish, it.has_yielded = Wish(), False
        self._charge(it, before)
        it.is_excused = False
        for other in self._groups:  # a spare waits for all groups until it has a seat, and again without one
            if other is not it:
                for member in seated:
                    if member.key in other.roster.waiting:
                        other.roster.lose(member)
                for spare in it.roster.spares:
                    other.roster.arrive(spare)
                self._background(self._reseat(other))

    def _charge(self, it: _Group, before: tuple[Member, ...]) -> None:
        """Count a re-formation under the same command as a death, and end the command where they are too many."""
        if not before:
            return
        replaced = [rank for rank, member in enumerate(before) if member not in it.roster.seated]
        values = {"generation": it.roster.generation, "workers": len(it.roster.seated), "replaced": replaced}
        self._tell(Event("regrouped", it.trial_id, values))
        if it.command is None or it.is_excused:
            return
        self._num_deaths[it.charged] += 1
        num_deaths = self._num_deaths[it.charged]
        if num_deaths > self._max_failures:
            text = f"its workers died {num_deaths} times, more than scaling.max_failures = {self._max_failures}"
            last = f"; the last, {it.last_loss}" if it.last_loss else ""
            self._settle(it, failure=TrainingFailed(text + last))

    def _lose(self, it: _Group, member: Member, how: str) -> None:
        if member in it.roster.seated and member.key not in it.roster.gone and not it.is_stopping:
            rank = it.roster.seated.index(member)
            values = {"rank": rank, "pid": member.pid, "node": member.node_ip, "how": how}
            self._tell(Event("lost", it.trial_id, values))
            it.last_loss = f"rank {rank} (pid {member.pid} on {member.node_ip}): {how}"
        it.beats.pop(member.key, None)
        it.roster.lose(member)

    async def _lost_everywhere(self, member: Member, how: str) -> None:
        for it in self._groups:
            if member in it.roster.seated or member.key in it.roster.waiting:
                self._lose(it, member, how)
                await self._reseat(it)

    async def _give_up_on_missing(self, it: _Group, generation: int) -> None:
        """Until the next generation begins: those that have not been heard for a while will not come back."""
        loop = asyncio.get_running_loop()
        while it.roster.missing:
            await asyncio.sleep(GRACE_S)
            if it.roster.generation != generation:
                return
            for member in it.roster.missing:
                if member.key not in it.beats or loop.time() - it.beats[member.key][0] >= GRACE_S:
                    self._lose(it, member, "it did not come back")
                    self._background(self._end_if_it_stays_away(it, member))
            await self._reseat(it)

    async def _end_if_it_stays_away(self, it: _Group, member: Member) -> None:
        """Ray Train replaces a worker that has ended, not one that is stopped."""
        await asyncio.sleep(STAYS_AWAY_S)
        is_back = any(g.roster.is_seated(member) or member.key in g.roster.waiting for g in self._groups)
        if member.key in it.roster.gone and not is_back:
            await asyncio.to_thread(kill_process, member, self._node_id)

    async def _ask_to_yield(self, it: _Group, timeout_s: float) -> bool:
        """Have the current generation commit a checkpoint and leave; whether it did. The others go before rank 0."""
        if it.trained is None:
            return False
        if it.roster.is_broken or not it.roster.seated:
            return False
        generation, first = it.roster.generation, it.roster.seated[0]
        it.is_excused, it.wish = True, Wish(save=True, stop=True)

        def is_over() -> bool:
            has_left = it.roster.generation != generation or not it.roster.is_seated(first)
            return it.has_yielded or it.command is None or has_left

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(is_over)
        if it.roster.generation == generation:
            it.wish = Wish()
        return it.has_yielded

    async def _move_away(self, it: _Group, leaving: list[Member]) -> None:
        it.is_excused = True
        await self._ask_to_yield(it, YIELD_TIMEOUT_S)
        for member in leaving:
            self._lose(it, member, "its node is being drained")
        await self._reseat(it)

    def _watch_process(self, member: Member) -> None:
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
            self._watched.discard(member.key)
            self._background(self._lost_everywhere(member, "its process ended"))

        loop.add_reader(descriptor, ended)

    def _watch(self) -> None:
        """Start looking for workers that hang, once."""
        if not self._is_watching:
            self._is_watching = True
            self._background(self._look_for_hangs())

    async def _look_for_hangs(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await asyncio.sleep(WATCH_EVERY_S)
            if loop.time() - began > 2 * WATCH_EVERY_S:  # we were stopped ourselves; the beats are still in the queue
                continue
            for it in self._groups:
                if it.trained is None:
                    continue
                limit_s = it.trained.training.hang_timeout_s
                beats = {m: it.beats[m.key] for m in it.roster.seated if m.key in it.beats}
                there = [m for m in it.roster.seated if m.key not in it.roster.gone]
                unheard = [] if it.roster.is_broken else [m for m in there if m not in beats]
                since_seated_s = loop.time() - it.seated_at
                for hang in find_hangs(it.roster.seated, beats, unheard, since_seated_s, loop.time(), limit_s):
                    await self._deal_with(it, hang)

    async def _deal_with(self, it: _Group, hang: Hang) -> None:
        key = (hang.member.key, hang.beat.num_steps, hang.beat.num_ticks)
        if key not in it.told_hangs:
            it.told_hangs.add(key)
            self._tell(Event("hang", it.trial_id, {"rank": hang.rank, "pid": hang.member.pid, "text": hang.describe()}))
        if hang.must_end:
            await self._lost_everywhere(hang.member, f"it hung and was ended, at {hang.innermost_frame}")
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
