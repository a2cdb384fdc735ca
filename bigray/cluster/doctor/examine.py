"""Examine a live cluster from the driver, within 20 seconds: what does not answer in time is a finding, not a hang."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from bigray.cluster.doctor import checks
from bigray.cluster.doctor.facts import (
    ClockFacts,
    DoorFacts,
    Node,
    NodeFacts,
    NodeInRay,
    RingFacts,
    RingPlace,
    StorageFacts,
)
from bigray.cluster.doctor.findings import Finding, Report
from bigray.cluster.doctor.ports import AGENT, DASHBOARD, Door, door
from bigray.cluster.doctor.probes import Probe, token_facts, versions
from bigray.cluster.doctor.rings import RING_TIMEOUT_S, Seat, num_pairs, rounds
from bigray.errors import ClusterError, last_line
from bigray.storage import Storage, sha256

BUDGET_S = 18.0
"""Of all of it, once connected."""
START_TIMEOUT_S = 10.0
"""Until a probe has started and told its facts; a new process loads Ray and pyarrow first."""
CLOCK_TIMEOUT_S = 1.0
CLOCK_LOOKS = 5
PORTS_TIMEOUT_S = 9.0
STORAGE_TIMEOUT_S = 6.0
REMOVE_TIMEOUT_S = 3.0
FILE_BYTES = 4096
TORCH_TIMEOUT_S = 10.0
ROUND_TIMEOUT_S = 2 * RING_TIMEOUT_S + 1.0
"""Two waits: to meet, and for the values."""
CALL_MARGIN_S = 1.0
"""What a call may take beside the time that it waits for others."""
PROBE_THREADS = 4
"""A call that hangs, as on a dead NFS server, must not hold up the others."""
FAKE_GPUS = "fake-gpu"
"""Part of the name of a node's label, or of a resource, where its GPUs are of a dry run."""

LATE = "no answer within"
Pair = tuple[str, str]


class Deadline:
    """The time there is for everything."""

    def __init__(self, budget_s: float) -> None:
        self._end_s = time.monotonic() + budget_s

    def within(self, timeout_s: float) -> float:
        """Of a step that may take so long, where that much is left."""
        return max(0.0, min(timeout_s, self._end_s - time.monotonic()))


@dataclass(frozen=True)
class Answer:
    """What came of one remote call."""

    value: Any = None
    error: str = ""
    """Empty where there is a value."""


def examine(storage: Storage | None) -> Report:
    """Measure the cluster this process is connected to, and judge it (driver).

    `storage` is tried from every node. Probes are ended, and the file that was written is removed, whatever happens.

    Raises:
        ClusterError: it has no live node.
    """
    import ray

    began_s, deadline = time.monotonic(), Deadline(BUDGET_S)
    in_ray = live_nodes()
    if not in_ray:
        raise ClusterError("the cluster has no live node: look on its head node with ray status")
    with _probes(in_ray) as probes:
        findings = list(_examine(in_ray, probes, storage, deadline))
    address = ray.get_runtime_context().gcs_address
    return Report(address, tuple(in_ray), tuple(findings), time.monotonic() - began_s)


def _examine(
    in_ray: Mapping[str, NodeInRay], probes: Mapping[str, Any], storage: Storage | None, deadline: Deadline
) -> Iterator[Finding]:
    answers = gather({name: probe.facts.remote() for name, probe in probes.items()}, deadline.within(START_TIMEOUT_S))
    nodes = [_node(name, node, answers[name]) for name, node in in_ray.items()]
    there = {node.name: probes[node.name] for node in nodes if node.facts is not None}
    opening = {name: probe.open_ring.remote() for name, probe in there.items()}  # torch loads while the rest is asked
    doors, untried_doors = _ask_doors(in_ray, there, deadline)
    clocks = _read_clocks(there, deadline)
    stored = try_storage(storage, there, in_ray, deadline) if storage is not None and there else None
    opened = gather(opening, deadline.within(TORCH_TIMEOUT_S))
    places = {name: answer.value for name, answer in opened.items() if not answer.error}
    rings, unmeasured = _time_rings(nodes, places, there, deadline)

    yield from checks.check_answers(nodes)
    yield from checks.check_versions(versions(), nodes)
    yield from checks.check_tokens(token_facts(), nodes)
    yield from checks.check_doors(doors, untried_doors)
    yield from checks.check_clocks(clocks)
    yield from checks.check_memory(nodes)
    yield from checks.check_disk(nodes)
    yield from checks.check_gpus(nodes, places)
    yield from checks.check_torch({name: answer.error for name, answer in opened.items() if answer.error})
    yield from checks.check_rings(nodes, rings, unmeasured)
    yield from checks.check_storage(stored)


def live_nodes() -> dict[str, NodeInRay]:
    """Of the cluster this process is connected to, the head first, by the name they are shown under (driver)."""
    import ray

    alive = [_in_ray(node) for node in ray.nodes() if node["Alive"]]
    return named(sorted(alive, key=lambda node: (not node.is_head, node.ip, node.node_id)))


