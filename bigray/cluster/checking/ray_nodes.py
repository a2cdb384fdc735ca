"""How many nodes a `ray up` file asks for, of which types, and the addresses of those that are there already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.nearest import nearest, unknown
from bigray.cluster.checking.ray_cluster import is_head, is_whole, items, mapping, node_types, provider_of
from bigray.cluster.checking.shapes import shown
from bigray.cluster.checking.yaml_file import Document

MOST_NODES = 1000
"""Above this a number of workers is taken for a slip of the hand."""
MOST_IDLE_MINUTES = 24 * 60

CLOUDS = ("aws", "gcp")


def check_nodes(document: Document) -> Iterator[Fault]:
    """The cluster's name and numbers, and its node types or, on machines of one's own, their addresses."""
    yield from _name_faults(document)
    yield from _cluster_numbers(document)
    if provider_of(document) == "local":
        yield from _local_rules(document)
    else:
        yield from _type_rules(document)


def _name_faults(document: Document) -> Iterator[Fault]:
    name = document.value.get("cluster_name")
    pattern = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?" if provider_of(document) == "gcp" else r"[A-Za-z0-9][-\w]{0,99}"
    if isinstance(name, str) and not re.fullmatch(pattern, name):
        yield document.fault(("cluster_name",), f"{name!r} becomes part of file names and tags; use letters, digits, -")


def _cluster_numbers(document: Document) -> Iterator[Fault]:
    most = document.value.get("max_workers")
    if "max_workers" not in document.value and provider_of(document) in CLOUDS:
        yield document.fault(("max_workers",), "is missing: Ray's own default is 2")
    elif is_whole(most) and most > MOST_NODES:
        yield document.fault(("max_workers",), f"is {most:,}; more than {MOST_NODES:,} workers is taken for a slip")
    elif most == 0:
        yield document.fault(("max_workers",), "is 0, so there are no workers")
    elif is_whole(most) and (least := _least_of_all(document)) > most:
        yield document.fault(("max_workers",), f"is {most}, less than the min_workers of all types, {least}")
    yield from _pace_faults(document)


def _least_of_all(document: Document) -> int:
    """The sum of min_workers; where one is above its own type's max_workers, which is told, as much as that."""
    least = 0
    for node_type in map(mapping, node_types(document).values()):
        wanted, most = node_type.get("min_workers"), node_type.get("max_workers")
        least += min(wanted, most if is_whole(most) else wanted) if is_whole(wanted) else 0
    return least


def _pace_faults(document: Document) -> Iterator[Fault]:
    """How fast nodes come and go."""
    idle = document.value.get("idle_timeout_minutes")
    if isinstance(idle, int | float) and idle == 0:
        yield document.fault(("idle_timeout_minutes",), "is 0: nodes go as soon as they are idle, even between trials")
    elif isinstance(idle, int | float) and idle > MOST_IDLE_MINUTES and provider_of(document) != "local":
        yield document.fault(("idle_timeout_minutes",), f"is {idle}: idle nodes are paid for longer than a day")
    if document.value.get("upscaling_speed") == 0:
        yield document.fault(("upscaling_speed",), "is 0, so the cluster never grows; 1.0 doubles it each time")


def _type_rules(document: Document) -> Iterator[Fault]:
    """Node types: which one is the head's, and how many nodes each may have."""
    value, types = document.value, node_types(document)
    head = value.get("head_node_type")
    if "available_node_types" not in value:
        if provider_of(document) in CLOUDS:
            yield document.fault(("available_node_types",), "is missing: Ray would launch machines of its own choice")
        return
    if "head_node_type" not in value:
        yield document.fault(("head_node_type",), "is missing: which of available_node_types is the head?")
    elif isinstance(head, str) and head not in types:
        yield document.fault(("head_node_type",), f"{head!r} {unknown(head, types).replace('key here', 'node type')}")
    elif isinstance(head, str) and set(types) == {head} and not mapping(types.get(head)).get("max_workers"):
        yield document.fault(("available_node_types",), "has the head's type only, so there are no workers")
    for name, node_type in types.items():
        yield from _worker_numbers(document, name, mapping(node_type))


