"""KubeRay's manifests: RayCluster, RayJob and RayService, and the plain objects beside them.

The keys and types come first; what is wrong there is taken out, so that the rules behind see sound values only and no
mistake is told twice. Kinds that are not known (Deployments, Queues, ...) are left to the API server.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.kube_house import house_mistakes, pod_house_mistakes
from bigray.cluster.checking.kube_job_rules import job_mistakes, service_mistakes
from bigray.cluster.checking.kube_links import link_faults
from bigray.cluster.checking.kube_parts import dig
from bigray.cluster.checking.kube_rules import cluster_mistakes
from bigray.cluster.checking.kube_shapes import PLAIN_KINDS, RAY_KINDS, ray_object
from bigray.cluster.checking.runtime_env import runtime_env_mistakes
from bigray.cluster.checking.secret_values import is_placeholder
from bigray.cluster.checking.serve_config import serve_config_mistakes
from bigray.cluster.checking.shapes import Mistake, mismatches, pruned, shown
from bigray.cluster.checking.yaml_file import Document, YamlFaults, read_yaml
from bigray.errors import did_you_mean

API = "ray.io/v1"
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""Room for what the operator appends in the names of pods and services."""
_NEEDS = {
    "autoscalerOptions": "enableInTreeAutoscaling",
    "ttlSecondsAfterFinished": "shutdownAfterJobFinishes",
    "suspend": "shutdownAfterJobFinishes",
}
"""Keys that mean nothing without another one beside them."""
_CLUSTER_OF: dict[str, tuple[str, ...]] = {
    "RayCluster": (),
    "RayJob": ("rayClusterSpec",),
    "RayService": ("rayClusterConfig",),
}


def check_kube(documents: Sequence[Document], *, house: bool = True) -> Iterator[Fault]:
    """Faults of a file of manifests, each with its line.

    Without `house` only what Kubernetes or the operator refuses or ignores, not what bigray asks for beyond it.
    """
    told: set[tuple[int | None, str, str]] = set()
    faults = [fault for document in documents for fault in _object_faults(document, house)]
    for fault in (*faults, *link_faults(documents, house=house)):
        key = (fault.line, fault.message, re.split(r"[.\[]", fault.place)[-1])
        if key not in told:  # what an alias repeats is one mistake
            told.add(key)
            yield fault


def _object_faults(document: Document, house: bool) -> Iterator[Fault]:
    value = pruned(document.value)
    if not isinstance(value, dict):
        yield document.fault((), f"expected an object with 'apiVersion' and 'kind', got {shown(value)}")
        return
    kind, api = value.get("kind"), value.get("apiVersion")
    if fault := _kind_fault(document, kind, api):
        yield fault
    if not isinstance(kind, str):
        return
    if kind in RAY_KINDS:
        yield from _ray_object_faults(document, value, kind, house)
    elif kind in PLAIN_KINDS:
        yield from _plain_object_faults(document, value, kind, house)


def _kind_fault(document: Document, kind: Any, api: Any) -> Fault | None:
    """What is wrong with the two keys that say what an object is."""
    for key, found in (("kind", kind), ("apiVersion", api)):
        if not isinstance(found, str):
            message = f"'{key}' is required, but missing" if found is None else f"expected a text, got {shown(found)}"
            return document.fault((key,) if found is not None else (), message)
    if kind in RAY_KINDS:
        if api == "ray.io/v1alpha1":
            return document.fault(("apiVersion",), f"'{api}' is no longer served, write {API}")
        return None if api == API else document.fault(("apiVersion",), f"a {kind} is of {API}, got '{api}'")
    if kind in PLAIN_KINDS:
        wanted = PLAIN_KINDS[kind][0]
        return None if api == wanted else document.fault(("apiVersion",), f"a {kind} is of {wanted}, got '{api}'")
    if api.startswith("ray.io/") and kind != "RayCronJob":
        return document.fault(("kind",), f"'{kind}' is no kind of KubeRay{did_you_mean(kind, RAY_KINDS)}")
    if near := difflib.get_close_matches(kind, PLAIN_KINDS, n=1, cutoff=0.85):
        return document.fault(("kind",), f"'{kind}' is no kind, did you mean '{near[0]}'?")
    return None


def _ray_object_faults(document: Document, value: dict[str, Any], kind: str, house: bool) -> Iterator[Fault]:
    shape = list(mismatches(ray_object(RAY_KINDS[kind][1]), value))
    sound = without(value, [path for path, _ in shape])
    spec = sound.get("spec")
    rules = list(_name_mistakes(sound, kind))
    inner: list[Fault] = []
    if isinstance(spec, dict):
        rules += _rule_mistakes(sound, spec, kind, house)
        inner = list(_embedded_faults(document, spec, kind, house))
    yield from _told_once(document, shape, rules)
    yield from inner


def _told_once(document: Document, shape: list[Mistake], rules: list[Mistake]) -> Iterator[Fault]:
    """Faults of keys and types, then those of rules that do not follow from them: a misspelt key is not missing too."""
    spoilt = {path[:-1] for path, _ in shape}
    for path, message in shape:
        yield document.fault(path, message)
    for path, message in rules:
        needed = _NEEDS.get(str(path[-1])) if path else None
        lost = [m for where, m in shape if where[:-1] == path[:-1] and (where[-1] == needed or f"'{needed}'" in m)]
        if path not in spoilt and not (needed and lost):
            yield document.fault(path, message)


