"""A host tells that it is about to go away: its workers leave in time, no step is repeated, and nobody is charged."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.hosts.hosts import Host, Network
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import Run, wait_for_no_workers, workers_on, write_job

NOTICE_S = 20
"""Of the cloud that takes the host; a spot host of theirs has 30 to 120."""
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def ray(network: Network) -> RayHosts:
    """A head and one more host, with one CPU each; `ray start` drains its node for as long as the notice lasts."""
    ray = RayHosts(network, settings={"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE_S)})
    ray.start_head(cpus=1)
    ray.add("other", cpus=1)
    return ray


def tell_ray_start(ray: RayHosts, host: Host) -> None:
    """SIGTERM to `ray start --block`, as a service manager sends it."""
    ray.wait_for_nodes(2)
    host.signal(ray.started[host.name], signal.SIGTERM)


def tell_the_cluster(ray: RayHosts, host: Host) -> None:
    """A notice by Ray's own command, as an autoscaler gives it."""
    node_id = ray.wait_for_nodes(2)[host.address]
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    deadline = f"--deadline-remaining-seconds={NOTICE_S}"
    command = ["ray", "drain-node", f"--address={ray.address}", f"--node-id={node_id}", *reason, deadline]
    done = ray.run(ray.head, command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tell", [tell_ray_start, tell_the_cluster])
def test_a_preempted_host_costs_no_step(ray: RayHosts, tmp_path: Path, tell: object) -> None:
    assert callable(tell)
    run = Run.start(ray, tmp_path, "train", str(write_job(tmp_path, epochs=600)))
    run.wait_for("epoch", count=5)
    other = ray.network.hosts["other"]
    assert workers_on(other)
    tell(ray, other)
    regrouped = run.wait_for("regrouped", lambda event: event["workers"] == 1)
    resumed = run.wait_for("resumed", lambda event: event["time"] >= regrouped["time"])
    told = [event["step"] for event in run.events("epoch") if event["time"] <= resumed["time"]]
    assert resumed["step"] >= max(told), "steps are repeated"
    ray.network.kill(other, in_silence=True)
    run.let_run()
    board = run.board()
    assert (board["samples_lost"], board["samples_repeated"]) == (0, 0)
    assert not run.events("failed"), "a preemption is charged to nobody"
    run.assert_weights_are_those_of_one_process()
    wait_for_no_workers([ray.head])
