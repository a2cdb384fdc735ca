"""A host is lost in the middle of training and of a sweep: what is left goes on, and the weights do not tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.hosts import Network
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import Run, wait_for_no_workers, workers_on, write_job

TRIALS = 8
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def ray(network: Network) -> RayHosts:
    """A head and one more host, with one CPU each."""
    ray = RayHosts(network)
    ray.start_head(cpus=1)
    ray.add("other", cpus=1)
    ray.wait_for_nodes(2)
    return ray


@pytest.mark.parametrize("in_silence", [False, True], ids=["killed", "without power"])
def test_training_goes_past_the_lost_step_and_its_weights_are_those_of_one_process(
    ray: RayHosts, tmp_path: Path, in_silence: bool
) -> None:
    run = Run.start(ray, tmp_path, "train", str(write_job(tmp_path)))
    run.wait_for("epoch", count=5)
    other = ray.network.hosts["other"]
    assert workers_on(ray.head) and workers_on(other)
    step = run.last_step()
    ray.network.kill(other, in_silence=in_silence)
    seconds = run.seconds_until_past(step)
    print(f"\nfrom the loss of the host to training past step {step}: {seconds:.1f} s (floor: at most 20 s)")
    run.let_run()
    board = run.board()
    assert (board["samples_lost"], board["samples_repeated"]) == (0, 0)
    run.assert_weights_are_those_of_one_process()
    wait_for_no_workers([ray.head])


def test_a_host_that_comes_back_is_trained_on_again(ray: RayHosts, tmp_path: Path) -> None:
    run = Run.start(ray, tmp_path, "train", str(write_job(tmp_path)))
    run.wait_for("epoch", count=5)
    lost = ray.network.hosts["other"]
    ray.network.kill(lost)
    run.wait_for("regrouped", lambda event: event["workers"] == 1)
    again = ray.network.boot(lost)
    ray.join(again, cpus=1)
    run.wait_for("regrouped", lambda event: event["workers"] == 2)
    run.seconds_until_past(run.last_step())
    assert workers_on(again)
    run.let_run()
    run.board()
    run.assert_weights_are_those_of_one_process()
    wait_for_no_workers([ray.head, again])


def test_a_sweep_goes_on_without_the_lost_host_and_every_trial_ends_once(ray: RayHosts, tmp_path: Path) -> None:
    job = write_job(tmp_path, workers="1", epochs=12)
    search = tmp_path / "search.toml"
    search.write_text(f"""
search    = "random"
trials    = {TRIALS}
scheduler = "none"
stack     = "off"

[space]
lr = {{ log_uniform = [1e-3, 0.1] }}
""")
    run = Run.start(ray, tmp_path, "tune", str(job), "--search", str(search))
    run.wait_for("epoch", count=15)
    other = ray.network.hosts["other"]
    assert workers_on(other)
    step, told = run.last_step(), len(run.events("epoch"))
    ray.network.kill(other, in_silence=True)
    run.wait_for("epoch", count=told + 10)
    print(f"\nthe sweep goes on past step {step}")
    run.let_run()
    board = run.board()
    assert len(board["trials"]) == TRIALS
    assert {trial["status"] for trial in board["trials"]} == {"finished"}
    assert len({trial["trial_id"] for trial in board["trials"]}) == TRIALS
    wait_for_no_workers([ray.head])
