"""The head is gone for 30 s while another host serves: that one answers every request, and nothing is started anew.

What a user sets for it. By Ray's defaults a head that is away for so long finds the others dead when it is back, and
Serve replaces what answered all the time:

* of `ray start`, on every host (`SETTINGS` and `PATIENCE`): the control service must not give a host up, and no process
  may take an open connection for a broken one. Both have to last longer than the absence: what was sent into a cut link
  is sent again at intervals that double, so that a connection is silent for up to twice as long as the link.
* in the serve file (`SERVE`): `proxy_location: EveryNode`, so that the host has a proxy of its own; three health checks
  of the proxy in a row may fail before it is replaced, and one of them has 10 s by default.
* no CPU for the head (`ray start --head --num-cpus=0`), so that no replica is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigray.bundle import ModelBundle
from bigray.serve.sample import write_sample_bundle
from tests.hosts.hosts import Host, Network
from tests.hosts.ray_hosts import Patience, RayHosts
from tests.waiting import wait_until

GONE_S = 30.0
SETTLING_S = 60.0
"""After the return: connections come back, and whoever was given up meanwhile would be replaced."""
PATIENCE = Patience(period_ms=3000, timeout_ms=5000, checks=30)
"""At least 90 seconds, also where each check fails at once, as with no way to the host."""
SETTINGS = {
    # how long a connection may be silent after something was sent; of workers' servers, and the control service's
    "RAY_grpc_keepalive_timeout_ms": "180000",
    "RAY_grpc_client_keepalive_timeout_ms": "180000",
    # after so long without the control service a raylet ends, and so do workers
    "RAY_gcs_rpc_server_reconnect_timeout_s": "180",
}
PORT = 8000
SERVE = f"""
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {PORT}
controller_options:
  runtime_env:
    env_vars:
      RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S: "60"
applications:
  - name: model
    route_prefix: /
    import_path: bigray.serve.app:build
    args:
      bundle: replaced
    deployments:
      - name: Model
        num_replicas: 1
        health_check_timeout_s: 60
        ray_actor_options:
          num_cpus: 1
