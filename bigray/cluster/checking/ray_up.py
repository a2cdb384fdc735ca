"""Files of `ray up`: Ray's own schema, what its launcher trips over later, and what bigray asks of a cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path as FilePath
from typing import Any

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.literal_secrets import is_private, secrets
from bigray.cluster.checking.nearest import nearest, unknown
from bigray.cluster.checking.ray_cluster import (
    OTHER_PROVIDERS,
    items,
    mapping,
    node_types,
    provider_of,
    storage_of,
)
from bigray.cluster.checking.ray_commands import check_commands
from bigray.cluster.checking.ray_images import check_containers
from bigray.cluster.checking.ray_nodes import check_nodes
from bigray.cluster.checking.shapes import FLAG, TEXT, TEXTS, Fields, fields, mismatches, shown
from bigray.cluster.checking.yaml_file import Document

LOCAL = fields("type", type=TEXT, head_ip=TEXT, worker_ips=TEXTS, coordinator_address=TEXT)
PROVIDERS: dict[str, Fields | None] = {
    "local": LOCAL,
    "aws": Fields(
        dict.fromkeys(("type", "region", "availability_zone"), TEXT)
        | dict.fromkeys(("cache_stopped_nodes", "use_internal_ips", "disable_node_updaters"), FLAG)
        | {"security_group": fields(GroupName=TEXT, IpPermissions=TEXTS), "key_pair": fields(key_name=TEXT)},
        ("region",),
    ),
    "gcp": Fields(
        dict.fromkeys(("type", "region", "availability_zone", "project_id"), TEXT)
        | dict.fromkeys(("cache_stopped_nodes", "use_internal_ips", "disable_node_updaters"), FLAG),
        ("region", "availability_zone", "project_id"),
    ),
} | dict.fromkeys(OTHER_PROVIDERS)
"""The keys of `provider` by its type; None where bigray has no list of them."""

DEEPER = ("security_group", "cloudwatch", "aws_credentials", "gcp_credentials")
"""Keys of `provider` that are looked into elsewhere."""
GONE = {
    "min_workers": "is for machines that are there already; use min_workers of each node type",
    "head_node": "is no longer read; give the head a type of its own in available_node_types",
    "worker_nodes": "is no longer read; give workers a type of their own in available_node_types",
    "initial_workers": "is no longer read; use min_workers of the node type",
    "autoscaling_mode": "is no longer read; use upscaling_speed",
    "target_utilization_fraction": "is no longer read; use upscaling_speed",
}


def check_ray_up(document: Document) -> Iterator[Fault]:
    """Every fault of a `ray up` file; a misspelt key is told once, and read as what was meant."""
    if not isinstance(document.value, dict):
        yield document.fault((), f"expected a mapping with cluster_name, provider, ..., got {shown(document.value)}")
        return
    keys = list(_key_faults(document.value, ()))
    yield from (document.fault(path, "a key has to be text; put it in quotes") for path in keys)
    if keys:
        return  # no schema knows such keys
    faults, is_broken = _schema_faults(document)
    faults += _provider_faults(document)
    yield from faults
    if is_broken:
        return  # the rules would stumble over it
    document = _as_meant(document)
    told = {(fault.place, fault.line) for fault in faults}
    for rule in (check_nodes, check_containers, _mount_rules, _storage_rules, check_commands):
        yield from (fault for fault in rule(document) if (fault.place, fault.line) not in told)
    yield from _secret_faults(document)
    yield from _cloud_faults(document)


def _key_faults(value: Any, path: Path) -> Iterator[Path]:
    """Keys that YAML reads as numbers, flags or nothing."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(items(value)):
        if isinstance(value, dict) and not isinstance(key, str):
            yield (*path, key)
        yield from _key_faults(item, (*path, key))


def _schema_faults(document: Document) -> tuple[list[Fault], bool]:
    """What Ray's own schema refuses, and whether a list or a mapping is something else."""
    import jsonschema

    value = dict(document.value)
    if PROVIDERS.get(provider_of(document), LOCAL) is LOCAL:
        value.pop("min_workers", None)  # Ray takes it out before it validates
    faults: list[Fault] = []
    is_broken = False
    for error in jsonschema.Draft7Validator(_ray_schema()).iter_errors(value):
        path: Path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            faults += _unknown_keys(document, path, error)
        elif error.validator == "required":
            faults += _missing_keys(document, path, error)
        else:
            faults.append(document.fault(path, _told(error)))
            is_broken = is_broken or error.validator_value in ("array", "object")
    return faults, is_broken


def _unknown_keys(document: Document, path: Path, error: Any) -> Iterator[Fault]:
    known = error.schema["properties"]
    for key in error.instance:
        if key not in known:
            gone = GONE.get(key) if not path else None
            yield document.fault((*path, key), gone or unknown(key, known))


def _missing_keys(document: Document, path: Path, error: Any) -> Iterator[Fault]:
    """The key that this error is about; one that is there misspelt is told as such."""
    known = error.schema.get("properties", {})
    for key in error.validator_value:
        if f"'{key}' is a required" not in error.message:
            continue
        if not any(nearest(other, known) == key for other in error.instance if other not in known):
            yield document.fault(path, f"'{key}' is required, but missing")


