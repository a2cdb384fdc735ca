"""Start an embedded local Ray, or join the cluster at an address.

Ray's settings that bigray relies on are environment variables read when Ray's processes start; they are set here, in
one place, before Ray starts, and never override what the user has set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigray.cluster.capacity import local_capacity
from bigray.cluster.refusals import check_before_joining, explain, host_and_port, open_to_others, token_place
from bigray.errors import ClusterError

RAY_SETTINGS = {
    # the workers' own reports are pushed, so this only bounds how late a dead worker is noticed (Ray: 2 s)
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # how long Train waits for places it believes are free before it looks again: a node that was lost or is being
    # drained still counts for it at first (Ray: 60 s)
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # workers stay in the folder the user started in, so that relative imports and paths keep their meaning
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Serve's fast path: HAProxy in front, the replica is the HTTP server
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # how often replicas report load; Serve's 10 s makes any autoscaling policy that slow
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    # the journal is bigray's record: Tune's CSV, JSON and TensorBoard copies double its cost for each result
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Tune's newer output prints a table of its own even when told to be silent
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ctrl-C must reach bigray, which ends the groups and says how to go on
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # a process without GPUs of its own keeps CUDA_VISIBLE_DEVICES as the user set it (Ray's coming default)
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

HEAD_ANSWERS_S = 2.0
JOIN_PATIENCE_S = 5.0
"""How long a head that does not listen yet is waited for."""


@dataclass(frozen=True)
class Connection:
    """A live connection of this process to Ray."""

    address: str
    embedded: bool
    """True where this process started the cluster, which then ends with it."""


def resolve_address(address: str | None) -> str | None:
    """The cluster to join: the argument, else `RAY_ADDRESS`, else None for an embedded one."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def connect(address: str | None = None, *, is_lenient: bool = False) -> Iterator[Connection]:
    """Hold a connection to Ray for the length of a `with` block (driver).

    With no address a local Ray is started, token authentication on, and ended with the block; with one ("auto" finds
    the cluster on this machine), that cluster is joined and left running. A connection that is there is used and left.
    `is_lenient` joins also with a token that other users can read.

    Raises:
        ClusterError: nothing answers at the address, it refuses the token, or others can read the token; or in the
            block Ray has failed, and the cluster's head does not answer any more.
    """
    import ray

    is_ours = not ray.is_initialized()
    connection = ensure_connected(address, is_lenient=is_lenient)
    try:
        yield connection
    except ray.exceptions.RayError as error:
        if (lost := _lost_head()) is None:
            raise
        raise ClusterError(
            f"{lost}: the head of the cluster is gone; start it, or join another, and give the command again"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


def ensure_connected(address: str | None = None, *, is_lenient: bool = False) -> Connection:
    """This process's connection to Ray, made where there is none; it then stays until the process ends (driver).

    So `train`, `tune` and `deploy` called one after another from Python share one Ray.

    Raises:
        ClusterError: as for `connect`.
    """
    target = resolve_address(address)
    prepare_environment(joining=target is not None)
    import ray

    if ray.is_initialized():
        return Connection(ray.get_runtime_context().gcs_address, embedded=False)
    keep_stdout_for_results()
    if target is not None:
        check_before_joining(target, JOIN_PATIENCE_S, is_lenient=is_lenient)
    try:
        with contextlib.nullcontext() if target else without_services():
            context = ray.init(address=target or "local", **_init_options(embedded=target is None))
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(explain(error, target or "local")) from error
    if target is None:
        keep_token_private()
    return Connection(context.address_info["gcs_address"], embedded=target is None)


def _init_options(*, embedded: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"namespace": "bigray", "log_to_driver": False, "logging_level": logging.ERROR}
    if embedded:
        # the plan was made for exactly this machine, before Ray started
        here = local_capacity()
        options |= {"include_dashboard": False, "num_cpus": int(here.cpus), "num_gpus": int(here.gpus)}
    return options


def prepare_environment(*, joining: bool) -> None:
    """Set Ray's environment variables for this process and its children; keeps what is already set."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Ray 2.60 switches authentication on by itself for a local cluster, but not for a client with an explicit
    # address, which then fails: say it either way
    if not joining or has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray._private import auto_init_hook
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")  # Ray reads its variables when it is imported, which may have been before now
    # a thread that outlives its connection must not join whatever other cluster this machine runs
    auto_init_hook.enable_auto_connect = False


def _lost_head() -> str | None:
    """The address of the cluster that this process has joined, where nothing answers at it any more."""
    import ray

    if not ray.is_initialized():  # the block has left it by itself
        return None
    address = str(ray.get_runtime_context().gcs_address)
    place = host_and_port(address)
    try:
        if place is not None:
            socket.create_connection(place, HEAD_ANSWERS_S).close()
    except OSError:
        return address
    return None


def is_embedded() -> bool:
    """True where this process is connected to a cluster that it has started itself."""
    from ray._private import worker

    return worker._global_node is not None and bool(worker._global_node.head)


@contextlib.contextmanager
def without_services() -> Iterator[None]:
    """Have `ray.init` leave out what an embedded Ray has no use for: three seconds of a core at every start.

    These are the dashboard, which without its pages reports usage alone, the autoscaler, and what carries the workers'
    output to the driver. Ray 2.60 has no setting for them.
    """
    from ray._private.node import Node

    def start_nothing(node: Any, **options: Any) -> None: ...

    names = ("start_api_server", "start_monitor", "start_log_monitor")
    originals = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, start_nothing)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Node, name, original)


def keep_stdout_for_results() -> None:
    """Have Ray tell on standard error that a process died: on standard output a script expects one JSON document.

    Ray 2.60 has no setting for it: its driver writes what the raylet reports to `sys.stdout`.
    """
    from ray._private import worker

    tell = worker.print_to_stdstream
    if tell.__module__ == __name__:  # done already
        return

    def tell_apart(data: dict[str, Any], ignore_prefix: bool) -> None:
        tell({**data, "is_err": data["is_err"] or data.get("pid") == "raylet"}, ignore_prefix)

    worker.print_to_stdstream = tell_apart


def keep_token_private() -> None:
    """Ray 2.60 writes the token of a cluster that it starts for everyone to read: leave it to its owner."""
    place = token_place()
    if isinstance(place, Path) and not os.environ.get("RAY_AUTH_TOKEN_PATH") and open_to_others(place):
        with contextlib.suppress(OSError):
            place.chmod(0o600)


def has_token() -> bool:
    """True where a Ray authentication token can be found for this user."""
    default = Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")) or default.exists()
