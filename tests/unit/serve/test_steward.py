from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from bigray.errors import ClusterError, DeployError
from bigray.serve import steward as steward_module
from bigray.serve.loaded import LoadedModel, ModelSettings, load_model
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.protect.keys import create_key
from bigray.serve.release.record import (
    ChannelState,
    Comparison,
    Release,
    ReplicaReport,
    Rollout,
    abort,
    beat,
    initial,
    promote,
    propose,
    roll_back,
)
from bigray.serve.release.registry import MemoryKeyValue, Registry, update
from bigray.serve.steward import RETRY_S, STALE_S, Identity, Steward
from bigray.serve.store import ModelStore
from tests.waiting import wait_until

AT = "2026-05-01T10:00:00+00:00"
ROWS = np.zeros((1, 2, 3), np.float32)


class Replica:
    """A steward with what it keeps right: a store with a live version, a registry shared with other replicas."""

    def __init__(self, registry: Registry, live: Release, name: str = "r1", keys: str | None = None) -> None:
        self.registry, self.name = registry, name
        self.telemetry, self.guard = Telemetry(), Guard(keys)
        self.loads: list[str] = []
        self.before_load: Callable[[str], None] = lambda location: None
        self.store = ModelStore(load_model(live.bundle, ModelSettings(), self.telemetry))
        self.steward = Steward(
            registry,
            self.store,
            self._load,
            identity=Identity(name, "node-1", 7),
            telemetry=self.telemetry,
            guard=self.guard,
        )
        self.now = 0.0

    def _load(self, location: str) -> LoadedModel:
        self.loads.append(location)
        self.before_load(location)
        return load_model(location, ModelSettings(), self.telemetry)

    def step(self, seconds: float = 0.25) -> None:
        self.now += seconds
        self.steward.step(self.now)

    def look(self, seconds: float = 0.25) -> None:
        self.now += seconds
        self.steward.look(self.now)

    @property
    def report(self) -> ReplicaReport:
        (found,) = (report for report in self.registry.reports() if report.replica == self.name)
        return found

    def answering(self, sticky: str = "") -> str:
        """The version that answers a real request now."""

        async def ask() -> str:
            _, by = await self.store.predict(self.store.find(sticky=sticky), ROWS)
            return by.version

        return asyncio.run(ask())


@pytest.fixture
def registry() -> Registry:
    return Registry("animals", "/runs/animals-1/bundle", MemoryKeyValue())


@pytest.fixture
def replica(registry: Registry, a: Release) -> Replica:
    """It has written the channel's first state, and read it."""
    replica = Replica(registry, a)
    replica.step()
    replica.step()
    return replica


def proposed(registry: Registry, release: Release, kind: str = "load", share: float = 0.0) -> ChannelState:
    rollout = Rollout(kind=kind, release=release, share=share)
    return update(registry, lambda state: propose(state, rollout))


def promoted(registry: Registry) -> ChannelState:
    return update(registry, lambda state: promote(state, AT, "good"))


# ----- the first


def test_the_first_replica_of_a_channel_writes_its_state(registry, a):
    replica = Replica(registry, a)
    replica.step()

    state = registry.read()
    assert state is not None
    assert (state.revision, state.live, state.rollout, state.previous) == (1, a, None, None)
    assert [(entry.version, entry.action) for entry in state.history] == [(a.version, "deployed")]


def test_a_replica_that_comes_later_leaves_the_state_as_it_is_and_follows_it(registry, replica, b):
    later = Replica(registry, b, "r2")
    before = registry.read()
    later.step()

    assert registry.read() == before
    assert later.answering() == before.live.version == later.report.live
    assert set(later.report.loaded) == {before.live.version}, "what is not wanted is not held"


def test_a_report_tells_who_where_and_what(replica, a):
    report = replica.report
    assert (report.replica, report.node, report.pid) == ("r1", "node-1", 7)
    assert (report.revision, report.live, report.loaded, report.candidate) == (1, a.version, (a.version,), "none")
    assert report.telemetry["versions"] == {}, "told by who put the endpoint together, and at each change"
    assert report.comparison is None
    replica.steward.report()
    assert replica.report.sequence == report.sequence + 1


def test_a_state_that_is_known_is_not_read_again(registry, replica, monkeypatch):
    monkeypatch.setattr(registry, "read", lambda: pytest.fail("read again"))
    replica.step()


