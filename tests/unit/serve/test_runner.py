from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bigray.errors import DeployError, SpecError
from bigray.serve import channels as channels_module
from bigray.serve import rollout as rollout_module
from bigray.serve import runner
from bigray.serve.channels import Applied, channel_of
from bigray.serve.config import ServeSpec
from bigray.serve.release.gate import GateReport
from bigray.serve.release.record import ChannelState, Release, Rollout, initial, promote, propose
from bigray.serve.release.registry import MemoryKeyValue, Registry, update
from bigray.serve.release.tables import spans
from bigray.serve.rollout import Mode, Progress
from bigray.serve.runner import (
    _Change,
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
from tests.unit.serve.fakes import FakeClient, LingeringClient, config
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("store")

A, B = (Release(version=letter * 12, bundle=f"/bundles/{letter}") for letter in "ab")
AT = "2026-05-01T10:00:00+00:00"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """Serve runs, with application 'model'."""
    client = FakeClient(model=A.bundle)
    monkeypatch.setattr(runner, "running_client", lambda: client)
    monkeypatch.setattr(runner, "root_url", lambda client: "http://127.0.0.1:8000")
    return client


# ----- while it starts


@pytest.mark.parametrize(
    ("state", "message", "expected"),
    [
        ("DEPLOY_FAILED", "no bundle", "no bundle"),
        ("UNHEALTHY", "it died", "it died"),
        ("DELETING", "", "it was deleted while it started"),
        ("DEPLOYING", "Traceback\nbigray.errors.DeployError: bad", "bad"),
        ("DEPLOYING", "", "not running in time"),
    ],
)
def test_every_failure_while_it_starts_is_undone_but_for_a_deletion(
    spec: ServeSpec, state: str, message: str, expected: str
):
    client = FakeClient(model="earlier")
    client.details = {"status": state, "message": message, "deployments": {}}
    with pytest.raises(DeployError, match=expected), Applied(client, spec.to_native()):
        _wait_until_running(client, "model", deadline=0.0)
    assert client.bundles == {"model": "new" if state == "DELETING" else "earlier"}


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


def test_a_further_model_with_the_name_of_the_endpoints_own_is_refused_before_the_gate(spec, client, release):
    with_models = spec.with_args(models=[{"name": "plants", "bundle": "p"}, {"name": "animals", "bundle": "q"}])
    with pytest.raises(
        SpecError, match=r"args.models.1.name: 'animals' is the endpoint's own model; give this one"
    ) as told:
        deploy(release.bundle, with_models)
    assert "\n" not in str(told.value)


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
    assert (client.bundles, ended) == ({"other": "/bundles/o"}, [])
    assert Registry("model", A.bundle, store).read() is None
    delete("other")
    assert (client.bundles, ended) == ({}, [True])


# ----- deployers at the same time


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> LingeringClient:
    """Serve runs, with application 'model', and takes its time to end one."""
    client = LingeringClient(model=A.bundle)
    client.details["status"] = "RUNNING"
    monkeypatch.setattr(runner, "running_client", lambda: client)
    monkeypatch.setattr(runner, "root_url", lambda client: "http://127.0.0.1:8000")
    monkeypatch.setattr(runner, "fetch_version", lambda url: B.version)
    monkeypatch.setattr(channels_module, "POLL_S", 0.005)
    channel_of(client, "model").begin(A, "first")
    return client


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, lingering: LingeringClient) -> list[dict[str, str]]:
    """What was served whenever Serve was ended."""
    ended: list[dict[str, str]] = []
    monkeypatch.setattr(runner, "shutdown", lambda: ended.append(lingering.bundles))
    return ended


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def first_deployment(client: FakeClient, spec: ServeSpec, release: Release = B) -> str:
    gate = GateReport(version=release.version, model="animals", checks=(), forced=(), seconds=0.0)
    return _Change(client, spec, release, gate, timeout_s=0.5).begin()


def named(spec: ServeSpec, name: str) -> ServeSpec:
    application = spec.application.model_copy(update={"name": name, "route_prefix": f"/{name}"})
    return spec.model_copy(update={"applications": (application,)})


def test_serve_goes_on_for_another_application_that_came_while_the_last_one_left(lingering, ended, pool, spec):
    deletion = pool.submit(delete, "model")
    wait_until(lambda: "model" in lingering.leaving)
    first_deployment(lingering, named(spec, "other"))
    lingering.let_go("model")
    deletion.result(20)
    assert (lingering.bundles, ended) == ({"other": B.bundle}, [])


def test_of_two_that_delete_the_last_two_applications_one_ends_serve(lingering, ended, pool):
    lingering.applications["other"] = config("/other", "/bundles/o") | {"name": "other"}
    deletions = [pool.submit(delete, name) for name in ("model", "other")]
    wait_until(lambda: len(lingering.leaving) == 2)
    for name, deletion in zip(("model", "other"), deletions, strict=True):
        assert ended == []
        lingering.let_go(name)
        deletion.result(20)
    assert ended == [{}]


