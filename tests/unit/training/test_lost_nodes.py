from __future__ import annotations

import socket
from typing import Any

from bigray.training.lost_nodes import lost_among, selector_without


def _node(name: str, port: int, address: str = "127.0.0.1") -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": address, "NodeManagerPort": port, "Alive": True}


def test_a_node_that_takes_no_connection_is_lost_and_one_that_is_too_busy_to_answer_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, socket.create_server(("127.0.0.1", 0)) as ended:
        nodes = [_node("busy", busy.getsockname()[1]), _node("ended", ended.getsockname()[1])]
        ended.close()
        assert lost_among(nodes) == {"ended"}, "nobody accepts what the busy one's kernel has taken"


def test_a_node_that_does_not_answer_is_lost() -> None:
    assert lost_among([_node("off", 1, "192.0.2.255")]) == {"off"}


def test_workers_are_kept_off_lost_nodes_on_top_of_what_the_job_asks_for() -> None:
    assert selector_without(frozenset({"b", "a"}), {"ray.io/accelerator-type": "A100"}) == {
        "ray.io/accelerator-type": "A100",
        "ray.io/node-id": "!in(a,b)",
    }
    assert selector_without(frozenset(), {"ray.io/accelerator-type": "A100"}) is None