# ----- a candidate


def test_a_candidate_is_loaded_and_told_ready_while_the_live_version_answers(registry, replica, a, b):
    state = proposed(registry, b)
    seen: list[tuple[str, str]] = []
    replica.before_load = lambda location: seen.append((replica.answering(), replica.report.candidate))
    replica.step()

    assert seen == [(a.version, "loading")], "while it loads, the other one answers"
    assert (replica.report.candidate, replica.report.why, replica.report.revision) == ("ready", "", state.revision)
    assert set(replica.report.loaded) == {a.version, b.version}
    assert {replica.answering(str(number)) for number in range(20)} == {a.version}
    assert replica.loads == [b.bundle]
    replica.step()
    assert replica.loads == [b.bundle], "once is enough"


def test_promoting_switches_and_keeps_the_version_before_in_memory(registry, replica, a, b):
    proposed(registry, b)
    replica.step()
    state = promoted(registry)
    replica.step()

    assert replica.answering() == b.version
    report = replica.report
    assert (report.live, report.revision, report.candidate) == (b.version, state.revision, "none")
    assert set(report.loaded) == {a.version, b.version}
    assert replica.telemetry.snapshot()["versions"]["animals"] == {
        "live": b.version,
        "previous": a.version,
        "candidate": None,
        "kind": None,
        "share": 0.0,
    }
    assert replica.store.find(version=a.version).version == a.version


def test_going_back_needs_no_load(registry, replica, a, b):
    proposed(registry, b)
    replica.step()
    promoted(registry)
    replica.step()
    update(registry, lambda state: roll_back(state, AT, "bad"))
    replica.step()

    assert replica.answering() == a.version
    assert replica.loads == [b.bundle]
    assert set(replica.report.loaded) == {a.version, b.version}


def test_of_three_versions_the_oldest_is_let_go(registry, replica, a, b, c):
    for release in (b, c):
        proposed(registry, release)
        replica.step()
        promoted(registry)
        replica.step()

    assert replica.answering() == c.version
    assert set(replica.report.loaded) == {b.version, c.version}


def test_a_promotion_that_comes_with_its_proposal_is_followed_too(registry, replica, b):
    proposed(registry, b)
    promoted(registry)
    replica.step()

    assert replica.answering() == b.version


def test_a_candidate_that_was_given_up_is_let_go(registry, replica, a, b):
    proposed(registry, b)
    replica.step()
    update(registry, lambda state: abort(state, AT, "no"))
    replica.step()

    assert (replica.report.loaded, replica.report.candidate) == ((a.version,), "none")


# ----- a candidate that cannot be loaded


def test_a_candidate_that_cannot_be_loaded_is_told_with_its_reason_and_the_live_version_goes_on(
    registry, replica, a, tmp_path
):
    nowhere = Release(version="0" * 12, bundle=str(tmp_path / "nothing"))
    state = proposed(registry, nowhere)
    replica.step()
    replica.step()

    report = replica.report
    assert (report.candidate, report.revision) == ("failed", state.revision)
    assert report.why == f"{nowhere.bundle}: no bundle here (manifest.json is missing)"
    assert (report.live, report.loaded) == (a.version, (a.version,))
    assert replica.answering() == a.version
    assert replica.loads == [nowhere.bundle], "not again and again"


def test_what_a_factory_raises_is_a_reason_too(registry, replica, b):
    def fail(location: str) -> None:
        raise RuntimeError("first line\nof a user's code")

    replica.before_load = fail
    proposed(registry, b)
    replica.step()

    assert replica.report.candidate == "failed"
    assert replica.report.why == "of a user's code"


def test_a_candidate_that_failed_is_tried_again_when_it_is_asked_for_again(registry, replica, b):
    faults = [DeployError("a passing fault")]

    def fail_once(location: str) -> None:
        if faults:
            raise faults.pop()

    replica.before_load = fail_once
    proposed(registry, b)
    replica.step()
    assert replica.report.candidate == "failed"
    update(registry, lambda state: abort(state, AT, "failed"))
    replica.step()
    proposed(registry, b)
    replica.step()

    assert (replica.report.candidate, replica.report.why) == ("ready", "")
    assert replica.loads == [b.bundle, b.bundle]


