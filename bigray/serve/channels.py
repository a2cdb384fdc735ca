"""Serve's applications as configs that are handed in, and the channel of versions that belongs to each (driver)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bigray.errors import DeployError
from bigray.serve.config import ServeSpec
from bigray.serve.failures import first_error_line
from bigray.serve.release.registry import Registry
from bigray.serve.rollout import Channel

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient


def channel_of(client: ServeControllerClient, name: str) -> Channel | None:
    """The channel of an application; None where it is not there, or was not deployed from a file of bigray's."""
    config = Applied.deployed(client).get(name, {})
    base = config.get("args", {}).get("bundle")
    if base is None:
        return None

    def replicas() -> frozenset[str]:
        return running_replicas(client.get_serve_details()["applications"].get(name, {}))

    return Channel(Registry(name, base), replicas)


def running_replicas(application: Mapping[str, Any]) -> frozenset[str]:
    """Ids of the replicas that take requests, out of Serve's details of an application."""
    deployments = application.get("deployments", {}).values()
    replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
    return frozenset(replica["replica_id"] for replica in replicas if replica["state"] == "RUNNING")


class Applied:
    """Hands an application's config in; where the block fails, Ctrl-C included, it is what it was again, or gone."""

    def __init__(self, client: ServeControllerClient, spec: ServeSpec) -> None:
        self._client, self._spec = client, spec
        self._name = spec.application.name
        self._earlier = self.deployed(client).get(self._name)
        self.channel = Channel(Registry(self._name, spec.application.args.bundle), frozenset)

    @staticmethod
    def deployed(client: ServeControllerClient) -> dict[str, dict[str, Any]]:
        """The config of each application, by name; those deployed from Python rather than from a file have none."""
        applications = client.get_serve_details()["applications"]
        configs = {
            name: details.get("deployed_app_config")
            for name, details in applications.items()
            # one that is on its way out must not be handed in again
            if str(getattr(details["status"], "value", details["status"])) != "DELETING"
        }
        return {name: config for name, config in configs.items() if config}

    def __enter__(self) -> Applied:
        self._apply(self._spec.application_document())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or not self._is_still_ours():
            return
        if self._earlier is None:
            with contextlib.suppress(TimeoutError):  # it goes all the same; why the block failed is the story to tell
                self._client.delete_apps([self._name])
            self.channel.forget()
        else:
            self._apply(self._earlier)

    def _is_still_ours(self) -> bool:
        """Whether nobody has deployed another config under this name meanwhile."""
        now = self.deployed(self._client).get(self._name)
        return now is None or now["args"] == self._spec.application_document()["args"]

    def _apply(self, application: dict[str, Any]) -> None:
        """The step of `serve deploy`, which replaces everything served; so what runs already is handed in again."""
        from ray.serve.schema import ServeDeploySchema

        document = self._spec.to_native()
        document.pop("controller_options", None)
        others = [config for name, config in self.deployed(self._client).items() if name != self._name]
        document["applications"] = [*others, application]
        try:
            config = ServeDeploySchema.model_validate(document)
        except ValueError as error:
            raise DeployError(f"Ray refuses the serve file: {first_error_line(str(error))}") from error
        self._client.deploy_apps(config)
