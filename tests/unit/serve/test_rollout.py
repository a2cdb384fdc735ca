from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from bigray.errors import DeployError
from bigray.inference import Predictions
from bigray.serve import rollout as rollout_module
from bigray.serve.batching import Batcher, Capacity
from bigray.serve.loaded import LoadedModel, ModelSettings, load_model
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.release.judge import JudgeLimits
from bigray.serve.release.record import (
    ChannelState,
    Comparison,
    Release,
    ReplicaReport,
    Rollout,
    VersionStats,
    abort,
    beat,
    initial,
    propose,
    take_over,
    withdraw,
)
from bigray.serve.release.registry import MemoryKeyValue, Registry, update
from bigray.serve.rollout import Channel, Mode, Progress, total
from bigray.serve.steward import Identity, Steward
from bigray.serve.store import ModelStore
from tests.waiting import wait_until

ROWS = np.zeros((1, 2, 3), np.float32)
LIMITS = JudgeLimits(min_requests=30, max_seconds=60, max_disagreement=1.0, max_latency_ratio=1e6)
"""Of what two untrained models differ in, nothing counts but errors."""
NOBODY: Callable[[Progress], None] = lambda progress: None  # noqa: E731


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "BEAT_S"):
        monkeypatch.setattr(rollout_module, name, 0.005)
    monkeypatch.setattr(rollout_module, "TAKE_BACK_S", 0.2)


class Fleet:
    """Replicas, each with a real steward that steps in its own thread and, if asked to, callers."""

    def __init__(self, store: MemoryKeyValue, live: Release, size: int) -> None:
        self.registry = Registry("animals", "base", store)
        self.names = frozenset(f"r{number}" for number in range(size))
        self.channel = Channel(self.registry, lambda: self.names)
        self.stores = {name: ModelStore(load_model(live.bundle, ModelSettings())) for name in sorted(self.names)}
        self.loading: Callable[[str, str], None] = lambda name, location: None
        """Called before a replica loads a bundle; may raise."""
        self.change: Callable[[LoadedModel], LoadedModel] = lambda model: model
        """Makes of a loaded model another one."""
        self.has_callers = False
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in sorted(self.names)]

    def __enter__(self) -> Fleet:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: {report.replica for report in self.registry.reports()} == self.names)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(20)

    @property
    def live(self) -> set[str]:
        return {store.view.live.version for store in self.stores.values()}

    @property
    def held(self) -> list[set[str]]:
        return [set(store.view.held) for store in self.stores.values()]

    @property
    def state(self) -> ChannelState:
        state = self.registry.read()
        assert state is not None
        return state

    @property
    def history(self) -> list[tuple[str, str, str]]:
        """Without the first entry."""
        return [(entry.version, entry.action, entry.why) for entry in self.state.history[1:]]

    def settled(self, version: str) -> bool:
        return self.live == {version} and all(held == {version} for held in self.held)

    def _run(self, name: str) -> None:
        asyncio.run(self._serve(name))

    async def _serve(self, name: str) -> None:
        store = self.stores[name]
        steward = Steward(
            self.registry,
            store,
            partial(self._load, name),
            identity=Identity(name, "node", 1),
            telemetry=Telemetry(),
            guard=Guard(),
        )
        asked = 0
        while not self._is_over.is_set():
            steward.step(time.monotonic())
            for _ in range(10 if self.has_callers else 0):
                asked += 1
                await store.predict(store.find(sticky=f"caller {asked}"), ROWS)
            if self.has_callers:
                steward.report()
            await asyncio.sleep(0.002)

    def _load(self, name: str, location: str) -> LoadedModel:
        self.loading(name, location)
        return self.change(load_model(location, ModelSettings()))


@contextmanager
def running(a: Release, size: int = 2) -> Iterator[Fleet]:
    fleet = Fleet(MemoryKeyValue(), a, size)
    fleet.channel.begin(a, "first")
    with fleet:
        yield fleet


def bring_in(fleet: Fleet, release: Release, mode: Mode | None = None, watch=NOBODY, **options) -> str:
    given = {"why": "the gate's 7 checks passed", "is_forced": False, "timeout_s": 20.0} | options
    return fleet.channel.bring_in(release, mode or Mode(), watch=watch, **given)


