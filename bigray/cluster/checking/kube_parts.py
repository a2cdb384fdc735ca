"""Ways into a manifest whose keys and types have been checked: what had a fault is not there, or None in a list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Path

Spec = dict[str, Any]


def dig(value: Any, *keys: str) -> Any:
    """The value below some keys, or None where one is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def items(value: Any, *keys: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The mappings of a list below some keys, by index; what had a fault of its own is left out."""
    found = dig(value, *keys)
    for index, item in enumerate(found if isinstance(found, list) else ()):
        if isinstance(item, dict):
            yield index, item


def containers(template: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All containers of a pod template with their paths below it."""
    for kind in ("initContainers", "containers"):
        for index, container in items(template, "spec", kind):
            yield ("spec", kind, index), container


def env_names(container: Any) -> dict[str, tuple[int, Any]]:
    """Name -> (index, literal value or None) of a container's variables."""
    return {item["name"]: (index, item.get("value")) for index, item in items(container, "env") if "name" in item}


def groups(spec: Spec, path: Path) -> Iterator[tuple[Path, str, Spec]]:
    """The head group and the worker groups, each with its path and what to call it."""
    if isinstance(spec.get("headGroupSpec"), dict):
        yield (*path, "headGroupSpec"), "head", spec["headGroupSpec"]
    for index, group in items(spec, "workerGroupSpecs"):
        yield (*path, "workerGroupSpecs", index), str(group.get("groupName", index)), group


def head_container(spec: Spec) -> tuple[Path, Spec]:
    """Ray's own container of the head, which is the first, and its path below the spec."""
    found = dig(spec, "headGroupSpec", "template", "spec", "containers")
    container = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}
    return ("headGroupSpec", "template", "spec", "containers", 0), container
