"""Serve's applications as configs that are handed in, and the channel of versions that belongs to each (driver)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bigray.errors import DeployError
from bigray.serve.config import JsonObject
from bigray.serve.failures import first_error_line
from bigray.serve.release.registry import Registry
from bigray.serve.rollout import Channel
from bigray.serve.turn import Turn

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient

POLL_S = 0.1
GONE_WITHIN_S = 60.0


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


def status_word(application: Mapping[str, Any]) -> str:
    """Serve's own word for how an application is, out of its details."""
    status = application.get("status", "NOT_STARTED")
    return str(getattr(status, "value", status))  # Ray's states are enumerations of strings


def take_down(client: ServeControllerClient, name: str) -> None:
    """Delete an application with its channel, and wait until it is gone or another one is deployed in its place.

    Raises:
        TimeoutError: it is still on its way out.
    """
    with Turn():
        _ask_to_delete(client, name)
    _see_off(client, name)


def other_name(bundle: str) -> str:
    """The same folder or URI, spelled otherwise: with a slash at its end, or without.

    A channel goes by the spelling, and Serve replaces replicas where an application's arguments differ.
    """
    place, mark, options = bundle.partition("?") if "://" in bundle else (bundle, "", "")
    return (place.rstrip("/") if place.endswith("/") else f"{place}/") + mark + options


class Applied:
    """Hands an application's config in; where that or the block fails, Ctrl-C included, it is what it was, or gone."""

    def __init__(
        self,
        client: ServeControllerClient,
        document: JsonObject,
        write: Callable[[Channel], object] = lambda channel: None,
    ) -> None:
        """`document` is a file of Serve's with one application.

        `write` is called in this deployer's turn, right before the config is handed in: it looks at what is served by
        then, and writes what the new replicas find in the channel. What it raises is raised, and nothing is changed.
        """
        self._client, self._document, self._write = client, document, write
        (self._application,) = document["applications"]
        self._name: str = self._application.get("name", "default")  # Serve's own default
        self._earlier: JsonObject | None = None
        self.channel = Channel(Registry(self._name, self._application["args"]["bundle"]), frozenset)

    @staticmethod
    def deployed(client: ServeControllerClient) -> dict[str, JsonObject]:
        """The config of each application, by name; those deployed from Python rather than from a file have none."""
        applications = client.get_serve_details()["applications"]
        configs = {
            name: details.get("deployed_app_config")
            for name, details in applications.items()
            if status_word(details) != "DELETING"  # one that is on its way out must not be handed in again
        }
        return {name: config for name, config in configs.items() if config}

    def __enter__(self) -> Applied:
        from ray.exceptions import ActorDiedError

        is_begun = False
        try:
            with Turn():
                deployed = self.deployed(self._client)
                self._earlier = deployed.get(self._name)
                self._write(self.channel)
                is_begun = True
                self._apply(self._application, deployed)
        except ActorDiedError:
            raise DeployError(f"application '{self._name}': Serve has been ended meanwhile; deploy again") from None
        except BaseException:
            if is_begun:  # Serve may have it already
                self._take_back()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._take_back()

    def _take_back(self) -> None:
        if self._undo():
            with contextlib.suppress(TimeoutError):  # it goes all the same; why the block failed is the story to tell
                _see_off(self._client, self._name)

    def _undo(self) -> bool:
        """Put back what was there; whether that was nothing, and the application is on its way out."""
        with Turn():
            deployed = self.deployed(self._client)
            now = deployed.get(self._name)
            if now is None:  # it was refused, or somebody has deleted it meanwhile
                _forget(self._name)
                return False
            if now["args"] != self._application["args"]:
                return False  # somebody has deployed another config under this name
            if self._earlier is None:
                _ask_to_delete(self._client, self._name)
                return True
            self._apply(self._earlier, deployed)
            return False

    def _apply(self, application: JsonObject, deployed: Mapping[str, JsonObject]) -> None:
        """The step of `serve deploy`, which replaces everything served; so what runs already is handed in again."""
        from ray.serve.schema import ServeDeploySchema

        document = {key: value for key, value in self._document.items() if key != "controller_options"}
        others = [config for name, config in deployed.items() if name != self._name]
        document["applications"] = [*others, application]
        try:
            config = ServeDeploySchema.model_validate(document)
        except ValueError as error:
            raise DeployError(f"Ray refuses the serve file: {first_error_line(str(error))}") from error
        self._client.deploy_apps(config)


def _ask_to_delete(client: ServeControllerClient, name: str) -> None:
    """Within a turn: whoever deploys another application of this name begins its channel in a later one."""
    client.delete_apps([name], blocking=False)
    client.get_serve_details()  # is answered after that: from here on everybody sees that it is on its way out
    _forget(name)


def _forget(name: str) -> None:
    Registry(name, "").clear()  # whatever the application was started with


def _see_off(client: ServeControllerClient, name: str) -> None:
    """Wait until it is gone, and remove what its replicas have said until then; `TimeoutError` where it is not."""
    _wait_until_gone(client, name)
    with Turn():
        if name not in client.get_serve_details()["applications"]:
            _forget(name)


def _wait_until_gone(client: ServeControllerClient, name: str) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while status_word(client.get_serve_details()["applications"].get(name, {})) == "DELETING":
        if time.monotonic() > deadline:
            raise TimeoutError(f"application '{name}' is still on its way out")
        time.sleep(POLL_S)
