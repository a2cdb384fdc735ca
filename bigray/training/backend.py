"""Ray Train's side of a worker group: how Train starts, replaces and ends its workers (runs in Train's controller).

Train has a mode for backends whose workers outlive the loss of one of them (its torchft integration): it then replaces
the lost worker alone, in its place, where it would otherwise restart the whole group. bigray's groups form their own
process group among survivors and replacement (`process_group`), so Train sets up none, and its controller, which is
no `TorchConfig`'s, imports no torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.worker_group import ReplicaGroup

from bigray.training.lost_nodes import unreachable_nodes

logger = logging.getLogger(__name__)
YIELD_TIMEOUT_S = 30.0


class _GroupBackend(Backend):  # type: ignore[misc]
    """Before Train ends a whole group, say to start it at another size, the group commits a checkpoint."""

    share_cuda_visible_devices = True
    has_replica_groups = True

    def on_shutdown(self, worker_group: Any, backend_config: GroupConfig) -> None:
        if isinstance(worker_group, ReplicaGroup):
            return
        board = backend_config.switchboard
        try:
            # the others would wait for those there, and for so long could not be asked for a checkpoint
            ray.get(board.nodes_gone.remote(sorted(unreachable_nodes())))
            ray.get(board.hold.remote(backend_config.group, YIELD_TIMEOUT_S))
        except ray.exceptions.RayError as error:  # the run is being ended; the last commit stands
            logger.info("no checkpoint before the end of the group: %s", error)


class _ElasticBackend(_GroupBackend):
    """A worker lost with its node cannot be replaced in its place: the group goes on without it (`survivors`), or
    starts again with what is left."""

    has_replica_groups = False


@dataclass
class GroupConfig(BackendConfig):  # type: ignore[misc]
    """Ray Train's settings of one worker group."""

    switchboard: Any = None
    group: int = 0
    is_elastic: bool = False

    @property
    def backend_cls(self) -> type[Backend]:
        return _ElasticBackend if self.is_elastic else _GroupBackend