def test_a_bundle_that_is_not_the_version_it_should_be_is_refused(registry, replica, a, b):
    proposed(registry, Release(version="0" * 12, bundle=b.bundle))
    replica.step()

    report = replica.report
    assert report.candidate == "failed"
    assert report.why == f"{b.bundle}: holds version {b.version} now, not {'0' * 12}"
    assert report.loaded == (a.version,)


def test_a_bundle_that_is_damaged_is_refused(registry, replica, a, b, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(b.bundle, damaged)
    weights = damaged / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    proposed(registry, Release(version=b.version, bundle=str(damaged)))
    replica.step()

    assert replica.report.candidate == "failed"
    assert "weights.safetensors" in replica.report.why
    assert replica.answering() == a.version


def test_a_live_version_that_could_not_be_loaded_is_tried_again(registry, replica, a, b):
    """As in a replica that had a fault while it started, after which all others went on."""
    faults = [DeployError("the storage was away")] * 2

    def fail(location: str) -> None:
        if faults:
            raise faults.pop()

    replica.before_load = fail
    proposed(registry, b)
    replica.step()
    promoted(registry)
    replica.step()
    assert replica.answering() == a.version
    replica.step(RETRY_S)
    assert replica.answering() == a.version
    replica.step(RETRY_S / 2)
    assert len(replica.loads) == 2
    replica.step(RETRY_S / 2)

    assert replica.answering() == b.version
    assert len(replica.loads) == 3
    replica.steward.report()
    assert replica.report.live == b.version


# ----- canary and shadow


def sides(replica: Replica) -> dict[str, int]:
    versions = [replica.store.find(sticky=f"caller {number}").version for number in range(500)]
    return {version: versions.count(version) for version in versions}


def test_a_canary_gets_its_share_and_what_is_seen_is_reported(registry, replica, a, b):
    proposed(registry, b, "canary", 0.5)
    replica.step()

    found = sides(replica)
    assert set(found) == {a.version, b.version}
    assert 150 < found[b.version] < 350
    caller = next(name for name in map(str, range(100)) if replica.store.find(sticky=name).version == b.version)
    assert replica.answering(caller) == b.version
    replica.steward.report()
    comparison = replica.report.comparison
    assert comparison is not None
    assert (comparison.candidate.requests, comparison.candidate.errors) == (1, 0)
    versions = replica.telemetry.snapshot()["versions"]["animals"]
    assert (versions["candidate"], versions["kind"], versions["share"]) == (b.version, "canary", 0.5)


def test_what_a_canary_has_shown_is_kept_while_its_watcher_is_heard(registry, replica, b):
    proposed(registry, b, "canary", 1.0)
    replica.step()
    replica.answering()
    update(registry, beat)
    replica.step()
    replica.answering()

    replica.steward.report()
    assert replica.report.comparison.candidate.requests == 2


def test_the_next_deployers_canary_of_the_same_version_is_heard_and_counted_anew(registry, replica, b):
    """Both its end and the next one's beginning fall between two looks."""
    proposed(registry, b, "canary", 0.5)
    replica.step()
    replica.answering()
    assert replica.store.view.side_by_side.comparison() != Comparison()

    replica.now += STALE_S - 0.5
    update(registry, lambda state: abort(state, AT, "not heard"))
    anew = Rollout(kind="canary", release=b, share=0.5, id="the next one's")
    update(registry, lambda state: propose(state, anew))
    replica.step(0.0)
    assert replica.store.view.side_by_side.comparison() == Comparison()
    replica.step(1.0)
    assert replica.store.view.rollout == anew


def test_a_canary_whose_watcher_is_silent_gets_no_traffic_until_it_is_heard_again(registry, replica, a, b):
    proposed(registry, b, "canary", 0.5)
    replica.step()
    replica.step(STALE_S - 1)
    assert set(sides(replica)) == {a.version, b.version}
    replica.step(2)
    assert set(sides(replica)) == {a.version}
    assert set(replica.store.view.held) == {a.version, b.version}, "it stays in memory"
    update(registry, beat)
    replica.step()
    assert set(sides(replica)) == {a.version, b.version}


def test_a_beat_now_and_then_keeps_a_canary_going(registry, replica, b):
    proposed(registry, b, "canary", 0.5)
    for _ in range(5):
        replica.step(STALE_S - 1)
        assert b.version in sides(replica)
        update(registry, beat)


def test_a_shadow_is_asked_and_answers_nobody(registry, replica, a, b):
    proposed(registry, b, "shadow")
    replica.step()

    async def ask() -> str:
        _, by = await replica.store.predict(replica.store.find(sticky="x"), ROWS)
        while replica.store.view.side_by_side.comparison().compared_rows == 0:
            await asyncio.sleep(0.001)
        return by.version

    assert set(sides(replica)) == {a.version}
    assert asyncio.run(ask()) == a.version


def test_a_promoted_canary_is_compared_no_more(registry, replica, b):
    proposed(registry, b, "canary", 0.5)
    replica.step()
    promoted(registry)
    replica.step()

    assert set(sides(replica)) == {b.version}
    assert replica.report.comparison is None


# ----- its threads


class Away(MemoryKeyValue):
    """A store that can be away, as the head node of a cluster."""

    is_away = False

    def keys(self, prefix: bytes) -> list[bytes]:
        self._check()
        return super().keys(prefix)

    def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
        self._check()
        return super().put(key, value, overwrite=overwrite)

    def _check(self) -> None:
        if self.is_away:
            raise ClusterError("the head node does not answer")


@pytest.fixture
def away() -> Away:
    return Away()


@pytest.fixture
def far_replica(away: Away, a: Release) -> Replica:
    """As `replica`, with a store that can be away."""
    replica = Replica(Registry("animals", "base", away), a)
    replica.step()
    replica.step()
    return replica


def test_a_canary_gets_no_traffic_while_nothing_can_be_read_and_until_its_deployer_is_heard_again(
    away, far_replica, a, b
):
    registry = far_replica.registry
    proposed(registry, b, "canary", 0.5)
    far_replica.look()
    assert set(sides(far_replica)) == {a.version, b.version}

    away.is_away = True
    far_replica.look(STALE_S - 1)
    assert set(sides(far_replica)) == {a.version, b.version}, "a moment does not end a canary"
    far_replica.look(2)
    assert set(sides(far_replica)) == {a.version}
    assert set(far_replica.store.view.held) == {a.version, b.version}

    away.is_away = False
    far_replica.look()
    assert set(sides(far_replica)) == {a.version}, "the store is back, the deployer may not be"
    update(registry, beat)
    far_replica.look()
    assert set(sides(far_replica)) == {a.version, b.version}


def test_what_was_decided_while_the_store_was_away_is_followed_when_it_is_back(away, far_replica, a, b):
    proposed(far_replica.registry, b, "canary", 0.5)
    far_replica.look()
    away.is_away = True
    far_replica.look(STALE_S)
    away.is_away = False
    promoted(far_replica.registry)
    far_replica.look()
    assert set(sides(far_replica)) == {b.version}
    assert far_replica.loads == [b.bundle], "it stayed in memory"


def test_a_candidate_that_is_loaded_while_the_store_goes_away_is_told_later_and_not_loaded_again(
    away, far_replica, a, b
):
    def go_away(location: str) -> None:
        away.is_away = True

    far_replica.before_load = go_away
    proposed(far_replica.registry, b)
    far_replica.look()
    assert far_replica.answering() == a.version
    away.is_away = False
    far_replica.look()
    far_replica.steward.report()
    assert (far_replica.report.candidate, far_replica.loads) == ("ready", [b.bundle])


@pytest.mark.parametrize("is_away_meanwhile", [False, True])
def test_a_replica_of_a_deleted_application_does_not_bring_its_channel_back(away, far_replica, a, is_away_meanwhile):
    far_replica.registry.clear()
    if is_away_meanwhile:
        away.is_away = True
        far_replica.look()
        away.is_away = False
    for _ in range(3):
        far_replica.look()
    assert far_replica.registry.read() is None
    assert far_replica.answering() == a.version, "as long as it runs"


def test_a_replica_that_starts_beside_a_canary_of_a_deployer_that_is_gone_gives_it_nothing(registry, replica, a, b):
    proposed(registry, b, "canary", 0.5)
    update(registry, beat)
    replica.step()
    later = Replica(registry, a, "r2")
    later.step()
    replica.step(STALE_S)
    later.step(STALE_S)
    assert (set(sides(replica)), set(sides(later))) == ({a.version}, {a.version})
    update(registry, lambda state: abort(state, AT, "taken over"))
    proposed(registry, b, "canary", 0.5)
    for each in (replica, later):
        each.step()
    assert (set(sides(replica)), set(sides(later))) == ({a.version, b.version}, {a.version, b.version})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "REPORT_S"):
        monkeypatch.setattr(steward_module, name, 0.01)
    monkeypatch.setattr(steward_module, "KEYS_S", 0.0)