def _worker_numbers(document: Document, name: str, node_type: dict[str, Any]) -> Iterator[Fault]:
    path: Path = ("available_node_types", name)
    least, most = node_type.get("min_workers", 0), node_type.get("max_workers")
    all_workers = document.value.get("max_workers")
    for key in ("min_workers", "max_workers"):
        if is_whole(node_type.get(key)) and node_type[key] < 0:
            yield document.fault((*path, key), f"must be at least 0, got {node_type[key]}")
            return
    if is_whole(least) and is_whole(most) and least > most:
        yield document.fault((*path, "min_workers"), f"is {least}, more than max_workers, which is {most}")
    elif most == 0 and not is_head(document, name):
        yield document.fault((*path, "max_workers"), "is 0, so no node of this type is ever launched")
    elif is_whole(most) and is_whole(all_workers) and most > all_workers > 0:
        yield document.fault((*path, "max_workers"), f"is {most}, the cluster's max_workers is {all_workers}")
    idle = node_type.get("idle_timeout_s")
    if isinstance(idle, int | float) and idle <= 0:
        yield document.fault((*path, "idle_timeout_s"), f"must be more than 0, got {idle}")


def _local_rules(document: Document) -> Iterator[Fault]:
    """Machines that are there already."""
    for key in ("available_node_types", "head_node_type"):
        if document.value.get(key):
            yield document.fault((key,), "is not for machines that are there already; Ray makes one type of them")
    provider, auth = mapping(document.value.get("provider")), mapping(document.value.get("auth"))
    if "coordinator_address" not in provider:
        yield from _lacking(document, ("provider",), provider, ("head_ip", "worker_ips"))
    yield from _lacking(document, ("auth",), auth, ("ssh_user",))
    yield from _address_faults(document, provider)
    yield from _local_numbers(document, items(provider.get("worker_ips")))


def _lacking(document: Document, path: Path, value: dict[str, Any], keys: tuple[str, ...]) -> Iterator[Fault]:
    """Keys that are needed; one that is there misspelt is told as such."""
    for key in keys:
        if key not in value and not any(nearest(other, keys) == key for other in value):
            yield document.fault(path, f"'{key}' is required, but missing")


def _local_numbers(document: Document, workers: list[Any]) -> Iterator[Fault]:
    most, least = document.value.get("max_workers"), document.value.get("min_workers")
    if workers and is_whole(most) and 0 < most < len(workers):
        yield document.fault(("max_workers",), f"is {most}, worker_ips has {len(workers)}: the others never join")
    elif workers and is_whole(most) and most > len(workers):
        yield document.fault(("max_workers",), f"is {most}, worker_ips has {len(workers)}")
    if least is not None and not (is_whole(least) and least >= 0):
        yield document.fault(("min_workers",), f"expected a whole number, got {shown(least)}")
    elif least is not None and is_whole(most) and least > most >= len(workers):
        yield document.fault(("min_workers",), f"is {least}, more than max_workers, which is {most}")


def _address_faults(document: Document, provider: dict[str, Any]) -> Iterator[Fault]:
    addresses: list[tuple[Path, Any]] = [(("provider", "head_ip"), provider.get("head_ip"))]
    addresses += [(("provider", "worker_ips", index), ip) for index, ip in enumerate(items(provider.get("worker_ips")))]
    seen: set[str] = set()
    for path, address in addresses:
        if not isinstance(address, str):
            continue  # told as a wrong type
        if address in seen:
            yield document.fault(path, f"{address} is there twice; each machine is one node")
        elif _is_loopback(address) and len(addresses) > 1:
            yield document.fault(
                path, f"{address} is another machine on each node; give the address others reach it by"
            )
        elif re.fullmatch(r"[\d.]+", address) and not _is_ip(address):
            yield document.fault(path, f"{address!r} is no IP address")
        elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*|[\da-fA-F:]+", address):
            yield document.fault(path, f"{address!r} is no address or host name; user and port belong in auth")
        seen.add(address)


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def _is_ip(text: str) -> bool:
    return re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", text) is not None and all(int(part) < 256 for part in text.split("."))
