"""The places of an elastic group's workers on real raylets, held and given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray.util.placement_group import placement_group_table

from bigray.training import places
from bigray.training.places import SeparatePlaces
from tests.integration.raylets import ray_cluster
from tests.waiting import wait_until

WORKER = {"CPU": 1.0}
PATIENCE_S = 20.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A node of two CPUs and one of one."""
    with ray_cluster({"num_cpus": 2}, {"num_cpus": 1}):
        yield


def held() -> float:
    """CPUs that are held, once Ray has counted them."""
    free: float = ray.available_resources().get("CPU", 0.0)
    return 3.0 - free


def wait_until_held(cpus: float) -> None:
    wait_until(lambda: held() == cpus, f"other than {cpus:g} CPUs are held", timeout_s=PATIENCE_S)


@pytest.mark.parametrize("is_view_stale", [False, True])
def test_each_worker_has_a_place_that_is_given_back_alone(is_view_stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what was free a moment ago is not seen yet, and Ray is asked where there is room."""
    wait_until_held(0)
    if is_view_stale:
        monkeypatch.setattr(places, "_room_for", lambda bundle, avoided: {})
    taken = SeparatePlaces([WORKER] * 3)
    assert taken.wait(PATIENCE_S)
    wait_until_held(3)
    nodes = [placement_group_table(place)["bundles_to_node_id"][0] for place in taken.placement_group.values()]
    assert sorted(nodes.count(node) for node in set(nodes)) == [1, 2]

    taken.let_go(1)
    wait_until_held(2)
    taken.let_go(1)
    taken.shutdown()
    wait_until_held(0)


def test_where_there_is_no_room_for_all_none_is_held() -> None:
    wait_until_held(0)
    assert not SeparatePlaces([WORKER] * 4).wait(0.1)
    wait_until_held(0)
