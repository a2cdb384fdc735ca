"""An endpoint put together from its parts: the same in a Serve replica and in a process of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from bigray.serve.asgi import Limits, ModelApp
from bigray.serve.batching import QueueLimits
from bigray.serve.config import BundleArgs, ModelEntry
from bigray.serve.explaining import ExplanationDesk
from bigray.serve.http import Answer
from bigray.serve.loaded import LoadedModel, ModelSettings, load_model
from bigray.serve.observe.access_log import AccessLog
from bigray.serve.observe.prometheus import CONTENT_TYPE, render_prometheus
from bigray.serve.observe.stats import StatsHistory
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.release.record import ReplicaReport
from bigray.serve.rollout import total
from bigray.serve.routes import Router
from bigray.serve.steward import SILENT_S
from bigray.serve.store import ModelStore, OtherModel
from bigray.serve.wire.images import prepare_images

Reports = Callable[[], Sequence[ReplicaReport]]
"""Reads what all replicas of the channel have reported."""

REUSED_S = 0.9
"""The numbers of all replicas are read at most about once a second, however many ask."""


@dataclass(frozen=True)
class Endpoint:
    """What answers, and what others need to keep it right."""

    app: ModelApp
    store: ModelStore
    telemetry: Telemetry
    guard: Guard
    load: Callable[[str], LoadedModel]
    """Loads a further version of the channel's model."""


def assemble(
    bundle: str,
    args: BundleArgs,
    *,
    num_threads: int,
    num_cpus: float = 1.0,
    replica: str = "",
    reports: Reports | None = None,
) -> Endpoint:
    """Load the live version and build the application around it; `replica` is this process in the numbers of all.

    Raises:
        CorruptFile, StorageError, DeployError: as for `load_model`.
        SpecError: a further model has the name of this one.
    """
    telemetry = Telemetry()
    settings = _settings(args, num_threads)
    live = load_model(bundle, settings, telemetry)
    args.check_own_name(live.name)
    telemetry.set_versions(live.name, live.version)
    prepare_images(live.manifest)
    others = {entry.name: _other(entry, settings, telemetry) for entry in args.models}
    store = ModelStore(live, others, None if args.models_memory_mb is None else int(args.models_memory_mb * 2**20))
    guard = Guard(args.keys)
    numbers = _Numbers(telemetry, replica, reports)
    limits = Limits(int(args.max_body_mb * 2**20), args.body_timeout_s, args.request_timeout_s, args.max_queue_s)
    explanations = ExplanationDesk(args.allow_factories, args.request_timeout_s, num_threads)
    router = Router(store, limits.max_body_bytes, numbers.stats, numbers.metrics, explanations)
    log = AccessLog(args.access_log) if args.access_log is not None else None
    tick = partial(_tick, store, telemetry, num_cpus, args.request_timeout_s)
    app = ModelApp(store, router, guard=guard, telemetry=telemetry, limits=limits, tick=tick, access_log=log)
    return Endpoint(app, store, telemetry, guard, partial(load_model, settings=settings, telemetry=telemetry))


def _tick(store: ModelStore, telemetry: Telemetry, num_cpus: float, request_timeout_s: float) -> None:
    """Measure the load, and give up what has waited too long (event loop, several times a second)."""
    batchers = [model.batcher for model in store.loaded()]
    for batcher in batchers:
        batcher.expire(request_timeout_s)
    telemetry.queued(sum(batcher.num_queued for batcher in batchers), max(each.oldest_age_s() for each in batchers))
    telemetry.tick(time.monotonic(), time.process_time(), num_cpus)


def _settings(args: BundleArgs, num_threads: int) -> ModelSettings:
    return ModelSettings(
        max_batch_size=args.max_batch_size,
        num_threads=num_threads,
        allow_factories=args.allow_factories,
        slo_ms=args.slo_ms,
        queue=QueueLimits(args.max_queue_s, args.max_queued_requests),
    )


def _other(entry: ModelEntry, settings: ModelSettings, telemetry: Telemetry) -> OtherModel:
    queue = settings.queue
    if entry.max_queued_requests is not None:
        queue = replace(queue, max_requests=entry.max_queued_requests)
    own = replace(settings, queue=queue)
    return OtherModel(entry.name, entry.bundle, partial(load_model, entry.bundle, own, telemetry, entry.name))


class _Numbers:
    """Answers `/stats` and `/metrics` with the numbers of all replicas, this one's own as they are now."""

    def __init__(self, telemetry: Telemetry, replica: str, reports: Reports | None) -> None:
        self._telemetry, self._replica, self._reports = telemetry, replica or "local", reports
        self._history = StatsHistory()
        self._reported: Sequence[ReplicaReport] = ()
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()

    async def stats(self) -> Answer:
        document = self._history.summary(await self._snapshots())
        return Answer(orjson.dumps(document | {"comparison": _compared(self._reported)}))

    async def metrics(self) -> Answer:
        return Answer(render_prometheus(await self._snapshots()), CONTENT_TYPE)

    async def _snapshots(self) -> dict[str, Mapping[str, Any]]:
        async with self._lock:
            if self._reports is not None and time.monotonic() - self._read_at > REUSED_S:
                self._reported = await asyncio.to_thread(self._read_reports)
                self._read_at = time.monotonic()
        others = {report.replica: report.telemetry for report in self._reported}
        return {**others, self._replica: self._telemetry.snapshot()}

    def _read_reports(self) -> list[ReplicaReport]:
        assert self._reports is not None, "asked only where there are reports"
        now = time.time()
        return [report for report in self._reports() if now - report.at < SILENT_S]


def _compared(reports: Sequence[ReplicaReport]) -> dict[str, Any] | None:
    """What all replicas have seen of a canary or shadow; None where none is under way."""
    if all(report.comparison is None for report in reports):
        return None
    seen = total(reports)
    sides = {"live": seen.live, "candidate": seen.candidate}
    return {
        "compared_rows": seen.compared_rows,
        "disagreeing_rows": seen.disagreeing_rows,
        **{name: {"requests": side.requests, "errors": side.errors} for name, side in sides.items()},
    }
