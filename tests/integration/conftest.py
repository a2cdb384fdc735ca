"""One real local Ray for all integration tests of training and tuning: four logical CPUs, whatever the machine has."""

from collections.abc import Iterator

import pytest

from bigray.cluster.connect import prepare_environment, without_services


@pytest.fixture(scope="module")
def four_cpu_ray() -> Iterator[None]:
    """Four logical CPUs let groups of four workers run on any machine."""
    prepare_environment(joining=False)
    import ray

    with without_services():
        ray.init(address="local", num_cpus=4, namespace="bigray", include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
