"""An elastic group on a cluster of real raylets that come and go: it follows, and the weights do not tell."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.results import Leaderboard
from bigray.storage import open_storage
from bigray.training.commands import Event
from tests.integration.jobs import last_weights, make_job, weights_of_one_process
from tests.integration.raylets import ray_cluster

PATIENCE_S = 150.0
pytestmark = pytest.mark.timeout(500)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head with one CPU, to which nodes can be added."""
    with ray_cluster({"num_cpus": 1}) as started:
        yield started


class Watched:
    """A run in a thread, since nodes can be added from the main thread only, and the events it has told so far."""

    def __init__(self, run: Callable[[Callable[[Event], None]], Leaderboard]) -> None:
        self.events: list[Event] = []
        self._outcome: list[Leaderboard | BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()

    def _run(self, run: Callable[[Callable[[Event], None]], Leaderboard]) -> None:
        try:
            self._outcome.append(run(self.events.append))
        except BaseException as error:
            self._outcome.append(error)

    def wait_for(self, kind: str, count: int = 1, **values: Any) -> Event:
        """The `count`-th event of this kind with these values."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = [e for e in self.events if e.kind == kind and values.items() <= e.values.items()]
            if len(found) >= count:
                return found[count - 1]
            told = [(e.kind, e.values) for e in self.events if e.kind not in ("epoch", "checkpoint")]
            assert not self._outcome, f"ended without '{kind}' {values}: {self._outcome}, {told}"
            assert time.monotonic() < deadline, f"no '{kind}' {values}: {told}"
            time.sleep(0.1)

    def result(self) -> Leaderboard:
        self._thread.join(PATIENCE_S)
        assert self._outcome, "the run has not ended"
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def drain(cluster: Any, node: Any, deadline_s: float) -> None:
    """Tell the cluster that a node is about to be taken away, as a cloud's spot notice does."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + deadline_s) * 1000)
    accepted, why_not = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", deadline_ms)
    assert accepted, why_not


def test_a_group_follows_the_cluster_and_its_weights_are_those_of_one_process(cluster: Any, tmp_path: Path) -> None:
    """Two workers; a node is preempted: one; a node joins: two. One run for all, since groups are slow to start."""
    from bigray.training.runner import train

    pace = tmp_path / "pace"
    pace.write_text("0.02")
    model = {"factory": "tests.integration.user_models:paced_mlp", "params": {"pace_file": str(pace)}}
    job = make_job(tmp_path, models={"paced": model}, workers=(1, 2), epochs=400, exact=True, max_failures=0)
    preempted = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    run = Watched(lambda listener: train(job, address=cluster.address, listener=listener))

    run.wait_for("epoch", count=5)
    drain(cluster, preempted, deadline_s=15)
    run.wait_for("lost")
    cluster.remove_node(preempted, allow_graceful=False)
    regrouped = run.wait_for("regrouped", workers=1)
    after_preemption = run.wait_for("resumed")
    told = run.events[: run.events.index(after_preemption)]
    last_told = max(event.values["step"] for event in told if event.kind == "epoch")
    assert after_preemption.values["step"] >= last_told, "steps are repeated"

    cluster.add_node(num_cpus=1)
    run.wait_for("regrouped", workers=2)
    run.wait_for("resumed", count=2)
    assert regrouped.values["workers"] == 1
    pace.write_text("0")
    board = run.result()

    assert (board.samples_lost, board.samples_repeated) == (0, 0)
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    assert not [e for e in read_journal(paths) if e["kind"] == "failed"], "a preemption is charged to nobody"
    disturbed, undisturbed = last_weights(paths, "paced"), weights_of_one_process(job)
    assert disturbed.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert np.array_equal(disturbed[name], tensor.numpy()), name
