"""A link between hosts is gone for ten seconds and for sixty: training goes on, and the weights do not tell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hosts.hosts import Network
from tests.hosts.ray_hosts import PATIENT, RayHosts
from tests.hosts.runs import Run, wait_for_no_workers, write_job

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def ray(network: Network) -> RayHosts:
    """A head and one more host, with one CPU each; a host may be silent for ten seconds."""
    ray = RayHosts(network, PATIENT)
    ray.start_head(cpus=1)
    ray.add("other", cpus=1)
    ray.wait_for_nodes(2)
    return ray


@pytest.mark.parametrize(("way", "gone_s"), [("cut", 10), ("drop", 10), ("cut", 60), ("drop", 60)])
def test_training_survives_a_link_that_is_gone_for_a_while(
    ray: RayHosts, tmp_path: Path, way: str, gone_s: float
) -> None:
    """Ten seconds are less than Ray's patience, sixty are more: then the host behind the link is lost for good."""
    run = Run.start(ray, tmp_path, "train", str(write_job(tmp_path)))
    run.wait_for("epoch", count=5)
    other = ray.network.hosts["other"]
    step = run.last_step()
    getattr(other.link, way)()
    started = time.monotonic()
    if gone_s > PATIENT.longest_s:
        seconds = run.seconds_until_past(step)
        print(f"\n{way}: training goes on past step {step} on the host that is left after {seconds:.1f} s")
    time.sleep(max(0.0, started + gone_s - time.monotonic()))
    other.link.mend()
    seconds = run.seconds_until_past(run.last_step())
    print(f"\n{way} for {gone_s:g} s: training {seconds:.1f} s after it was mended")
    if gone_s < PATIENT.longest_s:
        ray.wait_for_nodes(2)
    run.let_run()
    board = run.board()
    assert (board["samples_lost"], board["samples_repeated"]) == (0, 0)
    run.assert_weights_are_those_of_one_process()
    wait_for_no_workers([ray.head, other])


def test_over_a_slow_link_training_is_slower_and_no_other(ray: RayHosts, tmp_path: Path) -> None:
    ray.network.hosts["other"].link.slow(20)
    run = Run.start(ray, tmp_path, "train", str(write_job(tmp_path, workers="2", epochs=10)))
    run.let_run()
    board = run.board()
    assert board["trials"][0]["status"] == "finished"
    run.assert_weights_are_those_of_one_process()


def test_a_paused_host_costs_no_more_than_its_place(ray: RayHosts, tmp_path: Path) -> None:
    """Its kernel still answers, so that no connection breaks: Ray's own checks find out."""
    run = Run.start(ray, tmp_path, "train", str(write_job(tmp_path)))
    run.wait_for("epoch", count=5)
    other, step = ray.network.hosts["other"], run.last_step()
    other.pause()
    seconds = run.seconds_until_past(step)
    print(f"\nfrom the pause of the host to training past step {step}: {seconds:.1f} s")
    run.let_run()
    run.board()
    run.assert_weights_are_those_of_one_process()
