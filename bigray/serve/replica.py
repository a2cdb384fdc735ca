"""The Serve deployment: what one process of an endpoint is made of (replica)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import ray
from ray import serve

from bigray.errors import DeployError
from bigray.serve.asgi import ModelApp
from bigray.serve.assembly import assemble
from bigray.serve.config import BundleArgs
from bigray.serve.direct import go_direct
from bigray.serve.grpc_backend import GrpcBackend
from bigray.serve.ingress import claim_node_folder
from bigray.serve.protect.exposure import check_exposure, check_grpc_exposure
from bigray.serve.release.registry import Registry
from bigray.serve.steward import Identity, Steward
from bigray.serve.wire.grpc_service import InferenceMethods


@serve.deployment(
    name="Model",
    # slow clients hold a place each while their body comes in; what may wait for the model is bounded by bigray's queue
    max_ongoing_requests=10_000,
    # one log line a request costs as much as the prediction; bigray writes its own, if asked to
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)
@serve.ingress()
class Model(InferenceMethods):
    """Loads the channel's live version when the replica starts; Serve then hands requests to `ModelApp`."""

    def __init__(self, args: BundleArgs) -> None:
        # Ray's own tools deploy the same file: they start nothing that `bigray deploy` would refuse
        _check_exposure(args)
        node_id = ray.get_runtime_context().get_node_id()
        claim_socket_folder(node_id)
        context = serve.get_replica_context()
        registry = Registry(context.app_name, args.bundle)
        state = registry.read()
        bundle = state.live.bundle if state is not None else args.bundle
        num_cpus = _num_cpus()
        self._endpoint = assemble(
            bundle,
            args,
            num_threads=args.num_threads if args.num_threads is not None else max(1, int(num_cpus)),
            num_cpus=num_cpus,
            replica=context.replica_tag,
            reports=registry.reports,
        )
        if state is not None and self._endpoint.store.view.live.version != state.live.version:
            found = self._endpoint.store.view.live.version
            raise DeployError(f"{bundle}: holds version {found} now, not the live one, {state.live.version}")
        self._grpc_backend = GrpcBackend(self._endpoint)
        go_direct(self._endpoint.app)
        identity = Identity(context.replica_tag, node_id, os.getpid())
        self._steward = Steward(
            registry,
            self._endpoint.store,
            self._endpoint.load,
            identity=identity,
            telemetry=self._endpoint.telemetry,
            guard=self._endpoint.guard,
        )
        if state is not None:
            self._steward.step(time.monotonic())  # a replica that starts during a canary takes part in it
        self._steward.start()

    def __serve_build_asgi_app__(self) -> ModelApp:
        return self._endpoint.app

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """What `ArrivalPolicy` decides by; Serve asks several times a second."""
        load = self._endpoint.telemetry.load(time.monotonic())
        return {f"bigray_{name}": float(value) for name, value in load.items()}  # type: ignore[arg-type]


def claim_socket_folder(node_id: str) -> None:
    """Keep HAProxy's admin socket on this node to this user, where HAProxy stands in front (replica).

    Serve starts HAProxy on a node once a replica answers there, so the folder is claimed before it holds a socket;
    where `serve run` has started HAProxy first, the folder is closed to others here.

    Raises:
        DeployError: as for `claim_node_folder`.
    """
    from ray.serve._private import constants

    if constants.RAY_SERVE_ENABLE_HA_PROXY:
        claim_node_folder(constants.RAY_SERVE_HAPROXY_SOCKET_PATH, node_id)


def _check_exposure(args: BundleArgs) -> None:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "a replica has a controller"
    check_exposure(str(client.http_config.host), args.keys is not None, args.open)
    # what the running Serve listens for, whatever this application's own file says
    grpc = ray.get(client._controller.get_grpc_config.remote())
    if grpc.port > 0 and grpc.grpc_servicer_functions:
        check_grpc_exposure(args.keys is not None, args.open)


def _num_cpus() -> float:
    """CPUs that this process can keep busy: Ray's share is no limit, and an event loop alone fills one."""
    return max(1.0, float(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)))