def _rule_mistakes(value: dict[str, Any], spec: dict[str, Any], kind: str, house: bool) -> Iterator[Mistake]:
    annotations = dig(value, "metadata", "annotations") or {}
    path: Path = ("spec", *_CLUSTER_OF[kind])
    cluster = dig(value, "spec", *_CLUSTER_OF[kind])
    if isinstance(cluster, dict):
        if kind != "RayCluster" and dig(cluster, "authOptions", "enableK8sTokenAuth") is True:
            yield (*path, "authOptions", "enableK8sTokenAuth"), f"is not taken in a {kind}, only in a RayCluster"
            cluster = {**cluster, "authOptions": {"mode": "token"}}
        yield from cluster_mistakes(cluster, path, annotations)
        if house:
            yield from house_mistakes(cluster, path)
    if kind == "RayJob":
        yield from job_mistakes(spec, ("spec",), house=house)
        if house and "submitterPodTemplate" in spec:
            yield from pod_house_mistakes(spec["submitterPodTemplate"], ("spec", "submitterPodTemplate"), cluster)
    if kind == "RayService":
        yield from service_mistakes(spec, ("spec",), annotations, _parsed(spec.get("serveConfigV2")))


def _name_mistakes(value: dict[str, Any], kind: str) -> Iterator[Mistake]:
    name = dig(value, "metadata", "name")
    if name is None:
        if "metadata" in value and not dig(value, "metadata", "generateName"):
            yield ("metadata",), "'name' is required, but missing"
        return
    if len(name) > LONGEST_NAME[kind]:
        yield ("metadata", "name"), f"has {len(name)} characters, a {kind} may have {LONGEST_NAME[kind]}"
    elif not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield ("metadata", "name"), f"'{name}' has to be small letters, digits and '-', and start with a letter"


def _embedded_faults(document: Document, spec: dict[str, Any], kind: str, house: bool) -> Iterator[Fault]:
    """YAML inside of YAML, told by the lines of the file."""
    key, check = {
        "RayJob": ("runtimeEnvYAML", runtime_env_mistakes),
        "RayService": ("serveConfigV2", serve_config_mistakes),
    }.get(kind, ("", None))
    text = spec.get(key)
    if check is None or not isinstance(text, str) or not text.strip():
        return
    path: Path = ("spec", key)
    first = document.text_line_of(path)
    is_block = path in document.text_lines
    try:
        embedded, *others = read_yaml(text)
    except YamlFaults as error:
        for fault in error.faults:
            yield _moved(fault, f"spec.{key}", first, is_block)
        return
    if others:
        yield document.fault(path, "holds more than one YAML document")
    if not isinstance(embedded.value, dict):
        yield document.fault(path, f"expected a mapping, got {shown(embedded.value)}")
        return
    for below, message in check(embedded.value, house=house):
        yield _moved(embedded.fault(below, message), f"spec.{key}", first, is_block)


def _moved(fault: Fault, place: str, first: int, is_block: bool) -> Fault:
    """A fault of an embedded text as one of the file; text that is no block stands on one line or is folded."""
    line = first + fault.line - 1 if is_block and fault.line is not None else first
    return Fault(f"{place}.{fault.place}" if fault.place else place, fault.message, line)


def _parsed(text: Any) -> Any:
    try:
        return read_yaml(text)[0].value if isinstance(text, str) and text.strip() else None
    except YamlFaults:
        return None


def _plain_object_faults(document: Document, value: dict[str, Any], kind: str, house: bool) -> Iterator[Fault]:
    shape = list(mismatches(PLAIN_KINDS[kind][1], value))
    sound = without(value, [path for path, _ in shape])
    rules: list[Mistake] = []
    if "metadata" in sound and not dig(sound, "metadata", "name"):
        rules.append((("metadata",), "'name' is required, but missing"))
    if kind == "PersistentVolumeClaim" and isinstance(sound.get("spec"), dict):
        rules += _claim_mistakes(sound["spec"])
    if kind == "Secret":
        rules += _secret_mistakes(sound, house)
    yield from _told_once(document, shape, rules)


def _claim_mistakes(spec: dict[str, Any]) -> Iterator[Mistake]:
    if "accessModes" not in spec:
        yield ("spec",), "'accessModes' is required, such as [ReadWriteMany]"
    if dig(spec, "resources", "requests", "storage") is None:
        yield ("spec", "resources") if "resources" in spec else ("spec",), "needs resources.requests.storage"


def _secret_mistakes(value: dict[str, Any], house: bool) -> Iterator[Mistake]:
    for key, text in (value.get("data") or {}).items():
        try:
            base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            yield ("data", key), "is not base64; plain text belongs under 'stringData'"
            return
    if not house:
        return
    for field in ("data", "stringData"):
        for key, text in (value.get(field) or {}).items():
            if text and not is_placeholder(text):
                name = dig(value, "metadata", "name") or "NAME"
                yield (
                    (field, key),
                    f"a secret does not belong into a file; remove it here and make it once: kubectl create secret "
                    f"generic {name} --from-file={key}=FILE",
                )
                return


def without(value: Any, paths: Sequence[Path]) -> Any:
    """The document without the values at some paths; items of lists become None, so that others keep their index."""
    gone = set(paths)

    def copy(item: Any, path: Path) -> Any:
        if isinstance(item, dict):
            return {key: copy(part, (*path, key)) for key, part in item.items() if (*path, key) not in gone}
        if isinstance(item, list):
            return [None if (*path, index) in gone else copy(part, (*path, index)) for index, part in enumerate(item)]
        return item

    return {} if () in gone and not isinstance(value, dict) else copy(value, ())
