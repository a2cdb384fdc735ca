"""While a canary or a shadow runs: both versions side by side, in the replica that answers."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigray.inference import Predictions
from bigray.serve.http import Refusal
from bigray.serve.loaded import LoadedModel
from bigray.serve.release.record import LATENCY_BOUNDS_S, Comparison, VersionStats, latency_bucket

FloatArray = NDArray[np.float32]

MOST_MIRRORED = 32
"""Mirrored requests under way at once; beyond that a request is answered without being compared."""

VALUE_TOLERANCE = 1e-2
"""Relative difference of two predicted values that still counts as agreement."""


class SideBySide:
    """Answers each request by the version chosen for it, and asks the other one in the background (one event loop).

    What the other says is counted and thrown away: no answer mixes versions. A request that the candidate fails is
    answered by the live version, so a bad canary costs latency and no errors.
    """

    def __init__(self, kind: Literal["canary", "shadow"], live: LoadedModel, candidate: LoadedModel) -> None:
        self._kind, self.live, self.candidate = kind, live, candidate
        self._stats = {live.version: _Counter(), candidate.version: _Counter()}
        self._compared, self._disagreeing = 0, 0
        self._mirrored: set[asyncio.Task[None]] = set()

    async def answer(self, chosen: LoadedModel, rows: FloatArray) -> tuple[Predictions, LoadedModel]:
        """The predictions, and the version that made them."""
        try:
            predictions = await self._timed(chosen, rows)
        except Exception as error:
            is_full = isinstance(error, Refusal) and error.status == 503
            if chosen is self.live or (isinstance(error, Refusal) and not is_full):
                raise
            return await self._timed(self.live, rows), self.live
        other = self._other(chosen)
        if other is not None and len(self._mirrored) < MOST_MIRRORED:
            task = asyncio.get_running_loop().create_task(self._mirror(other, rows, predictions))
            self._mirrored.add(task)
            task.add_done_callback(self._mirrored.discard)
        return predictions, chosen

    def comparison(self) -> Comparison:
        """What was seen so far, in this replica."""
        live, candidate = self._stats[self.live.version], self._stats[self.candidate.version]
        return Comparison(
            live=live.frozen(),
            candidate=candidate.frozen(),
            compared_rows=self._compared,
            disagreeing_rows=self._disagreeing,
        )

    def _other(self, chosen: LoadedModel) -> LoadedModel | None:
        """Whom to ask as well: the live traffic of a canary goes on as it was."""
        if chosen is self.candidate:
            return self.live
        return self.candidate if self._kind == "shadow" else None

    async def _timed(self, model: LoadedModel, rows: FloatArray) -> Predictions:
        stats, start = self._stats[model.version], time.perf_counter()
        try:
            predictions = await model.submit(rows)
        except Refusal as refusal:
            if refusal.status == 504:  # it hangs, or is far too slow; a full queue is no fault of the version
                stats.add(len(rows), time.perf_counter() - start, failed=True)
            raise
        except Exception:
            stats.add(len(rows), time.perf_counter() - start, failed=True)
            raise
        stats.add(len(rows), time.perf_counter() - start, failed=False)
        return predictions

    async def _mirror(self, other: LoadedModel, rows: FloatArray, answered: Predictions) -> None:
        try:
            # of a canary, the live version's own traffic is its measure: what is mirrored to it is not counted
            second = await (self._timed(other, rows) if other is self.candidate else other.submit(rows))
        except Exception:  # counted where it matters; nobody waits for this answer
            return
        self._compared += len(rows)
        self._disagreeing += count_disagreements(answered, second)


class _Counter:
    """A `VersionStats` that grows."""

    def __init__(self) -> None:
        self.requests, self.errors, self.rows, self.seconds = 0, 0, 0, 0.0
        self.latency = [0] * (len(LATENCY_BOUNDS_S) + 1)

    def add(self, rows: int, seconds: float, *, failed: bool) -> None:
        self.requests += 1
        self.errors += failed
        self.rows += rows
        self.seconds += seconds
        self.latency[latency_bucket(seconds)] += 1

    def frozen(self) -> VersionStats:
        return VersionStats(
            requests=self.requests,
            errors=self.errors,
            rows=self.rows,
            seconds=self.seconds,
            latency=tuple(self.latency),
        )


def count_disagreements(first: Predictions, second: Predictions) -> int:
    """Rows with another label, or with values more than a hundredth apart."""
    if first.values is not None and second.values is not None:
        scale = np.maximum(np.abs(first.values), 1e-6)
        agreeing = np.abs(first.values - second.values) <= VALUE_TOLERANCE * scale  # so asked, NaN agrees with nothing
        return len(agreeing) - int(agreeing.sum())
    assert first.labels is not None and second.labels is not None, "both versions have the same task"
    return sum(a != b for a, b in zip(first.labels, second.labels, strict=True))
