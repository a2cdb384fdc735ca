from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from bigray.errors import ClusterError
from bigray.serve import turn as turn_module
from bigray.serve.release.registry import MemoryKeyValue
from bigray.serve.turn import Turn


@pytest.fixture
def store() -> MemoryKeyValue:
    return MemoryKeyValue()


def test_each_waits_for_its_turn(store, monkeypatch):
    monkeypatch.setattr(turn_module, "POLL_S", 0.001)
    inside: list[int] = []
    most = 0

    def take_turns(number: int) -> None:
        nonlocal most
        for _ in range(5):
            with Turn(store):
                inside.append(number)
                most = max(most, len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take_turns, range(8)))
    assert most == 1
    assert len(store.keys(b"")) == 1, "older turns are removed"


def test_a_turn_is_given_back_when_its_block_fails(store):
    with pytest.raises(KeyboardInterrupt), Turn(store):
        raise KeyboardInterrupt
    with Turn(store):
        pass


def test_the_turn_of_a_deployer_that_is_gone_is_taken_over(store, monkeypatch):
    monkeypatch.setattr(turn_module, "SILENT_S", 0.02)
    gone = Turn(store).__enter__()
    with Turn(store):
        gone.__exit__(None, None, None)  # it was only slow, and gives back what is not its own any more
        assert not Turn(store)._take(1), "the newest turn is what counts"
        monkeypatch.setattr(turn_module, "SILENT_S", 3600.0)
        newest = max(store.keys(b""))
        assert store.get(newest) != turn_module.GIVEN_BACK
    assert store.get(newest) == turn_module.GIVEN_BACK


def test_one_who_was_slow_between_looking_and_taking_has_lost(store):
    for _ in range(3):
        with Turn(store):
            pass
    assert not Turn(store)._take(1), "its key was another's, and removed"
    with Turn(store):
        pass


def test_a_put_whose_answer_was_lost_and_that_was_sent_twice_is_known_as_its_own():
    class Repeating(MemoryKeyValue):
        def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
            super().put(key, value, overwrite=overwrite)
            return super().put(key, value, overwrite=overwrite)

    with Turn(Repeating()):
        pass


def test_a_store_that_does_not_answer_is_told():
    class Away(MemoryKeyValue):
        def keys(self, prefix: bytes) -> list[bytes]:
            raise ClusterError("the head node does not answer")

    with pytest.raises(ClusterError), Turn(Away()):
        pass
