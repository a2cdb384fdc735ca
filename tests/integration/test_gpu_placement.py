"""Groups on GPUs that only Ray believes in: where it places them, and what a worker's environment says.

Two nodes of two fake GPUs each, of different types. bigray's own workers refuse them, as torch sees none; the groups
here are started by bigray's trainer with bigray's settings and run a loop that tells where it is.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigray.errors import GroupLost
from bigray.specs import ScalingSpec
from bigray.training.devices import backend_of
from bigray.training.membership import Member, Place
from tests.full_size import full_size
from tests.integration.jobs import make_job
from tests.integration.raylets import ray_cluster

PATIENCE_S = 90.0
TYPES = ("A100", "T4")
pytestmark = pytest.mark.timeout(400)


class Board:
    """Actor: workers tell where they are and wait until the test has seen all of them."""

    def __init__(self, expected: int) -> None:
        self._expected, self._notes = expected, list[dict[str, Any]]()
        self._all_here, self._released = asyncio.Event(), asyncio.Event()

    async def note(self, note: dict[str, Any]) -> None:
        self._notes.append(note)
        if len(self._notes) == self._expected:
            self._all_here.set()
        await self._released.wait()

    async def notes(self) -> list[dict[str, Any]]:
        await self._all_here.wait()
        return self._notes

    async def release(self) -> None:
        self._released.set()

    async def hold(self, group: int, timeout_s: float) -> None:
        """What `GroupConfig` asks of a switchboard, as the next."""

    async def nodes_gone(self, node_ids: list[str]) -> None: ...

    async def is_over(self) -> bool:
        """What `GroupTrainer` asks."""
        return False


def tell(config: dict[str, Any]) -> None:
    """The loop of each worker."""
    import ray.train.torch

    context = ray.train.get_context()
    note = {
        "group": config["group"],
        "node": ray.get_runtime_context().get_node_id(),
        "slot": context.get_world_rank(),
        "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "device": str(ray.train.torch.get_device()),
    }
    ray.get(config["board"].note.remote(note))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that only has the driver, and a node of each type."""
    labels = [{"ray.io/accelerator-type": kind} for kind in TYPES]
    nodes = [{"num_cpus": 4, "num_gpus": 2, "labels": label} for label in labels]
    with ray_cluster({"num_cpus": 0}, *nodes) as started:
        yield started


def placed(folder: Path, num_groups: int, **scaling: Any) -> list[dict[str, Any]]:
    """Start groups at once, and tell what each of their workers saw while all of them were up."""
    import ray

    spec = ScalingSpec(**scaling)
    board = ray.remote(num_cpus=0, max_concurrency=100)(Board).remote(num_groups * spec.max_workers)
    faults: list[BaseException] = []
    threads = [
        threading.Thread(target=_fit, args=(board, group, spec, str(folder), faults), daemon=True)
        for group in range(num_groups)
    ]
    for thread in threads:
        thread.start()
    try:
        notes: list[dict[str, Any]] = ray.get(board.notes.remote(), timeout=PATIENCE_S)
    finally:
        ray.get(board.release.remote())
        for thread in threads:
            thread.join(PATIENCE_S)
        ray.kill(board)
    assert not faults, faults
    return notes


def _fit(board: Any, group: int, spec: ScalingSpec, folder: str, faults: list[BaseException]) -> None:
    from ray.train import FailureConfig, RunConfig

    from bigray.training.backend import GroupConfig
    from bigray.training.groups import _scaling_config
    from bigray.training.trainer import GroupTrainer

    trainer = GroupTrainer(
        tell,
        train_loop_config={"setup": SimpleNamespace(switchboard=board), "board": board, "group": group},
        scaling_config=_scaling_config(spec),
        backend_config=GroupConfig(board, group, spec.is_elastic),
        run_config=RunConfig(
            name=f"group-{group}", storage_path=folder, failure_config=FailureConfig(controller_failure_limit=6)
        ),
    )
    try:
        trainer.fit()
    except BaseException as error:
        faults.append(error)


def nodes_of(notes: list[dict[str, Any]]) -> dict[int, set[str]]:
    """Group -> its nodes."""
    return {note["group"]: {it["node"] for it in notes if it["group"] == note["group"]} for note in notes}


