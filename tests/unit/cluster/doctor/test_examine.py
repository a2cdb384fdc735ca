"""What the driver makes of answers: no Ray."""

from __future__ import annotations

import pytest

from bigray.cluster.doctor.examine import LATE, Answer, Deadline, _in_ray, _ring, _time_rings
from bigray.cluster.doctor.facts import Node, RingPlace

PAIR = ("a", "b")
NODE = {
    "NodeID": "f" * 56,
    "NodeManagerAddress": "10.0.0.1",
    "Resources": {"CPU": 4.0, "GPU": 2.0, "object_store_memory": 3e9, "node:__internal_head__": 1.0},
    "Labels": {"ray.io/node-id": "f" * 56},
}


def test_a_ring_takes_as_long_as_its_slower_side() -> None:
    assert _ring(PAIR, "gloo", Answer(0.002), Answer(0.003)).seconds == 0.003


@pytest.mark.parametrize("late_first", [True, False])
def test_of_two_errors_the_one_that_says_more_is_told(late_first: bool) -> None:
    sides = [Answer(error=f"{LATE} 6 s"), Answer(error="Connection refused")]
    ring = _ring(PAIR, "gloo", *(sides if late_first else reversed(sides)))

    assert (ring.seconds, ring.error) == (None, "Connection refused")


def test_a_step_has_no_more_time_than_is_left() -> None:
    assert Deadline(100.0).within(2.0) == 2.0
    assert Deadline(0.0).within(2.0) == 0.0


def test_pairs_for_which_no_time_is_left_are_counted() -> None:
    nodes = [Node(str(number), _in_ray(NODE), None) for number in range(2_000)]
    places = {node.name: RingPlace(1, gpus_in_torch=0) for node in nodes}

    assert _time_rings(nodes, places, {}, Deadline(0.0)) == ([], 1_999_000)


@pytest.mark.parametrize(
    ("changes", "is_fake"),
    [
        ({}, False),
        ({"Labels": {"bigray.io/fake-gpu": "true"}}, True),
        ({"Resources": {**NODE["Resources"], "fake_gpus": 1.0}}, True),  # type: ignore[dict-item]
    ],
)
def test_a_node_is_read_as_ray_lists_it(changes: dict[str, object], is_fake: bool) -> None:
    node = _in_ray({**NODE, **changes})

    assert (node.ip, node.gpus, node.object_store_bytes, node.is_head) == ("10.0.0.1", 2.0, 3e9, True)
    assert node.has_fake_gpus is is_fake
