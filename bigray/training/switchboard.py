"""The actor between the driver, the Tune trials and the worker groups.

It holds, for each group, the one command the group is working on, and hands that same command to the group's fresh
workers when Ray Train had to restart them. Reports are pushed through it, so nobody polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from typing import Any

import ray
from ray.exceptions import RayTaskError

from bigray.errors import BigrayError, TrainingFailed
from bigray.training.commands import Command, Event, Stop

HEARTBEAT_S = 20.0
"""A waiting group wakes this often, so that no collective of an idle group nears its time limit."""


class Switchboard:
    """Async Ray actor, one for each run. Every method runs on its event loop, so none needs a lock."""

    def __init__(self, num_groups: int) -> None:
        self._commands: dict[int, tuple[int, Command]] = {}
        self._serials = itertools.count(1)
        self._results: dict[int, tuple[int, asyncio.Future[Any]]] = {}
        self._arrived = {group: asyncio.Event() for group in range(num_groups)}
        self._free = deque(range(num_groups))
        self._ended: dict[int, str] = {}
        self._lease_changed = asyncio.Condition()
        self._events: list[Event] = []
        self._event_added = asyncio.Event()

    async def lease(self) -> int:
        """Wait for a free group and take it (Tune trial, driver).

        Raises:
            TrainingFailed: every group has ended.
        """
        async with self._lease_changed:
            await self._lease_changed.wait_for(lambda: self._free or len(self._ended) == len(self._arrived))
            if not self._free:
                raise TrainingFailed(f"no worker group is left: {next(iter(self._ended.values()))}")
            return self._free.popleft()

    async def release(self, group: int) -> None:
        """Give a group back."""
        async with self._lease_changed:
            if group not in self._ended and group not in self._free:
                self._free.append(group)
            self._lease_changed.notify_all()

    async def execute(self, group: int, command: Command) -> Any:
        """Hand a leased group a command and wait for its result (Tune trial, driver).

        Raises:
            TrainingFailed: a worker reported an error, or the group ended.
        """
        if group in self._ended:
            raise TrainingFailed(self._ended[group])
        result = asyncio.get_running_loop().create_future()
        self._results[group] = (self._assign(group, command), result)
        return await result

    async def next_command(self, group: int) -> tuple[int, Command] | None:
        """The group's current command and its serial; None after a while without one (rank 0 of the group)."""
        if group not in self._commands:
            self._arrived[group].clear()
            try:
                await asyncio.wait_for(self._arrived[group].wait(), HEARTBEAT_S)
            except TimeoutError:
                return None
        return self._commands[group]

    async def complete(self, group: int, serial: int, result: Any) -> None:
        """The command is done (rank 0 of the group)."""
        if self._is_awaited(group, serial):
            self._settle(group, result=result)

    async def fail(self, group: int, serial: int, message: str) -> None:
        """The command cannot be done; the group's workers restart without it (any rank of the group).

        Each rank may tell of the same failure; by the time the last one does, the group may have its next command.
        """
        if self._is_awaited(group, serial):
            self._settle(group, failure=message)

    async def group_ended(self, group: int, message: str) -> None:
        """The group's Ray Train run is over (driver)."""
        async with self._lease_changed:
            self._ended[group] = message
            if group in self._free:
                self._free.remove(group)
            self._settle(group, failure=message)
            self._lease_changed.notify_all()

    async def stop_all(self) -> None:
        """Tell every group to leave its command loop."""
        for group in self._arrived:
            self._assign(group, Stop())

    async def push(self, event: Event) -> None:
        """Add an event to the stream."""
        self._events.append(event)
        self._event_added.set()

    async def take_events(self, wait_s: float) -> list[Event]:
        """The events since the last call; waits up to `wait_s` for one (driver)."""
        if not self._events:
            self._event_added.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._event_added.wait(), wait_s)
        taken, self._events = self._events, []
        return taken

    def _is_awaited(self, group: int, serial: int) -> bool:
        return group in self._results and self._results[group][0] == serial

    def _assign(self, group: int, command: Command) -> int:
        serial = next(self._serials)
        self._commands[group] = (serial, command)
        self._arrived[group].set()
        return serial

    def _settle(self, group: int, *, result: Any = None, failure: str | None = None) -> None:
        current = self._commands.get(group)
        if current is not None and not isinstance(current[1], Stop):
            del self._commands[group]
        _, waiting = self._results.pop(group, (0, None))
        if waiting is None or waiting.done():
            return
        if failure is None:
            waiting.set_result(result)
        else:
            waiting.set_exception(TrainingFailed(failure))


def ask(reference: Any) -> Any:
    """`ray.get` for calls of the switchboard: raises the actor's own error, without Ray's wrapping around it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, BigrayError):
            raise error.cause from None
        raise
