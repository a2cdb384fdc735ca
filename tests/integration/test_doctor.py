"""`bigray doctor` as a user runs it, on a real cluster of three raylets whose CPUs are all in use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigray.cluster.connect import prepare_environment
from tests.waiting import wait_until

TOKEN = "0123456789abcdef0123456789abcdef"
WORKERS = 2
TIMEOUT_S = 60.0
"""Of the doctor itself, on three nodes."""


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    def of(self, name: str) -> list[dict[str, Any]]:
        return [finding for finding in self.report["findings"] if finding["name"] == name]


def doctor(address: str, *arguments: str, **environment: str) -> Run:
    """With no token of this user's own, wherever the tests run."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-m", "bigray", "doctor", "--address", address, "--json", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with a dashboard and two nodes, with a token, and an actor of the tests' own on every CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        prepare_environment(joining=True)
        import ray
        from ray._private.authentication_test_utils import reset_auth_token_state
        from ray.cluster_utils import Cluster

        reset_auth_token_state()
        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(WORKERS):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace="bigray", log_to_driver=False)
        busy = [ray.remote(num_cpus=1)(Busy).remote() for _ in range(WORKERS + 1)]
        ray.get([actor.ping.remote() for actor in busy])
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    reset_auth_token_state()


class Busy:
    def ping(self) -> None: ...


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def probes_alive() -> list[Any]:
    from ray._private.state import actors

    return [actor for actor in actors(actor_state_name="ALIVE").values() if actor["ActorClassName"] == "Probe"]


def test_a_busy_cluster_is_examined_and_left_as_it_was(cluster: Any, tmp_path: Path) -> None:
    storage = tmp_path / "not" / "yet"
    run = doctor(cluster.address, "--storage", str(storage), RAY_AUTH_TOKEN=TOKEN)
    statuses = {finding["name"]: finding["status"] for finding in run.report["findings"]}
    passed = ("node", "python", "ray", "torch", "bigray", "token", "ports", "clock", "gpus", "gloo", "storage")

    assert {name: statuses.get(name) for name in passed} == dict.fromkeys(passed, "pass"), run.report
    assert run.code == (0 if run.report["ok"] else 5)
    assert len(run.report["nodes"]) == WORKERS + 1
    assert run.of("gloo")[0]["what"].startswith("3 pairs")
    assert "dashboard" in run.of("ports")[0]["what"]
    assert os.listdir(tmp_path) == []
    wait_until(lambda: not probes_alive(), timeout_s=10)


def test_gpus_that_torch_lacks_and_an_interface_that_is_not_there_fail(cluster: Any) -> None:
    odd = cluster.add_node(num_cpus=0, num_gpus=2, env_vars={"GLOO_SOCKET_IFNAME": "nosuch0"})
    try:
        run = doctor(cluster.address, RAY_AUTH_TOKEN=TOKEN)
    finally:
        cluster.remove_node(odd)
    (gpus,) = run.of("gpus")
    failed = [finding for finding in run.of("gloo") if finding["status"] == "fail"]

    assert run.code == 5
    assert (gpus["status"], gpus["what"]) == ("fail", "Ray hands out 2 GPUs, torch.cuda sees 0")
    # each of its pairs; where no time was left for one, on a busy machine, the report says for how many
    num_untried = sum(int(finding["what"].split()[0]) for finding in run.of("rings"))
    assert len(failed) <= WORKERS + 1 <= len(failed) + num_untried, run.report["findings"]
    assert all(gpus["node"] in finding["node"] for finding in failed), failed
    named = [finding for finding in failed if "nosuch0" in finding["what"]]
    assert named, "a pair whose second try was too slow, on a busy machine, tells of that instead"
    assert all(finding["fix"].startswith("start Ray with GLOO_SOCKET_IFNAME=") for finding in named)


def test_a_token_file_that_everyone_reads_fails(cluster: Any, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    run = doctor(cluster.address, RAY_AUTH_TOKEN_PATH=str(file))
    (told,) = run.of("token")

    assert run.code == 5
    assert (told["status"], told["node"], told["fix"]) == ("fail", "the driver", f"chmod 600 {file}")
    assert TOKEN not in run.out + run.err


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({"HOME": "/nonexistent"}, "it asks for a token, and this user has none"),
        ({"RAY_AUTH_TOKEN": "f" * 32}, "it refuses the token of RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"}, "unset RAY_AUTH_MODE"),
        (
            {"RAY_AUTH_TOKEN_PATH": "/nonexistent", "RAY_AUTH_MODE": "token"},
            "the token file /nonexistent cannot be read",
        ),
    ],
)
def test_a_cluster_that_refuses_is_one_line_with_the_cause(
    cluster: Any, environment: dict[str, str], cause: str
) -> None:
    run = doctor(cluster.address, **environment)

    assert (run.code, run.out) == (5, "")
    assert run.err.count("\n") == 1, run.err
    assert cause in run.err
    assert TOKEN not in run.err


def test_a_node_that_stands_still_is_a_finding(cluster: Any) -> None:
    still = cluster.add_node(num_cpus=0)
    raylet = still.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        run = doctor(cluster.address, RAY_AUTH_TOKEN=TOKEN)
    finally:
        os.kill(raylet, signal.SIGCONT)
        cluster.remove_node(still, allow_graceful=False)
    (silent,) = run.of("node")

    assert run.code == 5
    assert (silent["status"], silent["node"] in run.report["nodes"]) == ("fail", True)
    assert [finding["status"] for finding in run.of("gloo")] == ["pass"]
