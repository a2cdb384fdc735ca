"""What the doctor runs on each node: one actor that holds no CPU, so that a busy cluster can be examined.

Each method answers one question, changes nothing that stays, and returns plain facts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigray.cluster.doctor.facts import DoorFacts, NodeFacts, RingPlace, TokenFacts
from bigray.cluster.doctor.ports import Door, knock
from bigray.cluster.doctor.rings import Seat, open_store, time_ring, without_source
from bigray.cluster.shared_storage import missing_folders, remove_folders, shows
from bigray.storage import Storage, sha256

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


class Probe:
    """An actor on a node."""

    def __init__(self, name: str, ip: str) -> None:
        self._name, self._ip = name, ip
        self._store: TCPStore | None = None
        self._folders: list[Path] = []

    def facts(self) -> NodeFacts:
        """And begin to load torch, which takes longest: other nodes may still be starting."""
        found = node_facts(self._ip)
        threading.Thread(target=load_torch, daemon=True).start()
        return found

    def now(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def knock(self, doors: Sequence[Door]) -> list[DoorFacts]:
        return knock(doors, self._name)

    def write(self, storage: Storage, name: str, data: bytes) -> str:
        self._folders = missing_folders(storage)
        return write_file(storage, name, data)

    def read(self, storage: Storage, name: str) -> str | None:
        return read_file(storage, name)

    def remove(self, storage: Storage, name: str) -> None:
        """What `write` has made, on this node: the file, and folders that were not there."""
        try:
            storage.delete_file(name)
        finally:
            remove_folders(self._folders)

    def open_ring(self) -> RingPlace:
        """Open the store of this node's rings, once torch is there."""
        load_torch()
        import torch

        self._store = open_store(self._ip)
        return RingPlace(self._store.port, torch.cuda.device_count())

    def ring(self, seat: Seat) -> float:
        try:
            return time_ring(seat, self._store)
        except RuntimeError as error:  # torch's own kinds need torch where they are read
            raise RuntimeError(without_source(str(error))) from None


def node_facts(ip: str) -> NodeFacts:
    """Of the node this process is on, whose address in Ray is `ip` (node)."""
    interfaces, raylet = interface_addresses(), _raylet_words()
    session = _session_folder()
    disk = shutil.disk_usage(session)
    setting = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return NodeFacts(
        machine=_machine(),
        versions=versions(),
        token=token_facts(),
        plasma_folder=raylet.get("--plasma_directory", ""),
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        session_folder=session,
        disk_total_bytes=disk.used + disk.free,  # without what is kept for root
        disk_free_bytes=disk.free,
        interface=interface_of(ip, interfaces),
        gloo_interface=setting or interface_of(_address_by_hostname(), interfaces),
        gloo_setting=setting,
    )


def versions() -> dict[str, str]:
    """Of what a job's result depends on. torch is not imported for it."""
    found = {"python": platform.python_version()}
    for package in ("ray", "torch"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"bigray": _own_version()}


@cache
def _own_version() -> str:
    """With a hash of the sources: two checkouts of one version differ all the same."""
    import bigray

    folder = Path(bigray.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    try:
        version = importlib.metadata.version("bigray")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "checkout"
    return f"{version} (sources {digest.hexdigest()[:8]})"


def token_facts() -> TokenFacts:
    """How this process finds Ray's token, in the order in which Ray looks for it."""
    from bigray.cluster.refusals import token_place

    place = token_place()
    mode = None
    if isinstance(place, Path):
        with suppress(OSError):
            mode = stat.S_IMODE(place.stat().st_mode)
    return TokenFacts(_authentication_mode(), str(place or ""), mode)


def _authentication_mode() -> str:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return "token" if is_token_auth_enabled() else "disabled"


def _machine() -> str:
    """A kernel's boot and a network namespace: hosts in containers of one machine are two."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    return socket.gethostname()


def _session_folder() -> str:
    from ray._private import worker

    node = worker._global_node
    return str(node.get_session_dir_path()) if node is not None else "/tmp"


def _raylet_words() -> dict[str, str]:
    """Options of the raylet, which is this worker's parent."""
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        return {name: value for name, _, value in (word.partition("=") for word in words)}
    return {}


def load_torch() -> None:
    """With all GPUs that Ray has on this node (node)."""
    _see_all_gpus()
    import torch  # noqa: F401


def _see_all_gpus() -> None:
    """Ray hides all GPUs from a process that holds none: see what its raylet sees. Before torch is loaded."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    if own:
        return
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/environ").read_text().split("\0")
        visible = dict(word.split("=", 1) for word in words if "=" in word).get("CUDA_VISIBLE_DEVICES")
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def interface_addresses() -> dict[str, tuple[str, ...]]:
    """IP addresses by the name of the network interface that has them."""
    import ray  # noqa: F401  # brings psutil
    import psutil  # type: ignore[import-untyped, unused-ignore]  # isort: skip

    found: Mapping[str, Sequence[Any]] = psutil.net_if_addrs()
    wanted = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(str(entry.address).partition("%")[0] for entry in entries if entry.family in wanted)
        for name, entries in found.items()
    }


def interface_of(ip: str, interfaces: Mapping[str, Sequence[str]]) -> str:
    """The interface that has an address; empty where none has."""
    for name, addresses in interfaces.items():
        if ip in addresses:
            return name
    if ip.startswith("127."):  # all of 127.0.0.0/8 is the interface of 127.0.0.1, as Debian's 127.0.1.1
        return next((name for name, addresses in interfaces.items() if LOOPBACK in addresses), "")
    return ""


def _address_by_hostname() -> str:
    """What gloo binds to without a setting: the first address of the host's own name that can be bound."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_STREAM
        ):
            with suppress(OSError), socket.socket(family, kind, protocol) as tried:
                tried.bind((address[0], 0))
                return str(address[0])
    return LOOPBACK


def write_file(storage: Storage, name: str, data: bytes) -> str:
    """Write a file, and return its hash (node).

    Raises:
        StorageError: it cannot be written.
    """
    storage.write_bytes(name, data)
    return sha256(data)


def read_file(storage: Storage, name: str) -> str | None:
    """The hash of a file that another node wrote; None where it does not show (node or driver)."""
    return sha256(storage.read_bytes(name)) if shows(lambda: storage.file_size(name) is not None) else None
