"""What the objects of one file say of each other: names that are there twice or nearly right, volumes to share."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.kube_parts import dig, items
from bigray.cluster.checking.yaml_file import Document

_SHAREABLE = {"ReadWriteMany", "ReadOnlyMany"}
_REFERENCES = {
    "claimName": "PersistentVolumeClaim",
    "serviceAccountName": "ServiceAccount",
    "secretName": "Secret",
    "secretKeyRef": "Secret",
    "secretRef": "Secret",
    "configMap": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "configMapRef": "ConfigMap",
}
"""Keys below which another object is named: the name itself, or a mapping with it under `name`."""


def link_faults(documents: Sequence[Document], *, house: bool = True) -> Iterator[Fault]:
    """Faults between the objects of one file. What a file does not hold may be on the cluster, and is no fault."""
    names: dict[str, dict[str, Document]] = {}
    for document in documents:
        kind, name = dig(document.value, "kind"), dig(document.value, "metadata", "name")
        if not isinstance(kind, str) or not isinstance(name, str):
            continue
        known = names.setdefault(kind, {})
        if name in known and _namespace(known[name]) == _namespace(document):
            first = known[name].line_of(())
            yield document.fault(("metadata", "name"), f"this file has a {kind} '{name}' already, on line {first}")
        known[name] = document
    for document in documents:
        for path, kind, name in _references(document.value, ()):
            known = names.get(kind, {})
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if name not in known and near:
                yield document.fault(path, f"this file has no {kind} '{name}', did you mean '{near[0]}'?")
        if house:
            yield from _unshared_claims(document, names.get("PersistentVolumeClaim", {}))


def _namespace(document: Document) -> Any:
    return dig(document.value, "metadata", "namespace")


def _references(value: Any, path: Path) -> Iterator[tuple[Path, str, str]]:
    """(path, kind, name) of every other object that a value names."""
    if isinstance(value, dict):
        for key, item in value.items():
            kind = _REFERENCES.get(str(key))
            if kind is not None and isinstance(item, str):
                yield (*path, key), kind, item
            elif kind is not None and isinstance(dig(item, "name"), str):
                yield (*path, key, "name"), kind, item["name"]
            else:
                yield from _references(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _references(item, (*path, index))


def _unshared_claims(document: Document, claims: dict[str, Document]) -> Iterator[Fault]:
    """Claims that several pods mount and that only one node may have."""
    spec = document.value.get("spec") if isinstance(document.value, dict) else None
    cluster = next((found for key in ("rayClusterSpec", "rayClusterConfig") if (found := dig(spec, key))), spec)
    users: dict[str, int] = {}
    groups = [(dig(cluster, "headGroupSpec"), 1)]
    groups += [(group, group.get("maxReplicas", 2)) for _, group in items(cluster, "workerGroupSpecs")]
    for group, pods in groups:
        for _, volume in items(group, "template", "spec", "volumes"):
            claim = dig(volume, "persistentVolumeClaim", "claimName")
            if isinstance(claim, str) and isinstance(pods, int):
                users[claim] = users.get(claim, 0) + pods
    for claim, pods in users.items():
        modes = dig(claims[claim].value, "spec", "accessModes") if claim in claims else None
        if isinstance(modes, list) and pods > 1 and not _SHAREABLE & set(map(str, modes)):
            yield claims[claim].fault(
                ("spec", "accessModes"), f"pods on several nodes mount '{claim}'; it needs ReadWriteMany"
            )
