from __future__ import annotations

from typing import Any

import pytest

from bigray.errors import DeployError
from bigray.serve.channels import Applied, channel_of, running_replicas
from bigray.serve.config import ServeSpec, load_serve
from bigray.serve.release import registry
from bigray.serve.release.record import Release
from bigray.serve.release.registry import MemoryKeyValue, Registry

NEW = Release(version="b" * 12, bundle="new")


class FakeClient:
    """A fake of Serve's client: it only remembers what is deployed. The integration tests ask a real controller."""

    def __init__(self, **bundles: str) -> None:
        self.applications = {name: config("/" + name, bundle) | {"name": name} for name, bundle in bundles.items()}
        self.details: dict[str, Any] = {"status": "DEPLOYING", "message": "", "deployments": {}}
        self.http_options: list[dict[str, Any]] = []

    def get_serve_details(self) -> dict[str, Any]:
        return {
            "applications": {
                name: self.details | {"deployed_app_config": document} for name, document in self.applications.items()
            }
        }

    def deploy_apps(self, schema: Any) -> None:
        self.applications = {one.name: one.model_dump(exclude_unset=True) for one in schema.applications}
        self.http_options.append(schema.http_options.model_dump())

    def delete_apps(self, names: list[str], blocking: bool = True) -> None:
        for name in names:
            del self.applications[name]

    @property
    def bundles(self) -> dict[str, str]:
        return {name: document["args"]["bundle"] for name, document in self.applications.items()}


def config(prefix: str, bundle: str) -> dict[str, Any]:
    return {"route_prefix": prefix, "import_path": "bigray.serve.app:build", "args": {"bundle": bundle}}


def replicas(*states: str) -> dict[str, Any]:
    return {
        "deployments": {
            "Model": {"replicas": [{"replica_id": f"r{number}", "state": state} for number, state in enumerate(states)]}
        }
    }


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryKeyValue:
    """What Ray's head node would keep."""
    store = MemoryKeyValue()
    monkeypatch.setattr(registry, "RayKeyValue", lambda: store)
    return store


@pytest.fixture
def spec() -> ServeSpec:
    """Application 'model'."""
    return load_serve("serve/local.yaml").with_bundle("new")


# ----- an application's config


def test_a_failed_replacement_puts_back_what_served(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")
    before = client.applications["model"]
    with pytest.raises(DeployError, match="no luck"), Applied(client, spec):
        raise DeployError("no luck")
    assert client.bundles == {"model": "earlier", "other": "another"}
    assert client.applications["model"] == before


def test_a_failed_first_deployment_is_deleted_with_its_channel(spec: ServeSpec, store: MemoryKeyValue):
    client = FakeClient(other="another")
    applied = Applied(client, spec)
    applied.channel.begin(NEW, "first")
    with pytest.raises(KeyboardInterrupt), applied:
        raise KeyboardInterrupt
    assert client.bundles == {"other": "another"}
    assert store.keys(b"") == []


def test_a_failed_replacement_leaves_the_channel_of_what_served(spec: ServeSpec):
    client = FakeClient(model="earlier")
    earlier = channel_of(client, "model")
    earlier.begin(Release(version="a" * 12, bundle="earlier"), "first")
    before = earlier.state()
    applied = Applied(client, spec)
    applied.channel.succeed(before, NEW, "no room for both", is_forced=False)
    with pytest.raises(DeployError, match="no luck"), applied:
        raise DeployError("no luck")
    assert channel_of(client, "model").state() == before


def test_a_deployment_that_works_stays(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")
    with Applied(client, spec) as applied:
        assert client.bundles == {"model": "new", "other": "another"}
        applied.channel.begin(NEW, "first")
    assert client.bundles == {"model": "new", "other": "another"}
    assert channel_of(client, "model").state().live == NEW


def test_replicas_go_only_when_those_that_replace_them_answer(spec: ServeSpec):
    client = FakeClient(model="earlier")
    with Applied(client, spec):
        pass
    (deployment,) = client.applications["model"]["deployments"]
    assert deployment["max_surge_percent"] == 100


def test_what_ray_refuses_is_told_and_nothing_is_changed(spec: ServeSpec, monkeypatch: pytest.MonkeyPatch):
    client = FakeClient(model="earlier")
    applied = Applied(client, spec)
    monkeypatch.setattr(ServeSpec, "application_document", lambda self: {"name": "model", "import_path": 5})
    with pytest.raises(DeployError, match="Ray refuses the serve file: ") as told:
        applied.__enter__()
    assert "\n" not in str(told.value)
    assert client.bundles == {"model": "earlier"}


def test_an_application_that_was_made_in_python_has_no_config_to_hand_in_again(spec: ServeSpec):
    client = FakeClient(model="earlier")
    client.applications["of python"] = None
    assert list(Applied.deployed(client)) == ["model"]
    with Applied(client, spec):
        pass
    assert client.bundles == {"model": "new"}


# ----- its channel


def test_an_applications_channel_is_that_of_the_bundle_it_was_started_with(store: MemoryKeyValue):
    client = FakeClient(model="earlier")
    Registry("model", "earlier", store).write(_initial("earlier"))
    assert channel_of(client, "model").state().live.bundle == "earlier"
    assert channel_of(client, "elsewhere") is None


def test_an_application_of_others_has_no_channel():
    client = FakeClient(model="earlier")
    client.applications["model"]["args"] = {"something": "else"}
    assert channel_of(client, "model") is None


def test_only_replicas_that_take_requests_count():
    client = FakeClient(model="earlier")
    client.details |= replicas("RUNNING", "STARTING", "RUNNING", "STOPPING")
    assert channel_of(client, "model")._replicas() == frozenset({"r0", "r2"})
    assert running_replicas(replicas("RUNNING", "UPDATING")) == frozenset({"r0"})
    assert running_replicas({}) == frozenset()


def _initial(bundle: str):
    from bigray.serve.release.record import initial

    return initial(Release(version="a" * 12, bundle=bundle), "2026-05-01T10:00:00+00:00")
