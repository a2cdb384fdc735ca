"""A cluster of real Ray nodes on this machine: started, asked, hurt and ended as a person does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.cluster.dry_run.processes import snapshot
from bigray.cluster.dry_run.raylets import mark_of
from bigray.cluster.dry_run.state import LocalCluster, StateFolder
from bigray.cluster.local import (
    Ended,
    LocalClusterSpec,
    add_node,
    kill_node,
    local_status,
    preempt_node,
    start_local,
    take_down,
)
from bigray.errors import ClusterError
from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.storage import open_storage
from tests.full_size import full_size
from tests.integration.jobs import last_weights, weights_of_one_process, write_blobs
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PATIENCE_S = 150.0
pytestmark = pytest.mark.timeout(600)


def use_state_folder(patch: pytest.MonkeyPatch, folder: Path) -> StateFolder:
    """Commands of this process have their record there."""
    patch.setenv("XDG_STATE_HOME", str(folder))
    patch.chdir(ROOT)
    return StateFolder.of_user()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes of one CPU and two fake GPUs each, the head among them."""
    with pytest.MonkeyPatch.context() as patch:
        use_state_folder(patch, tmp_path_factory.mktemp("state"))
        try:
            yield start_local(LocalClusterSpec(nodes=3, cpus_per_node=1, gpus_per_node=2))
        finally:
            take_down()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateFolder]:
    """For a cluster beside that of the other tests."""
    yield use_state_folder(monkeypatch, tmp_path / "state")
    take_down()


def processes_of(folder: StateFolder, name: str = "") -> list[int]:
    mark = mark_of(folder.path, name)
    marks = {row.process.pid: row.mark or "" for row in snapshot()}
    return [pid for pid, found in marks.items() if (found == mark if name else found.startswith(mark))]


def ask(cluster: LocalCluster, script: str) -> Any:
    """What a driver prints that finds the cluster by its exports: a process of its own, so that none is joined here."""
    joined = f"import json, os, time, ray\nray.init(log_to_driver=False, logging_level='ERROR')\n{script}"
    environment = {**os.environ, **cluster.exports}
    done = subprocess.run(
        [sys.executable, "-c", joined], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def wait_for_nodes(cluster: LocalCluster, *names: str) -> None:
    """Until these are the nodes that Ray has."""
    found = ask(
        cluster,
        f"deadline, wanted = time.monotonic() + 90, sorted({names!r})\n"
        "while True:\n"
        "    alive = sorted(node['NodeName'] for node in ray.nodes() if node['Alive'])\n"
        "    if alive == wanted or time.monotonic() > deadline: break\n"
        "    time.sleep(0.2)\n"
        "print(json.dumps(alive))",
    )
    assert found == sorted(names)


def names_up() -> list[str]:
    return [status.node.name for status in local_status().nodes if status.state == "up"]


def have_three_nodes() -> list[str]:
    """The names of the two beside the head."""
    while len(names_up()) < 3:
        add_node()
    while len(names_up()) > 3:
        kill_node(names_up()[-1])
    return names_up()[1:]


def test_ray_sees_every_node_with_its_cpu_and_its_fake_gpus(cluster: LocalCluster) -> None:
    have_three_nodes()
    nodes = ask(
        cluster,
        "print(json.dumps([[n['Resources'].get('CPU', 0), n['Resources'].get('GPU', 0), "
        "n['Labels'].get('bigray.io/fake-gpu')] for n in ray.nodes() if n['Alive']]))",
    )

    assert nodes == [[1.0, 2.0, "true"]] * 3
    assert all(len(status.node.node_id) == 56 for status in local_status().nodes)


def test_work_is_placed_by_fake_gpus_and_sees_the_ones_that_it_got(cluster: LocalCluster) -> None:
    have_three_nodes()
    visible = ask(
        cluster,
        "@ray.remote(num_cpus=0, num_gpus=2)\n"
        "def work():\n"
        "    time.sleep(1)\n"
        "    return ray.get_runtime_context().get_node_id(), os.environ['CUDA_VISIBLE_DEVICES']\n"
        "print(json.dumps(ray.get([work.remote() for _ in range(3)], timeout=60)))",
    )

    assert len({node for node, _ in visible}) == 3
    assert {devices for _, devices in visible} == {"0,1"}


def test_the_dashboard_answers_on_loopback_and_to_the_token_only(cluster: LocalCluster) -> None:
    url = f"{cluster.dashboard_url}/api/jobs/"
    token = Path(cluster.token_path).read_text()

    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=20)
    assert refused.value.code in (401, 403)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200


def test_a_second_cluster_is_refused_and_the_first_goes_on(cluster: LocalCluster) -> None:
    with pytest.raises(ClusterError, match="bigray cluster down"):
        start_local(LocalClusterSpec(nodes=1))

    assert "head" in names_up()


def test_a_killed_node_is_gone_at_once_and_lost_to_ray_and_another_joins(cluster: LocalCluster) -> None:
    victim, other = have_three_nodes()
    ended = kill_node(victim)
    folder = StateFolder.of_user()

    assert ended.how == "killed"
    assert ended.processes >= 3
    assert processes_of(folder, victim) == []
    assert processes_of(folder, other)
    wait_for_nodes(cluster, "head", other)

    added = add_node(cpus=1, gpus=1)
    wait_for_nodes(cluster, "head", other, added.name)
    assert added.name not in (victim, other)
    assert added.gpus == 1


