"""A cluster that asks for a token, and who has none, a wrong one, or one that all may read: one line, and exit 5."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.hosts import Network
from tests.hosts.ray_hosts import DASHBOARD_PORT, GCS_PORT, RayHosts
from tests.hosts.runs import write_job

WRONG = "0" * 64
PORTS = (GCS_PORT, DASHBOARD_PORT, 10001, 52365)
"""Of a head: GCS, dashboard, Ray client, agent."""
ASK = """
import sys, urllib.request, urllib.error
for method, path in (
    ("POST", "/api/jobs/"),
    ("PUT", "/api/serve/applications/"),
    ("DELETE", "/api/serve/applications/"),
    ("POST", "/api/job_agent/jobs/"),
    ("GET", "/api/jobs/"),
    ("GET", "/nodes?view=summary"),
):
    request = urllib.request.Request(sys.argv[1] + path, data=b"{}" if method != "GET" else None, method=method)
    request.add_header("Content-Type", "application/json")
    try:
        print(method, path, urllib.request.urlopen(request, timeout=10).status)
    except urllib.error.HTTPError as error:
        print(method, path, error.code)
"""
COMMANDS = ("train", "plan", "doctor", "submit", "jobs")
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """A head alone, whose dashboard answers on its address, and a host beside it that is not of the cluster."""
    with Network(tmp_path_factory.mktemp("network")) as network:
        ray = RayHosts(network)
        ray.start_head(cpus=1)
        network.add("stranger")
        ray.wait_for_nodes(1)
        yield ray


@pytest.fixture(params=["missing", "wrong", "empty"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Of a user whose token is not the cluster's."""
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    if request.param != "missing":
        token.touch(mode=0o600)
        token.write_text(WRONG if request.param == "wrong" else "")
    return {"HOME": str(tmp_path / "home")}


def bigray(ray: RayHosts, command: str, project: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command that needs the cluster, in a folder with a job file."""
    write_job(project, workers="1", epochs=1)
    address = ray.dashboard if command in ("submit", "jobs") else ray.address
    job = ["job.toml"] if command in ("train", "plan", "submit") else []
    return ray.bigray(command, *job, "--address", address, environment=environment, folder=project)


@pytest.mark.parametrize("command", COMMANDS)
def test_who_has_not_the_clusters_token_is_told_so_in_one_line(
    ray: RayHosts, environment: dict[str, str], tmp_path: Path, command: str
) -> None:
    before = set(ray.head.processes())
    done = bigray(ray, command, tmp_path / "project", environment)
    assert done.returncode == 5, done.stdout + done.stderr
    *notes, line = [line for line in done.stderr.splitlines() if line.strip()]
    assert "token" in line
    assert not notes or command == "submit", "that one shows first what it would send"
    assert "Traceback" not in done.stderr
    assert WRONG not in done.stdout + done.stderr
    left = {pid: name for pid, name in ray.head.processes().items() if pid not in before and "bigray" in name}
    assert not left


@pytest.mark.parametrize("command", COMMANDS)
def test_a_token_file_that_others_can_read_is_told_with_the_way_out(
    ray: RayHosts, tmp_path: Path, command: str
) -> None:
    """Refused, but for the doctor, who lists it among what it finds."""
    token = tmp_path / "token"
    token.touch(mode=0o644)
    token.write_text(ray.network.token)
    done = bigray(ray, command, tmp_path / "project", {"RAY_AUTH_TOKEN_PATH": str(token)})
    assert done.returncode == 5, done.stdout + done.stderr
    assert "chmod 600" in " ".join((done.stdout + done.stderr).split())
    assert ray.network.token not in done.stdout + done.stderr


def test_a_host_with_a_wrong_token_cannot_join(ray: RayHosts) -> None:
    stranger = ray.network.hosts["stranger"]
    command = ["ray", "start", f"--address={ray.address}", f"--node-ip-address={stranger.address}", "--num-cpus=1"]
    done = ray.run(stranger, command, timeout_s=90, environment={"RAY_AUTH_TOKEN": WRONG})
    assert done.returncode != 0
    assert set(ray.wait_for_nodes(1)) == {ray.head.address}


def test_without_a_token_nothing_on_the_head_takes_a_request(ray: RayHosts) -> None:
    done = ray.run(ray.head, [sys.executable, "-c", ASK, ray.dashboard])
    answers = {tuple(line.split()[:2]): int(line.split()[2]) for line in done.stdout.splitlines()}
    assert len(answers) == 6, done.stderr
    assert set(answers.values()) <= {401, 403, 404, 405}, answers


def test_the_dashboard_of_the_head_cannot_be_reached_from_another_host(ray: RayHosts) -> None:
    probe = """
import socket, sys
for port in sys.argv[2:]:
    with socket.socket() as tried:
        tried.settimeout(2)
        print(port, tried.connect_ex((sys.argv[1], int(port))) == 0)
"""
    stranger = ray.network.hosts["stranger"]
    done = stranger.run([sys.executable, "-c", probe, ray.head.address, *map(str, PORTS)])
    reached = {int(line.split()[0]): line.split()[1] == "True" for line in done.stdout.splitlines()}
    assert reached[GCS_PORT], "that is how hosts join"
    assert not reached[DASHBOARD_PORT]