def heard(fleet: Fleet) -> None:
    update(fleet.registry, beat)


def failing(model: LoadedModel) -> LoadedModel:
    """The same version with a fault that its self-check has not found."""

    def fail(rows: np.ndarray) -> Predictions:
        raise ValueError("broken")

    return replace(model, batcher=Batcher(fail, Capacity(64, 1e-4, False)))


# ----- load


def test_a_version_is_loaded_in_every_replica_and_then_live_everywhere(a, b):
    told: list[Progress] = []
    with running(a) as fleet:
        why = bring_in(fleet, b, watch=told.append)
        assert fleet.live == {b.version}
        assert fleet.held == [{a.version, b.version}] * 2
        assert why == "the gate's 7 checks passed"
        assert fleet.history == [(b.version, "deployed", why)]
        assert (fleet.state.previous, fleet.state.rollout) == (a, None)
    assert [(told[0].stage, told[0].replicas), (told[-1].stage, told[-1].ready)] == [("loading", 2), ("switching", 2)]
    assert {one.stage for one in told} == {"loading", "switching"}


def test_no_replica_switches_before_all_have_loaded(a, b):
    gate = threading.Event()

    def wait(name: str, location: str) -> None:
        if name == "r1":
            gate.wait(20)

    with running(a) as fleet:
        fleet.loading = wait

        def watch(progress: Progress) -> None:
            if progress.ready == 1 and progress.stage == "loading":
                assert fleet.live == {a.version}
                gate.set()

        bring_in(fleet, b, watch=watch)
        assert gate.is_set()
        assert fleet.live == {b.version}


def test_a_forced_version_is_written_down_as_such(a, b):
    with running(a) as fleet:
        bring_in(fleet, b, why="forced past: holdout", is_forced=True)
        assert fleet.history == [(b.version, "forced", "forced past: holdout")]


def test_a_version_that_is_live_is_not_brought_in_again(a):
    with running(a) as fleet:
        with pytest.raises(DeployError, match="is live already"):
            bring_in(fleet, a)
        assert fleet.history == []


def test_where_one_of_two_replicas_cannot_load_it_all_go_back(a, b):
    def fail(name: str, location: str) -> None:
        if name == "r1":
            raise DeployError("no memory here")

    with running(a) as fleet:
        fleet.loading = fail
        with pytest.raises(
            DeployError, match=f"version {b.version}: replica r1 cannot load it: no memory here"
        ) as told:
            bring_in(fleet, b)
        assert "\n" not in str(told.value)
        wait_until(lambda: fleet.settled(a.version))
        assert fleet.state.rollout is None
        assert fleet.history == [(b.version, "refused", str(told.value))]


def test_a_version_that_failed_can_be_brought_in_at_once_when_its_fault_is_gone(a, b):
    faults = [DeployError("a passing fault")]

    def fail_once(name: str, location: str) -> None:
        if name == "r1" and faults:
            raise faults.pop()

    with running(a) as fleet:
        fleet.loading = fail_once
        with pytest.raises(DeployError, match="a passing fault"):
            bring_in(fleet, b)
        bring_in(fleet, b)
        assert fleet.live == {b.version}


def test_a_replica_that_is_never_ready_ends_it_in_time(a, b):
    with running(a) as fleet:
        fleet.names = fleet.names | {"silent"}
        with pytest.raises(DeployError, match=r"2 of 3 replicas have loaded it, not in time; see the replicas' logs"):
            bring_in(fleet, b, timeout_s=0.25)
        wait_until(lambda: fleet.settled(a.version))
        assert [action for _, action, _ in fleet.history] == ["refused"]


def test_replicas_that_are_gone_are_not_waited_for(a, b):
    with running(a) as fleet:
        gone = next(iter(fleet.registry.reports())).model_copy(update={"replica": "gone"})
        fleet.registry.report(gone)
        assert {report.replica for report in fleet.channel.reports()} == fleet.names
        bring_in(fleet, b)
        assert fleet.live == {b.version}