def test_what_is_deployed_in_the_place_of_one_that_leaves_keeps_its_channel(lingering, ended, pool, spec, store):
    deletion = pool.submit(delete, "model")
    wait_until(lambda: "model" in lingering.leaving and Registry("model", A.bundle, store).read() is None)
    first_deployment(lingering, spec)
    deletion.result(20)
    assert (versions("model")[0].live, ended) == (B, [])


def test_what_replicas_say_on_their_way_out_is_forgotten(lingering, ended, pool, store):
    deletion = pool.submit(delete, "model")
    wait_until(lambda: "model" in lingering.leaving and Registry("model", A.bundle, store).read() is None)
    Registry("model", A.bundle, store).write(initial(A, AT))
    lingering.let_go("model")
    deletion.result(20)
    assert Registry("model", A.bundle, store).read() is None


def test_of_two_first_deployments_of_a_name_the_slower_is_told_and_the_other_goes_on(lingering, spec):
    before = channel_of(lingering, "model").state()
    with pytest.raises(DeployError, match="application 'model': another version became live while the gate ran"):
        first_deployment(lingering, spec)
    assert (versions("model")[0], lingering.bundles) == (before, {"model": A.bundle})


@pytest.mark.parametrize("call", ["begin", "delete"])
def test_that_somebody_else_has_ended_serve_meanwhile_is_no_fault_of_bigray(lingering, ended, spec, monkeypatch, call):
    from ray.exceptions import ActorDiedError

    def die(*args: Any, **options: Any) -> None:
        raise ActorDiedError

    if call == "delete":
        monkeypatch.setattr(lingering, "delete_apps", die)
        delete("model")
        assert ended == []
    else:
        del lingering.applications["model"]
        monkeypatch.setattr(lingering, "deploy_apps", die)
        with pytest.raises(DeployError, match="application 'model': Serve has been ended meanwhile; deploy again"):
            first_deployment(lingering, spec)


# ----- after a surge


@pytest.fixture
def surged(client: FakeClient, store: MemoryKeyValue, a: Release, b: Release, monkeypatch: pytest.MonkeyPatch):
    """`b` has replaced `a` in replicas of its own, and the fake endpoint answers with what is deployed."""
    client.applications["model"]["args"]["bundle"] = a.bundle
    client.details["status"] = "RUNNING"
    monkeypatch.setattr(runner, "POLL_S", 0.005)
    monkeypatch.setattr(runner, "fetch_version", lambda url: deployed_version(client, a, b))
    channel_of(client, "model").begin(a, "first")
    surge(client, b)
    return channel_of(client, "model").state()


def deployed_version(client: FakeClient, *releases: Release) -> str:
    return {release.bundle: release.version for release in releases}[client.bundles["model"]]


def surge(client: FakeClient, release: Release, spec_args: dict[str, Any] | None = None) -> str:
    from bigray.serve.config import load_serve

    spec = load_serve("serve/local.yaml").with_args(swap="surge", **spec_args or {})
    gate = GateReport(version=release.version, model="animals", checks=(), forced=(), seconds=0.0)
    change = _Change(client, spec, release, gate, timeout_s=0.5)
    return change.replace(channel_of(client, "model").state(), Mode(), nobody)


def nobody(progress: Progress) -> None:
    pass


def test_going_back_after_a_surge_deploys_the_version_before_with_the_settings_that_count(
    client, surged: ChannelState, a, b
):
    assert (surged.live, surged.previous, surged.replaced) == (b, None, a)
    client.applications["model"]["args"]["slo_ms"] = 5.0
    before = client.applications["model"]

    after = rollback("model", why="the pager rang")

    assert client.applications["model"] == before | {"args": before["args"] | {"bundle": a.bundle}}
    assert versions("model")[0] == after
    assert (after.live, after.previous, after.replaced) == (a, None, b)
    assert [(entry.version, entry.action) for entry in after.history] == [
        (a.version, "deployed"),
        (b.version, "deployed"),
        (b.version, "rolled back"),
    ]
    assert after.history[-1].why == "the pager rang"
    assert [version for version, _, _ in spans(after)] == [a.version, b.version, a.version]
    assert rollback("model").live == b, "a second call returns"
    assert known_versions() == {a.version: a.bundle, b.version: b.bundle}


def test_where_the_version_before_does_not_come_up_what_serves_goes_on(client, surged, a, b, monkeypatch):
    monkeypatch.setattr(runner, "fetch_version", lambda url: b.version)
    with pytest.raises(DeployError, match=f"still serves version {b.version}, not {a.version}"):
        rollback("model", timeout_s=0.02)
    assert client.bundles == {"model": b.bundle}
    assert versions("model")[0] == surged