def _told(error: Any) -> str:
    if error.validator == "type":
        kinds = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        wanted = " or ".join(_KINDS.get(str(kind), str(kind)) for kind in kinds)
        return f"expected {wanted}, got {shown(error.instance)}"
    if error.validator == "minimum":
        return f"must be at least {error.validator_value:g}, got {error.instance}"
    if error.validator == "enum":
        return f"{error.instance!r} is not one of {', '.join(error.validator_value)}"
    return str(error.message)


_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list ('- ' before each item)",
    "object": "a mapping",
}


@lru_cache(maxsize=1)
def _ray_schema() -> dict[str, Any]:
    """Read as a file: importing Ray takes seconds."""
    spec = find_spec("ray")
    folder = FilePath(next(iter(spec.submodule_search_locations or ()))) if spec else FilePath()
    schema: dict[str, Any] = json.loads((folder / "autoscaler" / "ray-schema.json").read_text())
    return schema


def _provider_faults(document: Document) -> Iterator[Fault]:
    """The keys of `provider`, of which Ray's schema allows any."""
    provider = document.value.get("provider")
    if not isinstance(provider, dict) or not isinstance(kind := provider.get("type"), str):
        return
    if kind not in PROVIDERS:
        yield document.fault(("provider", "type"), f"{kind!r} {unknown(kind, PROVIDERS).replace('key', 'provider')}")
        return
    shape = PROVIDERS[kind]
    if shape is not None:
        shallow = {key: value for key, value in provider.items() if key not in DEEPER}
        known_to_schema = _ray_schema()["properties"]["provider"]["properties"]
        for path, message in mismatches(shape, shallow, ("provider",)):
            if not (path[-1] in known_to_schema and message.startswith("expected")):  # the schema has told it
                yield document.fault(path, message)


def _as_meant(document: Document) -> Document:
    """The document with misspelt keys of the first level, and of each node type, put right."""
    properties = _ray_schema()["properties"]
    document = _renamed(document, (), properties)
    of_types = properties["available_node_types"]["patternProperties"][".*"]["properties"]
    for name in node_types(document):
        document = _renamed(document, ("available_node_types", name), of_types)
    return document


def _renamed(document: Document, path: Path, known: dict[str, Any]) -> Document:
    at = document.value
    for step in path:
        at = at[step]
    meant = {key: nearest(key, known) for key in at if key not in known and not (path == () and key in GONE)}
    new_names = {old: new for old, new in meant.items() if new and new not in at}
    if not new_names:
        return document

    def moved(lines: dict[Path, int]) -> dict[Path, int]:
        depth = len(path)
        return {
            (*path, new_names[at[depth]], *at[depth + 1 :])
            if at[:depth] == path and len(at) > depth and at[depth] in new_names
            else at: line
            for at, line in lines.items()
        }

    value = _replaced(document.value, path, {new_names.get(key, key): item for key, item in at.items()})
    return Document(value, moved(document.lines), moved(document.text_lines))


def _replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    return {**value, path[0]: _replaced(value[path[0]], path[1:], new)}


def _mount_rules(document: Document) -> Iterator[Fault]:
    """Files that are copied to every node."""
    for remote, local in mapping(document.value.get("file_mounts")).items():
        path: Path = ("file_mounts", remote)
        if not isinstance(local, str):
            yield document.fault(path, f"expected the local path, got {shown(local)}")
        elif is_private(local):
            yield document.fault(path, f"{local} would be copied to every node; give the nodes a role of their own")
        elif not str(remote).startswith(("/", "~")):
            yield document.fault(path, "the path on the node has to start with / or ~")
    for index, synced in enumerate(document.value.get("cluster_synced_files") or ()):
        if is_private(str(synced)):
            yield document.fault(("cluster_synced_files", index), f"{synced} would be copied to every node")


def _storage_rules(document: Document) -> Iterator[Fault]:
    """`metadata.storage`: a note of where runs are kept, which every node has to see."""
    storage = storage_of(document)
    path: Path = ("metadata", "storage")
    if re.match(r"(s3|gs|gcs):/(?!/)", storage):
        yield document.fault(path, f"{storage!r} has one slash; write {storage.replace(':/', '://', 1)!r}")
    elif re.match(r"(s3|gs)://(/|$)", storage):
        yield document.fault(path, f"{storage!r} names no bucket")
    elif storage and not storage.startswith(("s3://", "gs://", "/")):
        yield document.fault(path, f"{storage!r} is not seen by every node; use s3://, gs:// or a mounted folder")
    elif storage.startswith(("/tmp", "/var/tmp", "/dev/shm", "/home", "/root")):
        yield document.fault(path, f"{storage!r} is another folder on each node; use s3://, gs:// or a mounted folder")


def _secret_faults(document: Document) -> Iterator[Fault]:
    for path, kind in secrets(document.value):
        yield document.fault(path, f"{kind} in clear text; it belongs in the environment or in a role of the machine")


def _cloud_faults(document: Document) -> Iterator[Fault]:
    if provider_of(document) == "aws":
        from bigray.cluster.checking.aws import check_aws

        yield from check_aws(document)
    elif provider_of(document) == "gcp":
        from bigray.cluster.checking.gcp import check_gcp

        yield from check_gcp(document)
