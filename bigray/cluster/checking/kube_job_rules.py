"""What the operator refuses of a RayJob or a RayService, and what it takes and then ignores."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.kube_parts import Spec, dig, items
from bigray.cluster.checking.kube_pod_rules import pod_mistakes
from bigray.cluster.checking.nearest import unknown
from bigray.cluster.checking.runtime_env import entrypoint_resource_fault
from bigray.cluster.checking.shapes import Mistake

SELECTOR = "ray.io/cluster"
TIMEOUT_ANNOTATION = "ray.io/initializing-timeout"
SERVE_PORT = 8000
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
COMMANDS = (
    *("autoscale", "compress", "data", "delete", "deploy", "explain", "keys", "plan", "predict", "rollback", "run"),
    *("show", "status", "top", "trace", "train", "tune", "verify", "versions"),
)
"""Commands of bigray that a job may run; a test holds them against the command line."""


def job_mistakes(spec: Spec, path: Path, *, house: bool = True) -> Iterator[Mistake]:
    """A RayJob's own rules; those of its cluster are elsewhere."""
    yield from _cluster_choice(spec, path)
    yield from _mode_mistakes(spec, path)
    yield from _lifetime_mistakes(spec, path)
    yield from _deletion_mistakes(spec, path)
    template = spec.get("submitterPodTemplate")
    if template is not None:
        yield from pod_mistakes(template, (*path, "submitterPodTemplate"))
        if dig(template, "spec", "restartPolicy") == "Always":
            yield (*path, "submitterPodTemplate", "spec", "restartPolicy"), "a submitter ends; use Never or OnFailure"
    resources = spec.get("entrypointResources")
    if isinstance(resources, str) and (fault := entrypoint_resource_fault(resources)):
        yield (*path, "entrypointResources"), fault
    if isinstance(spec.get("entrypoint"), str):
        yield from _entrypoint_mistakes(spec["entrypoint"], (*path, "entrypoint"), house)


def _cluster_choice(spec: Spec, path: Path) -> Iterator[Mistake]:
    selector = spec.get("clusterSelector")
    if not selector:
        if "rayClusterSpec" not in spec:
            yield path, "needs 'rayClusterSpec', or 'clusterSelector' for a cluster that is there"
        return
    where: Path = (*path, "clusterSelector")
    if not selector.get(SELECTOR):
        yield where, f"needs the cluster's name under '{SELECTOR}'"
    if "rayClusterSpec" in spec:
        yield where, "does not go with 'rayClusterSpec', which makes a cluster of its own; keep one"
    if spec.get("suspend") is True:
        yield (*path, "suspend"), "does not go with 'clusterSelector'"
    if (spec.get("backoffLimit") or 0) > 0:
        yield (*path, "backoffLimit"), "does not go with 'clusterSelector': a retry makes a new cluster"
    if spec.get("submissionMode") == "SidecarMode":
        yield (*path, "submissionMode"), "SidecarMode does not go with 'clusterSelector'"


