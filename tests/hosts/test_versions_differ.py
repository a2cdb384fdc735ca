"""A cluster of another Ray version: one line with both versions, and exit 5."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.hosts.hosts import Network
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import write_job

OTHER = "2.59.0"
AS_OTHER = f"import ray; ray.__version__ = {OTHER!r}; from ray.scripts.scripts import main; main()"
"""`ray`, which says of itself that it is of another version: what is compared is only that."""
pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def ray(network: Network) -> RayHosts:
    """A head of the other version."""
    ray = RayHosts(network)
    ray.start_head(cpus=1, program=(sys.executable, "-c", AS_OTHER))
    return ray


def test_a_cluster_of_another_version_is_refused_with_both_versions(ray: RayHosts, tmp_path: Path) -> None:
    job = write_job(tmp_path, workers="1", epochs=1)
    for command in (["train", str(job)], ["plan", str(job)], ["doctor"]):
        done = ray.bigray(*command, "--address", ray.address)
        assert done.returncode == 5, done.stdout + done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        assert OTHER in line and version("ray") in line


def test_a_host_of_another_version_cannot_join(ray: RayHosts) -> None:
    host = ray.network.add("other")
    command = ["ray", "start", f"--address={ray.address}", f"--node-ip-address={host.address}"]
    done = ray.run(host, command, timeout_s=90)
    assert done.returncode != 0
    assert OTHER in done.stdout + done.stderr