def named(nodes: Sequence[NodeInRay]) -> dict[str, NodeInRay]:
    """By IP address; where several have one, with the start of the node's id."""
    count = Counter(node.ip for node in nodes)
    return {node.ip if count[node.ip] == 1 else f"{node.ip} ({node.node_id[:6]})": node for node in nodes}


def _in_ray(node: Mapping[str, Any]) -> NodeInRay:
    resources: dict[str, float] = node["Resources"]
    marks = [*resources, *node.get("Labels", {})]
    return NodeInRay(
        node_id=node["NodeID"],
        ip=node["NodeManagerAddress"],
        gpus=resources.get("GPU", 0.0),
        object_store_bytes=resources.get("object_store_memory", 0.0),
        is_head="node:__internal_head__" in resources,
        has_fake_gpus=any(FAKE_GPUS in mark.replace("_", "-") for mark in marks),
    )


@contextmanager
def _probes(nodes: Mapping[str, NodeInRay]) -> Iterator[dict[str, Any]]:
    """One on each node, ended with the block. They hold no CPU: a cluster that is all in use has room for them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": PROBE_THREADS}
    actor = ray.remote(Probe)
    probes: dict[str, Any] = {}
    try:
        for name, node in nodes.items():
            here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            probes[name] = actor.options(scheduling_strategy=here, **options).remote(name, node.ip)
        yield probes
    finally:
        for probe in probes.values():
            with suppress(Exception):  # it may have ended with its node
                ray.kill(probe)


def gather(calls: Mapping[str, Any], timeout_s: float) -> dict[str, Answer]:
    """The answers to remote calls, each with its own error; those that are late have one too (driver)."""
    import ray

    if not calls:
        return {}
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s, fetch_local=False)
    done = set(ready)
    return {
        name: _answer(call) if call in done else Answer(error=f"{LATE} {timeout_s:.0f} s")
        for name, call in calls.items()
    }


def _answer(call: Any) -> Answer:
    import ray

    try:
        return Answer(ray.get(call, timeout=CALL_MARGIN_S))
    except Exception as error:  # of the node, of its code, or of the way there: each is told
        return Answer(error=_cause(error))


def _cause(error: BaseException) -> str:
    """In one line: what a remote function raised, without the traceback that Ray puts before it."""
    inner = getattr(error, "cause", None)
    return last_line(inner if isinstance(inner, BaseException) else error)


def _node(name: str, in_ray: NodeInRay, answer: Answer) -> Node:
    facts = answer.value if isinstance(answer.value, NodeFacts) else None
    return Node(name, in_ray, facts, answer.error)


def _read_clocks(probes: Mapping[str, Any], deadline: Deadline) -> dict[str, ClockFacts]:
    found: dict[str, ClockFacts] = {}
    for name, probe in probes.items():
        looks = []
        for _ in range(CLOCK_LOOKS):
            began = time.time()
            answer = gather({name: probe.now.remote()}, deadline.within(CLOCK_TIMEOUT_S))[name]
            ended = time.time()
            if answer.error:
                break
            looks.append(ClockFacts(answer.value - (began + ended) / 2, ended - began))
        if looks:
            found[name] = min(looks, key=lambda look: look.round_trip_s)
    return found


def _ask_doors(
    in_ray: Mapping[str, NodeInRay], probes: Mapping[str, Any], deadline: Deadline
) -> tuple[list[DoorFacts], dict[str, str]]:
    """From the nodes themselves: a dashboard on loopback is asked where it runs. And why a node could not ask."""
    doors = {name: list(_doors_of(in_ray[name])) for name in probes}
    calls = {name: probes[name].knock.remote(found) for name, found in doors.items() if found}
    answers = gather(calls, deadline.within(PORTS_TIMEOUT_S))
    untried = {name: answer.error for name, answer in answers.items() if answer.error}
    return [fact for answer in answers.values() if not answer.error for fact in answer.value], untried


def _doors_of(node: NodeInRay) -> Iterator[Door]:
    from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD
    from ray._private.services import get_webui_url_from_internal_kv
    from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX
    from ray.experimental.internal_kv import _internal_kv_get

    dashboard = (get_webui_url_from_internal_kv() or "") if node.is_head else ""
    if found := door("dashboard", dashboard, DASHBOARD):
        yield found
    told = _internal_kv_get(f"{DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX}{node.node_id}", namespace=KV_NAMESPACE_DASHBOARD)
    if told:
        host, port, _ = json.loads(told)
        if found := door("agent", f"{host}:{port}", AGENT):
            yield found


def try_storage(
    storage: Storage, probes: Mapping[str, Any], in_ray: Mapping[str, NodeInRay], deadline: Deadline
) -> StorageFacts:
    """Write a file from a node that is not the driver's, where there is one, read it from all, remove it (driver)."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    writer = next((name for name in probes if in_ray[name].node_id != here), next(iter(probes)))
    name, data = f".bigray-doctor-{uuid.uuid4().hex}", os.urandom(FILE_BYTES)
    facts = StorageFacts(storage.uri, writer, is_local=storage.is_local)
    written = Answer(error=LATE)
    try:
        write = {writer: probes[writer].write.remote(storage, name, data)}
        written = gather(write, deadline.within(STORAGE_TIMEOUT_S))[writer]
        if written.error:
            facts = replace(facts, errors={writer: written.error})
        else:
            facts = _read_from_all(replace(facts, sha256=sha256(data)), storage, name, probes, deadline)
    finally:
        remove = {writer: probes[writer].remove.remote(storage, name)}
        gone = gather(remove, REMOVE_TIMEOUT_S)[writer]
    # one that was not written is not there to be removed, unless nobody knows
    is_left = gone.error and (not written.error or written.error.startswith(LATE))
    return replace(facts, left_behind=f"{storage.uri}/{name}") if is_left else facts


