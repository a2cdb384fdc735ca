"""Findings from measured facts: pure functions, one for each question that the doctor answers."""

from __future__ import annotations

import ipaddress
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TypeVar

from bigray.cluster.doctor.facts import (
    ClockFacts,
    DoorFacts,
    Node,
    NodeFacts,
    RingFacts,
    RingPlace,
    StorageFacts,
    TokenFacts,
)
from bigray.cluster.doctor.findings import Finding, Status

MOST_LISTED = 10
"""Nodes or pairs with the same fault that get a line each."""
SMALL_SHM_BYTES = 1 << 30
SMALL_DISK_BYTES = 5 << 30
FULL_DISK = 0.95
"""From this share on Ray creates no object on disk any more (`RAY_local_fs_capacity_threshold`)."""
CLOCK_WARN_S = 1.0
CLOCK_FAIL_S = 300.0
"""Object stores refuse a request that is signed 15 minutes off, others at 5."""
SLOW_RING_S = 0.25
"""4 MB in this time are some 130 Mb/s each way."""
UNEVEN_RING = 5.0
UNEVEN_RING_S = 0.02
"""A pair that takes this many times as long as the median pair, and at least this long, is told."""
REFUSED = (401, 403)
NOT_SERVED = (404, 405)
DRIVER = "the driver"

_Value = TypeVar("_Value")


