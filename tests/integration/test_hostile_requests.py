"""Hostile requests against a real endpoint, through its front door and straight to a replica's own port."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from bigray.cluster.connect import Connection, connect
from bigray.data.features import Column
from bigray.serve import runner
from bigray.serve.config import load_serve
from bigray.serve.instance import running_client
from bigray.serve.protect.keys import create_key
from bigray.serve.sample import write_sample_bundle
from tests.integration.hostile_requests import (
    Canary,
    HostileCase,
    Target,
    ask_again,
    auth_cases,
    by_name,
    damaged_cases,
    good_requests,
    hostile_cases,
    send,
    slow_connections,
)

pytestmark = pytest.mark.timeout(300)

HOST = "127.0.0.1"
PACE = {"drip_pause_s": 0.5}
DOORS = ("front", "replica")
NAMES = list(by_name(hostile_cases(Target())))
KEY_NAMES = list(by_name(auth_cases(Target())))


@dataclass(frozen=True)
class Doors:
    """The two ways to an application that has one replica."""

    ports: dict[str, int]
    target: Target
    canary: Canary
    replica: str

    def check(self, door: str, case: HostileCase) -> None:
        """The case is answered as it should be, nothing is fetched, and the next good request is answered."""
        port = self.ports[door]
        for _ in range(case.times):
            assert case.fault(send(HOST, port, case)) == ""
        assert ask_again(HOST, port, self.target).status == 200
        assert self.canary.visits() == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Connection]:
    with connect() as connection:
        yield connection
        runner.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sample_bundle(
        str(tmp_path_factory.mktemp("bundles")),
        name="animals",
        columns=(Column(name="image", shape=(4, 5)),),
        class_names=("cat", "dog", "fox"),
        params={"hidden": [16]},
    )


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    canary = Canary()
    yield canary
    canary.close()


@pytest.fixture(scope="module")
def endpoint(cluster: Connection, bundle: str, canary: Canary, tmp_path_factory: pytest.TempPathFactory) -> Doors:
    target = Target("/open", canary_url=canary.url, **PACE)
    return open_doors(bundle, tmp_path_factory.mktemp("open"), "open", {}, target, canary)


@pytest.fixture(scope="module")
def guarded(cluster: Connection, bundle: str, canary: Canary, tmp_path_factory: pytest.TempPathFactory) -> Doors:
    """Takes requests with one key only."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = str(folder / "keys.json")
    target = Target("/guarded", secret=create_key(keys, "anna"), canary_url=canary.url, **PACE)
    return open_doors(bundle, folder, "guarded", {"keys": keys}, target, canary)


def open_doors(bundle: str, folder: Path, name: str, args: dict[str, object], target: Target, canary: Canary) -> Doors:
    application = {
        "name": name,
        "route_prefix": target.prefix,
        "import_path": "bigray.serve.app:build",
        "args": {"bundle": "replaced", **args},
        "deployments": [{"name": "Model", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.2}}],
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"port": 0}, "applications": [application]}))
    deployed = runner.deploy(bundle, load_serve(file))
    port = urlsplit(deployed.url).port
    assert port is not None
    return Doors({"front": port, "replica": replica_port(name)}, target, canary, replica_id(name))


def replica_port(name: str) -> int:
    """Where the application's one replica listens itself; skips where Serve's own proxy runs instead of HAProxy."""
    import ray

    client = running_client()
    assert client is not None
    # Ray shows these to HAProxy only
    groups = ray.get(client._controller.get_target_groups.remote(app_name=name, from_proxy_manager=True))
    targets = [target for group in groups if group.protocol == "HTTP" for target in group.targets]
    if len(targets) != 1:
        pytest.skip("the replica has no port of its own")
    return int(targets[0].port)


def replica_id(name: str) -> str:
    client = running_client()
    assert client is not None
    deployments = client.get_serve_details()["applications"][name]["deployments"].values()
    (replica,) = [replica for deployment in deployments for replica in deployment["replicas"]]
    return f"{replica['replica_id']} {replica['pid']}"


@pytest.fixture(scope="module")
def cases(endpoint: Doors) -> dict[str, HostileCase]:
    return by_name(hostile_cases(endpoint.target))


@pytest.mark.parametrize("door", DOORS)
def test_good_requests_are_answered(endpoint, door):
    for case in good_requests(endpoint.target):
        endpoint.check(door, case)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_request_is_refused_and_the_next_good_one_answered(endpoint, cases, name, door):
    endpoint.check(door, cases[name])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", KEY_NAMES)
def test_only_a_right_key_in_a_header_opens(guarded, name, door):
    guarded.check(door, by_name(auth_cases(guarded.target))[name])


@pytest.mark.parametrize("door", DOORS)
def test_damaged_bodies_fail_by_themselves(endpoint, door):
    port = endpoint.ports[door]
    faults = {case.name: case.fault(send(HOST, port, case)) for case in damaged_cases(endpoint.target, 300, seed=1)}
    assert {name: fault for name, fault in faults.items() if fault} == {}
    assert ask_again(HOST, port, endpoint.target).status == 200


@pytest.mark.parametrize("door", DOORS)
def test_500_slow_clients_do_not_keep_others_waiting(endpoint, door):
    with slow_connections(HOST, endpoint.ports[door], 500):
        for _ in range(50):
            assert ask_again(HOST, endpoint.ports[door], endpoint.target).status == 200


def test_after_all_that_the_same_replicas_answer(endpoint, guarded):
    assert (replica_id("open"), replica_id("guarded")) == (endpoint.replica, guarded.replica)
