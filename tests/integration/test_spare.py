"""A run's spare process leaves a node that is drained, and another takes its place (one real Ray)."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from bigray.data.dataset import TrainingArrays
from bigray.errors import Preempted
from bigray.paths import RunPaths
from bigray.storage import open_storage
from bigray.training import groups
from bigray.training.membership import Member
from bigray.training.setup import GroupSetup
from tests.full_size import full_size

PATIENCE_S = 60.0


class Board:
    """In the switchboard's place: knows who waits for a seat, and gives nobody one."""

    def __init__(self) -> None:
        self._pids: list[int] = []
        self._notice = asyncio.Event()
        self._end = asyncio.Event()

    async def all_seated(self) -> None:
        return

    async def join(self, group: int | None, member: Member) -> None:
        self._pids.append(member.pid)
        if len(self._pids) == 1:
            await self._notice.wait()
            raise Preempted("its node is being drained")
        await self._end.wait()

    async def came(self) -> list[int]:
        """The pids of all that have waited, also of those that are gone."""
        return self._pids

    async def drain(self) -> None:
        self._notice.set()

    async def end(self) -> None:
        self._end.set()


@contextmanager
def spare_of_a_run(board: Any, folder: str) -> Iterator[None]:
    rows = {name: np.zeros((2, 1), np.float32) for name in ("x_train", "y_train", "x_val", "y_val")}
    here = ray.get_runtime_context().get_node_id()
    paths = RunPaths(open_storage(folder), "run")
    setup = GroupSetup(groups.NO_GROUP, board, ray.put(TrainingArrays(**rows)), 1, paths, 1, 1, driver_node=here)
    is_over = threading.Event()
    thread = threading.Thread(target=groups._keep_spare, args=(setup, is_over))
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        ray.get(board.end.remote())
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def wait_for_another(board: Any, known: list[int]) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not (others := [pid for pid in ray.get(board.came.remote()) if pid not in known]):
        assert time.monotonic() < deadline, f"nobody came after {known}"
        time.sleep(0.1)
    return int(others[0])


@full_size
@pytest.mark.usefixtures("four_cpu_ray")
def test_a_spare_that_has_to_go_leaves_no_process_and_another_waits_also_after_one_was_killed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "SPARE_DELAY_S", 0.0)
    board = ray.remote(num_cpus=0)(Board).remote()
    with spare_of_a_run(board, str(tmp_path)):
        first = wait_for_another(board, [])
        ray.get(board.drain.remote())
        second = wait_for_another(board, [first])
        assert not psutil.pid_exists(first), "Ray keeps a drained node as long as a process of it lives"

        os.kill(second, signal.SIGKILL)
        wait_for_another(board, [first, second])