def test_a_registry_that_is_away_disturbs_no_answer_and_is_followed_when_it_is_back(quick, a, b, caplog):
    store = Away()
    registry = Registry("animals", "base", store)
    replica = Replica(registry, a)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        replica.steward.start()
        try:
            wait_until(lambda: bool(registry.reports()))
            store.is_away = True
            wait_until(lambda: "could not be read" in caplog.text and "could not be written" in caplog.text)
            assert replica.answering() == a.version
            store.is_away = False
            proposed(registry, b)
            promoted(registry)
            wait_until(lambda: replica.report.live == b.version)
        finally:
            replica.steward.stop()
    assert replica.answering() == b.version


def test_stopping_ends_its_threads(quick, replica):
    replica.steward.start()
    replica.steward.stop()
    for thread in replica.steward._threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in replica.steward._threads)
    assert all(thread.daemon for thread in replica.steward._threads)


def test_keys_are_read_again_and_their_rates_shared_by_all_replicas(quick, registry, a, tmp_path, monkeypatch):
    keys = str(tmp_path / "keys.json")
    create_key(keys, "anna")
    replica = Replica(registry, a, keys=keys)
    shares: list[int] = []
    monkeypatch.setattr(replica.guard, "set_replicas", shares.append)
    secret = create_key(keys, "bert")
    headers = {b"x-api-key": secret.encode()}
    registry.report(replica_report("r2", time.time()))
    registry.report(replica_report("gone", time.time() - 3600))
    replica.steward.start()
    try:
        wait_until(lambda: 2 in shares)
        assert replica.guard.authorize(headers, "predict").name == "bert"
    finally:
        replica.steward.stop()


