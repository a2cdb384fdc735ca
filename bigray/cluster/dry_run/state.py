"""The record of the cluster on this machine: one JSON file that each command reads anew, changed under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bigray.cluster.dry_run.processes import Process
from bigray.cluster.dry_run.spec import HEAD
from bigray.errors import ClusterError, SpecError, StorageError, did_you_mean

FORMAT = 1
_LOCK_PATIENCE_S = 2.0


@dataclass(frozen=True)
class LocalNode:
    """One node: what it was started with, and by which processes it is known."""

    name: str
    cpus: int
    gpus: int
    """Fake ones."""
    object_store_mib: int
    memory_mib: int
    labels: dict[str, str]
    log: str
    """What `ray start` printed."""
    root: Process | None = None
    """`ray start --block`. None until it is started."""
    raylet: Process | None = None
    """Without it, the cluster does not have the node any more. None until it is up."""
    node_id: str = ""
    leaves_at: float | None = None
    """Unix time of its end, where it was told of one."""
    ended_by: str = ""
    """`kill-node` or `preempt-node`; empty while nobody has ended it."""

    @property
    def is_head(self) -> bool:
        return self.name == HEAD

    @property
    def known(self) -> list[Process]:
        return [process for process in (self.root, self.raylet) if process is not None]


@dataclass(frozen=True)
class LocalCluster:
    """A cluster on this machine."""

    name: str
    boot_id: str
    """Of the machine: after a reboot no process of the record is alive, whatever has its pid."""
    started_at: float
    temp_dir: str
    token_path: str
    session_dir: str = ""
    address: str = ""
    """host:port of Ray's control plane. Empty until the head is up."""
    dashboard_url: str = ""
    nodes: tuple[LocalNode, ...] = ()

    def node(self, name: str) -> LocalNode:
        """Raises: SpecError: there is no such node."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise SpecError(f"{name}: no such node{did_you_mean(name, [node.name for node in self.nodes])}")

    def with_node(self, node: LocalNode) -> LocalCluster:
        """The node in the place of the one of its name, or as the last."""
        if any(other.name == node.name for other in self.nodes):
            return replace(self, nodes=tuple(node if other.name == node.name else other for other in self.nodes))
        return replace(self, nodes=(*self.nodes, node))

    def without_node(self, name: str) -> LocalCluster:
        return replace(self, nodes=tuple(node for node in self.nodes if node.name != name))

    @property
    def exports(self) -> dict[str, str]:
        """The environment in which Ray's commands and bigray's find this cluster."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
        }


@dataclass(frozen=True)
class StateFolder:
    """`~/.bigray/local`, or below `$XDG_STATE_HOME`: the record, the token, the lock and the nodes' logs."""

    path: Path

    @classmethod
    def of_user(cls) -> StateFolder:
        base = os.environ.get("XDG_STATE_HOME")
        return cls((Path(base) / "bigray" if base else Path.home() / ".bigray") / "local")

    @property
    def record(self) -> Path:
        return self.path / "cluster.json"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def make(self) -> None:
        """Raises: StorageError: it cannot be made."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be made: {error.strerror}; set XDG_STATE_HOME to a folder of yours"
            ) from error

    @contextlib.contextmanager
    def locked(self, patience_s: float = _LOCK_PATIENCE_S) -> Iterator[None]:
        """Keep other commands from changing the cluster.

        Raises:
            ClusterError: another one is at it.
        """
        self.make()
        with (self.path / "lock").open("a") as lock:
            deadline = time.monotonic() + patience_s
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() >= deadline:
                        raise ClusterError(
                            f"{self.path}: another `bigray cluster` command is changing this cluster: wait for it"
                        ) from None
                    time.sleep(0.1)
            yield

    def read(self) -> LocalCluster | None:
        """The cluster on record; None where there is none.

        Raises:
            ClusterError: the record cannot be read, or is another bigray's.
        """
        try:
            document = json.loads(self.record.read_text())
            return _cluster_of(document)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClusterError(
                f"{self.record}: cannot be read ({type(error).__name__}): `bigray cluster down` ends what runs, and "
                "removes it"
            ) from error

    def write(self, cluster: LocalCluster) -> None:
        _write_private(self.record, json.dumps({"format": FORMAT, **asdict(cluster)}, indent=2) + "\n")

    def new_token(self) -> Path:
        """A token for one cluster, readable by this user only."""
        _write_private(self.token, secrets.token_hex(32))
        return self.token

    def forget(self) -> None:
        for path in (self.record, self.token):
            path.unlink(missing_ok=True)


def _write_private(path: Path, text: str) -> None:
    """The whole file or none of it, with mode 0600 from its first byte."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.replace(path)


def _cluster_of(document: dict[str, Any]) -> LocalCluster:
    if document.pop("format") != FORMAT:
        raise ValueError("another format")
    nodes = tuple(_node_of(node) for node in document.pop("nodes"))
    return LocalCluster(**document, nodes=nodes)


def _node_of(document: dict[str, Any]) -> LocalNode:
    root, raylet = (Process(**value) if (value := document.pop(key)) else None for key in ("root", "raylet"))
    return LocalNode(**document, root=root, raylet=raylet)


def boot_id() -> str:
    """Another one after each boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