def check_answers(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Nodes from which nothing came back, with the reason."""
    silent = {node.name: node for node in nodes if node.facts is None}
    for name, node in _first(silent):
        yield Finding("node", "fail", node.error, _answer_fix(node), name)
    yield from _more("node", silent)
    answered = len(_measured(nodes))
    if answered == len(nodes):
        yield Finding("node", "pass", f"all {answered} answer" if answered != 1 else "it answers")


def _answer_fix(node: Node) -> str:
    if "No module named" in node.error or "has no attribute" in node.error:
        return "install the same bigray there: pip install -c constraints.txt bigray, then start Ray again"
    return "look at its processes and network: ray status, and /tmp/ray/session_latest/logs there"


def check_versions(here: Mapping[str, str], nodes: Sequence[Node]) -> Iterator[Finding]:
    """Of each package on each node against the driver's."""
    for package, ours in here.items():
        found = {node.name: facts.versions.get(package, "") for node, facts in _measured(nodes)}
        others = {name: theirs for name, theirs in found.items() if theirs != ours}
        if not others and found:
            yield Finding(package, "pass", f"{ours} on {_all_nodes(len(found))} and on the driver")
        for name, theirs in _first(others):
            is_build = _release(theirs) == _release(ours) and package == "torch"
            what = f"{theirs or 'not installed'}, the driver has {ours}"
            if is_build:
                yield Finding(package, "warn", f"{what}: another build of it", "install the same build", name)
            else:
                yield Finding(package, "fail", what, _version_fix(package, ours), name)
        yield from _more(package, others)


def _release(version: str) -> str:
    return version.partition("+")[0]


def _version_fix(package: str, ours: str) -> str:
    if package == "python":
        return f"make its environment with Python {ours}, then start Ray again"
    if package == "bigray":
        return "install the driver's bigray there, then start Ray again"
    name = "ray[default]" if package == "ray" else package
    return f"pip install '{name}=={_release(ours)}' there, then start Ray again"


def check_tokens(here: TokenFacts, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether the cluster asks for a token, and who may read it."""
    without = {node.name: node.in_ray.ip for node, facts in _measured(nodes) if facts.token.mode == "disabled"}
    reachable = {name: ip for name, ip in without.items() if not _is_loopback(ip)}
    if without:
        where = f"on {len(without)} of {len(nodes)} nodes" if len(without) < len(nodes) else "in this cluster"
        who = f"whoever reaches {next(iter(reachable.values()))}" if reachable else "every user of this machine"
        yield Finding(
            "token",
            "fail" if reachable else "warn",
            f"authentication is off {where}: {who} can run code on it",
            "ray get-auth-token --generate; copy ~/.ray/auth_token (mode 600) to every node; "
            "start Ray again with RAY_AUTH_MODE=token",
        )
    places = {DRIVER: here, **{node.name: facts.token for node, facts in _measured(nodes)}}
    readable = {name: token for name, token in places.items() if _others_may_read(token)}
    for name, token in _first(readable):
        what = f"other users can read {token.place} (mode {token.file_mode or 0:04o})"
        yield Finding("token", "fail", what, f"chmod 600 {shlex.quote(token.place)}", name)
    yield from _more("token", readable)
    if not without and not readable:
        yield Finding("token", "pass", "asked for on every node; no other user can read it")


def _others_may_read(token: TokenFacts) -> bool:
    return token.file_mode is not None and bool(token.file_mode & 0o066)


def _is_loopback(ip: str) -> bool:
    try:
        return ipaddress.ip_address(ip).is_loopback
    except ValueError:
        return ip == "localhost"


def check_doors(doors: Sequence[DoorFacts], untried: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Ports that accept a change without a token. `untried`: node -> why its ports could not be asked."""
    silent = [door for door in doors if all(answer is None for answer in door.answers.values())]
    guarded = [door for door in doors if not _taken(door) and door not in silent]
    unguarded = sorted((door for door in doors if _taken(door)), key=lambda door: not door.is_public)
    for door in unguarded[:MOST_LISTED]:
        told = ", ".join(f"{request} without a token: {answer}" for request, answer in _taken(door).items())
        where = "from other machines too" if door.is_public else "from this machine only"
        fix = "start Ray with RAY_AUTH_MODE=token"
        if door.is_public and door.what == "dashboard":
            fix += " and --dashboard-host=127.0.0.1"
        status: Status = "fail" if door.is_public else "warn"
        yield Finding("ports", status, f"{door.what} at {door.address}, {where}: {told}", fix, door.node)
    yield from _more("ports", unguarded, "ports")
    if guarded and len(guarded) == len(doors):
        told = ", ".join(sorted({door.what for door in guarded}))
        yield Finding("ports", "pass", f"{told}: no request without a token was taken")
    told_nothing = {
        **(untried or {}),
        **{door.node or "": f"{door.what} at {door.address} does not answer" for door in silent},
    }
    for node, why in list(told_nothing.items())[:MOST_LISTED]:
        yield Finding("ports", "warn", f"could not be tried: {why}", "run bigray doctor again", node)
    if not doors and not untried:
        yield Finding("ports", "pass", "neither a dashboard nor an agent listens")


def _taken(door: DoorFacts) -> dict[str, int | None]:
    """The requests that it took, with its answers."""
    return {request: answer for request, answer in door.answers.items() if _is_taken(answer)}


def _is_taken(answer: int | None) -> bool:
    """Any other answer came from behind the check of the token, also where it was told to be invalid."""
    return answer is not None and answer not in REFUSED and answer not in NOT_SERVED


def check_memory(nodes: Sequence[Node]) -> Iterator[Finding]:
    """The object store of each node and the shared memory under it."""
    faults: dict[str, tuple[str, str]] = {}
    stores = []
    for node, facts in _measured(nodes):
        size = node.in_ray.object_store_bytes
        stores.append(size)
        shm = facts.shm_bytes or 0
        if facts.plasma_folder and not facts.plasma_folder.startswith("/dev/shm"):
            faults[node.name] = (
                f"the object store of {_gib(size)} is in {facts.plasma_folder}, on disk: /dev/shm has {_gib(shm)}",
                f"give the machine a larger /dev/shm (docker run --shm-size={_gib_up(size)}g, or an emptyDir of "
                "medium Memory), then start Ray again",
            )
        elif shm < size:
            faults[node.name] = (
                f"/dev/shm has {_gib(shm)}, less than the object store of {_gib(size)}",
                f"mount -o remount,size={_gib_up(size)}g /dev/shm, or start Ray with a smaller --object-store-memory",
            )
        elif shm < SMALL_SHM_BYTES:
            faults[node.name] = (
                f"/dev/shm has only {_gib(shm)}",
                "give the machine a larger /dev/shm: loaders with processes of their own use it too",
            )
    for name, (what, fix) in _first(faults):
        yield Finding("memory", "warn", what, fix, name)
    yield from _more("memory", faults)
    if stores and not faults:
        span = _gib(min(stores)) if min(stores) == max(stores) else f"{_gib(min(stores))} to {_gib(max(stores))}"
        yield Finding("memory", "pass", f"object store of {span} in /dev/shm on {_all_nodes(len(stores))}")


def check_disk(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Room for logs, packages and spilled objects."""
    tight: dict[str, Finding] = {}
    free = []
    for node, facts in _measured(nodes):
        free.append(facts.disk_free_bytes)
        used = 1 - facts.disk_free_bytes / max(facts.disk_total_bytes, 1)
        what = f"{_gib(facts.disk_free_bytes)} free ({1 - used:.0%}) under {facts.session_folder}"
        fix = "free some, or start Ray with --temp-dir on a larger disk"
        if used >= FULL_DISK:
            full = f"{what}: Ray stores no object on a disk that is {FULL_DISK:.0%} full"
            tight[node.name] = Finding("disk", "fail", full, fix, node.name)
        elif facts.disk_free_bytes < SMALL_DISK_BYTES:
            tight[node.name] = Finding("disk", "warn", what, fix, node.name)
    yield from (finding for _, finding in _first(tight))
    yield from _more("disk", tight)
    if free and not tight:
        yield Finding("disk", "pass", f"at least {_gib(min(free))} free under the session folder")


def check_clocks(clocks: Mapping[str, ClockFacts]) -> Iterator[Finding]:
    """Only what is certain counts: an offset less half the round trip."""
    off = {name: clock for name, clock in clocks.items() if _certain_s(clock) >= CLOCK_WARN_S}
    for name, clock in _first(off):
        status: Status = "fail" if _certain_s(clock) >= CLOCK_FAIL_S else "warn"
        side = "ahead of" if clock.ahead_s > 0 else "behind"
        what = f"its clock is {abs(clock.ahead_s):,.1f} s {side} the driver's"
        yield Finding("clock", status, what, "run chronyd or systemd-timesyncd on it: timedatectl set-ntp true", name)
    yield from _more("clock", off)
    if clocks and not off:
        most = max(abs(clock.ahead_s) for clock in clocks.values())
        unsure = max(clock.round_trip_s for clock in clocks.values()) / 2
        yield Finding("clock", "pass", f"at most {most * 1e3:.1f} ms off the driver's (± {unsure * 1e3:.1f} ms)")


def _certain_s(clock: ClockFacts) -> float:
    return abs(clock.ahead_s) - clock.round_trip_s / 2


def check_gpus(nodes: Sequence[Node], places: Mapping[str, RingPlace]) -> Iterator[Finding]:
    """What Ray hands out against what torch can use."""
    seen = [(node, places[node.name].gpus_in_torch) for node in nodes if node.name in places]
    faults: dict[str, Finding] = {}
    for node, in_torch in seen:
        in_ray = node.in_ray.gpus
        what = f"Ray hands out {in_ray:g} GPUs, torch.cuda sees {in_torch}"
        if in_ray > in_torch and node.in_ray.has_fake_gpus:
            faults[node.name] = Finding("gpus", "warn", f"{what}: fake ones, of a dry run", "", node.name)
        elif in_ray > in_torch:
            fix = "install the driver and a torch built for CUDA there, or start Ray with the right --num-gpus"
            faults[node.name] = Finding("gpus", "fail", what, fix, node.name)
        elif in_ray < in_torch:
            fix = f"start Ray there with --num-gpus={in_torch}, unless they are kept for others"
            faults[node.name] = Finding("gpus", "warn", what, fix, node.name)
    yield from (finding for _, finding in _first(faults))
    yield from _more("gpus", faults)
    if seen and not faults:
        total = sum(in_torch for _, in_torch in seen)
        yield Finding(
            "gpus", "pass", f"{total} in Ray and in torch.cuda" if total else "none, in Ray and in torch.cuda"
        )


def check_torch(errors: Mapping[str, str]) -> Iterator[Finding]:
    """Nodes on which torch could not be loaded, or not in time, so that no ring was tried from them."""
    for name, why in _first(errors):
        is_late = why.startswith("no answer")
        fix = "run bigray doctor again when it is less busy" if is_late else 'python -c "import torch" there tells more'
        yield Finding("torch", "warn" if is_late else "fail", f"could not be loaded: {why}", fix, name)
    yield from _more("torch", errors)


def check_rings(nodes: Sequence[Node], rings: Sequence[RingFacts], unmeasured: int = 0) -> Iterator[Finding]:
    """Whether each pair of nodes can form a process group, and how fast it is."""
    facts = {node.name: found for node, found in _measured(nodes)}
    for backend in dict.fromkeys(ring.backend for ring in rings):
        yield from _check_backend(backend, [ring for ring in rings if ring.backend == backend], facts)
    if unmeasured:
        what = f"{unmeasured:,} pairs of nodes were not tried: no time was left"
        yield Finding("rings", "warn", what, "run bigray doctor again when the cluster is less busy")
    cut_off = {name for ring in rings if ring.seconds is None for name in (ring.first, ring.second)}
    yield from _check_interfaces({name: found for name, found in facts.items() if name not in cut_off})


def _check_backend(backend: str, rings: Sequence[RingFacts], facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    failed = {_pair(ring): ring for ring in rings if ring.seconds is None}
    for pair, ring in _first(failed):
        yield Finding(backend, "fail", _ring_fault(ring, facts), _ring_fix(ring, facts), pair)
    yield from _more(backend, failed, "pairs")
    times = {_pair(ring): ring.seconds for ring in rings if ring.seconds is not None}
    if not times:
        return
    middle = statistics.median(times.values())
    slow = {pair: seconds for pair, seconds in times.items() if _is_slow(seconds, middle)}
    for pair, seconds in _first(slow):
        what = f"an all-reduce of 4 MB takes {_ms(seconds)}, that of the median pair {_ms(middle)}"
        yield Finding(backend, "warn", what, "look at the link, and at what else uses it", pair)
    yield from _more(backend, slow, "pairs")
    if not failed and not slow:
        names = ", ".join(sorted({found.gloo_interface or "?" for found in facts.values()}))
        over = f" over {names}" if backend == "gloo" else ""
        pairs = f"{len(times):,} pairs" if len(times) != 1 else "1 pair"
        what = f"{pairs}{over}: an all-reduce of 4 MB takes {_ms(middle)}, at most {_ms(max(times.values()))}"
        yield Finding(backend, "pass", what)


def _pair(ring: RingFacts) -> str:
    return f"{ring.first} - {ring.second}"


def _is_slow(seconds: float, middle: float) -> bool:
    return seconds >= SLOW_RING_S or (seconds >= UNEVEN_RING * middle and seconds >= UNEVEN_RING_S)


def _ring_fault(ring: RingFacts, facts: Mapping[str, NodeFacts]) -> str:
    if ring.seconds_with_interface is None:
        return f"they do not reach each other: {ring.error}"
    chosen = " and ".join(
        f"{found.gloo_interface or 'none'} on {name}" for name, found in _of_pair(ring, facts).items()
    )
    fine = _ms(ring.seconds_with_interface)
    return f"they do not reach each other on what gloo chooses ({chosen}); on their addresses in Ray it takes {fine}"


def _ring_fix(ring: RingFacts, facts: Mapping[str, NodeFacts]) -> str:
    variable = "NCCL_SOCKET_IFNAME" if ring.backend == "nccl" else "GLOO_SOCKET_IFNAME"
    own = {name: found.interface for name, found in _of_pair(ring, facts).items() if found.interface}
    setting = " and ".join(f"{variable}={interface} on {name}" for name, interface in own.items())
    if len(own) == 2 and len(set(own.values())) == 1:
        setting = f"{variable}={next(iter(own.values()))} on both"
    is_set_otherwise = any(found.gloo_setting not in ("", found.interface) for found in _of_pair(ring, facts).values())
    if ring.seconds_with_interface is not None or (is_set_otherwise and setting):
        return f"start Ray with {setting}"
    advice = "open all TCP ports between them"
    return f"{advice}; where they have a network of their own, start Ray with {setting}" if setting else advice


def _of_pair(ring: RingFacts, facts: Mapping[str, NodeFacts]) -> dict[str, NodeFacts]:
    return {name: facts[name] for name in (ring.first, ring.second) if name in facts}


def _check_interfaces(facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """Where gloo works, but over another network than Ray."""
    if len({found.machine for found in facts.values()}) < 2:
        return
    other = {
        name: found for name, found in facts.items() if found.interface and found.gloo_interface != found.interface
    }
    for name, found in _first(other):
        by = f"by GLOO_SOCKET_IFNAME={found.gloo_setting}" if found.gloo_setting else "by the name of the host"
        what = f"gloo uses {found.gloo_interface or 'no interface'} ({by}), Ray uses {found.interface}"
        fix = f"start Ray with GLOO_SOCKET_IFNAME={found.interface}, unless {found.gloo_interface} is the faster one"
        yield Finding("interface", "warn", what, fix, name)
    yield from _more("interface", other)


def check_storage(facts: StorageFacts | None) -> Iterator[Finding]:
    """Whether every node sees what another has written."""
    if facts is None:
        yield Finding("storage", "warn", "not tried: none was named", "bigray doctor --job JOB, or --storage URI")
        return
    if facts.left_behind:
        yield Finding("storage", "warn", f"{facts.left_behind} could not be removed", "remove it")
    if not facts.sha256:
        what = f"{facts.uri} cannot be written: {facts.errors.get(facts.writer, 'no reason given')}"
        yield Finding("storage", "fail", what, _storage_fix(facts), facts.writer)
        return
    wrong = {name: why or "not there" for name, why in facts.errors.items()}
    wrong |= {name: "other content" for name, found in facts.reads.items() if found != facts.sha256}
    for name, why in _first(wrong):
        what = f"{facts.uri}: written from {facts.writer}, but from here {why}"
        yield Finding("storage", "fail", what, _storage_fix(facts), name)
    yield from _more("storage", wrong)
    if not wrong:
        what = f"{facts.uri}: written from {facts.writer}, read from {_all_nodes(len(facts.reads))}, removed again"
        yield Finding("storage", "pass", what)


def _storage_fix(facts: StorageFacts) -> str:
    if facts.is_local:
        return "name a folder that all nodes mount at the same path, or s3://bucket/prefix: --set storage=..."
    return "set the store's credentials and endpoint in the environment of `ray start` on that node"


def _measured(nodes: Sequence[Node]) -> list[tuple[Node, NodeFacts]]:
    return [(node, node.facts) for node in nodes if node.facts is not None]


def _first(found: Mapping[str, _Value]) -> Iterator[tuple[str, _Value]]:
    return islice(found.items(), MOST_LISTED)


def _more(name: str, found: Sized, unit: str = "nodes") -> Iterator[Finding]:
    """The rest of a long list of one fault, in one line; its worst is listed already."""
    if len(found) > MOST_LISTED:
        yield Finding(name, "warn", f"the same on {len(found) - MOST_LISTED:,} more {unit}", "as above")


def _all_nodes(count: int) -> str:
    return f"all {count:,} nodes" if count != 1 else "the node"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _gib_up(size: float) -> int:
    return int(-(-size // 2**30)) or 1


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
