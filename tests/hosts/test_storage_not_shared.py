"""A folder that every host has for itself is no storage: found in seconds, before anything runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.hosts import Network
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import write_job

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """A head and two more hosts, with one CPU each."""
    with Network(tmp_path_factory.mktemp("network")) as network:
        ray = RayHosts(network)
        ray.start_head(cpus=1)
        for name in ("other", "third"):
            ray.add(name, cpus=1)
        ray.wait_for_nodes(3)
        yield ray


@pytest.fixture
def own_folder(ray: RayHosts, tmp_path: Path) -> Path:
    """The same path on all hosts, and another disk behind it on each."""
    folder = tmp_path / "own"
    for host in ray.network.hosts.values():
        host.add_disk(folder, size_mb=64)
    return folder


def findings(ray: RayHosts, storage: Path) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of `bigray doctor`, and what it says of the storage."""
    started = time.monotonic()
    done = ray.bigray("doctor", "--address", ray.address, "--storage", str(storage), "--json")
    print(f"\nbigray doctor on 3 hosts: {time.monotonic() - started:.1f} s (floor: at most 20 s)")
    assert "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)["findings"]
    return done.returncode, [finding for finding in told if finding["name"] == "storage"]


def test_the_doctor_passes_a_folder_that_all_hosts_share(ray: RayHosts, tmp_path: Path) -> None:
    _, told = findings(ray, tmp_path / "runs")
    assert [finding["status"] for finding in told] == ["pass"], told


def test_the_doctor_names_the_hosts_that_do_not_see_what_another_wrote(ray: RayHosts, own_folder: Path) -> None:
    exit_code, told = findings(ray, own_folder)
    assert exit_code == 5
    failed = [finding for finding in told if finding["status"] == "fail"]
    assert failed and all(finding["fix"] for finding in failed), told


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_job_on_it_is_refused_with_one_line_before_anything_is_trained(
    ray: RayHosts, own_folder: Path, tmp_path: Path, command: str
) -> None:
    job = write_job(tmp_path / "job", workers="3", epochs=2, storage=own_folder)
    done = ray.bigray(command, str(job), "--address", ray.address)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert f"storage: {own_folder}: what is written here is not seen from" in done.stderr.splitlines()[-1]
    for host in ray.network.hosts.values():
        assert list(host.path(own_folder).rglob("*")) == [], "something is left"
