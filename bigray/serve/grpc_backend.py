"""The models of a replica as its gRPC service asks them: the same store, keys, canary and counters as over HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.inference import Predictions
from bigray.serve.assembly import Endpoint
from bigray.serve.http import Refusal
from bigray.serve.loaded import LoadedModel
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.keys import Key
from bigray.serve.store import ModelStore

FloatArray = NDArray[np.float32]

OK, FAILED, OVERLOADED = 200, 500, 503

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")


class GrpcBackend:
    """What `InferenceMethods` asks (replica, event loop)."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._loading: set[asyncio.Task[None]] = set()

    def find(self, name: str | None, version: str | None, sticky: str) -> AskedModel:
        store = self._endpoint.store
        if name is not None and store.knows(name) and not store.is_loaded(name):
            self._start_load(name)
        found = store.find(name, version, sticky or str(time.monotonic_ns()))
        return AskedModel(found, store, self._endpoint.telemetry)

    def _start_load(self, name: str) -> None:
        """This caller is told to come back; what fails is told to those who come back after it."""
        task = asyncio.get_running_loop().create_task(self._endpoint.store.load(name))
        self._loading.add(task)
        task.add_done_callback(self._forget_load)

    def _forget_load(self, task: asyncio.Task[None]) -> None:
        self._loading.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.warning("bigray: %s", error)

    def authorize(self, metadata: Mapping[bytes, bytes], scope: str) -> Key | None:
        return self._endpoint.guard.authorize(metadata, scope)

    def names(self) -> Sequence[str]:
        return self._endpoint.store.names()

    def is_loaded(self, name: str) -> bool:
        return self._endpoint.store.is_loaded(name)


class AskedModel:
    """A version for one call; after the answer, `version` is that of the version that made it."""

    def __init__(self, chosen: LoadedModel, store: ModelStore, telemetry: Telemetry) -> None:
        self._model, self._store, self._telemetry = chosen, store, telemetry

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def version(self) -> str:
        return self._model.version

    @property
    def backend(self) -> str:
        return self._model.backend

    @property
    def manifest(self) -> BundleManifest:
        return self._model.manifest

    def check_room(self) -> None:
        """Raise a 503 before the request is decoded, where it would wait too long."""
        try:
            self._model.batcher.check_room()
        except Refusal:
            self._telemetry.shed(self.name)
            # it was offered too: scaling goes by the share of the requests that are shed
            self._telemetry.record(self.name, self.version, "grpc", OVERLOADED, 0.0, 0, 0)
            raise

    async def submit(self, rows: FloatArray) -> Predictions:
        start, status = time.perf_counter(), FAILED
        self._telemetry.ongoing(1)
        try:
            predictions, self._model = await self._store.predict(self._model, rows)
            status = OK
        except Refusal as refusal:
            status = refusal.status
            if status == OVERLOADED:
                self._telemetry.shed(self._model.name)
            raise
        finally:
            self._telemetry.ongoing(-1)
            seconds = time.perf_counter() - start
            self._telemetry.record(self.name, self.version, "grpc", status, seconds, len(rows), rows.nbytes)
        return predictions
