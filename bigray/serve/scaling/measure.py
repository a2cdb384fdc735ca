"""How fast one replica of a bundle is: its predictor, timed in this process, plus what HTTP costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from bigray.bundle import ModelBundle
from bigray.inference import BUILT_IN_FACTORIES, Predictor
from bigray.serve.scaling.simulation import ServiceModel

HTTP_SECONDS_PER_REQUEST = 0.0004
"""Read, check and answer one request in the replica's HTTP server: a replica that answers 2,155 JSON requests a second
of 784 numbers is full (benchmarks/serve_throughput.py, two cores), which is 0.46 ms each, some of it the model's."""
REPLICA_START_S = 4.5
"""For Serve to start a replica's process and import what it needs: as a request at zero replicas took to its answer, on
two cores that did little else. On cores that are full it takes about twice as long."""
LARGE_BATCH = 64
SECONDS_A_SIZE = 0.5
"""Spent on each batch size, or at least `FEWEST_RUNS` runs."""
FEWEST_RUNS = 5
MOST_RUNS = 200


def measure_service(
    bundle: str, threads: int = 1, *, allow_factories: Sequence[str] = BUILT_IN_FACTORIES
) -> ServiceModel:
    """Time the bundle's predictor at 1 and at 64 rows (a second or two, on this machine) and draw a line through them.

    Raises:
        CorruptFile, StorageError: there is no sound bundle at this location.
        DeployError: its factory is not allowed.
    """
    start = time.perf_counter()
    loaded = ModelBundle.load(bundle)
    predictor = Predictor(loaded, num_threads=threads, allow_factories=allow_factories)
    row = loaded.manifest.inputs.from_records([loaded.manifest.example])
    predictor.run(row)
    load_s = time.perf_counter() - start
    batch = np.repeat(row, LARGE_BATCH, axis=0)
    one_s, many_s = _median_seconds(lambda: predictor.run(row)), _median_seconds(lambda: predictor.run(batch))
    return service_model(one_s, many_s, startup_s=REPLICA_START_S + load_s, cpus=threads)


def service_model(one_s: float, many_s: float, *, startup_s: float, cpus: float = 1.0) -> ServiceModel:
    """From the time of one row and of `LARGE_BATCH` rows; where the latter is no longer, rows cost nothing."""
    per_row_s = min(max(0.0, (many_s - one_s) / (LARGE_BATCH - 1)), one_s)
    return ServiceModel(
        seconds_per_request=HTTP_SECONDS_PER_REQUEST + one_s - per_row_s,
        seconds_per_row=per_row_s,
        startup_s=startup_s,
        cpus=cpus,
    )


def _median_seconds(run: Callable[[], object]) -> float:
    run()
    seconds: list[float] = []
    while len(seconds) < FEWEST_RUNS or (sum(seconds) < SECONDS_A_SIZE and len(seconds) < MOST_RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
