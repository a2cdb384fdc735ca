"""The models that one replica holds, and which of them answers a request.

Of the channel's own model there are several versions in memory: the live one, perhaps a candidate, perhaps the one
before. Other models of the serve file are loaded when they are first asked for, and let go when memory is short.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.errors import last_line
from bigray.inference import Predictions
from bigray.serve.compare import SideBySide
from bigray.serve.http import TRY_AGAIN, Refusal, try_again_in
from bigray.serve.loaded import LoadedModel
from bigray.serve.release.record import Rollout, routes_to_candidate

FloatArray = NDArray[np.float32]

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class View:
    """What the replica serves at one moment. It is replaced whole, so no request sees half a change."""

    live: LoadedModel
    held: Mapping[str, LoadedModel] = field(default_factory=dict)
    """Every version in memory, the live one among them."""
    rollout: Rollout | None = None
    """A canary or a shadow that is under way with its candidate in memory."""
    side_by_side: SideBySide | None = None


@dataclass(frozen=True)
class OtherModel:
    """A further model of the serve file."""

    name: str
    bundle: str
    load: Callable[[], LoadedModel]


class ModelStore:
    """Finds the model for a request (event loop); is given new versions by the steward (its thread)."""

    def __init__(
        self, live: LoadedModel, others: Mapping[str, OtherModel] | None = None, memory_bytes: int | None = None
    ) -> None:
        self._view = View(live, {live.version: live})
        self._leaving: tuple[LoadedModel, ...] = ()
        self._others = dict(others or {})
        self._shelf = Shelf(self._others, memory_bytes)

    @property
    def view(self) -> View:
        return self._view

    def set_view(self, view: View) -> None:
        """Switch, in one assignment; versions that are held no more let go of their threads."""
        before, self._view = self._view, view
        gone = [model for version, model in before.held.items() if version not in view.held]
        for model in gone:
            model.close()
        self._leaving = (*_still_asked(self._leaving), *gone)

    def names(self) -> tuple[str, ...]:
        return (self._view.live.name, *self._others)

    def loaded(self) -> tuple[LoadedModel, ...]:
        """Every version of every model in memory, and those let go that somebody still waits for."""
        return (*self._view.held.values(), *self._shelf.models(), *_still_asked(self._leaving))

    def knows(self, name: str) -> bool:
        return name == self._view.live.name or name in self._others

    def is_loaded(self, name: str) -> bool:
        return name == self._view.live.name or self._shelf.peek(name) is not None

    def find(self, name: str | None = None, version: str | None = None, sticky: str = "") -> LoadedModel:
        """The model that is to answer; only asking it for predictions is a use of it, which keeps it in memory.

        `sticky` decides on which side of a canary the caller is: the same text, the same side.

        Raises:
            Refusal: 404, there is no such model or version in this replica; 503, it is not loaded yet.
        """
        view = self._view
        if name is not None and name != view.live.name:
            return self._find_other(name, version)
        if version:
            found = view.held.get(version)
            if found is None:
                raise Refusal(404, f"model '{view.live.name}': version '{version[:40]}' is not served")
            return found
        return _canary_of(view, sticky) or view.live

    async def load(self, name: str) -> None:
        """Have another model in memory; loading happens in a thread, once however many ask.

        Raises:
            Refusal: 404, no such model; 503, it cannot be loaded.
        """
        if name not in self._others:
            raise _unknown(name)
        await self._shelf.load(name)

    async def predict(self, chosen: LoadedModel, rows: FloatArray) -> tuple[Predictions, LoadedModel]:
        """The predictions, and the version that made them: another than `chosen` only where a canary failed."""
        beside = self._beside(chosen)
        if beside is not None:
            return await beside.answer(chosen, rows)
        return await self._ask_alone(chosen, rows), chosen

    def ask(self, chosen: LoadedModel, rows: FloatArray) -> asyncio.Future[Any]:
        """What `predict` returns, to come; mere predictions, without a task for them, where `chosen` alone is asked.

        Raises:
            Refusal: 503, too much waits already.
        """
        if self._beside(chosen) is not None:
            return asyncio.get_running_loop().create_task(self.predict(chosen, rows))
        return self._ask_alone(chosen, rows)

    def _beside(self, chosen: LoadedModel) -> SideBySide | None:
        beside = self._view.side_by_side
        return beside if beside is not None and (chosen is beside.live or chosen is beside.candidate) else None

    def _ask_alone(self, chosen: LoadedModel, rows: FloatArray) -> asyncio.Future[Predictions]:
        if chosen.name in self._others:
            self._shelf.touch(chosen.name)
        return chosen.batcher.enqueue(rows)

    def _find_other(self, name: str, version: str | None) -> LoadedModel:
        if name not in self._others:
            raise _unknown(name)
        model = self._shelf.peek(name)
        if model is None:
            raise Refusal(503, f"model '{name}': not loaded yet; try again", TRY_AGAIN)
        if version and version != model.version:
            raise Refusal(404, f"model '{name}': version '{version[:40]}' is not served")
        return model


class Shelf:
    """Models loaded on demand, the least recently used let go first when they outgrow `memory_bytes`."""

    def __init__(self, others: Mapping[str, OtherModel], memory_bytes: int | None) -> None:
        self._others, self._memory_bytes = others, memory_bytes
        self._loaded: dict[str, LoadedModel] = {}  # in the order of their last use
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._leaving: tuple[LoadedModel, ...] = ()
        self._lock = threading.Lock()

    def models(self) -> tuple[LoadedModel, ...]:
        """In memory; those let go as well while somebody waits for them."""
        with self._lock:
            return (*self._loaded.values(), *_still_asked(self._leaving))

    def peek(self, name: str) -> LoadedModel | None:
        return self._loaded.get(name)

    def touch(self, name: str) -> None:
        """Now it is the most recently used; no effect on one that has been let go."""
        with self._lock:
            model = self._loaded.pop(name, None)
            if model is not None:
                self._loaded[name] = model

    async def load(self, name: str) -> None:
        if name in self._loaded:
            return
        task = self._loading.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(name))
            self._loading[name] = task
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        await asyncio.shield(task)  # one caller that goes away does not end the load for the others

    async def _load(self, name: str) -> None:
        try:
            model = await asyncio.to_thread(self._others[name].load)
        except Exception as error:  # whatever a user's factory raises
            _logger.warning("bigray: model '%s' could not be loaded: %s", name, last_line(error))
            message = f"model '{name}': cannot be loaded; the replica's log has the reason"
            raise Refusal(503, message, try_again_in(10)) from None
        with self._lock:
            self._loaded[name] = model
            gone = [self._loaded.pop(each) for each in self._over_budget(keep=name)]
            for evicted in gone:
                evicted.close()
            self._leaving = _still_asked((*self._leaving, *gone))

    def _over_budget(self, keep: str) -> list[str]:
        if self._memory_bytes is None:
            return []
        total = sum(model.nbytes for model in self._loaded.values())
        evicted = []
        for name, model in self._loaded.items():
            if total <= self._memory_bytes or name == keep:
                continue
            evicted.append(name)
            total -= model.nbytes
        return evicted


def _canary_of(view: View, sticky: str) -> LoadedModel | None:
    """The candidate where it is to answer this caller, and can: its full queue is no reason to send anybody away."""
    if view.side_by_side is None or view.rollout is None or view.rollout.kind != "canary":
        return None
    candidate = view.side_by_side.candidate
    return candidate if routes_to_candidate(view.rollout, sticky) and candidate.batcher.has_room() else None


def _still_asked(models: Iterable[LoadedModel]) -> tuple[LoadedModel, ...]:
    return tuple(model for model in models if not model.batcher.is_idle)


def _unknown(name: str) -> Refusal:
    return Refusal(404, f"model '{name[:80]}' is not served here; GET /v2/repository/index lists the models")
