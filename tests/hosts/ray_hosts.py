"""A Ray cluster on real hosts: a head and workers, each by its own `ray start --block`, token authentication on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts.hosts import REPOSITORY, Host, Network
from tests.waiting import wait_until

GCS_PORT = 6379
DASHBOARD_PORT = 8265
OBJECT_STORE_BYTES = 100_000_000
START_S = 90.0
"""Several hosts share two cores while they start."""
NODES = """
import json, sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + float(sys.argv[3])
while True:
    alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if len(alive) == int(sys.argv[2]) or time.monotonic() > deadline:
        break
    time.sleep(0.2)
print(json.dumps(alive))
"""


@dataclass(frozen=True)
class Patience:
    """When Ray gives a host up: so many health checks in a row without an answer."""

    period_ms: int
    timeout_ms: int
    checks: int

    @property
    def longest_s(self) -> float:
        """From the loss of a host that does not answer to its being declared dead."""
        return self.checks * (self.period_ms + self.timeout_ms) / 1000

    def environment(self) -> dict[str, str]:
        """Of all of Ray's processes."""
        return {
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": str(self.period_ms),
            "RAY_health_check_timeout_ms": str(self.timeout_ms),
            "RAY_health_check_failure_threshold": str(self.checks),
        }


QUICK = Patience(period_ms=500, timeout_ms=1000, checks=4)
"""At most six seconds. Less than that is taken for a loss by a machine that is busy."""
PATIENT = Patience(period_ms=1000, timeout_ms=3000, checks=6)
"""At most 24 seconds, and never within the ten of a link that is away for so long."""


@dataclass
class RayHosts:
    """A cluster whose hosts are a network's. They end with the network, and so do their Rays."""

    network: Network
    patience: Patience = QUICK
    settings: Mapping[str, str] = field(default_factory=dict)
    """More of Ray's environment variables, on all hosts."""
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By host: its `ray start --block`."""

    @property
    def head(self) -> Host:
        return self.network.hosts["head"]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{GCS_PORT}"

    @property
    def dashboard(self) -> str:
        """For commands that are run on the head, which is where it listens."""
        return f"http://127.0.0.1:{DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Of `ray start` and of the commands that join: the mode, and no telling of usage."""
        common = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
        ending = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
        return {**common, **ending, **self.patience.environment(), **self.settings}

    def start_head(self, *, cpus: int = 1, options: Sequence[str] = (), program: Sequence[str] = ("ray",)) -> Host:
        """Bring up the host "head", and Ray on it. `program`: another one than this environment's `ray`."""
        host = self.network.hosts.get("head") or self.network.add("head")
        listening = [f"--port={GCS_PORT}", f"--dashboard-port={DASHBOARD_PORT}", "--dashboard-host=127.0.0.1"]
        self._start(host, ["--head", *listening, "--include-dashboard=true", *options], cpus, program)
        return host

    def add(self, name: str, *, cpus: int = 1, options: Sequence[str] = ()) -> Host:
        """Bring up one more host, and a worker node of Ray on it."""
        host = self.network.add(name)
        self.join(host, cpus=cpus, options=options)
        return host

    def join(self, host: Host, *, cpus: int = 1, options: Sequence[str] = ()) -> None:
        """Start a worker node of Ray on a host that is up."""
        self._start(host, [f"--address={self.address}", *options], cpus)

    def _start(self, host: Host, options: Sequence[str], cpus: int, program: Sequence[str] = ("ray",)) -> None:
        common = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--block"]
        store = [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        before = host.log("ray").count("Ray runtime started")
        process = host.start("ray", [*program, "start", *options, *common, *store], environment=self.environment)
        self.started[host.name] = process

        def is_up_or_over() -> bool:
            return host.log("ray").count("Ray runtime started") > before or process.poll() is not None

        wait_until(is_up_or_over, f"{host.name}: Ray does not start: {host.log('ray')}", START_S)
        if process.poll() is not None:
            raise RuntimeError(f"{host.name}: Ray ended: {host.log('ray')}")

    def autoscaler_log(self) -> str:
        """What the autoscaler itself has written."""
        logs = self.head.path("/tmp/ray").glob("session_2*/logs/monitor*")
        return "".join(file.read_text(errors="replace") for file in sorted(logs))

    def wait_for_nodes(self, count: int, timeout_s: float = START_S) -> dict[str, str]:
        """Ray's id of each live node, by address, once there are so many.

        Raises:
            TimeoutError: there are others.
        """
        arguments = [self.address, str(count), str(timeout_s)]
        done = self.run(self.head, [sys.executable, "-c", NODES, *arguments], timeout_s=timeout_s + 30)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        nodes: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        if len(nodes) != count:
            raise TimeoutError(f"{count} nodes are expected, there are {nodes}")
        return nodes

    def run(
        self,
        host: Host,
        command: Sequence[str],
        *,
        timeout_s: float = 60.0,
        environment: Mapping[str, str] | None = None,
        folder: Path = REPOSITORY,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host as its user would: with the cluster's settings, and its token file."""
        settings = {**self.environment, **(environment or {})}
        return host.run(command, timeout_s=timeout_s, environment=settings, folder=folder)

    def bigray(
        self,
        *arguments: str,
        timeout_s: float = 120.0,
        environment: Mapping[str, str] | None = None,
        folder: Path = REPOSITORY,
    ) -> subprocess.CompletedProcess[str]:
        """Run `bigray` on the head."""
        command = [sys.executable, "-m", "bigray", *arguments]
        return self.run(self.head, command, timeout_s=timeout_s, environment=environment, folder=folder)
