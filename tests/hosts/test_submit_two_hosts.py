"""A job over two hosts, one worker on each, ends with the weights that it has on one host."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.storage import open_storage
from tests.full_size import full_size
from tests.hosts.hosts import Network
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import Run, wait_for_no_workers, workers_on
from tests.integration.jobs import last_weights, weights_of_one_process

DIGITS = "examples/digits/job.toml"
EPOCHS = 3
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """A head and one more, with one CPU each, so that two workers are on two hosts."""
    with Network(tmp_path_factory.mktemp("network")) as network:
        ray = RayHosts(network)
        ray.start_head(cpus=1)
        ray.add("other", cpus=1)
        ray.wait_for_nodes(2)
        yield ray


def settings(folder: Path, *, exact: bool) -> list[str]:
    """Of the digits job: shorter, and on a folder that all hosts see."""
    chosen = (f"storage='{folder}/runs'", f"training.epochs={EPOCHS}", f"training.exact={str(exact).lower()}")
    return [word for setting in chosen for word in ("--set", setting)]


def weights(folder: Path, model: str) -> dict[str, np.ndarray]:
    (run,) = (folder / "runs").glob("digits-*")
    return last_weights(RunPaths(open_storage(str(run)), run.name), model)


def test_exact_training_over_two_hosts_is_bit_equal_to_one_process(two_hosts: RayHosts, tmp_path: Path) -> None:
    run = Run.start(two_hosts, tmp_path, "train", DIGITS, *settings(tmp_path, exact=True), log="exact")
    trained_on: set[str] = set()
    while run.process.poll() is None:
        trained_on |= {name for name, host in two_hosts.network.hosts.items() if workers_on(host)}
        time.sleep(0.2)
    assert run.board()["trials"][0]["status"] == "finished"
    assert trained_on == {"head", "other"}
    job = load_job(DIGITS, [f"storage='{tmp_path}/runs'", f"training.epochs={EPOCHS}", "training.exact=true"])
    alone, together = weights_of_one_process(job), weights(tmp_path, next(iter(job.models)))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert np.array_equal(tensor.numpy(), together[name]), name


@full_size
def test_training_over_two_hosts_is_what_it_is_on_one(two_hosts: RayHosts, tmp_path: Path) -> None:
    """Two workers either way, to 1e-5; the one host is outside the cluster and starts a Ray of its own."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    Run.start(two_hosts, together, "train", DIGITS, *settings(together, exact=False), log="together").board()
    host = two_hosts.network.add("alone")
    command = [sys.executable, "-m", "bigray", "train", DIGITS, *settings(alone, exact=False), "--json"]
    done = host.run(command, timeout_s=200)
    assert done.returncode == 0, done.stderr
    for model in load_job(DIGITS).models:
        one_host, two = weights(alone, model), weights(together, model)
        assert one_host.keys() == two.keys()
        for name in two:
            np.testing.assert_allclose(two[name], one_host[name], rtol=0, atol=1e-5, err_msg=f"{model}: {name}")


@full_size
def test_bigray_submit_trains_over_two_hosts_serves_and_leaves_nothing(two_hosts: RayHosts, tmp_path: Path) -> None:
    """The whole checkout is sent; the weights are again those of one process."""
    chosen = settings(tmp_path, exact=True)
    done = two_hosts.bigray("submit", DIGITS, *chosen, "--address", two_hosts.dashboard, "--exit", timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "269/269 answers equal" in done.stdout, done.stdout
    job = load_job(DIGITS, [f"storage='{tmp_path}/runs'", f"training.epochs={EPOCHS}", "training.exact=true"])
    alone, together = weights_of_one_process(job), weights(tmp_path, next(iter(job.models)))
    assert all(np.array_equal(alone[name].numpy(), together[name]) for name in alone)
    wait_for_no_workers(list(two_hosts.network.hosts.values()))


@full_size
def test_rays_own_job_submit_trains_over_two_hosts(two_hosts: RayHosts, tmp_path: Path) -> None:
    """The entrypoint runs on the head, from the checkout that all hosts see."""
    entrypoint = [sys.executable, "-m", "bigray", "train", DIGITS, *settings(tmp_path, exact=True), "--json"]
    command = ["ray", "job", "submit", "--address", two_hosts.dashboard, "--", *entrypoint]
    done = two_hosts.run(two_hosts.head, command, timeout_s=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights(tmp_path, "mlp")
