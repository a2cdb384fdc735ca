"""The demand of a run brings nodes up, a launch that fails is survived, and idleness brings the nodes down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.autoscaled import IDLE_S, AutoscaledHosts
from tests.hosts.hosts import Network
from tests.hosts.runs import Run, wait_for_no_workers, workers_on, write_job
from tests.waiting import wait_until

MOST = 2
TRIALS = 4
LONG = 300
"""Epochs: the first node is not to be done with every trial before the second one is up."""
UP_S = 150.0
DOWN_S = 240.0
"""`IDLE_S` after the end; three minutes more where a controller had no time to give back what it had asked for."""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def ray(network: Network) -> Iterator[AutoscaledHosts]:
    """A head without a CPU, alone; there may be two more hosts with one CPU each."""
    with AutoscaledHosts.start(network, head_cpus=0, cpus=1, most=MOST) as cluster:
        yield cluster


def search_of(folder: Path) -> Path:
    file = folder / "search.toml"
    file.write_text(f"""
search    = "random"
trials    = {TRIALS}
scheduler = "none"
stack     = "off"

[space]
lr = {{ log_uniform = [1e-3, 0.1] }}
""")
    return file


def test_a_sweep_brings_nodes_up_and_their_idleness_brings_them_down(ray: AutoscaledHosts, tmp_path: Path) -> None:
    job = write_job(tmp_path, workers="1", epochs=LONG)
    run = Run.start(ray, tmp_path, "tune", str(job), "--search", str(search_of(tmp_path)))
    ray.wait_for("launched", MOST, UP_S)
    up = [ray.network.hosts[node] for node in ray.cloud.workers]
    wait_until(lambda: all(workers_on(host) for host in up), "no group on one of the nodes", UP_S)
    run.wait_for("started", lambda event: event["group"] != 0)
    run.let_run()
    board = run.board()
    assert [trial["status"] for trial in board["trials"]] == ["finished"] * TRIALS
    assert not workers_on(ray.head)
    ray.wait_for("terminated", MOST, DOWN_S)
    assert ray.cloud.workers == []
    assert ray.cloud.count("launched") == MOST, ray.cloud.history  # and none came back for nothing
    ray.wait_for_nodes(1)
    came, went = ([it.at_s for it in ray.cloud.history if it.kind == kind] for kind in ("launched", "terminated"))
    assert min(went) - min(came) > IDLE_S
    print(
        f"\n{MOST} nodes up, the last {max(came) - min(came):.1f} s after the first; down {max(went) - min(went):.1f} s"
    )


def test_a_launch_that_fails_is_tried_again_and_the_run_completes(ray: AutoscaledHosts, tmp_path: Path) -> None:
    ray.cloud.fail_next(1)
    job = write_job(tmp_path, workers=str(MOST), epochs=12)
    run = Run.start(ray, tmp_path, "train", str(job))
    ray.wait_for("refused", 1, UP_S)
    ray.wait_for("launched", MOST, UP_S)
    run.wait_for("epoch")
    assert all(workers_on(ray.network.hosts[node]) for node in ray.cloud.workers)
    run.let_run()
    assert run.board()["trials"][0]["status"] == "finished"
    run.assert_weights_are_those_of_one_process()
    wait_for_no_workers(list(ray.network.hosts.values()))


def test_a_job_that_no_number_of_nodes_can_hold_is_refused_before_any_is_launched(
    ray: AutoscaledHosts, tmp_path: Path
) -> None:
    job = write_job(tmp_path, workers=str(MOST + 1))
    done = ray.bigray("train", str(job), "--address", ray.address)
    assert done.returncode != 0
    assert f"with the {MOST} that its autoscaler may add; the most that fits is num_workers = {MOST}" in done.stderr
    assert ray.cloud.history == []
