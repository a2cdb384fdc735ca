"""What the rules for `ray up` files ask of a document, whatever types its values have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.yaml_file import Document

CLOUDS = ("aws", "gcp")
OTHER_PROVIDERS = (
    "azure",
    "aliyun",
    "vsphere",
    "spark",
    "kuberay",
    "external",
    "readonly",
    "fake_multinode",
    "fake_multinode_docker",
)
"""Of those that make machines; `local` is for machines that are there."""


def mapping(value: Any) -> dict[Any, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is an integer and no flag."""
    return isinstance(value, int) and not isinstance(value, bool)


def at(value: Any, path: Sequence[str | int]) -> Any:
    """What stands at a path of keys; None where a part of it is missing."""
    for step in path:
        value = mapping(value).get(step)
    return value


def provider_of(document: Document) -> str:
    """`aws`, `gcp`, `local`, ..."""
    return str(at(document.value, ("provider", "type")))


def node_types(document: Document) -> dict[Any, Any]:
    """`available_node_types`."""
    return mapping(document.value.get("available_node_types"))


def is_head(document: Document, name: str) -> bool:
    """Whether this node type is the head's."""
    return bool(document.value.get("head_node_type") == name)


def is_worker(document: Document, name: str) -> bool:
    """Whether this node type is a worker's; False where the file does not tell which one is the head's."""
    head = document.value.get("head_node_type")
    return isinstance(head, str) and head in node_types(document) and head != name


def storage_of(document: Document) -> str:
    """Where runs are kept, as `metadata.storage` tells; empty where it does not."""
    return str(at(document.value, ("metadata", "storage")) or "")


def too_large(document: Document, name: str, cpus: int | None, gpus: int | None) -> Iterator[Fault]:
    """Where a node type's `resources` promise more than its machine has; None where that is not known."""
    path: Path = ("available_node_types", name, "resources")
    for resource, has in (("CPU", cpus), ("GPU", gpus)):
        asked = at(document.value, (*path, resource))
        if has is not None and is_whole(asked) and asked > has:
            yield document.fault((*path, resource), f"is {asked}, the machine has {has}")