def _mode_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    mode = spec.get("submissionMode", "K8sJobMode")
    template = spec.get("submitterPodTemplate")
    for key in ("submitterPodTemplate", "submitterConfig"):
        if key in spec and mode != "K8sJobMode":
            yield (*path, key), f"is of K8sJobMode, submissionMode is {mode}"
    if mode == "InteractiveMode" and (spec.get("backoffLimit") or 0) > 0:
        yield (*path, "backoffLimit"), "does not go with InteractiveMode, in which you submit the job yourself"
    if mode == "SidecarMode":
        policy = dig(spec, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
        if policy not in (None, "Never") and dig(spec, "rayClusterSpec", "autoscalerOptions", "version") != "v2":
            place = (*path, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
            yield place, "has to be Never in SidecarMode"
    has_command = any(container.get("command") for _, container in items(template, "spec", "containers"))
    if mode != "InteractiveMode" and not str(spec.get("entrypoint", "")).strip() and not has_command:
        yield path, "'entrypoint' is required, such as: bigray run job.toml --set storage=s3://bucket/runs"


def _lifetime_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    ends = spec.get("shutdownAfterJobFinishes") is True
    if spec.get("suspend") is True and not ends and not spec.get("clusterSelector"):
        yield (*path, "suspend"), "needs shutdownAfterJobFinishes: true"
    if (spec.get("ttlSecondsAfterFinished") or 0) > 0 and not ends:
        yield (*path, "ttlSecondsAfterFinished"), "needs shutdownAfterJobFinishes: true"
    whole, before = spec.get("activeDeadlineSeconds"), spec.get("preRunningDeadlineSeconds")
    if whole is not None and before is not None and before >= whole:
        yield (*path, "preRunningDeadlineSeconds"), f"{before} is not less than activeDeadlineSeconds, {whole}"


def _deletion_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    strategy = spec.get("deletionStrategy")
    if not isinstance(strategy, dict):
        return
    where: Path = (*path, "deletionStrategy")
    old = [key for key in ("onSuccess", "onFailure") if key in strategy]
    if "deletionRules" in strategy:
        if old:
            yield (*where, old[0]), "does not go with 'deletionRules'; keep one"
        elif spec.get("shutdownAfterJobFinishes") is True:
            yield (*where, "deletionRules"), "do not go with shutdownAfterJobFinishes: true; keep one"
        yield from _rule_mistakes(spec, (*where, "deletionRules"))
    elif len(old) < 2:
        yield where, "needs 'deletionRules', or both 'onSuccess' and 'onFailure'"
    else:
        for key in old:
            policy = dig(strategy, key, "policy")
            if policy is None:
                yield (*where, key), "'policy' is required, but missing"
            elif policy == "DeleteNone" and spec.get("shutdownAfterJobFinishes") is True:
                yield (*where, key, "policy"), "DeleteNone does not go with shutdownAfterJobFinishes: true"
            elif fault := _policy_fault(policy, spec):
                yield (*where, key, "policy"), fault


def _policy_fault(policy: Any, spec: Spec) -> str | None:
    if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
        return f"{policy} does not go with 'clusterSelector', whose cluster is not the job's"
    if policy == "DeleteWorkers" and dig(spec, "rayClusterSpec", "enableInTreeAutoscaling") is True:
        return "DeleteWorkers does not go with the autoscaler, which would bring them back"
    return None


def _rule_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    delays: dict[str, dict[str, tuple[int, int]]] = {}
    for index, rule in items(spec, "deletionStrategy", "deletionRules"):
        policy, condition = rule.get("policy"), rule.get("condition") or {}
        state = condition.get("jobStatus") or condition.get("jobDeploymentStatus")
        where: Path = (*path, index)
        if fault := _policy_fault(policy, spec):
            yield (*where, "policy"), fault
        if "condition" in rule and state is None:
            yield (*where, "condition"), "needs 'jobStatus' or 'jobDeploymentStatus'"
        if policy is None or state is None:
            continue
        known = delays.setdefault(state, {})
        if policy in known:
            yield (*where, "policy"), f"{policy} after {state} is there twice, see deletionRules[{known[policy][0]}]"
        known.setdefault(policy, (index, condition.get("ttlSeconds", 0)))
    for state, known in delays.items():
        order = [(policy, *known[policy]) for policy in _ORDER if policy in known]
        for (earlier, _, least_s), (policy, index, delay_s) in pairwise(order):
            if delay_s < least_s:
                place = (*path, index, "condition", "ttlSeconds")
                yield place, f"{policy} after {state} comes at {delay_s} s, before {earlier} at {least_s} s"


def _entrypoint_mistakes(entrypoint: str, path: Path, house: bool) -> Iterator[Mistake]:
    """A command of bigray that is none, and results on a pod's own disk."""
    try:
        words = shlex.split(entrypoint, comments=True)
    except ValueError as error:
        yield path, f"is no shell command: {str(error).lower()}"
        return
    start = next((index for index, word in enumerate(words) if word.rsplit("/", 1)[-1] == "bigray"), None)
    if start is None or not house:
        return
    command = words[start + 1] if start + 1 < len(words) else ""
    if not command.startswith("-") and command not in COMMANDS:
        yield path, f"`bigray {command}`: '{command}' {unknown(command, COMMANDS).replace('a key', 'a command')}"
        return
    for word in words[start:]:
        found = re.fullmatch(r"(?:--set=)?storage=(.*)", word)
        if found and "://" not in found[1] and not found[1].startswith("/"):
            yield path, f"storage={found[1]} is on the pod's own disk and gone with it; use s3://... or a volume's path"


def service_mistakes(spec: Spec, path: Path, annotations: Mapping[str, Any], serve: Any = None) -> Iterator[Mistake]:
    """A RayService's own rules; `serve` is its Serve configuration, already read."""
    if not str(spec.get("serveConfigV2", "")).strip():
        yield path, "'serveConfigV2' is required, without it nothing is served"
    name = dig(spec, "rayClusterConfig", "headGroupSpec", "headService", "metadata", "name")
    if name:
        yield (
            (*path, "rayClusterConfig", "headGroupSpec", "headService", "metadata", "name"),
            "is not taken in a RayService, which has a head for each upgrade; remove it",
        )
    if fault := _timeout_fault(annotations.get(TIMEOUT_ANNOTATION)):
        yield ("metadata", "annotations", TIMEOUT_ANNOTATION), fault
    yield from _upgrade_mistakes(spec, path)
    yield from _port_mistakes(spec, path, serve)


def _timeout_fault(value: Any) -> str | None:
    if value in (None, ""):
        return None
    if not re.fullmatch(r"\d+|(\d+(\.\d+)?(ns|us|ms|s|m|h))+", str(value)):
        return f"takes a time such as 5m, 1h or a number of seconds, got '{value}'"
    return None if re.search(r"[1-9]", str(value)) else f"has to be more than 0, got '{value}'"


def _upgrade_mistakes(spec: Spec, path: Path) -> Iterator[Mistake]:
    strategy = spec.get("upgradeStrategy") or {}
    where: Path = (*path, "upgradeStrategy")
    options = strategy.get("clusterUpgradeOptions")
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        if options is not None and "type" in strategy:
            yield (*where, "clusterUpgradeOptions"), "goes with type: NewClusterWithIncrementalUpgrade"
        return
    if options is None:
        yield where, "'clusterUpgradeOptions' is required with NewClusterWithIncrementalUpgrade"
        return
    if dig(spec, "rayClusterConfig", "enableInTreeAutoscaling") is not True:
        yield (*where, "type"), "needs rayClusterConfig.enableInTreeAutoscaling: true"
    step, surge = options.get("stepSizePercent"), options.get("maxSurgePercent", 100)
    if step is not None and step > surge:
        yield (*where, "clusterUpgradeOptions", "stepSizePercent"), f"{step} is more than maxSurgePercent, {surge}"


def _port_mistakes(spec: Spec, path: Path, serve: Any) -> Iterator[Mistake]:
    """Serve's port in its configuration against the port that the pods name `serve`, which the Service sends to."""
    listens = dig(serve, "http_options", "port")
    if listens is None:
        listens = SERVE_PORT
    if isinstance(listens, bool) or not isinstance(listens, int) or listens == 0:
        return
    config: Path = (*path, "rayClusterConfig")
    named = [
        ((*config, "headGroupSpec", "template", "spec", "containers", index, "ports", number, "containerPort"), port)
        for index, container in items(spec, "rayClusterConfig", "headGroupSpec", "template", "spec", "containers")
        for number, port in items(container, "ports")
        if port.get("name") == "serve"
    ]
    for place, port in named:
        found = port.get("containerPort")
        if found is not None and found != listens:
            yield place, f"the port named 'serve' is {found}, and Serve listens on {listens} (http_options.port)"
    if not named and listens != SERVE_PORT:
        yield (
            (*path, "serveConfigV2"),
            f"Serve listens on {listens}, and the Service sends to 8000 unless the head's container has a port named "
            f"'serve'; add one",
        )
