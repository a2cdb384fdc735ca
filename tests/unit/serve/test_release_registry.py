from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from bigray.errors import ClusterError, DeployError
from bigray.serve.release.record import (
    ChannelState,
    Release,
    ReplicaReport,
    Rollout,
    abort,
    beat,
    initial,
    promote,
    propose,
)
from bigray.serve.release.registry import KEPT_REVISIONS, MemoryKeyValue, RayKeyValue, Registry, update

A, B = (Release(version=letter * 12, bundle=f"/bundles/{letter}") for letter in "ab")
T0 = "2026-05-01T10:00:00+00:00"
BEATS = KEPT_REVISIONS - 4
"""So few that no revision is removed, and each writer can tell whether it won."""
CANARY = Rollout(kind="canary", release=B, share=0.1)


@pytest.fixture
def store() -> MemoryKeyValue:
    return MemoryKeyValue()


@pytest.fixture
def registry(store: MemoryKeyValue) -> Registry:
    return Registry("digits", "/runs/digits-1/bundle", store)


def report(replica: str, sequence: int = 1) -> ReplicaReport:
    return ReplicaReport(
        replica=replica, node="n", pid=1, sequence=sequence, at=0.0, revision=1, live=A.version, loaded=(A.version,)
    )


def written(registry: Registry, state: ChannelState) -> ChannelState:
    assert registry.write(state)
    return state


def test_a_channel_that_nobody_wrote_has_no_state(registry: Registry) -> None:
    assert registry.read() is None
    assert registry.revision() == 0


def test_the_newest_state_is_read(registry: Registry) -> None:
    first = written(registry, initial(A, T0))
    second = written(registry, propose(first, CANARY))

    assert registry.read() == second
    assert registry.revision() == 2


def test_a_revision_that_was_written_is_not_written_again(registry: Registry) -> None:
    first = written(registry, initial(A, T0))
    second = written(registry, propose(first, CANARY))

    assert not registry.write(propose(first, Rollout(kind="load", release=B)))
    assert not registry.write(initial(B, T0))
    assert registry.read() == second


def test_a_state_that_does_not_follow_the_newest_is_refused(registry: Registry) -> None:
    state = propose(initial(A, T0), CANARY)

    assert not registry.write(state), "the state it follows is gone, say because the application was deleted"
    assert registry.read() is None


def test_of_writers_that_race_for_a_revision_exactly_one_wins(registry: Registry) -> None:
    first = written(registry, initial(A, T0))
    rivals = [propose(first, Rollout(kind="load", release=Release(version=f"{n:012d}", bundle="b"))) for n in range(16)]
    barrier = threading.Barrier(len(rivals))

    def race(state: ChannelState) -> bool:
        barrier.wait()
        return registry.write(state)

    with ThreadPoolExecutor(len(rivals)) as pool:
        won = list(pool.map(race, rivals))

    assert won.count(True) == 1
    assert registry.read() == rivals[won.index(True)]


def test_of_writers_of_the_very_same_state_one_wins_too(registry: Registry) -> None:
    barrier = threading.Barrier(8)

    def race(_: int) -> bool:
        barrier.wait()
        return registry.write(initial(A, T0))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(race, range(8))).count(True) == 1


def test_steps_of_many_writers_are_all_taken_once(registry: Registry) -> None:
    written(registry, propose(written(registry, initial(A, T0)), CANARY))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: update(registry, beat), range(BEATS)))

    state = registry.read()
    assert state is not None
    assert state.rollout is not None
    assert state.rollout.beat == BEATS
    assert state.revision == 2 + state.rollout.beat


def test_readers_always_find_a_state_while_old_ones_are_removed(registry: Registry) -> None:
    written(registry, propose(written(registry, initial(A, T0)), CANARY))
    is_over = threading.Event()
    seen: list[int] = []

    def watch() -> None:
        while not is_over.is_set():
            state = registry.read()
            seen.append(0 if state is None else state.revision)

    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(watch) for _ in range(2)]
        for _ in range(3 * KEPT_REVISIONS):
            update(registry, beat)
        is_over.set()
        [each.result() for each in watching]

    assert seen
    assert min(seen) >= 2


def test_old_revisions_are_removed(registry: Registry, store: MemoryKeyValue) -> None:
    written(registry, propose(written(registry, initial(A, T0)), CANARY))
    for _ in range(2 * KEPT_REVISIONS):
        update(registry, beat)

    assert len(store.keys(b"")) == KEPT_REVISIONS


@pytest.mark.parametrize("num_revisions", [1, 2, KEPT_REVISIONS - 1, KEPT_REVISIONS, 3 * KEPT_REVISIONS])
def test_a_writer_who_stood_still_is_told_that_it_lost(store: MemoryKeyValue, num_revisions: int) -> None:
    """Between looking and writing, others write so many that the late one's revision was made, and removed."""
    others = Registry("digits", "base", store)
    first = written(others, propose(written(others, initial(A, T0)), CANARY))

    class StandsStill(MemoryKeyValue):
        has_stood = False

        def keys(self, prefix: bytes) -> list[bytes]:
            found = store.keys(prefix)
            for _ in range(0 if self.has_stood else num_revisions):
                update(others, beat)
            self.has_stood = True
            return found

        def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
            return store.put(key, value, overwrite=overwrite)

        def get(self, key: bytes) -> bytes | None:
            return store.get(key)

    assert not Registry("digits", "base", StandsStill()).write(abort(first, T0, "too late"))
    state = others.read()
    assert state is not None
    assert state.rollout is not None, "what the late one wrote is not what is served"
    assert state.revision == 2 + num_revisions