def test_ctrl_c_while_it_loads_takes_it_back(a, b):
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with running(a) as fleet:
        with pytest.raises(KeyboardInterrupt):
            bring_in(fleet, b, watch=interrupt)
        wait_until(lambda: fleet.settled(a.version))
        assert fleet.state.rollout is None
        assert fleet.history == [(b.version, "refused", "interrupted")]


def test_ctrl_c_while_a_canary_is_watched_takes_it_back(a, b):
    def interrupt(progress: Progress) -> None:
        if progress.stage == "watching":
            raise KeyboardInterrupt

    with running(a) as fleet:
        with pytest.raises(KeyboardInterrupt):
            bring_in(fleet, b, Mode("canary", 0.5, LIMITS), watch=interrupt)
        wait_until(lambda: fleet.settled(a.version))
        assert fleet.history == [(b.version, "rolled back", "interrupted")]


def test_ctrl_c_while_replicas_switch_leaves_what_was_decided(a, b):
    def interrupt(progress: Progress) -> None:
        if progress.stage == "switching":
            raise KeyboardInterrupt

    with running(a) as fleet:
        with pytest.raises(KeyboardInterrupt):
            bring_in(fleet, b, watch=interrupt)
        wait_until(lambda: fleet.live == {b.version})
        assert [action for _, action, _ in fleet.history] == ["deployed"]


# ----- canary and shadow


def test_a_canary_that_does_well_is_promoted_with_its_numbers(a, b):
    told: list[Progress] = []
    with running(a) as fleet:
        fleet.has_callers = True
        why = bring_in(fleet, b, Mode("canary", 0.5, LIMITS), watch=told.append)
        assert fleet.live == {b.version}
        assert "requests, errors 0.00% (live 0.00%)" in why
        assert fleet.history == [(b.version, "promoted", why)]
    watched = [one for one in told if one.stage == "watching"]
    assert watched
    assert watched[-1].comparison.candidate.requests >= LIMITS.min_requests


def test_a_canary_that_fails_is_rolled_back_and_no_caller_has_noticed(a, b):
    with running(a) as fleet:
        fleet.has_callers, fleet.change = True, failing
        with pytest.raises(DeployError) as told:
            bring_in(fleet, b, Mode("canary", 0.5, LIMITS))
        wait_until(lambda: fleet.settled(a.version))
        ((version, action, why),) = fleet.history
    assert (version, action) == (b.version, "rolled back")
    assert why.startswith("errors: ")
    assert str(told.value) == f"version {b.version}: {why}; rolled back, the live version went on"


def test_a_canary_that_nobody_asks_is_rolled_back_when_its_time_is_over(a, b):
    limits = JudgeLimits(min_requests=30, max_seconds=0.05)
    with running(a) as fleet:
        with pytest.raises(DeployError, match="too few to judge by"):
            bring_in(fleet, b, Mode("canary", 0.5, limits))
        assert [action for _, action, _ in fleet.history] == ["rolled back"]


def test_a_shadow_is_compared_and_switches_nothing(a, b):
    with running(a) as fleet:
        fleet.has_callers = True
        why = bring_in(fleet, b, Mode("shadow", limits=LIMITS))
        assert fleet.live == {a.version}
        assert fleet.history == [(b.version, "compared", why)]
        wait_until(lambda: fleet.settled(a.version))
    assert "compared rows differ" in why


def test_a_shadow_that_fails_is_told_as_an_error_and_is_over(a, b):
    with running(a) as fleet:
        fleet.has_callers, fleet.change = True, failing
        with pytest.raises(DeployError, match="errors: "):
            bring_in(fleet, b, Mode("shadow", limits=LIMITS))
        wait_until(lambda: fleet.settled(a.version))
        assert fleet.state.rollout is None


# ----- more than one deployer


