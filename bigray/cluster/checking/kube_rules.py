"""What KubeRay's operator refuses of a cluster although every key is right, and what it takes and then ignores.

The rules are those of the operator's own validation (1.4 to 1.7), told by place. They run on a spec whose keys and
types have been checked: what had a fault is gone from it, so that no mistake is told twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.kube_option_rules import (
    collector_mistakes,
    fault_tolerance_mistakes,
    network_mistakes,
    tls_mistakes,
)
from bigray.cluster.checking.kube_parts import Spec, dig, env_names, groups, head_container, items
from bigray.cluster.checking.kube_pod import LABEL, LABEL_KEY
from bigray.cluster.checking.kube_pod_rules import mount_mistakes, pod_mistakes, resource_mistakes, volume_names
from bigray.cluster.checking.kube_start_params import start_param_mistakes
from bigray.cluster.checking.shapes import Mistake
from bigray.cluster.checking.versions import parse_image

AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
TOKEN_SINCE, K8S_TOKEN_SINCE, PRIORITY_SINCE, V2_SINCE = (2, 52), (2, 55), (2, 56), (2, 47)
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def version_of(spec: Spec) -> tuple[int, int] | None:
    """Major and minor of `rayVersion`."""
    found = re.match(r"(\d+)\.(\d+)", str(spec.get("rayVersion", "")))
    return (int(found[1]), int(found[2])) if found else None


def cluster_mistakes(spec: Spec, path: Path, annotations: Mapping[str, Any]) -> Iterator[Mistake]:
    """Everything about one cluster's spec; `annotations` are those of the object around it."""
    for where, _, group in groups(spec, path):
        yield from _group_mistakes(group, where)
    yield from _worker_mistakes(spec, path)
    yield from fault_tolerance_mistakes(spec, path, annotations)
    yield from _autoscaler_mistakes(spec, path)
    yield from _token_mistakes(spec, path)
    yield from network_mistakes(spec, path)
    yield from tls_mistakes(spec, path)
    yield from collector_mistakes(spec, path)
    yield from _image_mistakes(spec, path)


def _group_mistakes(group: Spec, path: Path) -> Iterator[Mistake]:
    template = group.get("template")
    if template is not None and not dig(template, "spec", "containers"):
        yield (*path, "template", "spec"), "has no container; the first one is Ray's"
    yield from pod_mistakes(template, (*path, "template"))
    params = group.get("rayStartParams") or {}
    if "labels" in params:
        yield (*path, "rayStartParams", "labels"), "is not taken here; use the group's own 'labels'"
    yield from start_param_mistakes({name: value for name, value in params.items() if name != "labels"},
                                    (*path, "rayStartParams"))  # fmt: skip
    both = next((name for name in _RESOURCE_PARAMS if params.get(name)), None)
    if both and group.get("resources"):
        yield (*path, "resources"), f"rayStartParams has '{both}' too; name resources in one of the two"
    for key, value in (group.get("labels") or {}).items():
        if not re.fullmatch(LABEL_KEY, key):
            yield (*path, "labels", key), f"'{key}' is not a label's key: letters, digits, '-', '_', '.', one '/'"
        elif not re.fullmatch(str(LABEL.pattern), value):
            yield (*path, "labels", key), f"'{value}' is not {LABEL.hint}"


def _worker_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    seen: dict[str, int] = {}
    for index, group in items(spec, "workerGroupSpecs"):
        where: Path = (*path, "workerGroupSpecs", index)
        name = group.get("groupName")
        if name in seen:
            yield (*where, "groupName"), f"'{name}' is also that of workerGroupSpecs[{seen[name]}]; give it another"
        elif name is not None:
            seen[name] = index
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if low > high:
            yield (*where, "minReplicas"), f"{low} is more than maxReplicas, {high}"
        elif "replicas" in group and not low <= group["replicas"] <= high:
            yield (
                (*where, "replicas"),
                f"{group['replicas']} is not between minReplicas, {low}, and maxReplicas, {high}",
            )
        if group.get("suspend") is True:
            yield (*where, "suspend"), "is for the operator alone; set replicas and minReplicas to 0 instead"
        yield from _v2_only(spec, group, where)


def _v2_only(spec: Spec, group: Spec, path: Path) -> Iterator[Mistake]:
    """Keys of a group that only the second autoscaler reads."""
    if group.get("idleTimeoutSeconds") is not None and not _has_v2(spec):
        yield (*path, "idleTimeoutSeconds"), "is only read by autoscaler v2; set autoscalerOptions.version: v2"
    if group.get("priority"):
        version = version_of(spec)
        if version is not None and version < PRIORITY_SINCE:
            yield (*path, "priority"), f"needs Ray 2.56 or newer, rayVersion is {spec['rayVersion']}"
        elif not _has_v2(spec):
            yield (*path, "priority"), "is only read by autoscaler v2; set autoscalerOptions.version: v2"


