from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigray.errors import DeployError, SpecError
from bigray.serve import runner
from bigray.serve.channels import Applied
from bigray.serve.config import ServeSpec, load_serve
from bigray.serve.release import registry
from bigray.serve.release.record import Release, Rollout, initial, promote, propose
from bigray.serve.release.registry import MemoryKeyValue, Registry
from bigray.serve.rollout import Mode
from bigray.serve.runner import (
    _wait_until_running,
    absolute_location,
    delete,
    deploy,
    known_versions,
    resolved_config,
    rollback,
    status,
    versions,
)

A, B = (Release(version=letter * 12, bundle=f"/bundles/{letter}") for letter in "ab")
AT = "2026-05-01T10:00:00+00:00"


class FakeClient:
    """A fake of Serve's client: it only remembers what is deployed. The integration tests ask a real controller."""

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


def config(prefix: str, bundle: str) -> dict[str, Any]:
    return {"route_prefix": prefix, "import_path": "bigray.serve.app:build", "args": {"bundle": bundle}}


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryKeyValue:
    """What Ray's head node would keep."""
    store = MemoryKeyValue()
    monkeypatch.setattr(registry, "RayKeyValue", lambda: store)
    return store


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """Serve runs, with application 'model'."""
    client = FakeClient(model=A.bundle)
    monkeypatch.setattr(runner, "running_client", lambda: client)
    monkeypatch.setattr(runner, "root_url", lambda client: "http://127.0.0.1:8000")
    return client


@pytest.fixture
def spec() -> ServeSpec:
    """Application 'model'."""
    return load_serve("serve/local.yaml").with_bundle("new")


# ----- while it starts


@pytest.mark.parametrize(
    ("state", "message", "expected"),
    [
        ("DEPLOY_FAILED", "no bundle", "no bundle"),
        ("UNHEALTHY", "it died", "it died"),
        ("DEPLOYING", "Traceback\nbigray.errors.DeployError: bad", "bad"),
        ("DEPLOYING", "", "not running in time"),
    ],
)
def test_every_failure_while_it_starts_is_undone(spec: ServeSpec, state: str, message: str, expected: str):
    client = FakeClient(model="earlier")
    client.details = {"status": state, "message": message, "deployments": {}}
    with pytest.raises(DeployError, match=expected), Applied(client, spec):
        _wait_until_running(client, "model", deadline=0.0)
    assert client.bundles == {"model": "earlier"}


def test_one_that_runs_is_waited_for_no_longer(client: FakeClient):
    client.details = {"status": "RUNNING", "message": "", "deployments": {}}
    _wait_until_running(client, "model", deadline=0.0)


# ----- before it starts


def test_nothing_is_started_for_an_endpoint_that_anybody_could_reach(spec: ServeSpec, client: FakeClient, release):
    exposed = spec.model_copy(update={"http_options": spec.http_options.model_copy(update={"host": "0.0.0.0"})})
    with pytest.raises(SpecError, match="can be reached from other machines and needs keys"):
        deploy(release.bundle, exposed)
    assert client.bundles == {"model": A.bundle}


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_there_has_to_be_a_version_that_a_candidate_is_compared_with(spec: ServeSpec, client, release, kind):
    with pytest.raises(DeployError, match=f"application 'model': nothing is live yet that a {kind} could be compared"):
        deploy(release.bundle, spec, mode=Mode(kind, 0.1))


def test_a_factory_that_is_not_allowed_is_refused_before_the_gate(spec: ServeSpec, client, release):
    with pytest.raises(DeployError, match="is not allowed"):
        deploy(release.bundle, spec.with_args(allow_factories=("mine.*",)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/run/bundle", "s3://bucket/run/bundle"),
        ("/runs/a", "/runs/a"),
        ("runs/a", str(Path.cwd() / "runs/a")),
        ("~/runs", str(Path.home() / "runs")),
    ],
)
def test_a_location_is_one_that_a_replica_can_open(given, expected):
    assert absolute_location(given) == expected


def test_the_resolved_file_holds_absolute_places_and_a_port(spec: ServeSpec):
    with_places = spec.with_args(keys="keys.json", models=[{"name": "other", "bundle": "runs/b"}])
    document = resolved_config("runs/a", with_places.with_port(0))
    args = document["applications"][0]["args"]
    assert args["bundle"] == str(Path.cwd() / "runs/a")
    assert args["keys"] == str(Path.cwd() / "keys.json")
    assert args["models"][0]["bundle"] == str(Path.cwd() / "runs/b")
    assert document["http_options"]["port"] > 0
    assert document["controller_options"]["runtime_env"]["env_vars"]


# ----- what serves


@pytest.fixture
def state(client: FakeClient, store: MemoryKeyValue):
    """`a` was live before `b`."""
    registry = Registry("model", A.bundle, store)
    first = initial(A, AT)
    second = propose(first, Rollout(kind="load", release=B))
    third = promote(second, AT, "good")
    for each in (first, second, third):
        assert registry.write(each)
    return third


def test_the_versions_of_an_application_are_told(state):
    found, reports = versions("model")
    assert (found, reports) == (state, ())
    assert known_versions() == {A.version: A.bundle, B.version: B.bundle}


def test_the_status_tells_the_live_version_and_what_is_under_way(client, state, store):
    registry = Registry("model", A.bundle, store)
    client.details |= {"status": "RUNNING"}
    (row,) = status()
    assert (row.name, row.state, row.version, row.bundle, row.rollout) == ("model", "RUNNING", B.version, B.bundle, "")
    assert row.url == "http://127.0.0.1:8000/model"
    registry.write(propose(state, Rollout(kind="canary", release=Release(version="c" * 12, bundle="/c"), share=0.1)))
    (row,) = status()
    assert row.rollout == f"canary 10% of {'c' * 12}"


def test_an_application_that_bigray_knows_nothing_of_is_told_all_the_same(client):
    client.details |= {"status": "RUNNING"}
    (row,) = status()
    assert (row.version, row.rollout, row.bundle) == ("", "", A.bundle)
    with pytest.raises(DeployError, match="application 'model': it has not reported yet, or was deployed without"):
        versions("model")


@pytest.mark.parametrize("call", [versions, rollback, delete], ids=lambda call: call.__name__)
def test_an_application_that_is_not_there_is_told_with_those_that_are(client, call):
    with pytest.raises(DeployError, match=r"no application named 'modell'; there are: model$"):
        call("modell")


@pytest.mark.parametrize("call", [versions, rollback, delete], ids=lambda call: call.__name__)
def test_where_nothing_is_served_that_is_told(monkeypatch, call):
    monkeypatch.setattr(runner, "running_client", lambda: None)
    with pytest.raises(DeployError, match=r"no application named 'model'; nothing is served on this cluster$"):
        call("model")
    assert status() == ()


def test_deleting_the_last_application_ends_serve_and_forgets_its_channel(client, state, store, monkeypatch):
    ended: list[bool] = []
    monkeypatch.setattr(runner, "shutdown", lambda: ended.append(True))
    client.applications["other"] = config("/other", "/bundles/o") | {"name": "other"}
    delete("model")
    assert (client.bundles, store.keys(b""), ended) == ({"other": "/bundles/o"}, [], [])
    delete("other")
    assert (client.bundles, ended) == ({}, [True])