def test_an_idle_node_leaves_when_it_is_told_to_and_a_busy_one_is_killed_at_the_end(cluster: LocalCluster) -> None:
    idle, busy = have_three_nodes()
    hold = (
        "import bigray.cluster.local as local\n"
        "node_id = local.local_status().cluster.node('{name}').node_id\n"
        "from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At\n"
        "@ray.remote(num_cpus=1)\n"
        "class Holder:\n"
        "    def ready(self): return True\n"
        "holder = Holder.options(lifetime='detached', name='holder', namespace='test', "
        "scheduling_strategy=At(node_id, soft=False)).remote()\n"
        "print(json.dumps(ray.get(holder.ready.remote(), timeout=60)))"
    )
    assert ask(cluster, hold.format(name=busy))

    assert preempt_node(idle, 60).how == "left before its time was up"
    told: list[Ended] = []
    thread = threading.Thread(target=lambda: told.append(preempt_node(busy, 8)))
    thread.start()
    wait_until(lambda: state_of(busy) == "draining", timeout_s=PATIENCE_S)
    thread.join(PATIENCE_S)

    assert [ended.how for ended in told] == ["killed when its time was up"]
    assert [state_of(idle), state_of(busy)] == ["ended", "ended"]
    assert not processes_of(StateFolder.of_user(), busy)


def state_of(name: str) -> str:
    return next(status.state for status in local_status().nodes if status.node.name == name)


class Run:
    """`bigray train --events` as a process, and what it has told so far."""

    def __init__(self, cluster: LocalCluster, job: Path, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bigray", "train", str(job), "--events"],
            env={**os.environ, **cluster.exports},
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))

    def wait_for(self, kind: str, count: int = 1, **values: Any) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = [e for e in list(self.events) if e["kind"] == kind and values.items() <= e.items()]
            if len(found) >= count:
                return found[count - 1]
            told = [event for event in self.events if event["kind"] not in ("epoch", "checkpoint")]
            assert self._process.poll() is None, f"ended without '{kind}' {values}: {told}\n{self._said()}"
            assert time.monotonic() < deadline, f"no '{kind}' {values}: {told}\n{self._said()}"
            time.sleep(0.1)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def result(self) -> dict[str, Any]:
        code = self._process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        assert code == 0, self._said()
        return self.events[-1]

    def end(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._errors.close()


def paced_job(folder: Path, pace: Path) -> Path:
    """A job whose steps take as long as a file says, on any number of workers the same weights."""
    source = write_blobs(folder / "blobs.npz")
    job = folder / "job.toml"
    job.write_text(
        f"""
name = "blobs"
storage = "{folder / "runs"}"
[data]
source = "{source}"
target = "label"
normalize = "standard"
[models.paced]
factory = "tests.integration.user_models:paced_mlp"
params = {{ pace_file = "{pace}" }}
[training]
task = "classification"
epochs = 400
global_batch_size = 32
lr = 0.05
exact = true
logical_shards = 4
[scaling]
num_workers = [2, 3]
max_failures = 3
"""
    )
    return job


@full_size
def test_training_goes_on_through_a_loss_a_join_and_a_preemption_with_the_same_weights(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """The story of docs/failures.md."""
    victim, other = have_three_nodes()
    pace = tmp_path / "pace"
    pace.write_text("0.05")
    job = paced_job(tmp_path, pace)
    run = Run(cluster, job, tmp_path)
    try:
        run.wait_for("checkpoint")  # else it starts anew, and tells of no going on
        kill_node(victim)
        run.wait_for("regrouped", workers=2)
        run.wait_for("resumed")

        add_node(cpus=1, gpus=0)
        run.wait_for("regrouped", workers=3)
        run.wait_for("resumed", count=2)

        preempt_node(other, 30)
        run.wait_for("regrouped", count=2, workers=2)
        run.wait_for("resumed", count=3)
        pace.write_text("0")
        run.result()
    finally:
        run.end()

    (folder,) = (tmp_path / "runs").iterdir()
    paths = RunPaths(open_storage(str(folder)), folder.name)
    disturbed, undisturbed = last_weights(paths, "paced"), weights_of_one_process(load_job(job))
    assert disturbed.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert np.array_equal(disturbed[name], tensor.numpy()), name


def test_two_clusters_of_one_machine_do_not_meet(cluster: LocalCluster, own_folder: StateFolder) -> None:
    other = start_local(LocalClusterSpec(nodes=1, cpus_per_node=1))

    assert ask(other, "print(json.dumps(len(ray.nodes())))") == 1
    assert (other.address, other.temp_dir, other.token_path) != (cluster.address, cluster.temp_dir, cluster.token_path)
    down = take_down()
    assert down.nodes == ("head",)
    assert processes_of(own_folder) == []
    assert not Path(other.temp_dir).exists()
    assert ask(cluster, "print(json.dumps(len(ray.nodes()) >= 3))")


def test_without_its_head_nothing_joins_and_down_ends_the_rest(own_folder: StateFolder) -> None:
    made = start_local(LocalClusterSpec(nodes=2, cpus_per_node=1))
    kill_node("head")
    with pytest.raises(ClusterError, match="the head of the local cluster is gone"):
        add_node()

    assert take_down().processes
    assert processes_of(own_folder) == []
    assert not Path(made.temp_dir).exists()
    assert take_down().processes == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_start_that_is_cut_short_leaves_nothing_or_down_finds_it(
    own_folder: StateFolder, number: signal.Signals
) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in some shells' jobs
        "from bigray.cluster.local import LocalClusterSpec, start_local; start_local(LocalClusterSpec(nodes=2))"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    # `ray start`, and something that it started
    wait_until(lambda: len(processes_of(own_folder, "head")) > 1, timeout_s=PATIENCE_S)
    made = own_folder.read()
    assert made is not None
    starter.send_signal(number)
    starter.communicate(timeout=PATIENCE_S)

    if number == signal.SIGKILL:
        assert processes_of(own_folder)
        assert take_down().processes
    assert processes_of(own_folder) == []
    assert own_folder.read() is None
    assert not Path(made.temp_dir).exists()
