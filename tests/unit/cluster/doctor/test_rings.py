from __future__ import annotations

import itertools
import os
import threading

import pytest

from bigray.cluster.doctor.rings import Seat, open_store, rounds, time_ring, without_source


@pytest.mark.parametrize("count", range(9))
def test_every_pair_has_its_turn_and_no_node_is_in_two_at_once(count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    turns = list(rounds(names))
    pairs = [frozenset(pair) for turn in turns for pair in turn]

    assert sorted(map(sorted, pairs)) == [list(pair) for pair in itertools.combinations(names, 2)]
    assert all(len({name for pair in turn for name in pair}) == 2 * len(turn) for turn in turns)


def test_the_first_round_of_very_many_nodes_does_not_wait_for_the_others() -> None:
    assert len(next(rounds([str(number) for number in range(100_000)]))) == 50_000


def test_what_gloo_says_is_told_without_its_sources() -> None:
    text = (
        "[enforce fail at /__w/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: x\n#0"
    )

    assert without_source(text) == "ifa != nullptr. Unable to find address for: x"


def test_two_sides_of_a_ring_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    store = open_store("127.0.0.1")
    seats = [Seat("key", rank, "127.0.0.1", store.port, "gloo") for rank in (0, 1)]
    times: list[float] = []
    other = threading.Thread(target=lambda: times.append(time_ring(seats[1], None)))
    other.start()
    times.append(time_ring(seats[0], store))
    other.join()

    assert len(times) == 2
    assert all(seconds > 0 for seconds in times)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_store_that_is_not_there_is_told_with_its_address() -> None:
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:1 cannot be reached: Connection refused"):
        time_ring(Seat("key", 1, "127.0.0.1", 1, "gloo"), None)