def test_a_second_rollout_at_the_same_time_is_refused_and_the_first_goes_on(a, b, c):
    refused: list[str] = []

    def deploy_another(progress: Progress) -> None:
        if not refused:
            with pytest.raises(DeployError) as told:
                bring_in(fleet, c)
            refused.append(str(told.value))

    with running(a) as fleet:
        bring_in(fleet, b, watch=deploy_another)
        assert fleet.live == {b.version}
    assert refused == [
        f"version {c.version}: another rollout is under way, load of version {b.version}; "
        "wait for its end, or end it with `bigray rollback`"
    ]


def test_a_rollout_that_is_ended_from_elsewhere_is_told_to_its_deployer(a, b):
    def end(progress: Progress) -> None:
        if progress.stage == "watching" and fleet.state.rollout is not None:
            update(fleet.registry, lambda state: withdraw(state, "2026-05-01T10:00:00+00:00", "asked for"))

    with running(a) as fleet:
        with pytest.raises(DeployError, match="ended from elsewhere"):
            bring_in(fleet, b, Mode("canary", 0.5, LIMITS), watch=end)
        assert fleet.history == [(b.version, "rolled back", "asked for")]


def test_a_deployer_whose_rollout_was_ended_leaves_the_next_one_alone(a, b, c):
    """Another one has ended it and begun a rollout of its own."""

    def supplant(progress: Progress) -> None:
        if fleet.state.rollout is not None and fleet.state.rollout.release == b:
            update(fleet.registry, lambda state: abort(state, "2026-05-01T10:00:00+00:00", "asked for"))
            update(fleet.registry, lambda state: propose(state, Rollout(kind="load", release=c)))

    with running(a) as fleet:
        with pytest.raises(DeployError, match=f"ended from elsewhere; {c.version} is on its way now"):
            bring_in(fleet, b, watch=supplant)
        assert fleet.state.rollout is not None
        assert fleet.state.rollout.release == c


def test_a_deployer_that_decides_too_late_does_not_promote_what_is_not_its_own(a, b, c, monkeypatch):
    monkeypatch.setattr(rollout_module, "BEAT_S", 3600.0)

    def supplant(progress: Progress) -> None:
        if progress.ready == 2 and fleet.state.rollout.release == b:
            update(fleet.registry, lambda state: abort(state, "2026-05-01T10:00:00+00:00", "asked for"))
            update(fleet.registry, lambda state: propose(state, Rollout(kind="load", release=c)))

    with running(a) as fleet:
        with pytest.raises(DeployError, match="ended from elsewhere"):
            bring_in(fleet, b, watch=supplant)
        assert (fleet.state.live, fleet.state.rollout.release) == (a, c)


def left_by_a_deployer_that_is_gone(fleet: Fleet, release: Release) -> None:
    update(fleet.registry, lambda state: propose(state, Rollout(kind="canary", release=release, share=0.5)))
    update(fleet.registry, beat)


def test_a_rollout_whose_deployer_is_gone_is_taken_over_by_the_next(a, b, c, monkeypatch):
    monkeypatch.setattr(rollout_module, "STALE_S", 0.1)
    with running(a) as fleet:
        left_by_a_deployer_that_is_gone(fleet, b)
        state = fleet.channel.clear_the_way(c, NOBODY)
        assert (state.live, state.rollout) == (a, None)
        bring_in(fleet, c)
        assert fleet.live == {c.version}
        (given_up, deployed) = fleet.history
    assert given_up == (
        b.version,
        "rolled back",
        f"its deployer was not heard for 0.1 s; taken over by the deployment of {c.version}",
    )
    assert deployed[:2] == (c.version, "deployed")


def test_the_same_version_can_be_deployed_again_where_its_deployer_is_gone(a, b, monkeypatch):
    monkeypatch.setattr(rollout_module, "STALE_S", 0.1)
    with running(a) as fleet:
        left_by_a_deployer_that_is_gone(fleet, b)
        fleet.channel.clear_the_way(b, NOBODY)
        bring_in(fleet, b)
        assert fleet.live == {b.version}


def test_a_deployer_that_is_heard_is_not_taken_over(a, b, c):
    with running(a) as fleet:
        left_by_a_deployer_that_is_gone(fleet, b)
        with pytest.raises(DeployError, match=f"another rollout is under way, canary of version {b.version}; wait"):
            fleet.channel.clear_the_way(c, lambda progress: heard(fleet))
        assert (fleet.state.rollout.release, fleet.history) == (b, [])


