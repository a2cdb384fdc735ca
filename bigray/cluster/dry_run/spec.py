"""What a cluster on one machine is made of: `cluster/local.toml`, and the options that stand for its keys."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from bigray.errors import CapacityError, SpecError
from bigray.loading import validate_document
from bigray.specs import Name, Spec

HEAD = "head"
FAKE_GPU_LABEL = "bigray.io/fake-gpu"
MOST_NODES = 32
LEAST_OBJECT_STORE_MIB = 76
"""Ray starts no node with less than 75 MiB."""


_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?/)?{_LABEL.pattern}")


def _labels(labels: dict[str, str]) -> dict[str, str]:
    """Kubernetes' rules for labels, which Ray holds to when a node starts."""
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise ValueError(
                f"'{key}' is no key of a label, use letters, digits, '-', '_' and '.', such as team.io/zone"
            )
        if value and not _LABEL.fullmatch(value):
            raise ValueError(f"'{key}' has the value '{value}', use up to 63 letters, digits, '-', '_' and '.'")
        if key == FAKE_GPU_LABEL:
            raise ValueError(f"'{key}' is set by bigray itself, leave it out")
    return labels


Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Cpus = Annotated[int, Field(ge=0, le=1024)]
Gpus = Annotated[int, Field(ge=0, le=64)]
Mib = Annotated[int, Field(ge=1, le=2**24)]


class NodeGroup(Spec):
    """Nodes of one kind beside the plain ones: `[[groups]]`."""

    name: Name
    """Its nodes are called by it: `spot-1`, `spot-2`."""
    count: int = Field(default=1, ge=1, le=MOST_NODES)
    cpus: Cpus = 1
    gpus: Gpus = 0
    """Fake ones: Ray counts them and hands them out, and there is no device."""
    labels: Labels = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_name_of_its_own(self) -> NodeGroup:
        if self.name in (HEAD, "node"):
            raise ValueError(f"name = '{self.name}' is what plain nodes are called, use another")
        return self


class LocalClusterSpec(Spec):
    """A head and other nodes on this machine. Each is a real Ray node; they share its cores and its memory."""

    name: Name = "local"
    nodes: int = Field(default=3, ge=1, le=MOST_NODES)
    """Plain nodes, the head among them: `head`, `node-1`, `node-2`."""
    cpus_per_node: Annotated[int, Field(ge=1, le=1024)] | None = None
    """What Ray counts; no process is held to it. None: the cores of this machine, shared out, but at least 1."""
    gpus_per_node: Gpus = 0
    """Fake ones, on the head too: Ray counts them and hands them out, and there is no device."""
    head_cpus: Cpus | None = None
    """0 keeps work off the head. None: as many as on the other nodes."""
    object_store_mib: int = Field(default=200, ge=LEAST_OBJECT_STORE_MIB, le=2**20)
    """Of each node, in /dev/shm."""
    memory_mib: Mib | None = None
    """What Ray counts of each node's memory. None: this machine's, shared out."""
    labels: Labels = Field(default_factory=dict)
    """Of all plain nodes, for label selectors: `{ "team.io/zone" = "a" }`."""
    groups: Annotated[tuple[NodeGroup, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _is_of_a_size(self) -> LocalClusterSpec:
        names = [group.name for group in self.groups]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"groups: '{twice[0]}' is there twice, give each group another name")
        if self.num_nodes > MOST_NODES:
            raise ValueError(f"nodes and groups make {self.num_nodes} nodes, one machine takes {MOST_NODES}")
        return self

    @property
    def num_nodes(self) -> int:
        return self.nodes + sum(group.count for group in self.groups)


@dataclass(frozen=True)
class NodeShape:
    """One node that is to be started, with every number known."""

    name: str
    cpus: int
    gpus: int
    object_store_mib: int
    memory_mib: int
    labels: Mapping[str, str]

    @property
    def is_head(self) -> bool:
        return self.name == HEAD

    @property
    def all_labels(self) -> dict[str, str]:
        return {**self.labels, **({FAKE_GPU_LABEL: "true"} if self.gpus else {})}


def shapes_of(spec: LocalClusterSpec, cores: int, memory_mib: int) -> list[NodeShape]:
    """Every node of a cluster on a machine of this size, the head first."""
    return list(_shapes(spec, cores, memory_mib))


def _shapes(spec: LocalClusterSpec, cores: int, memory_mib: int) -> Iterator[NodeShape]:
    cpus = spec.cpus_per_node or max(1, cores // spec.num_nodes)
    memory = spec.memory_mib or max(1, memory_mib // spec.num_nodes)
    head_cpus = cpus if spec.head_cpus is None else spec.head_cpus
    store = spec.object_store_mib
    yield NodeShape(HEAD, head_cpus, spec.gpus_per_node, store, memory, spec.labels)
    for number in range(1, spec.nodes):
        yield NodeShape(f"node-{number}", cpus, spec.gpus_per_node, store, memory, spec.labels)
    for group in spec.groups:
        for number in range(1, group.count + 1):
            yield NodeShape(f"{group.name}-{number}", group.cpus, group.gpus, store, memory, group.labels)


def check_shared_memory(shapes: list[NodeShape], free_bytes: int) -> None:
    """Nodes whose object stores do not fit /dev/shm would put them on the disk, and be slow without a word.

    Raises:
        CapacityError: with what would fit.
    """
    asked = sum(shape.object_store_mib for shape in shapes)
    free = free_bytes // 2**20
    if asked <= free:
        return
    each = math.floor(free / len(shapes))
    way_out = f"set object_store_mib = {each}" if each >= LEAST_OBJECT_STORE_MIB else "start fewer nodes"
    raise CapacityError(
        f"object_store_mib: {len(shapes)} nodes need {asked} MiB of /dev/shm, and {free} MiB are free; {way_out}"
    )


def load_local_spec(
    file: str | Path | None = None,
    *,
    nodes: int | None = None,
    cpus_per_node: int | None = None,
    gpus_per_node: int | None = None,
) -> LocalClusterSpec:
    """A cluster file, if there is one, with the command's options over it.

    Raises:
        SpecError: one line for each fault: `local.toml: nodes: ...`, `--nodes: ...`.
    """
    document = {} if file is None else _read(Path(file))
    spec = validate_document(LocalClusterSpec, document, str(file or ""))
    options = {"nodes": nodes, "cpus_per_node": cpus_per_node, "gpus_per_node": gpus_per_node}
    given = {key: value for key, value in options.items() if value is not None}
    validate_options(LocalClusterSpec, given)
    return validate_document(LocalClusterSpec, {**document, **given}, str(file or "")) if given else spec


def validate_options(model: type[Spec], given: dict[str, Any]) -> None:
    """Check what was given as options of a command, by the keys that they stand for.

    Raises:
        SpecError: one line for each fault: `--cpus-per-node: ...`.
    """
    try:
        validate_document(model, given, "")
    except SpecError as error:
        raise SpecError([_as_option(fault) for fault in error.faults]) from None


def _as_option(fault: str) -> str:
    key, colon, rest = fault.partition(":")
    return f"--{key.replace('_', '-')}{colon}{rest}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from None


def machine_memory_mib() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