def _has_v2(spec: Spec) -> bool:
    version = dig(spec, "autoscalerOptions", "version")
    if version is not None:
        return bool(version == "v2")
    _, value = env_names(head_container(spec)[1]).get(AUTOSCALER_V2, (0, None))
    ray = version_of(spec)
    return value in ("1", "true") or (ray is not None and ray >= V2_SINCE)


def _autoscaler_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    is_on = spec.get("enableInTreeAutoscaling") is True
    options = spec.get("autoscalerOptions") or {}
    below, head = head_container(spec)
    number, value = env_names(head).get(AUTOSCALER_V2, (None, None))
    switch: Path = (*path, *below, "env", number or 0)
    if number is not None and not is_on and value in ("1", "true"):
        yield switch, "the autoscaler is off; set enableInTreeAutoscaling: true"
    if number is not None and is_on and "version" in options:
        yield switch, "is set by autoscalerOptions.version; remove one of the two"
    if options and not is_on:
        yield (*path, "autoscalerOptions"), "is not read while the autoscaler is off; set enableInTreeAutoscaling: true"
    if options.get("version") == "v2" and is_on:
        for where, name, group in groups(spec, path):
            if dig(group, "template", "spec", "restartPolicy") not in (None, "Never"):
                yield (*where, "template", "spec", "restartPolicy"), f"has to be Never for autoscaler v2 ({name} group)"
    for index, variable in items(options, "env"):
        if variable.get("name") == "KUBERAY_GEN_AUTOSCALER_START_CMD":
            yield (*path, "autoscalerOptions", "env", index, "name"), "the operator sets it; remove it"
    volumes = volume_names(dig(spec, "headGroupSpec", "template"))
    yield from mount_mistakes(options, (*path, "autoscalerOptions"), volumes)
    yield from resource_mistakes(options.get("resources"), (*path, "autoscalerOptions", "resources"))


def token_is_on(spec: Spec) -> bool:
    """Whether the operator turns token authentication on."""
    options = spec.get("authOptions")
    return isinstance(options, dict) and options.get("mode", "token") == "token"


def _token_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    options = spec.get("authOptions") or {}
    where: Path = (*path, "authOptions")
    by_kubernetes = options.get("enableK8sTokenAuth") is True
    if not token_is_on(spec):
        if by_kubernetes:
            yield (*where, "enableK8sTokenAuth"), "needs authOptions.mode: token"
        return
    version = version_of(spec)
    if version is None:
        yield path, "'rayVersion' is required with authOptions.mode: token"
    elif version < TOKEN_SINCE:
        yield (*path, "rayVersion"), f"token authentication needs Ray 2.52 or newer, got {spec['rayVersion']}"
    elif by_kubernetes and version < K8S_TOKEN_SINCE:
        yield (*where, "enableK8sTokenAuth"), f"needs Ray 2.55 or newer, rayVersion is {spec['rayVersion']}"
    if by_kubernetes and options.get("secretName"):
        yield (*where, "secretName"), "does not go with enableK8sTokenAuth, which uses service accounts' tokens"


def _image_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    """Images that are of another Ray or Python than the rest: workers that differ from the head cannot join."""
    found = []
    for where, _, group in groups(spec, path):
        containers = dig(group, "template", "spec", "containers")
        image = dig(containers[0], "image") if containers else None
        if isinstance(image, str):
            found.append(((*where, "template", "spec", "containers", 0, "image"), parse_image(image)))
    named = str(spec.get("rayVersion", ""))
    versions = {image.ray for _, image in found if image.ray}
    expected = named or (found[0][1].ray if found else None)
    if named and len(versions) == 1 and versions != {named}:
        yield (*path, "rayVersion"), f"{named} is not the {versions.pop()} of the images"
    else:
        for place, image in found:
            if image.ray and expected and image.ray != expected:
                yield place, f"has Ray {image.ray}, {'rayVersion' if named else 'the head'} is {expected}"
    pythons = [(place, image.python) for place, image in found if image.python]
    for place, python in pythons[1:]:
        if python != pythons[0][1]:
            ours, theirs = (".".join(map(str, version or ())) for version in (python, pythons[0][1]))
            yield place, f"has Python {ours}, the first image has {theirs}; all nodes need the same"