def test_a_folder_that_holds_another_version_by_now_is_not_gone_back_to(client, surged, store, a, b, c):
    moved = surged.model_copy(
        update={"replaced": Release(version=a.version, bundle=c.bundle), "revision": surged.revision + 1}
    )
    Registry("model", b.bundle, store).write(moved)
    with pytest.raises(DeployError, match=f"{c.bundle} holds version {c.version} now; deploy another bundle"):
        rollback("model")
    assert (client.bundles, versions("model")[0]) == ({"model": b.bundle}, moved)


def test_a_surge_takes_over_from_a_canary_whose_deployer_is_gone(client, surged, store, a, b, monkeypatch):
    monkeypatch.setattr(rollout_module, "STALE_S", 0.02)
    monkeypatch.setattr(rollout_module, "POLL_S", 0.005)
    left = Rollout(kind="canary", release=Release(version="c" * 12, bundle="/c"), share=0.1)
    update(Registry("model", b.bundle, store), lambda state: propose(state, left))

    surge(client, a)

    state = versions("model")[0]
    assert (state.live, state.replaced, state.rollout) == (a, b, None)
    assert [(entry.version, entry.action) for entry in state.history[-2:]] == [
        ("c" * 12, "rolled back"),
        (a.version, "deployed"),
    ]


@pytest.fixture
def in_place(client: FakeClient, a: Release, b: Release, monkeypatch: pytest.MonkeyPatch) -> ChannelState:
    """`b` was promoted in the replicas that were started with `a`."""
    client.applications["model"]["args"]["bundle"] = a.bundle
    client.details["status"] = "RUNNING"
    monkeypatch.setattr(runner, "POLL_S", 0.005)
    channel = channel_of(client, "model")
    channel.begin(a, "first")
    registry = Registry("model", a.bundle)
    update(registry, lambda state: propose(state, Rollout(kind="load", release=b)))
    return update(registry, lambda state: promote(state, AT, "good"))


def test_a_surge_to_the_bundle_that_it_was_started_with_has_replicas_and_a_channel_of_its_own(
    client, in_place, a, b, monkeypatch
):
    running = channel_of(client, "model")
    monkeypatch.setattr(runner, "fetch_version", lambda url: a.version)
    surge(client, a)
    assert client.bundles["model"] not in (a.bundle, b.bundle), "or Serve would replace nothing"
    assert absolute_location(client.bundles["model"]) == a.bundle
    assert running.state() == in_place, "replicas that answer until then do not switch"
    state = versions("model")[0]
    assert (state.live, state.previous, state.replaced) == (a, None, b)
    monkeypatch.setattr(runner, "fetch_version", lambda url: b.version)
    assert rollback("model").live == b


def test_a_surge_to_the_bundle_that_it_was_started_with_that_fails_leaves_what_serves(
    client, in_place, a, b, monkeypatch
):
    monkeypatch.setattr(runner, "fetch_version", lambda url: b.version)
    with pytest.raises(DeployError, match=f"still serves version {b.version}"):
        surge(client, a)
    assert (versions("model")[0], client.bundles) == (in_place, {"model": a.bundle})


def test_a_surge_to_another_version_in_the_same_folder_replaces_the_replicas(client, surged, b, monkeypatch):
    anew = Release(version="e" * 12, bundle=b.bundle)
    monkeypatch.setattr(runner, "fetch_version", lambda url: anew.version)
    running = channel_of(client, "model")
    for _ in range(2):  # there and back
        before = client.bundles["model"]
        surge(client, anew)
        assert client.bundles["model"] != before
        assert absolute_location(client.bundles["model"]) == b.bundle
        assert versions("model")[0].live == anew
        anew = Release(version="f" * 12, bundle=b.bundle)
        monkeypatch.setattr(runner, "fetch_version", lambda url, version=anew.version: version)
    assert running.state().live.version == "f" * 12


@pytest.mark.parametrize("call", ["deploy", "rollback"])
def test_what_somebody_else_made_live_before_its_turn_is_not_overrun(client, surged, store, a, b, call, monkeypatch):
    """They are faster between the look at the state and the turn."""
    other = Release(version="d" * 12, bundle="/d")

    class OthersTurn(channels_module.Turn):
        def __enter__(self) -> OthersTurn:
            update(
                Registry("model", b.bundle, store), lambda state: propose(state, Rollout(kind="load", release=other))
            )
            update(Registry("model", b.bundle, store), lambda state: promote(state, AT, "theirs"))
            return super().__enter__()

    monkeypatch.setattr(channels_module, "Turn", OthersTurn)
    with pytest.raises(DeployError, match=r"another version became live|it was deployed or deleted meanwhile"):
        surge(client, a) if call == "deploy" else rollback("model")
    assert (versions("model")[0].live, client.bundles) == (other, {"model": b.bundle})