def test_a_newest_state_that_is_removed_while_it_is_read_is_looked_for_again(registry: Registry) -> None:
    state = written(registry, initial(A, T0))
    calls = count()

    class LosesTheFirst(MemoryKeyValue):
        def get(self, key: bytes) -> bytes | None:
            return None if next(calls) == 0 else super().get(key)

    store = LosesTheFirst()
    late = Registry("digits", "base", store)
    written(late, state)

    assert late.read() == state


def test_a_put_whose_answer_was_lost_has_been_won(store: MemoryKeyValue) -> None:
    class AnswersTwice(MemoryKeyValue):
        """As a client that sends a request again because the first answer did not come."""

        def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
            super().put(key, value, overwrite=overwrite)
            return super().put(key, value, overwrite=overwrite)

    registry = Registry("digits", "base", AnswersTwice())

    assert registry.write(initial(A, T0))
    assert not registry.write(initial(A, T0))


def test_a_step_is_taken_again_on_the_state_of_a_faster_writer(registry: Registry) -> None:
    written(registry, propose(written(registry, initial(A, T0)), CANARY))
    seen: list[int] = []

    def step(state: ChannelState) -> ChannelState:
        if not seen:
            written(registry, beat(state))
        seen.append(state.revision)
        return promote(state, T0, "good")

    state = update(registry, step)

    assert seen == [2, 3]
    assert (state.revision, state.live) == (4, B)
    assert registry.read() == state


def test_a_step_that_is_refused_changes_nothing(registry: Registry) -> None:
    first = written(registry, initial(A, T0))

    with pytest.raises(DeployError, match="no rollout"):
        update(registry, lambda state: promote(state, T0, ""))
    assert registry.read() == first


def test_a_step_that_changes_nothing_writes_nothing(registry: Registry) -> None:
    first = written(registry, initial(A, T0))

    assert update(registry, lambda state: state) == first
    assert registry.revision() == 1


def test_there_is_nothing_to_change_before_the_first_release(registry: Registry) -> None:
    with pytest.raises(DeployError, match="application 'digits': nothing has been deployed"):
        update(registry, beat)


def test_a_stored_state_that_cannot_be_read_is_told_with_the_way_out(registry: Registry, store: MemoryKeyValue) -> None:
    written(registry, initial(A, T0))
    store.put(store.keys(b"")[0], b"of another time", overwrite=True)

    with pytest.raises(DeployError, match=r"application 'digits': the stored state of revision 1 .* deploy it again"):
        registry.read()


def test_the_last_report_of_each_replica_is_read(registry: Registry) -> None:
    for each in (report("r2"), report("r1"), report("r2", sequence=2)):
        registry.report(each)

    assert registry.reports() == (report("r1"), report("r2", sequence=2))


def test_a_broken_report_is_passed_over(registry: Registry, store: MemoryKeyValue) -> None:
    registry.report(report("r1"))
    store.put(store.keys(b"")[0], b"half a rep", overwrite=True)
    registry.report(report("r2"))

    assert [each.replica for each in registry.reports()] == ["r2"]


def test_a_replica_that_is_gone_is_forgotten(registry: Registry) -> None:
    registry.report(report("r1"))
    registry.forget("r1")
    registry.forget("r1")

    assert registry.reports() == ()


@pytest.mark.parametrize(
    ("app", "base"), [("a/b", "c"), ("a", "b/c"), ("", ""), ("ä b\n", "s3://x/y?z=1#2"), ("x" * 5000, "\udc80")]
)
def test_any_name_and_location_have_keys_of_their_own(
    registry: Registry, store: MemoryKeyValue, app: str, base: str
) -> None:
    other = Registry(app, base, store)
    written(registry, initial(A, T0))
    written(other, initial(B, T0))
    other.report(report("replica/1\x00"))

    assert (registry.read(), other.read()) == (initial(A, T0), initial(B, T0))
    assert all(key.isascii() and len(key) < 100 for key in store.keys(b""))
    assert [each.replica for each in other.reports()] == ["replica/1\x00"]


def test_an_application_is_cleared_whatever_it_was_started_with(registry: Registry, store: MemoryKeyValue) -> None:
    earlier, other = Registry("digits", "/another/bundle", store), Registry("digits-2", "/another/bundle", store)
    for each in (registry, earlier, other):
        written(each, initial(A, T0))
        each.report(report("r"))

    registry.clear()

    assert (registry.read(), registry.reports(), earlier.read(), earlier.reports()) == (None, (), None, ())
    assert other.read() == initial(A, T0)
    assert len(other.reports()) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get(b"k"),
        lambda store: store.keys(b"k"),
        lambda store: store.delete(b"k"),
        lambda store: store.put(b"k", b"v", overwrite=False),
    ],
)
def test_without_a_cluster_the_fault_is_the_clusters(call: Callable[[RayKeyValue], object]) -> None:
    with pytest.raises(ClusterError, match="Ray is not connected"):
        call(RayKeyValue())
