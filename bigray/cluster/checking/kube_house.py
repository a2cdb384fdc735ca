"""What KubeRay takes and bigray does not: secrets in clear, images that move, heads without a token, privileges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.kube_parts import Spec, containers, dig, env_names, groups, head_container, items
from bigray.cluster.checking.kube_rules import token_is_on
from bigray.cluster.checking.secret_values import is_placeholder, is_secret
from bigray.cluster.checking.shapes import Mistake, amount
from bigray.cluster.checking.versions import image_fault, parse_image, ray_version_fault

IN_CLEAR = "is a secret in clear; make a Secret with kubectl and name it in valueFrom.secretKeyRef"
_EVERYWHERE = ("0.0.0.0", "::")


def house_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    """bigray's own rules for one cluster's spec."""
    yield from _version_mistakes(spec, path)
    yield from _open_head_mistakes(spec, path)
    for where, _, group in groups(spec, path):
        template: Path = (*where, "template")
        yield from pod_house_mistakes(group.get("template"), template, spec)
        own = dig(group, "template", "spec", "containers")
        if own and isinstance(own[0], dict):
            yield from _ray_memory_mistakes(own[0], (*template, "spec", "containers", 0))
    yield from _secret_variables(spec.get("autoscalerOptions"), (*path, "autoscalerOptions"))
    collector = dig(spec, "historyServerOptions", "collectorOptions")
    yield from _secret_variables(collector, (*path, "historyServerOptions", "collectorOptions"))
    for key in ("redisPassword", "redisUsername"):
        value = dig(spec, "gcsFaultToleranceOptions", key, "value")
        if value and key == "redisPassword" and not is_placeholder(value):
            yield (*path, "gcsFaultToleranceOptions", key, "value"), IN_CLEAR
    password = dig(spec, "headGroupSpec", "rayStartParams", "redis-password")
    if isinstance(password, str) and password and not is_placeholder(password):
        yield (*path, "headGroupSpec", "rayStartParams", "redis-password"), IN_CLEAR


def _version_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    """`rayVersion` against constraints.txt; images are compared with it elsewhere, and told here only without it."""
    named = spec.get("rayVersion")
    if isinstance(named, str):
        images = {image for image in _ray_versions(spec) if image}
        fault = ray_version_fault(named)
        if fault and (not images or images == {named}):  # else it is told that they differ
            yield (*path, "rayVersion"), fault


def _ray_versions(spec: Spec) -> Iterator[str | None]:
    for _, _, group in groups(spec, ()):
        own = dig(group, "template", "spec", "containers")
        image = own[0].get("image") if own and isinstance(own[0], dict) else None
        yield parse_image(image).ray if isinstance(image, str) else None


def _open_head_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    """Without a token whoever reaches the dashboard's port runs code. The operator listens on all addresses."""
    if token_is_on(spec):
        return
    _, head = head_container(spec)
    if env_names(head).get("RAY_AUTH_MODE", (0, None))[1] == "token":
        return
    way_out = "whoever reaches the head runs code there; set authOptions: {mode: token}"
    params = dig(spec, "headGroupSpec", "rayStartParams") or {}
    if dig(spec, "authOptions", "mode") == "disabled":
        yield (*path, "authOptions", "mode"), f"without a token {way_out}"
    elif params.get("dashboard-host") in _EVERYWHERE:
        yield (
            (*path, "headGroupSpec", "rayStartParams", "dashboard-host"),
            f"listens on all addresses without a token: {way_out}",
        )
    elif "dashboard-host" not in params:
        yield path, f"has no 'authOptions', and without a token {way_out}"


def pod_house_mistakes(template: Any, path: Path, spec: Spec | None = None) -> Iterator[Mistake]:
    """bigray's own rules for any pod template."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if dig(template, "spec", key) is True:
            yield (*path, "spec", key), "shares the node with the pod; remove it"
    yield from _privileges(dig(template, "spec", "securityContext"), (*path, "spec", "securityContext"))
    for index, volume in items(template, "spec", "volumes"):
        if "hostPath" in volume:
            yield (
                (*path, "spec", "volumes", index, "hostPath"),
                "is a folder of whichever node the pod is on; use a claim",
            )
    for below, container in containers(template):
        where = (*path, *below)
        yield from _image_mistakes(container, where, spec or {})
        yield from _secret_variables(container, where)
        yield from _privileges(container.get("securityContext"), (*where, "securityContext"))
        yield from _memory_mistakes(container.get("resources"), (*where, "resources"))


def _image_mistakes(container: Spec, path: Path, spec: Spec) -> Iterator[Mistake]:
    image = container.get("image")
    if not isinstance(image, str):
        return
    fault = image_fault(image)
    ray = parse_image(image).ray
    is_of_its_ray = ray is not None and fault is not None and fault.endswith(ray_version_fault(ray) or "\0")
    if fault and not (is_of_its_ray and spec.get("rayVersion")):  # with rayVersion, its Ray is compared with that
        yield (*path, "image"), fault


def _secret_variables(container: Any, path: Path) -> Iterator[Mistake]:
    for name, (index, value) in env_names(container).items():
        if is_secret(name, value):
            yield (*path, "env", index, "value"), f"{name} {IN_CLEAR}"


def _privileges(context: Any, path: Path) -> Iterator[Mistake]:
    if not isinstance(context, dict):
        return
    if context.get("privileged") is True:
        yield (*path, "privileged"), "makes the container root on its node; remove it"
    elif context.get("allowPrivilegeEscalation") is True:
        yield (*path, "allowPrivilegeEscalation"), "lets a process become root; set it to false"
    if context.get("runAsNonRoot") is False:
        yield (*path, "runAsNonRoot"), "lets the container run as root; set it to true (Ray's images have user 1000)"
    elif context.get("runAsUser") == 0 and context.get("runAsNonRoot") is not True:
        yield (*path, "runAsUser"), "0 is root; Ray's images have user 1000"
    for index, name in enumerate(dig(context, "capabilities", "add") or ()):
        if name in ("ALL", "SYS_ADMIN", "CAP_SYS_ADMIN"):
            yield (*path, "capabilities", "add", index), f"{name} makes the container root on its node; remove it"


def _memory_mistakes(resources: Any, path: Path) -> Iterator[Mistake]:
    request, limit = dig(resources, "requests", "memory"), dig(resources, "limits", "memory")
    if request is None or limit is None:
        return
    if 2**20 <= amount(request) < amount(limit):
        yield (
            (*path, "requests", "memory"),
            f"{request} is not the limit, {limit}: a node may not have what Ray counts on; make both equal",
        )


def _ray_memory_mistakes(container: Spec, path: Path) -> Iterator[Mistake]:
    resources = container.get("resources") or {}
    if "memory" not in (resources.get("limits") or {}):
        below = ("resources", "limits") if "limits" in resources else ("resources",) if resources else ()
        yield (
            (*path, *below),
            "Ray's container needs a limit for 'memory': without one Ray counts on all that its node has",
        )
