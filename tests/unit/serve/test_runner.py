from __future__ import annotations

from typing import Any

import pytest

from bigray.errors import DeployError
from bigray.serve.config import ServeSpec, load_serve
from bigray.serve.runner import _applied, _wait_until_running


class FakeClient:
    """A fake of Serve's client: it only remembers what is deployed. The integration tests ask a real controller."""

    def __init__(self, **bundles: str) -> None:
        self.applications = {
            name: config("/" + name, bundle) | {"name": name, "route_prefix": "/" + name}
            for name, bundle in bundles.items()
        }
        self.status = {"status": "DEPLOYING", "message": ""}

    def get_serve_details(self) -> dict[str, Any]:
        return {
            "applications": {
                name: self.status | {"deployed_app_config": document} for name, document in self.applications.items()
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


def config(prefix: str, bundle: str) -> dict[str, Any]:
    return {"route_prefix": prefix, "import_path": "bigray.serve.app:build", "args": {"bundle": bundle}}


@pytest.fixture
def spec() -> ServeSpec:
    """Application 'model'."""
    return load_serve("serve/local.yaml").with_bundle("new")


def test_a_failed_replacement_puts_back_what_served(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")
    before = client.applications["model"]
    with pytest.raises(DeployError, match="no luck"), _applied(client, spec):
        raise DeployError("no luck")
    assert client.bundles == {"model": "earlier", "other": "another"}
    assert client.applications["model"] == before


def test_a_failed_first_deployment_is_deleted(spec: ServeSpec):
    client = FakeClient(other="another")
    with pytest.raises(KeyboardInterrupt), _applied(client, spec):
        raise KeyboardInterrupt
    assert client.bundles == {"other": "another"}


def test_a_deployment_that_works_stays(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")
    with _applied(client, spec):
        pass
    assert client.bundles == {"model": "new", "other": "another"}


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        ("DEPLOY_FAILED", "no bundle", "no bundle"),
        ("DEPLOYING", "Traceback\nbigray.errors.DeployError: bad", "bad"),
        ("DEPLOYING", "", "not running in time"),
    ],
)
def test_every_failure_while_it_starts_is_undone(spec: ServeSpec, status: str, message: str, expected: str):
    client = FakeClient(model="earlier")
    client.status = {"status": status, "message": message, "deployments": {}}
    with pytest.raises(DeployError, match=expected), _applied(client, spec):
        _wait_until_running(client, "model", deadline=0.0)
    assert client.bundles == {"model": "earlier"}