def test_a_deployer_that_is_heard_again_at_the_last_moment_is_not_taken_over(a, b):
    """It beats between the next one's last look and its write."""
    silent = propose(initial(a, "t0"), Rollout(kind="canary", release=b, share=0.5))
    heard_again = beat(silent)
    assert take_over(heard_again, silent.rollout, "t1", "silent") == heard_again
    assert take_over(silent, silent.rollout, "t1", "silent").rollout is None


def test_a_deployer_that_stood_still_itself_waits_anew(a, b, c, monkeypatch):
    """Both did, as on a machine that slept; the other one wakes up a little later."""
    monkeypatch.setattr(rollout_module, "STALE_S", 0.1)
    monkeypatch.setattr(rollout_module, "STOOD_STILL_S", 0.05)
    looks = 0

    def wake_up(progress: Progress) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            time.sleep(0.15)
        else:
            heard(fleet)

    with running(a) as fleet:
        left_by_a_deployer_that_is_gone(fleet, b)
        with pytest.raises(DeployError, match="another rollout is under way"):
            fleet.channel.clear_the_way(c, wake_up)
        assert fleet.history == []


def test_a_deployer_that_wakes_up_does_not_drive_its_successors_rollout(a, b, monkeypatch):
    """The next one ran the very same command: the same version, kind and share."""
    successors: list[Rollout] = []

    def supplant(progress: Progress) -> None:
        if progress.stage == "watching" and not successors:
            ours = fleet.state.rollout
            update(fleet.registry, lambda state: take_over(state, ours, "t1", "not heard"))
            successor = Rollout(kind="canary", release=b, share=ours.share)
            assert ours.id != successor.id
            successors.append(update(fleet.registry, lambda state: propose(state, successor)).rollout)

    monkeypatch.setattr(rollout_module, "BEAT_S", 0.0)
    with running(a) as fleet:
        with pytest.raises(DeployError, match="its rollout was ended from elsewhere"):
            bring_in(fleet, b, Mode("canary", 0.5, LIMITS), watch=supplant)
        assert fleet.state.rollout == successors[0], "neither beaten nor taken back"


def test_a_rollout_that_ends_while_its_deployer_is_waited_for_leaves_the_way_clear(a, b, c):
    def end(progress: Progress) -> None:
        update(fleet.registry, lambda state: withdraw(state, "t1", "asked for"))

    with running(a) as fleet:
        left_by_a_deployer_that_is_gone(fleet, b)
        assert fleet.channel.clear_the_way(c, end).rollout is None
        assert fleet.history == [(b.version, "rolled back", "asked for")]


def test_a_deployer_that_was_taken_over_does_not_go_on_with_another_kind_of_rollout_of_its_version(a, b, monkeypatch):
    """It slept, and the next one has begun a canary of the same version, which it must not promote."""
    monkeypatch.setattr(rollout_module, "BEAT_S", 3600.0)

    def supplant(progress: Progress) -> None:
        if progress.ready == 2 and fleet.state.rollout.kind == "load":
            update(fleet.registry, lambda state: abort(state, "t1", "not heard"))
            left_by_a_deployer_that_is_gone(fleet, b)

    with running(a) as fleet:
        with pytest.raises(DeployError, match="ended from elsewhere"):
            bring_in(fleet, b, watch=supplant)
        assert (fleet.state.live, fleet.state.rollout.kind) == (a, "canary")


# ----- going back


def test_going_back_makes_the_version_before_live_everywhere(a, b):
    with running(a) as fleet:
        bring_in(fleet, b)
        state = fleet.channel.go_back("asked for", 20.0, NOBODY)
        assert (state.live, state.previous) == (a, b)
        assert fleet.live == {a.version}
        assert fleet.history[-1] == (b.version, "rolled back", "asked for")


