"""Deploy, look at and delete endpoints (driver). Every function expects that Ray is connected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigray.bundle import ModelBundle
from bigray.errors import DeployError
from bigray.inference import check_factory
from bigray.serve.client import fetch_json, predict_records
from bigray.serve.config import ServeSpec
from bigray.serve.failures import first_error_line
from bigray.serve.ingress import free_port
from bigray.serve.instance import controller_environment, root_url, running_client, shutdown, start_serve

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient

__all__ = ["Deployment", "EndpointStatus", "delete", "deploy", "resolved_config", "shutdown", "status"]

POLL_S = 0.1


@dataclass(frozen=True)
class Deployment:
    """A live endpoint."""

    name: str
    """The application's name in Serve; what `delete` takes."""
    model: str
    """The model's name in `/v2/models/{name}`."""
    version: str
    """The bundle's version: the first 12 hex digits of the weights' SHA-256."""
    url: str
    """Root of its routes, without a slash at the end."""

    def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Ask the endpoint over HTTP: one prediction for each record, in order."""
        return predict_records(self.url, records)


@dataclass(frozen=True)
class EndpointStatus:
    """One row of `bigray status`."""

    name: str
    url: str
    state: str
    """Serve's own word: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, DELETING."""
    replicas_running: int
    replicas_target: int
    bundle: str
    message: str
    """What is wrong, in one line; empty when all is well."""


def deploy(bundle: str, spec: ServeSpec, *, timeout_s: float = 90.0) -> Deployment:
    """Serve a bundle as the file says, beside what the cluster serves already; returns when it answers over HTTP.

    An application of the same name is replaced; where that fails, what served before is put back.

    Raises:
        CorruptFile: a file of the bundle differs from its manifest; nothing has been started.
        StorageError: there is no bundle at this location.
        DeployError: the port is taken, or no replica came up in time; the message is the replica's own first error.
    """
    loaded = ModelBundle.load(bundle)
    check_factory(loaded, spec.application.args.allow_factories)
    client = start_serve(spec)
    spec = spec.with_port(client.http_config.port).with_bundle(absolute_location(bundle))
    url = _public_url(client, spec)
    name = spec.application.name
    deadline = time.monotonic() + timeout_s
    with _applied(client, spec):
        _wait_until_running(client, name, deadline)
        _wait_until_answering(name, url, loaded.version, deadline)
    return Deployment(name, loaded.manifest.name, loaded.version, url)


def resolved_config(bundle: str, spec: ServeSpec) -> dict[str, Any]:
    """The native file with the bundle, a port and the fast path's settings filled in, for `serve run` and Git."""
    port = spec.http_options.port or free_port(0)
    document = spec.with_bundle(absolute_location(bundle)).with_port(port).to_native()
    document["controller_options"] = {"runtime_env": {"env_vars": controller_environment(spec, port)}}
    return document


def status() -> tuple[EndpointStatus, ...]:
    """All applications that Serve runs on this cluster; empty where Serve does not run."""
    client = running_client()
    if client is None:
        return ()
    root = root_url(client)
    applications = client.get_serve_details()["applications"].values()
    return tuple(_describe(application, root) for application in applications)


def delete(name: str) -> None:
    """Take an application down; with the last one Serve itself ends, and its port is free.

    Raises:
        DeployError: no application has this name.
    """
    client = running_client()
    names = [] if client is None else [row.name for row in status()]
    if client is None or name not in names:
        known = f"; there are: {', '.join(names)}" if names else "; nothing is served on this cluster"
        raise DeployError(f"no application named '{name}'{known}")
    client.delete_apps([name])
    if names == [name]:
        shutdown()


def absolute_location(bundle: str) -> str:
    """The bundle's location as a replica can open it: replicas do not run in the user's folder."""
    return bundle if "://" in bundle else str(Path(bundle).expanduser().absolute())


@contextmanager
def _applied(client: ServeControllerClient, spec: ServeSpec) -> Iterator[None]:
    """Hand the application in; whatever goes wrong inside, Ctrl-C included, it is what it was again, or gone."""
    name = spec.application.name
    earlier = _deployed_configs(client).get(name)
    _apply(client, spec)
    try:
        yield
    except BaseException:
        if earlier is None:
            client.delete_apps([name], blocking=False)
        else:
            _apply(client, spec, earlier)
        raise


def _deployed_configs(client: ServeControllerClient) -> dict[str, dict[str, Any]]:
    """The config of each application, by name; those deployed from Python rather than from a file have none."""
    applications = client.get_serve_details()["applications"]
    configs = {name: details.get("deployed_app_config") for name, details in applications.items()}
    return {name: config for name, config in configs.items() if config}


def _apply(client: ServeControllerClient, spec: ServeSpec, application: dict[str, Any] | None = None) -> None:
    """The same step as `serve deploy`, which replaces everything served; so what runs already is handed in again.

    `application` is the config to serve instead of the file's own.
    """
    from ray.serve.schema import ServeDeploySchema

    document = spec.to_native()
    document.pop("controller_options", None)
    others = [config for name, config in _deployed_configs(client).items() if name != spec.application.name]
    own = document["applications"] if application is None else [application]
    document["applications"] = [*others, *own]
    try:
        config = ServeDeploySchema.model_validate(document)
    except ValueError as error:
        raise DeployError(f"Ray refuses the serve file: {first_error_line(str(error))}") from error
    client.deploy_apps(config)


def _wait_until_running(client: ServeControllerClient, name: str, deadline: float) -> None:
    while True:
        application = client.get_serve_details()["applications"].get(name, {})
        state = _word(application.get("status", "NOT_STARTED"))
        message = _message(application)
        if state == "RUNNING":
            return
        if state in ("DEPLOY_FAILED", "UNHEALTHY") or "Traceback" in message:
            raise DeployError(f"application '{name}': {first_error_line(message)}")
        if time.monotonic() > deadline:
            reason = first_error_line(message) or f"still {state}"
            raise DeployError(f"application '{name}': not running in time: {reason}")
        time.sleep(POLL_S)


def _wait_until_answering(name: str, url: str, version: str, deadline: float) -> None:
    """Over real HTTP, and with this version: after a replacement the old replicas answer for a moment."""
    while True:
        try:
            fetch_json(f"{url}/v2/health/ready")
            found = fetch_json(f"{url}/")["version"]
            if found == version:
                return
            problem = f"{url} still serves version {found}, not {version}"
        except DeployError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise DeployError(f"application '{name}': running, but not reachable in time: {problem}")
        time.sleep(POLL_S)


def _describe(application: dict[str, Any], root: str) -> EndpointStatus:
    deployments = application["deployments"].values()
    replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
    config = application.get("deployed_app_config") or {}
    return EndpointStatus(
        name=application["name"],
        url=root + (application["route_prefix"] or "").rstrip("/"),
        state=_word(application["status"]),
        replicas_running=sum(replica["state"] == "RUNNING" for replica in replicas),
        replicas_target=sum(deployment["target_num_replicas"] for deployment in deployments),
        bundle=config.get("args", {}).get("bundle", ""),
        message=first_error_line(_message(application)),
    )


def _word(state: Any) -> str:
    return str(getattr(state, "value", state))  # Ray's states are enumerations of strings


def _message(application: dict[str, Any]) -> str:
    deployments = application.get("deployments", {}).values()
    texts = [str(application.get("message") or ""), *(str(one.get("message") or "") for one in deployments)]
    return max(texts, key=len)


def _public_url(client: ServeControllerClient, spec: ServeSpec) -> str:
    return root_url(client) + spec.application.route_prefix.rstrip("/")
