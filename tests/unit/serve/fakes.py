"""A fake of Serve's client, and what tests of several modules do with it."""

from __future__ import annotations

from typing import Any


class FakeClient:
    """It only remembers what is deployed. The integration tests ask a real controller."""

    def __init__(self, **bundles: str) -> None:
        self.applications = {name: config("/" + name, bundle) | {"name": name} for name, bundle in bundles.items()}
        self.details: dict[str, Any] = {"status": "DEPLOYING", "message": "", "deployments": {}}

    def get_serve_details(self) -> dict[str, Any]:
        return {
            "applications": {
                name: self.details | {"name": name, "route_prefix": "/" + name, "deployed_app_config": document}
                for name, document in self.applications.items()
            }
        }

    def deploy_apps(self, schema: Any) -> None:
        self.applications = {one.name: one.model_dump(exclude_unset=True) for one in schema.applications}

    def delete_apps(self, names: list[str], blocking: bool = True) -> None:
        for name in names:
            del self.applications[name]

    @property
    def bundles(self) -> dict[str, str]:
        return {name: document["args"]["bundle"] for name, document in self.applications.items()}


class LingeringClient(FakeClient):
    """Deleted applications are on their way out until `let_go`, or until others are deployed in their place."""

    def __init__(self, **bundles: str) -> None:
        super().__init__(**bundles)
        self.leaving: dict[str, dict[str, Any]] = {}

    def get_serve_details(self) -> dict[str, Any]:
        details = super().get_serve_details()
        gone = {name: {"name": name, "status": "DELETING", "deployments": {}} for name in dict(self.leaving)}
        return {"applications": gone | details["applications"]}

    def deploy_apps(self, schema: Any) -> None:
        super().deploy_apps(schema)
        for name in self.applications:
            self.leaving.pop(name, None)

    def delete_apps(self, names: list[str], blocking: bool = True) -> None:
        self.leaving |= {name: self.applications.pop(name) for name in names}

    def let_go(self, name: str) -> None:
        del self.leaving[name]


def config(prefix: str, bundle: str) -> dict[str, Any]:
    return {"route_prefix": prefix, "import_path": "bigray.serve.app:build", "args": {"bundle": bundle}}