def _read_from_all(
    facts: StorageFacts, storage: Storage, name: str, probes: Mapping[str, Any], deadline: Deadline
) -> StorageFacts:
    calls = {reader: probe.read.remote(storage, name) for reader, probe in probes.items()}
    answers = gather(calls, deadline.within(STORAGE_TIMEOUT_S))
    reads = {reader: answer.value for reader, answer in answers.items() if answer.value is not None}
    errors = {reader: answer.error for reader, answer in answers.items() if answer.value is None}
    return replace(facts, reads=reads, errors=errors)


def _time_rings(
    nodes: Sequence[Node], places: Mapping[str, RingPlace], probes: Mapping[str, Any], deadline: Deadline
) -> tuple[list[RingFacts], int]:
    """All pairs that there is time for, and how many there was none for."""
    rings = _Rings({node.name: node for node in nodes}, places, probes, deadline)
    names = [node.name for node in nodes if node.name in places]
    found = rings.measure("gloo", rounds(names))
    tried = takewhile(lambda turn: found.keys() >= set(turn), rounds(names))
    again = [[pair for pair in turn if found[pair].seconds is None] for turn in tried]
    repaired = rings.measure("gloo", again, on_interfaces=True)
    found |= {pair: replace(found[pair], seconds_with_interface=ring.seconds) for pair, ring in repaired.items()}
    with_gpus = [name for name, place in places.items() if place.gpus_in_torch]
    on_gpus = rings.measure("nccl", rounds(with_gpus))  # not run on a GPU
    wanted = num_pairs(len(names)) + num_pairs(len(with_gpus))
    return [*found.values(), *on_gpus.values()], wanted - len(found) - len(on_gpus)


@dataclass(frozen=True)
class _Rings:
    """Times pairs of nodes, a round at a time."""

    nodes: Mapping[str, Node]
    places: Mapping[str, RingPlace]
    probes: Mapping[str, Any]
    deadline: Deadline

    def measure(
        self, backend: str, turns: Iterable[Sequence[Pair]], *, on_interfaces: bool = False
    ) -> dict[Pair, RingFacts]:
        """Those that there is time for. `on_interfaces`: bound to what has the node's address in Ray."""
        found: dict[Pair, RingFacts] = {}
        for turn in turns:
            if self.deadline.within(ROUND_TIMEOUT_S) < RING_TIMEOUT_S:
                break
            if turn:
                found |= self._round(backend, turn, on_interfaces=on_interfaces)
        return found

    def _round(self, backend: str, pairs: Sequence[Pair], *, on_interfaces: bool) -> dict[Pair, RingFacts]:
        calls: dict[str, Any] = {}
        for pair in pairs:
            key = uuid.uuid4().hex
            for rank, name in enumerate(pair):
                seat = self._seat(key, rank, pair, backend, on_interfaces=on_interfaces)
                calls[name] = self.probes[name].ring.remote(seat)
        answers = gather(calls, self.deadline.within(ROUND_TIMEOUT_S))
        return {pair: _ring(pair, backend, answers[pair[0]], answers[pair[1]]) for pair in pairs}

    def _seat(self, key: str, rank: int, pair: Pair, backend: str, *, on_interfaces: bool) -> Seat:
        first, facts = pair[0], self.nodes[pair[rank]].facts
        interface = facts.interface if on_interfaces and facts is not None else ""
        return Seat(key, rank, self.nodes[first].in_ray.ip, self.places[first].port, backend, interface)


def _ring(pair: Pair, backend: str, first: Answer, second: Answer) -> RingFacts:
    """The slower side's time; of two errors the one that says more than that time was up."""
    errors = sorted((answer.error for answer in (first, second) if answer.error), key=_says_only_late)
    if errors:
        return RingFacts(*pair, backend, None, errors[0])
    return RingFacts(*pair, backend, max(first.value, second.value))


def _says_only_late(error: str) -> bool:
    return LATE in error or "timeout" in error
