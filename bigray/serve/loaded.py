"""One version of a model in a replica's memory: loaded, warmed up, checked, ready to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, ModelBundle
from bigray.errors import DeployError
from bigray.inference import BUILT_IN_FACTORIES, Predictions, Predictor
from bigray.serve.batching import Batcher, QueueLimits, measure_capacity
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.release.golden import check_golden

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class ModelSettings:
    """How a replica runs a model, the same for each version."""

    max_batch_size: int = 64
    num_threads: int = 1
    allow_factories: Sequence[str] = BUILT_IN_FACTORIES
    slo_ms: float | None = None
    queue: QueueLimits = field(default_factory=QueueLimits)


@dataclass(frozen=True)
class LoadedModel:
    """A version that can answer (replica)."""

    name: str
    """In `/v2/models/{name}`."""
    manifest: BundleManifest
    version: str
    bundle: str
    """Where it was loaded from."""
    backend: str
    """`onnxruntime` or `torch`."""
    batcher: Batcher
    nbytes: int
    """Of weights and graph on disk; in memory a model takes two to three times as much."""

    async def submit(self, rows: FloatArray) -> Predictions:
        """Predictions for checked rows (rows, *input_shape).

        Raises:
            Refusal: 503, too much waits already.
        """
        return await self.batcher.submit(rows)

    def close(self) -> None:
        """Let go of its thread; what waits in it is still answered."""
        self.batcher.close()


def load_model(
    location: str, settings: ModelSettings, telemetry: Telemetry | None = None, name: str | None = None
) -> LoadedModel:
    """Read, verify, warm up and self-check a bundle; takes no request before that (replica, any thread).

    Raises:
        CorruptFile: a file differs from the manifest.
        StorageError: there is no bundle that can be read.
        DeployError: its factory is not allowed, or it does not reproduce its golden answers.
    """
    bundle = ModelBundle.load(location)
    predictor = Predictor(bundle, num_threads=settings.num_threads, allow_factories=settings.allow_factories)
    if (difference := check_golden(bundle, predictor)) is not None:
        raise DeployError(f"bundle of run '{bundle.manifest.origin.run}': {difference}")
    manifest = bundle.manifest
    example = manifest.inputs.from_records([manifest.example])
    capacity = measure_capacity(predictor.run, example, settings.max_batch_size, settings.slo_ms)
    shown = name or manifest.name

    def on_batch(rows: int, seconds: float, waited_s: float) -> None:
        if telemetry is not None:
            telemetry.record_batch(shown, bundle.version, rows, seconds, waited_s)

    def on_begin() -> None:
        if telemetry is not None:
            telemetry.begin_batch(shown, bundle.version)

    return LoadedModel(
        name=shown,
        manifest=manifest,
        version=bundle.version,
        bundle=location,
        backend=predictor.backend,
        batcher=Batcher(predictor.run, capacity, settings.queue, on_batch, on_begin),
        nbytes=len(bundle.weights) + len(bundle.onnx or b""),
    )
