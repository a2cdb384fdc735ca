"""Twenty submissions, five of them bad: each ends as documented, and nothing of them is left on any host."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hosts.hosts import Network
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import write_job
from tests.waiting import wait_until

NUM_GOOD = 15
BAD = {
    "a value that cannot be": (["job.toml", "--set", "training.lr=nan"], {}, 2, "training.lr"),
    "a storage inside the job's own folder": (["job.toml", "--set", "storage='runs'"], {}, 2, "storage"),
    "no such file": (["jib.toml"], {}, 2, "jib.toml"),
    "nobody at the address": (["job.toml", "--address", "http://127.0.0.1:9"], {}, 5, "http://127.0.0.1:9"),
    "another token": (["job.toml"], {"RAY_AUTH_TOKEN": "0" * 64}, 5, "token"),
}
"""Arguments, environment, exit code, and what the line names."""
OF_A_JOB = ("RayTrainWorker", "ServeReplica", "bigray run", "JobSupervisor")
"""Parts of command lines."""
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def ray(network: Network) -> RayHosts:
    """A head and one more host, with one CPU each."""
    ray = RayHosts(network)
    ray.start_head(cpus=1)
    ray.add("other", cpus=1)
    ray.wait_for_nodes(2)
    return ray


def test_each_ends_as_documented_and_no_process_is_left_on_any_host(ray: RayHosts, tmp_path: Path) -> None:
    """A package of one small folder; each of the good ones trains, serves and ends, one after the other."""
    project = tmp_path / "project"
    write_job(project, workers="2", epochs=2, storage=tmp_path / "runs")
    (project / "pace").write_text("0")
    bad = iter(BAD.items())
    started = time.monotonic()
    for number in range(NUM_GOOD + len(BAD)):
        if number % 4 == 3:
            told_bad(ray, project, *next(bad))
        else:
            arguments = ["job.toml", "--set", f"seed={number}", "--exit"]
            done = ray.bigray("submit", *arguments, "--address", ray.dashboard, folder=project, timeout_s=200)
            assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs").glob("paced-*/bundle/manifest.json"))) == NUM_GOOD
    print(f"\n{NUM_GOOD} submissions and {len(BAD)} that were refused: {time.monotonic() - started:.0f} s")
    wait_until(lambda: not left_on(ray), f"left: {left_on(ray)}", 60)


def told_bad(ray: RayHosts, project: Path, what: str, case: tuple[list[str], dict[str, str], int, str]) -> None:
    arguments, environment, exit_code, named = case
    to = [] if "--address" in arguments else ["--address", ray.dashboard]
    done = ray.bigray("submit", *arguments, *to, "--exit", folder=project, environment=environment)
    assert done.returncode == exit_code, f"{what}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, what
    assert named in done.stderr.splitlines()[-1], f"{what}: {done.stderr}"


def left_on(ray: RayHosts) -> list[str]:
    """Command lines of what jobs have started and that still runs, on all hosts."""
    commands = [command for host in ray.network.hosts.values() for command in host.processes().values()]
    return [command for command in commands if any(part in command for part in OF_A_JOB)]