def test_going_back_during_a_rollout_ends_it(a, b):
    with running(a) as fleet:
        update(fleet.registry, lambda state: propose(state, Rollout(kind="canary", release=b, share=0.1)))
        state = fleet.channel.go_back("asked for", 20.0, NOBODY)
        assert (state.live, state.rollout) == (a, None)
        wait_until(lambda: fleet.settled(a.version))


def test_there_is_nothing_before_the_first_version(a):
    with running(a) as fleet, pytest.raises(DeployError, match=f"no version before {a.version}"):
        fleet.channel.go_back("asked for", 20.0, NOBODY)


def test_replicas_that_do_not_follow_are_told(a, b):
    with running(a) as fleet:
        bring_in(fleet, b)
        fleet.names = fleet.names | {"silent"}
        with pytest.raises(DeployError, match=r"live in 2 of 3 replicas, not in time"):
            fleet.channel.go_back("asked for", 0.25, NOBODY)


# ----- the first version, and replicas of their own


def channel_at(store: MemoryKeyValue, base: str) -> Channel:
    return Channel(Registry("animals", base, store), frozenset)


def test_a_first_version_forgets_what_an_earlier_application_of_its_name_left(store, a, b):
    earlier = channel_at(store, "base")
    earlier.begin(a, "long ago")
    channel = channel_at(store, "base")
    channel.begin(b, "first")

    state = channel.state()
    assert (state.revision, state.live, len(state.history)) == (1, b, 1)
    assert (state.history[0].action, state.history[0].why) == ("deployed", "first")


def test_replicas_of_their_own_go_on_with_the_history(store, a, b):
    before = channel_at(store, "base a")
    before.begin(a, "first")
    after = channel_at(store, "base b")
    after.succeed(before.state(), b, "no room for both", is_forced=False)

    state = after.state()
    assert (state.revision, state.live, state.previous, state.replaced) == (1, b, None, a)
    assert [entry.version for entry in state.history] == [a.version, b.version]
    assert before.state().live == a, "until they are gone, the old ones go on"
    with pytest.raises(DeployError, match=f"version {a.version} is not in memory any more; deploy it again"):
        after.go_back("asked for", 1.0, NOBODY)


def test_replicas_of_their_own_go_on_after_what_an_earlier_try_left(store, a, b):
    before, after = channel_at(store, "base a"), channel_at(store, "base b")
    before.begin(a, "first")
    after.succeed(before.state(), b, "a try that failed", is_forced=False)
    after.succeed(before.state(), b, "again", is_forced=True)

    assert after.state().revision == 2
    assert after.state().history[-1].action == "forced"


@pytest.mark.parametrize(
    "step",
    [
        lambda channel, before, release: channel.begin(release, "too late"),
        lambda channel, before, release: channel.succeed(before, release, "too late", is_forced=False),
    ],
    ids=["begin", "succeed"],
)
def test_of_two_deployers_at_once_the_slower_is_told(store, a, b, step):
    """The other one writes right after this one has looked."""

    class OneIsFaster(MemoryKeyValue):
        def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
            super().put(key, b"written by the other one", overwrite=True)
            return super().put(key, value, overwrite=overwrite)

    before = channel_at(store, "base")
    before.begin(a, "first")

    with pytest.raises(DeployError, match="application 'animals': another deployment of it was faster; try again"):
        step(channel_at(OneIsFaster(), "base"), before.state(), b)


def test_a_channel_that_is_forgotten_has_no_state(store, a):
    channel = channel_at(store, "base")
    channel.begin(a, "first")
    channel.forget()
    assert channel.state() is None


def test_what_replicas_have_seen_adds_up():
    def report(replica: str, comparison: Comparison | None) -> ReplicaReport:
        return ReplicaReport(
            replica=replica, node="n", pid=1, sequence=1, at=0.0, revision=1, live="a" * 12, comparison=comparison
        )

    seen = Comparison(candidate=VersionStats(requests=3, errors=1), compared_rows=5, disagreeing_rows=2)
    combined = total([report("r1", seen), report("r2", None), report("r3", seen)])
    assert (combined.candidate.requests, combined.candidate.errors, combined.live.requests) == (6, 2, 0)
    assert (combined.compared_rows, combined.disagreeing_rows) == (10, 4)
