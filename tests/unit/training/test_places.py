from __future__ import annotations

import pytest

from bigray.training.places import choose_nodes, places_on, without_what_others_hold


def test_workers_are_on_as_few_nodes_as_hold_them_and_on_those_with_the_most_room() -> None:
    assert choose_nodes({"a": 2, "b": 4, "c": 1}, 3) == ["b", "b", "b"]
    assert choose_nodes({"a": 2, "b": 4, "c": 1}, 5) == ["b", "b", "b", "b", "a"]
    assert choose_nodes({"b": 1, "a": 1}, 2) == ["a", "b"]


@pytest.mark.parametrize("room", [{}, {"a": 0}, {"a": 1, "b": 1}])
def test_where_they_do_not_fit_none_is_placed(room: dict[str, int]) -> None:
    assert choose_nodes(room, 3) is None


@pytest.mark.parametrize(
    ("free", "bundle", "expected"),
    [
        ({"CPU": 4.0}, {"CPU": 1.0}, 4),
        ({"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, 1),
        ({"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}, 0),
        ({"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.1, "GPU": 0.25}, 4),
        ({"CPU": 0.3}, {"CPU": 0.1}, 3),
        ({}, {"CPU": 1.0}, 0),
        ({"CPU": 4.0, "GPU": 2.0}, {"CPU": 0.0, "GPU": 1.0}, 2),
    ],
)
def test_a_node_has_places_for_what_all_its_free_resources_hold(
    free: dict[str, float], bundle: dict[str, float], expected: int
) -> None:
    assert places_on(free, bundle) == expected


def test_a_running_group_can_have_what_it_holds_and_what_is_free() -> None:
    reserved = {node: {"CPU": 4.0, "GPU": 1.0} for node in ("own", "empty", "held by others", "unknown")}
    free = {
        "own": {"CPU": 3.7, "GPU": 0.0},
        "empty": {"CPU": 4.0, "GPU": 1.0},
        "held by others": {"CPU": 1.0},
    }
    assert without_what_others_hold(reserved, free, {"own": 3}, {"CPU": 0.1}) == {
        "own": {"CPU": 4.0, "GPU": 0.0},
        "empty": {"CPU": 4.0, "GPU": 1.0},
        "held by others": {"CPU": 1.0, "GPU": 0.0},
        "unknown": {"CPU": 0.0, "GPU": 0.0},
    }
