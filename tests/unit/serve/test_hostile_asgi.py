"""The application behind a plain HTTP server, as in a replica, under every hostile request there is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import uvicorn

from bigray.data.features import Column
from bigray.serve.fast_http import use_fast_http
from bigray.serve.protect.keys import create_key
from bigray.serve.sample import write_sample_bundle
from bigray.serve.standalone import standalone_app
from tests.integration.hostile_requests import (
    Canary,
    HostileAnswer,
    HostileCase,
    Send,
    Target,
    ask_again,
    auth_cases,
    by_name,
    damaged_cases,
    good_bodies,
    good_requests,
    hostile_cases,
    predict,
    send,
    slow_connections,
)

HOST = "127.0.0.1"
LIMITS = {"max_body_bytes": 2**20, "num_chunks": 5000, "drip_pause_s": 0.02}
NAMES = list(by_name(hostile_cases(Target(**LIMITS))))
KEY_NAMES = list(by_name(auth_cases(Target(**LIMITS))))


@dataclass(frozen=True)
class Endpoint:
    port: int
    target: Target
    canary: Canary

    def check(self, case: HostileCase) -> None:
        """The case is answered as it should be, nothing is fetched, and the next good request is answered."""
        for _ in range(case.times):
            assert case.fault(send(HOST, self.port, case)) == ""
        assert ask_again(HOST, self.port, self.target).status == 200
        assert self.canary.visits() == 0


@contextmanager
def running(app) -> Iterator[int]:
    """The app behind uvicorn, set up as in a replica, on a free port."""
    config = uvicorn.Config(app, host=HOST, port=0, lifespan="off", access_log=False, log_config=None)
    use_fast_http(config, app)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sample_bundle(
        str(tmp_path_factory.mktemp("hostile")),
        name="animals",
        columns=(Column(name="image", shape=(4, 5)),),
        class_names=("cat", "dog", "fox"),
        params={"hidden": [4]},
        onnx=False,
    )


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    canary = Canary()
    yield canary
    canary.close()


def make_app(bundle: str, **args: object):
    return standalone_app(bundle, num_threads=1, allow_factories=("bigray.models:*",), max_body_mb=1, **args)


@pytest.fixture(scope="module")
def endpoint(bundle: str, canary: Canary) -> Iterator[Endpoint]:
    with running(make_app(bundle)) as port:
        yield Endpoint(port, Target(canary_url=canary.url, **LIMITS), canary)


@pytest.fixture(scope="module")
def guarded(bundle: str, canary: Canary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Takes requests with one key only."""
    keys = str(tmp_path_factory.mktemp("keys") / "keys.json")
    target = Target(secret=create_key(keys, "anna"), canary_url=canary.url, **LIMITS)
    with running(make_app(bundle, keys=keys)) as port:
        yield Endpoint(port, target, canary)


@pytest.fixture(scope="module")
def cases(endpoint: Endpoint) -> dict[str, HostileCase]:
    return by_name(hostile_cases(endpoint.target))


def test_good_requests_are_answered(endpoint):
    for case in good_requests(endpoint.target):
        endpoint.check(case)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_request_is_refused_and_the_next_good_one_answered(endpoint, cases, name):
    endpoint.check(cases[name])


@pytest.mark.parametrize("name", KEY_NAMES)
def test_only_a_right_key_in_a_header_opens(guarded, name):
    guarded.check(by_name(auth_cases(guarded.target))[name])


@pytest.mark.parametrize("kind", good_bodies())
def test_a_good_body_of_each_kind_is_answered(endpoint, kind):
    steps = predict(endpoint.target, good_bodies()[kind], b"content-type: " + kind.encode())
    endpoint.check(HostileCase(kind, steps, frozenset({200})))


def test_damaged_bodies_fail_by_themselves(endpoint):
    faults = {case.name: case.fault(send(HOST, endpoint.port, case)) for case in damaged_cases(endpoint.target, 150)}
    assert {name: fault for name, fault in faults.items() if fault} == {}
    assert ask_again(HOST, endpoint.port, endpoint.target).status == 200


def test_slow_clients_do_not_keep_others_waiting(endpoint):
    with slow_connections(HOST, endpoint.port, 100, pause_s=0.01):
        for _ in range(20):
            assert ask_again(HOST, endpoint.port, endpoint.target).status == 200


def test_the_canary_sees_who_comes():
    canary = Canary()
    port = int(canary.url.rpartition(":")[2].partition("/")[0])
    send(HOST, port, HostileCase("visit", (Send(b"x"),), patience_s=0.01))
    assert (canary.visits(wait_s=0.05), canary.visits()) == (1, 0)
    canary.close()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (HostileAnswer(400, b'{"error": "x"}'), ""),
        (HostileAnswer(200, b"{}"), "answered 200"),
        (HostileAnswer(500, b'{"error": "x"}'), "answered 500"),
        (HostileAnswer(400, b"oops"), "not an error in JSON"),
        (HostileAnswer(400, b'{"error": "a\\nb"}'), "not an error in JSON"),
        (HostileAnswer(400, b'{"error": "Traceback"}'), "holds b'Traceback'"),
        (HostileAnswer(None, ending="closed"), "closed"),
        (HostileAnswer(None, ending="waiting"), "no answer"),
        (HostileAnswer(None, ending="not HTTP"), "not HTTP"),
    ],
)
def test_a_wrong_answer_is_told_from_a_fine_one(answer, fault):
    found = HostileCase("x", ()).fault(answer)
    assert fault in found
    assert bool(fault) == bool(found)