def replica_report(name: str, at: float) -> ReplicaReport:
    return ReplicaReport(replica=name, node="n", pid=1, sequence=1, at=at, revision=1, live="a" * 12)


def test_a_switch_in_one_thread_disturbs_no_request_in_another(registry, replica, a, b):
    """Requests go on all the while; each is answered by the one version or the other."""
    is_over = threading.Event()
    seen: set[str] = set()

    async def ask() -> None:
        while not is_over.is_set():
            _, by = await replica.store.predict(replica.store.find(), ROWS)
            seen.add(by.version)

    asking = threading.Thread(target=asyncio.run, args=(ask(),))
    asking.start()
    try:
        proposed(registry, b)
        replica.step()
        promoted(registry)
        replica.step()
        for _ in range(10):
            update(registry, lambda state: roll_back(state, AT, "and again"))
            replica.step()
        wait_until(lambda: len(seen) == 2)
    finally:
        is_over.set()
        asking.join(20)
    assert seen == {a.version, b.version}


def test_an_older_history_is_taken_up(registry, a, b):
    """A replica that starts during a canary takes part in it once it hears that somebody watches it."""
    registry.write(initial(a, AT))
    proposed(registry, b, "canary", 0.5)
    replica = Replica(registry, a)
    replica.step()
    assert set(sides(replica)) == {a.version}, "what it finds may have been left by a deployer that is gone"

    update(registry, beat)
    replica.step()

    assert set(sides(replica)) == {a.version, b.version}


def test_what_a_replica_reported_that_is_gone_for_long_is_forgotten(registry, replica, monkeypatch):
    replica.step()
    old = replica.report.model_copy(
        update={"replica": "gone", "at": replica.report.at - 2 * steward_module.FORGOTTEN_S}
    )
    registry.report(old)
    monkeypatch.setattr(steward_module, "REPORT_S", 0.01)
    monkeypatch.setattr(steward_module, "REPORTS_BEFORE_FORGETTING", 1)
    replica.steward.start()
    try:
        wait_until(lambda: [report.replica for report in registry.reports()] == ["r1"])
    finally:
        replica.steward.stop()
