"""What the operator refuses of a cluster's larger options: fault tolerance, network policy, TLS, history server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.kube_parts import Spec, dig, env_names, groups, head_container, items
from bigray.cluster.checking.shapes import Mistake
from bigray.errors import did_you_mean

FT_ANNOTATION = "ray.io/ft-enabled"
_NOW_AN_OPTION = {
    "redis-password": "redisPassword",
    "REDIS_PASSWORD": "redisPassword",
    "RAY_REDIS_ADDRESS": "redisAddress",
    "ray.io/external-storage-namespace": "externalStorageNamespace",
}
"""Parameters, variables and annotations of the head, and the options that took their place."""
_TLS_VARIABLES = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def fault_tolerance_mistakes(spec: Spec, path: Path, annotations: Mapping[str, Any]) -> Iterator[Mistake]:
    """Redis named in more than one place, or in the places of older operators."""
    options = spec.get("gcsFaultToleranceOptions")
    below, head = head_container(spec)
    variables = {
        name: (*path, *below, "env", index, "name") for name, (index, _) in env_names(head).items()
    }  # fmt: skip
    params = {
        name: (*path, "headGroupSpec", "rayStartParams", name)
        for name, value in (dig(spec, "headGroupSpec", "rayStartParams") or {}).items()
        if value
    }
    named = variables | params
    for name in ("redis-username", "REDIS_USERNAME"):
        if name in named:
            yield named[name], "is not taken here; use gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables and str(annotations.get(FT_ANNOTATION, "")).lower() != "true":
            yield named["RAY_REDIS_ADDRESS"], "needs 'gcsFaultToleranceOptions'; use its redisAddress instead"
        return
    named |= {name: ("metadata", "annotations", name) for name, value in annotations.items() if value}
    for name, instead in _NOW_AN_OPTION.items():
        if name in named:
            yield named[name], f"is not taken here; use gcsFaultToleranceOptions.{instead}"
    if FT_ANNOTATION in named:
        yield named[FT_ANNOTATION], "excludes 'gcsFaultToleranceOptions'; remove the annotation"
    yield from _backend_mistakes(options, (*path, "gcsFaultToleranceOptions"))


def _backend_mistakes(options: Spec, path: Path) -> Iterator[Mistake]:
    if options.get("backend", "redis") == "redis":
        if "storage" in options:
            yield (*path, "storage"), "goes with backend: rocksdb"
        if "redisAddress" not in options:
            yield path, "'redisAddress' is required with Redis, such as redis:6379"
        return
    for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if key in options:
            yield (*path, key), "does not go with backend: rocksdb"
    storage = options.get("storage") or {}
    for key in ("size", "storageClassName", "accessModes"):
        if "claimName" in storage and key in storage:
            yield (*path, "storage", key), "does not go with 'claimName', whose volume is as it is"


def network_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    """A network policy that counts for nothing, or keeps the pods from finding each other."""
    policy = spec.get("networkPolicy")
    if not isinstance(policy, dict):
        return
    where: Path = (*path, "networkPolicy")
    mode = policy.get("mode", "DenyAll")
    parts = [((*where, key), policy[key]) for key in ("head", "worker") if key in policy]
    parts += [((*where, "workerGroups", index), rules) for index, rules in items(policy, "workerGroups")]
    for place, rules in parts:
        for key, free in (("ingressRules", "DenyAllEgress"), ("egressRules", "DenyAllIngress")):
            if rules.get(key) and mode == free:
                yield (*place, key), f"counts for nothing with mode: {mode}, which leaves that direction open"
    yield from _policy_group_mistakes(spec, policy, path)
    if mode != "DenyAllIngress":
        own = {rules.get("groupName"): rules for _, rules in items(policy, "workerGroups")}
        names = [group.get("groupName") for _, group in items(spec, "workerGroupSpecs")]
        needs = {"head": policy.get("head")} | {
            f"worker ({name})": own.get(name, policy.get("worker")) for name in names
        }
        if cut_off := [part for part, rules in needs.items() if not _allows_names(rules)]:
            yield where, f"{cut_off[0]} needs an egress rule for port 53: without DNS no pod finds the head"


def _policy_group_mistakes(spec: Spec, policy: Spec, path: Path) -> Iterator[Mistake]:
    names = [str(group.get("groupName")) for _, group in items(spec, "workerGroupSpecs")]
    for index, rules in items(policy, "workerGroups"):
        name = rules.get("groupName")
        if name is not None and name not in names:
            place: Path = (*path, "networkPolicy", "workerGroups", index, "groupName")
            yield place, f"no worker group is called '{name}'{did_you_mean(name, names)}"
    for index, group in items(spec, "workerGroupSpecs"):
        name = str(group.get("groupName"))
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            place = (*path, "workerGroupSpecs", index, "groupName")
            yield place, f"'{name}' is part of a NetworkPolicy's name: small letters, digits and '-' only"


def _allows_names(rules: Any) -> bool:
    """Whether an egress rule lets DNS through."""
    for _, rule in items(rules, "egressRules"):
        ports = [port.get("port") for _, port in items(rule, "ports")]
        if not ports or 53 in ports or "dns" in ports:
            return True
    return False


def tls_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    """Variables that the operator sets itself where it makes the certificates."""
    if dig(spec, "tlsOptions", "enabled") is not True:
        return
    for where, _, group in groups(spec, path):
        for position, container in items(group, "template", "spec", "containers"):
            for name, (index, _) in env_names(container).items():
                if name in _TLS_VARIABLES and position == 0:
                    place = (*where, "template", "spec", "containers", position, "env", index, "name")
                    yield place, "the operator sets it with tlsOptions; remove it"
    for name, (index, _) in env_names(spec.get("autoscalerOptions")).items():
        if name in _TLS_VARIABLES:
            place = (*path, "autoscalerOptions", "env", index, "name")
            yield place, "the operator sets it with tlsOptions; remove it"


def collector_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    """What the history server's collector has to be told."""
    options = spec.get("historyServerOptions")
    if isinstance(options, dict):
        collector = options.get("collectorOptions")
        where: Path = (*path, "historyServerOptions")
        if collector is None:
            yield where, "'collectorOptions' is required, but missing"
        elif not collector.get("image"):
            yield (*where, "collectorOptions"), "'image' is required, but missing"
        elif "STORAGE_BACKEND" not in env_names(collector):
            yield (*where, "collectorOptions"), "needs STORAGE_BACKEND in its 'env'"