def label_of(node_id: str) -> str:
    import ray

    return next(str(n["Labels"]["ray.io/accelerator-type"]) for n in ray.nodes() if n["NodeID"] == node_id)


def members(notes: list[dict[str, Any]]) -> tuple[Member, ...]:
    """The workers of one group as they would be seated, by rank."""
    seated = sorted(notes, key=lambda note: int(note["slot"]))
    return tuple(Member(it["node"], "127.0.0.1", it["slot"], it["slot"], 2, it["gpus"][0]) for it in seated)


def backend(notes: list[dict[str, Any]]) -> str:
    return backend_of(members(notes), "cuda")


def test_a_group_is_on_one_node_with_a_gpu_for_each_worker_and_two_groups_are_on_two(
    cluster: Any, tmp_path: Path
) -> None:
    notes = placed(tmp_path, 2, num_workers=2, gpus_per_worker=1)
    groups = nodes_of(notes)

    assert [len(nodes) for nodes in groups.values()] == [1, 1]
    assert groups[0] != groups[1]
    for group in (0, 1):
        workers = sorted((note for note in notes if note["group"] == group), key=lambda note: int(note["slot"]))
        # Ray Train shows both to both, and each computes on its own, which LOCAL_RANK counts
        assert [note["visible"] for note in workers] == ["0,1"] * 2
        local_ranks = [Place(0, note["slot"], members(workers)).local_rank for note in workers]
        assert local_ranks == [0, 1]
        assert [(note["gpus"], note["device"]) for note in workers] == [(["0"], "cuda:0"), (["1"], "cuda:1")]
        assert backend(workers) == "nccl"


@full_size
def test_groups_of_one_worker_are_spread_and_each_sees_its_own_gpu_alone(cluster: Any, tmp_path: Path) -> None:
    notes = placed(tmp_path, 4, gpus_per_worker=1)

    assert sorted(Counter(note["node"] for note in notes).values()) == [2, 2]
    assert len({(note["node"], note["gpus"][0]) for note in notes}) == 4
    assert all([note["visible"]] == note["gpus"] and note["device"] == "cuda:0" for note in notes)


@full_size
def test_two_groups_of_one_worker_go_to_different_nodes(cluster: Any, tmp_path: Path) -> None:
    notes = placed(tmp_path, 2, gpus_per_worker=1)

    assert len({note["node"] for note in notes}) == 2


@full_size
def test_small_groups_share_gpus_and_none_is_given_out_twice_over(cluster: Any, tmp_path: Path) -> None:
    notes = placed(tmp_path, 8, cpus_per_worker=0.5, gpus_per_worker=0.5)

    assert sorted(Counter((note["node"], note["gpus"][0]) for note in notes).values()) == [2, 2, 2, 2]
    assert all([note["visible"]] == note["gpus"] and note["device"] == "cuda:0" for note in notes)


@full_size
def test_a_group_whose_workers_share_a_gpu_would_use_gloo(cluster: Any, tmp_path: Path) -> None:
    notes = placed(tmp_path, 1, num_workers=4, gpus_per_worker=0.5, cpus_per_worker=0.5, accelerator="A100")
    shared = Counter(note["gpus"][0] for note in notes)

    assert sorted(shared.values()) == [2, 2]
    assert backend(notes) == "gloo"


@pytest.mark.parametrize("kind", [TYPES[0], pytest.param(TYPES[1], marks=full_size)])
def test_an_accelerator_is_got_from_the_node_with_its_label(cluster: Any, tmp_path: Path, kind: str) -> None:
    notes = placed(tmp_path, 2, gpus_per_worker=1, accelerator=kind)

    assert [label_of(note["node"]) for note in notes] == [kind, kind]
    assert sorted(note["gpus"][0] for note in notes) == ["0", "1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch sees GPUs")
def test_a_job_on_gpus_that_torch_does_not_see_ends_with_one_line(cluster: Any, tmp_path: Path) -> None:
    from bigray.training.runner import train

    job = make_job(tmp_path).model_copy(update={"scaling": ScalingSpec(gpus_per_worker=1)})
    with pytest.raises(GroupLost, match=r"Ray has assigned GPU 0, but torch\.cuda sees 0 of the GPUs '0' here") as told:
        train(job, address=cluster.address)

    assert "\n" not in str(told.value)
