"""The files of cluster/kuberay really run: a host for each pod, with the `ray start` line of KubeRay's operator."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.serve.protect.keys import create_key
from tests.hosts.hosts import REPOSITORY, Host, Network
from tests.hosts.kuberay import read_cluster, with_values
from tests.hosts.pods import Pods, Probed
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import Run, wait_for_no_workers, workers_on, write_job

FOLDER = REPOSITORY / "cluster" / "kuberay"
POD_CPUS = 4
"""Of a worker of rayjob.yaml: two processes that take so many each are on two pods."""
PORT = 8000
REDIS = {"bigray-redis": {"password": "not asked for"}}
ASK = """
import os, sys, numpy as np
from bigray import Client
with Client(sys.argv[1], key=os.environ.get("KEY")) as client:
    np.save(sys.argv[3], client.predict_array(np.load(sys.argv[2])))
"""
pytestmark = pytest.mark.timeout(1200)


def job_pods(network: Network, values: dict[str, str], attempt: int = 1) -> Pods:
    """rayjob.yaml with two workers, and what its user writes into it."""
    text = with_values((FOLDER / "rayjob.yaml").read_text(), values)
    pods = Pods(network, read_cluster(text, token=network.token, replicas={"cpu": 2}, attempt=attempt))
    pods.start()
    return pods


class Followed(RayHosts):
    """What a `Run` asks of a cluster: where its command has printed, which is where the job is followed."""

    @property
    def head(self) -> Host:
        return self.network.hosts["submitter"]


@dataclass(frozen=True)
class Trained:
    """What became of the shipped job."""

    job: dict[str, Any]
    log: str
    trained_on: set[str]
    probed: list[Probed]
    folder: Path

    @property
    def bundle(self) -> Path:
        (bundle,) = self.folder.glob("runs/digits-*/bundle")
        return bundle


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The digits of rayjob.yaml, in fewer epochs and on a folder that all hosts see instead of a bucket."""
    folder = tmp_path_factory.mktemp("job")
    settings = f"{folder}/runs --set training.epochs=3 --set scaling.cpus_per_worker={POD_CPUS}"
    with Network(folder / "network") as network:
        pods = job_pods(network, {"s3://my-bucket/bigray/runs": settings})
        probed = pods.probe_all()
        submitted = pods.submit()
        trained_on: set[str] = set()
        while submitted.process.poll() is None:
            trained_on |= {pod.plan.host for pod in pods.started.values() if workers_on(pod.host)}
            time.sleep(0.2)
        job = pods.wait_for_job(submitted, timeout_s=60)
        wait_for_no_workers([pod.host for pod in pods.started.values()])
        return Trained(job, submitted.log(), trained_on, probed, folder)


def test_the_rayjob_trains_over_two_pods_and_leaves_a_bundle_on_shared_storage(trained: Trained) -> None:
    assert trained.job["status"] == "SUCCEEDED", trained.log
    assert trained.trained_on == {"cpu-0", "cpu-1"}
    assert ModelBundle.load(trained.bundle).version


def test_the_probes_of_the_rayjob_pass_once_its_pods_are_up(trained: Trained) -> None:
    assert len(trained.probed) == 6
    assert not [probed for probed in trained.probed if not probed.has_passed]


def test_the_rayservice_answers_from_the_bundle_of_a_run_on_every_worker(
    trained: Trained, network: Network, tmp_path: Path
) -> None:
    key = create_key(tmp_path / "keys.json", "web")
    secrets = {"bigray-keys": {"keys.json": (tmp_path / "keys.json").read_text()}}
    values = {"s3://my-bucket/bigray/runs/digits-1a2b3c/bundle": str(trained.bundle)}
    text = with_values((FOLDER / "rayservice.yaml").read_text(), values)
    pods = Pods(network, read_cluster(text, token=network.token, secrets={**REDIS, **secrets}), secrets)
    pods.start()
    pods.deploy()

    assert pods.applications() == {"model": "RUNNING"}
    for worker in pods.workers:
        url = f"http://{worker.host.address}:{PORT}"
        assert is_answered_as_when_it_was_exported(pods, url, key, trained.bundle, tmp_path), worker.plan.name
    refused = pods.operator.run([sys.executable, "-c", ASK, url, str(tmp_path / "rows.npy"), str(tmp_path / "no.npy")])
    assert refused.returncode != 0
    assert "401" in refused.stderr
    assert not [probed for probed in pods.probe_all() if not probed.has_passed]


def is_answered_as_when_it_was_exported(pods: Pods, url: str, key: str, bundle: Path, folder: Path) -> bool:
    """The bundle's own rows, asked from outside the cluster, have the classes that it keeps for them."""
    golden = ModelBundle.load(bundle).golden
    assert golden is not None
    rows, answers = folder / "rows.npy", folder / "answers.npy"
    np.save(rows, golden.inputs)
    command = [sys.executable, "-c", ASK, url, str(rows), str(answers)]
    done = pods.operator.run(command, environment={"KEY": key})
    assert done.returncode == 0, done.stderr
    return bool((np.load(answers).argmax(1) == golden.outputs.argmax(1)).all())


def test_a_rayjob_whose_head_is_lost_goes_on_from_storage_on_its_next_cluster(network: Network, tmp_path: Path) -> None:
    """The operator's `backoffLimit`: another cluster, and the same entrypoint."""
    job_file = write_job(tmp_path, workers="2", epochs=400)
    job_file.write_text(job_file.read_text() + f"cpus_per_worker = {POD_CPUS}\n")
    values = {"examples/digits/job.toml --set storage=s3://my-bucket/bigray/runs": str(job_file)}
    pods = job_pods(network, values)
    first = pods.submit()
    run = Run(Followed(network), tmp_path, first.process, first.id)
    run.wait_for("epoch", count=5)
    run.wait_for("checkpoint")
    network.kill(pods.head.host)
    pods.remove()

    pods = job_pods(network, values, attempt=2)
    (tmp_path / "pace").write_text("0")
    second = pods.submit()
    job = pods.wait_for_job(second)
    assert job["status"] == "SUCCEEDED", second.log()
    assert run.events("resumed"), "it has started anew"
    run.assert_weights_are_those_of_one_process()
