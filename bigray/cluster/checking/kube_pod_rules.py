"""What does not go together inside one pod: the API server, the kubelet or Ray would refuse it or take it amiss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.kube_parts import containers, dig, items
from bigray.cluster.checking.shapes import Mistake, amount
from bigray.errors import did_you_mean

LEAST_MEMORY = 2**20
DEFAULT_GRACE_S = 30
LONGEST_PORT_NAME = 15


def pod_mistakes(template: Any, path: Path) -> Iterator[Mistake]:
    """Everything that does not fit together in one pod template."""
    yield from _names_twice(template, path)
    volumes = volume_names(template)
    if volumes == set() and any(container.get("volumeMounts") for _, container in containers(template)):
        yield (*path, "spec"), "'volumes' is missing, and containers mount some"
        volumes = None
    for below, container in containers(template):
        where = (*path, *below)
        yield from mount_mistakes(container, where, volumes)
        yield from _port_mistakes(container, where)
        yield from _environment_mistakes(container, where)
        yield from resource_mistakes(container.get("resources"), (*where, "resources"))
    yield from _user_mistakes(template, path)
    yield from _ending_mistakes(template, path)
    for index, toleration in items(template, "spec", "tolerations"):
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            yield (*path, "spec", "tolerations", index, "value"), "goes with operator: Equal; Exists takes no value"


def _names_twice(template: Any, path: Path) -> Iterator[Mistake]:
    for kind in ("containers", "initContainers", "volumes"):
        seen: set[str] = set()
        for index, item in items(template, "spec", kind):
            name = item.get("name")
            if name in seen:
                yield (*path, "spec", kind, index, "name"), f"'{name}' is there twice; give each its own name"
            seen.add(str(name))


def mount_mistakes(container: Mapping[str, Any], path: Path, volumes: set[str] | None) -> Iterator[Mistake]:
    """Two mounts at one place, and mounts of a volume that the pod does not have (not looked for without `volumes`)."""
    places: set[str] = set()
    for index, mount in items(container, "volumeMounts"):
        name, place = mount.get("name"), mount.get("mountPath")
        if volumes is not None and name is not None and name not in volumes:
            hint = did_you_mean(str(name), volumes) if volumes else "; add it under 'volumes'"
            yield (*path, "volumeMounts", index, "name"), f"the pod has no volume '{name}'{hint}"
        if place in places:
            yield (*path, "volumeMounts", index, "mountPath"), f"'{place}' is mounted twice; remove one"
        places.add(str(place))


def volume_names(template: Any) -> set[str] | None:
    """Names of a pod's volumes; None where one is not known, since it or its name had a fault of its own."""
    found = dig(template, "spec", "volumes") or []
    names = [dig(volume, "name") for volume in found]
    return None if None in names else set(names)


def _port_mistakes(container: Mapping[str, Any], path: Path) -> Iterator[Mistake]:
    names: set[str] = set()
    for index, port in items(container, "ports"):
        name = str(port.get("name", ""))
        if len(name) > LONGEST_PORT_NAME:
            yield (*path, "ports", index, "name"), f"'{name}' has {len(name)} characters, at most 15 are taken"
        if name and name in names:
            yield (*path, "ports", index, "name"), f"'{name}' is there twice; give each port its own name"
        names.add(name)
    for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
        for way in ("httpGet", "tcpSocket"):
            port = dig(container, kind, way, "port")
            if isinstance(port, str) and port not in names:
                yield (*path, kind, way, "port"), f"the container has no port named '{port}'"


def _environment_mistakes(container: Mapping[str, Any], path: Path) -> Iterator[Mistake]:
    seen: set[str] = set()
    for index, variable in items(container, "env"):
        name = str(variable.get("name"))
        if name in seen:
            yield (*path, "env", index, "name"), f"'{name}' is there twice, and the last one counts; remove one"
        seen.add(name)


def resource_mistakes(resources: Any, path: Path) -> Iterator[Mistake]:
    """Requests above limits, devices in part or without a limit, and memory of less than a megabyte."""
    limits, requests = dig(resources, "limits") or {}, dig(resources, "requests") or {}
    for kind, table in (("limits", limits), ("requests", requests)):
        for name, value in table.items():
            if name == "memory" and 0 < amount(value) < LEAST_MEMORY:
                yield (*path, kind, name), f"{value} is {amount(value):g} bytes; write {_as_memory(value)}"
            elif "/" in name and amount(value) % 1:
                yield (*path, kind, name), f"devices are whole, got {value}"
    for name, value in requests.items():
        if message := _request_fault(name, value, limits.get(name)):
            yield (*path, "requests", name), message


def _request_fault(name: str, value: Any, limit: Any) -> str | None:
    is_device = "/" in name
    if limit is None:
        return "a device needs a limit too; add it under 'limits'" if is_device else None
    if name == "memory" and min(amount(limit), amount(value)) < LEAST_MEMORY:
        return None  # told already
    if is_device and amount(value) != amount(limit):
        return f"{value} is not the limit, {limit}; devices need both equal"
    return f"{value} is more than the limit, {limit}" if amount(value) > amount(limit) else None


def _as_memory(value: Any) -> str:
    number = str(value).rstrip("mKk")
    return f"{number}Mi" if str(value).endswith("m") else f"{number}Gi"


def _user_mistakes(template: Any, path: Path) -> Iterator[Mistake]:
    message = "0 is root, and runAsNonRoot is set, so that the pod cannot start; Ray's images have user 1000"
    pod = dig(template, "spec", "securityContext") or {}
    if _is_root_and_not(pod):
        yield (*path, "spec", "securityContext", "runAsUser"), message
    for below, container in containers(template):
        own = container.get("securityContext") or {}
        if {"runAsUser", "runAsNonRoot"} & set(own) and _is_root_and_not({**pod, **own}):
            yield (*path, *below, "securityContext"), f"runAsUser: {message}"


def _is_root_and_not(context: Mapping[str, Any]) -> bool:
    return context.get("runAsNonRoot") is True and context.get("runAsUser") == 0


def _ending_mistakes(template: Any, path: Path) -> Iterator[Mistake]:
    grace = dig(template, "spec", "terminationGracePeriodSeconds")
    grace_s = DEFAULT_GRACE_S if grace is None else grace
    for index, container in items(template, "spec", "containers"):
        hook = dig(container, "lifecycle", "preStop")
        command = " ".join(str(word) for word in dig(hook, "exec", "command") or ())
        slept = [int(seconds) for seconds in re.findall(r"\bsleep (\d+)\b", command)]
        pause_s = sum(slept) + (dig(hook, "sleep", "seconds") or 0)
        if pause_s and pause_s >= grace_s:
            where: Path = (*path, "spec", "containers", index, "lifecycle", "preStop")
            yield where, f"waits {pause_s} s, and terminationGracePeriodSeconds, {grace_s}, ends the pod before"
