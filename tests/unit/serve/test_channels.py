from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bigray.errors import DeployError
from bigray.serve.channels import Applied, channel_of, other_name, running_replicas, take_down
from bigray.serve.config import ServeSpec
from bigray.serve.release.record import Release
from bigray.serve.release.registry import MemoryKeyValue, Registry
from bigray.serve.rollout import Channel
from tests.unit.serve.fakes import FakeClient

pytestmark = pytest.mark.usefixtures("store")

NEW = Release(version="b" * 12, bundle="new")


def replicas(*states: str) -> dict[str, Any]:
    return {
        "deployments": {
            "Model": {"replicas": [{"replica_id": f"r{number}", "state": state} for number, state in enumerate(states)]}
        }
    }


# ----- an application's config


def test_a_failed_replacement_puts_back_what_served(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")
    before = client.applications["model"]
    with pytest.raises(DeployError, match="no luck"), Applied(client, spec.to_native()):
        raise DeployError("no luck")
    assert client.bundles == {"model": "earlier", "other": "another"}
    assert client.applications["model"] == before


def test_a_failed_first_deployment_is_deleted_with_its_channel(spec: ServeSpec):
    client = FakeClient(other="another")
    applied = Applied(client, spec.to_native())
    applied.channel.begin(NEW, "first")
    with pytest.raises(KeyboardInterrupt), applied:
        raise KeyboardInterrupt
    assert client.bundles == {"other": "another"}
    assert applied.channel.state() is None


def test_a_failed_replacement_leaves_the_channel_of_what_served(spec: ServeSpec):
    client = FakeClient(model="earlier")
    earlier = channel_of(client, "model")
    earlier.begin(Release(version="a" * 12, bundle="earlier"), "first")
    before = earlier.state()
    applied = Applied(client, spec.to_native())
    applied.channel.succeed(before, NEW, "no room for both", is_forced=False)
    with pytest.raises(DeployError, match="no luck"), applied:
        raise DeployError("no luck")
    assert channel_of(client, "model").state() == before


class InterruptedClient(FakeClient):
    """Serve has the config already when Ctrl-C comes."""

    def deploy_apps(self, schema: Any) -> None:
        super().deploy_apps(schema)
        if "new" in self.bundles.values():
            raise KeyboardInterrupt


@pytest.mark.parametrize("earlier", [{}, {"model": "earlier"}], ids=["first", "replacement"])
def test_ctrl_c_while_a_config_is_handed_in_is_undone(spec: ServeSpec, earlier: dict[str, str]):
    client = InterruptedClient(other="another", **earlier)
    applied = Applied(client, spec.to_native(), lambda channel: channel.begin(NEW, "first"))
    with pytest.raises(KeyboardInterrupt), applied:
        pytest.fail("it has not been handed in")
    assert client.bundles == {"other": "another"} | earlier
    assert (applied.channel.state() is None) == (not earlier)


def test_what_is_refused_before_a_config_is_handed_in_changes_nothing(spec: ServeSpec):
    client = FakeClient(model="earlier")
    before = client.applications

    def refuse(channel: Channel) -> None:
        raise DeployError("somebody was faster")

    with pytest.raises(DeployError, match="faster"), Applied(client, spec.to_native(), refuse):
        pytest.fail("it has not been handed in")
    assert client.applications is before


def test_a_first_deployment_that_ray_refuses_leaves_no_channel(spec: ServeSpec):
    wrong = {"name": "model", "import_path": 5, "args": {"bundle": "new"}}
    document = spec.to_native() | {"applications": [wrong]}
    applied = Applied(FakeClient(), document, lambda channel: channel.begin(NEW, "first"))
    with pytest.raises(DeployError, match="Ray refuses"):
        applied.__enter__()
    assert applied.channel.state() is None


def test_a_deployment_that_works_stays(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")
    with Applied(client, spec.to_native()) as applied:
        assert client.bundles == {"model": "new", "other": "another"}
        applied.channel.begin(NEW, "first")
    assert client.bundles == {"model": "new", "other": "another"}
    assert channel_of(client, "model").state().live == NEW


def test_replicas_go_only_when_those_that_replace_them_answer(spec: ServeSpec):
    client = FakeClient(model="earlier")
    with Applied(client, spec.to_native()):
        pass
    (deployment,) = client.applications["model"]["deployments"]
    assert deployment["max_surge_percent"] == 100


def test_what_ray_refuses_is_told_and_nothing_is_changed(spec: ServeSpec):
    client = FakeClient(model="earlier")
    wrong = {"name": "model", "import_path": 5, "args": {"bundle": "new"}}
    applied = Applied(client, spec.to_native() | {"applications": [wrong]})
    with pytest.raises(DeployError, match="Ray refuses the serve file: ") as told:
        applied.__enter__()
    assert "\n" not in str(told.value)
    assert client.bundles == {"model": "earlier"}


def test_an_application_that_was_made_in_python_has_no_config_to_hand_in_again(spec: ServeSpec):
    client = FakeClient(model="earlier")
    client.applications["of python"] = None
    assert list(Applied.deployed(client)) == ["model"]
    with Applied(client, spec.to_native()):
        pass
    assert client.bundles == {"model": "new"}


def test_an_application_that_is_deleted_while_its_new_version_starts_stays_deleted(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")

    def delete_and_fail() -> None:
        take_down(client, "model")
        raise DeployError("no luck")

    with pytest.raises(DeployError, match="no luck"), Applied(client, spec.to_native()):
        delete_and_fail()
    assert client.bundles == {"other": "another"}


def test_one_on_its_way_out_is_not_handed_in_again_with_another(spec: ServeSpec):
    client = FakeClient(model="earlier", other="another")
    client.details["status"] = "DELETING"
    with Applied(client, spec.to_native()):
        pass
    assert client.bundles == {"model": "new"}


def test_what_somebody_else_has_deployed_meanwhile_is_left_alone(spec: ServeSpec):
    client = FakeClient(model="earlier")

    def supplant_and_fail() -> None:
        with Applied(client, spec.with_bundle("another deployer's").to_native()):
            pass
        raise DeployError("no luck")

    with pytest.raises(DeployError, match="no luck"), Applied(client, spec.to_native()):
        supplant_and_fail()
    assert client.bundles == {"model": "another deployer's"}


def test_deployers_of_different_applications_at_the_same_time_lose_none(spec: ServeSpec):
    class SlowClient(FakeClient):
        """Between what it tells and what it is told there is time for others, as on a cluster."""

        def get_serve_details(self) -> dict[str, Any]:
            found = super().get_serve_details()
            time.sleep(0.005)
            return found

    client = SlowClient(there="before")
    names = [f"app-{number}" for number in range(6)]

    def deploy(name: str) -> None:
        (application,) = spec.to_native()["applications"]
        document = {"applications": [application | {"name": name, "route_prefix": f"/{name}"}]}
        with Applied(client, document):
            pass

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(deploy, names))
    assert sorted(client.bundles) == [*names, "there"]


# ----- its channel


def test_an_applications_channel_is_that_of_the_bundle_it_was_started_with(store: MemoryKeyValue):
    client = FakeClient(model="earlier")
    Registry("model", "earlier", store).write(_initial("earlier"))
    assert channel_of(client, "model").state().live.bundle == "earlier"
    assert channel_of(client, "elsewhere") is None


@pytest.mark.parametrize(
    ("bundle", "expected"),
    [("/runs/a", "/runs/a/"), ("/runs/a?", "/runs/a?/"), ("s3://b/a?region=eu-west-1", "s3://b/a/?region=eu-west-1")],
)
def test_a_place_can_be_spelled_otherwise_and_back(bundle: str, expected: str):
    assert other_name(bundle) == expected
    assert other_name(expected) == bundle


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