"""
ASK = """
import http.client, json, sys, time
address, body, pause_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
has_answered = False
while True:
    began, status, why = time.time(), 0, ""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("POST", "/predict", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
        if status == 200 and not json.loads(text)["predictions"]:
            status, why = 0, "no prediction"
        elif status != 200:
            why = text[:200].decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        status, why = 0, repr(error)
    finally:
        connection.close()
    has_answered = has_answered or status == 200
    if has_answered:
        print(json.dumps({"began": began, "seconds": time.time() - began, "status": status, "why": why}), flush=True)
    time.sleep(pause_s)
"""
"""One request after another, each on a connection of its own and asked once; told from the first answer on."""
PAUSE_S = 0.05
SERVING = ("ray::ServeReplica", "ray::HAProxyManager", "ray::ProxyActor", "ray::ServeController")
"""Beginnings of the command lines of Serve's processes; behind them Ray shows what they are at."""
RAYLET = "/raylet/raylet"
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Asking:
    """Requests from a host outside the cluster to the proxy of one in it, until the hosts end."""

    host: Host
    log: str

    @classmethod
    def start(cls, host: Host, address: str, body: str) -> Asking:
        host.start("asking", [sys.executable, "-c", ASK, address, body, str(PAUSE_S)])
        return cls(host, "asking")

    def answers(self) -> list[dict[str, Any]]:
        """Those told so far; the last line may be half written."""
        whole = self.host.output(self.log).rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def between(self, began: float, ended: float) -> list[dict[str, Any]]:
        return [answer for answer in self.answers() if began <= answer["began"] < ended]


@pytest.fixture
def ray(network: Network) -> RayHosts:
    """A head without a CPU, one more host with one, and a third that is not of the cluster."""
    ray = RayHosts(network, PATIENCE, SETTINGS)
    ray.start_head(cpus=0)
    ray.add("other", cpus=1)
    network.add("client")
    ray.wait_for_nodes(2)
    return ray


@pytest.mark.parametrize("way", ["cut", "paused"])
def test_a_host_that_serves_answers_while_the_head_is_gone_and_goes_on_after(
    ray: RayHosts, tmp_path: Path, way: str
) -> None:
    """Its link is cut, as when a switch fails; or it stands still, as a machine without memory, and is connected."""
    other = ray.network.hosts["other"]
    body = deploy(ray, tmp_path)
    asking = Asking.start(ray.network.hosts["client"], f"{other.address}:{PORT}", body)
    wait_until(lambda: len(asking.answers()) > 50, "the proxy of the second host does not answer", 60)
    before = {host.name: serving_on(host) for host in (ray.head, other)}
    assert any("ServeReplica" in command for command in before["other"].values()), before
    assert not any("ServeReplica" in command for command in before["head"].values()), before

    began = time.time()
    if way == "cut":
        ray.head.link.cut()
    else:
        ray.head.pause()
    time.sleep(GONE_S)
    ended = time.time()
    if way == "cut":
        ray.head.link.mend()
    else:
        ray.head.go_on()
    gone = asking.between(began, ended)
    tell(f"the head {way} for {GONE_S:g} s", gone)

    wait_until(lambda: is_running(ray), "bigray status does not show the endpoint as running", 90)
    print(f"bigray status shows it as running {time.time() - ended:.1f} s after the return")
    time.sleep(max(0.0, ended + SETTLING_S - time.time()))
    after = asking.between(ended, time.time())
    tell(f"{SETTLING_S:g} s after it", after)
    assert len(gone) > 100
    assert failed(gone) == []
    assert failed(after) == []
    assert is_running(ray)
    assert {host.name: set(serving_on(host)) for host in (ray.head, other)} == {
        name: set(found) for name, found in before.items()
    }, f"something was started anew: {before}, {serving_on(ray.head)}, {serving_on(other)}"
    ray.wait_for_nodes(2)


def deploy(ray: RayHosts, folder: Path) -> str:
    """Serve a small bundle that all hosts see, by `bigray deploy` on the head; returns the body of a request."""
    bundle = write_sample_bundle(str(folder / "bundles"), params={"hidden": [16]})
    config = folder / "serve.yaml"
    config.write_text(SERVE)
    options = ["--config", str(config), "--address", ray.address, "--open", "--json"]
    done = ray.bigray("deploy", bundle, *options, timeout_s=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.dumps({"records": [ModelBundle.load(bundle).manifest.example]})


def is_running(ray: RayHosts) -> bool:
    """As `bigray status` tells it on the head."""
    try:
        done = ray.bigray("status", "--address", ray.address, "--json", timeout_s=30)
    except subprocess.TimeoutExpired as late:
        print(f"{late}")
        return False
    if done.returncode != 0:
        print(f"bigray status: {done.stderr.strip()}")
        return False
    rows = json.loads(done.stdout)
    print(f"bigray status: {rows}")
    return [(row["name"], row["state"], row["replicas_running"], row["replicas_target"]) for row in rows] == [
        ("model", "RUNNING", 1, 1)
    ]


def serving_on(host: Host) -> dict[int, str]:
    """Pid and command line of Ray's node process and of Serve's; HAProxy replaces itself when its targets change."""
    found = host.processes()
    return {pid: command for pid, command in found.items() if command.startswith(SERVING) or RAYLET in command}


def failed(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if answer["status"] != 200]


def tell(when: str, answers: list[dict[str, Any]]) -> None:
    slowest = max((answer["seconds"] for answer in answers), default=0.0)
    lost = failed(answers)
    print(f"\n{when}: {len(answers)} requests, {len(lost)} failed (floor: 0), the slowest took {slowest:.2f} s")
    for answer in lost[:10]:
        print(f"  {answer}")
