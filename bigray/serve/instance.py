"""Serve itself on the connected cluster: find it, start it, end it (driver)."""

from __future__ import annotations

import atexit
import logging
import shutil
import time
from typing import TYPE_CHECKING

from bigray.errors import DeployError
from bigray.serve.config import ServeSpec
from bigray.serve.failures import first_error_line
from bigray.serve.ingress import (
    choose_port,
    claim_folder,
    end_orphans,
    haproxy_available,
    haproxy_folder,
    ingress_settings,
)

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient

POLL_S = 0.1
SHUTDOWN_TIMEOUT_S = 30.0
GRPC_MARGIN_BYTES = 64 * 1024
"""What a message holds beside its tensors."""


def running_client() -> ServeControllerClient | None:
    """Serve's client where Serve runs on this cluster."""
    # Serve's public API has no way to hand in a config file: `serve run` uses this client as well
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def start_serve(spec: ServeSpec) -> ServeControllerClient:
    """Start Serve where the file says, or join the one that runs.

    Raises:
        DeployError: the port is taken, Serve listens on another one, or its proxy does not come up.
    """
    client = running_client()
    options = spec.http_options
    if client is not None:
        running = client.http_config.port
        if options.port not in (0, running):
            raise DeployError(
                f"http_options.port: Serve already listens on {running} on this cluster, not on {options.port}; "
                f"ask for {running}, or end it first"
            )
        return client
    port = _claimed_port(spec) if _head_is_here() else options.port or 8000
    native = spec.with_port(port).to_native()
    from ray import serve
    from ray.exceptions import RayError

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location=spec.proxy_location,
            http_options=native["http_options"],
            grpc_options=native.get("grpc_options"),
            controller_options={"runtime_env": {"env_vars": controller_environment(spec, port)}},
        )
    except (TimeoutError, RayError) as error:
        shutdown()
        reason = first_error_line(str(error))
        raise DeployError(f"the proxy did not come up on port {port}: {reason}") from error
    if _ray_ends_with_this_process():
        atexit.register(_leave_nothing, port)
    started = running_client()
    if started is None:
        raise DeployError("Serve's controller ended right after its start; see the logs under /tmp/ray/session_latest")
    return started


def _claimed_port(spec: ServeSpec) -> int:
    port = choose_port(spec.http_options.host, spec.http_options.port)
    if haproxy_available():
        claim_folder(port)
    return port


def shutdown() -> None:
    """End Serve on this cluster with everything it serves."""
    client = running_client()
    if client is None:
        return
    import ray
    from ray import serve

    port = client.http_config.port
    # `serve.shutdown()` alone waits inside the controller until that is killed, which Ray reports as a failed task
    ray.get(client._controller.graceful_shutdown.remote(wait=False))
    _wait_until_gone()
    serve.shutdown()
    end_orphans(port)
    shutil.rmtree(haproxy_folder(port), ignore_errors=True)


def root_url(client: ServeControllerClient) -> str:
    """Where the driver reaches Serve's proxy, without a slash at the end."""
    options = client.http_config
    host = options.host
    if host in ("0.0.0.0", "::", None):
        host = "127.0.0.1" if _head_is_here() else _head_address()
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://{host}:{options.port}{options.root_path}"


def controller_environment(spec: ServeSpec, port: int) -> dict[str, str]:
    """bigray's settings for Serve's processes, and the file's own before them."""
    uses_tls = spec.http_options.ssl_certfile is not None
    settings = ingress_settings(port, uses_tls=uses_tls)
    if spec.grpc_options is not None:
        # a message is parsed before its key is looked at; Ray's own limit is 2 GB
        limit = int(spec.application.args.max_body_mb * 2**20) + GRPC_MARGIN_BYTES
        settings["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] = str(limit)
    return settings | spec.controller_options.runtime_env.get("env_vars", {})


def _ray_ends_with_this_process() -> bool:
    import ray

    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def _leave_nothing(port: int) -> None:
    """At the end of a process that started Ray itself: Serve, and an HAProxy that Ray's own end left behind."""
    import ray

    if ray.is_initialized():
        shutdown()
    end_orphans(port)
    shutil.rmtree(haproxy_folder(port), ignore_errors=True)


def _wait_until_gone() -> None:
    """Until the controller's name is free; asking the controller itself would be a task that fails with it."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return
        time.sleep(POLL_S)


def _head_is_here() -> bool:
    import ray

    return bool(ray.util.get_node_ip_address() == _head_address())


def _head_address() -> str:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    head = next((node for node in nodes if "node:__internal_head__" in node["Resources"]), nodes[0])
    return str(head["NodeManagerAddress"])
