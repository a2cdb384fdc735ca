"""Which kind a cluster file is, and its checker."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.yaml_file import YamlFaults, read_yaml

MOST_BYTES = 200_000


class Kind(StrEnum):
    """What a file is for."""

    RAY_UP = "ray up"
    KUBE = "KubeRay"
    SLURM = "Slurm"
    DOCKERFILE = "Dockerfile"
    LOCAL = "bigray cluster local"


CONTENTS = (
    (Kind.SLURM, r"^#SBATCH\b"),
    (Kind.KUBE, r"^(apiVersion|kind):"),
    (
        Kind.RAY_UP,
        r"^(cluster_name|provider|available_node_types|head_node_type|head_start_ray_commands|worker_start_ray_commands)\s*:",
    ),
    (Kind.DOCKERFILE, r"^(FROM|from)\s+[^\s=]+(\s+[Aa][Ss]\s+\S+)?\s*$"),
)
"""Tried in this order on the text: even a file that cannot be parsed has a kind."""

NAMES = (
    (Kind.DOCKERFILE, r"(.*\.)?(Dockerfile|Containerfile)(\..*)?"),
    (Kind.SLURM, r".*\.(sbatch|slurm)"),
    (Kind.LOCAL, r".*\.toml"),
    (Kind.RAY_UP, r"(onprem|aws|gcp|azure)\.ya?ml"),
    (Kind.KUBE, r"(raycluster|rayjob|rayservice).*\.ya?ml"),
)


def kind_of(text: str, name: str) -> Kind | None:
    """The kind of a file by its content, else by its name; None where neither tells."""
    if not name.endswith(".toml"):
        for kind, pattern in CONTENTS:
            if re.search(pattern, text, re.MULTILINE):
                return kind
    return next((kind for kind, pattern in NAMES if re.fullmatch(pattern, name)), None)


def check_file(path: Path) -> list[Fault]:
    """Every fault of a cluster file, by line; notes (`Fault.is_note`) come with them. Never raises for the file."""
    faults = [dataclasses.replace(fault, file=str(path)) for fault in _faults(path)]
    return sorted(faults, key=lambda fault: fault.line or 0)


def _faults(path: Path) -> Iterator[Fault]:
    text, fault = _read(path)
    if text is None:
        yield fault
        return
    kind = kind_of(text, path.name)
    if kind is None:
        yield Fault("", f"is none of the files that are checked: {', '.join(Kind)}")
        return
    yield from _checker(kind)(text)


def _read(path: Path) -> tuple[str | None, Fault]:
    """The text, or what keeps it from being read."""
    if not path.exists():
        return None, Fault("", "there is no such file")
    if not path.is_file():
        return None, Fault("", "is not a file")
    if (size := path.stat().st_size) > MOST_BYTES:
        return None, Fault("", f"has {size:,} bytes, a cluster file has at most {MOST_BYTES:,}")
    try:
        content = path.read_bytes()
        return content.decode(), Fault("", "")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return None, Fault("", f"is not UTF-8: byte 0x{content[error.start]:02x}", line)
    except OSError as error:
        return None, Fault("", f"cannot be read: {error.strerror}")


def _checker(kind: Kind) -> Callable[[str], Iterator[Fault]]:
    """Checkers are loaded when they are used: some bring large schemas along."""
    if kind is Kind.SLURM:
        from bigray.cluster.checking.slurm import check_slurm

        return check_slurm
    if kind is Kind.DOCKERFILE:
        from bigray.cluster.checking.dockerfile import check_dockerfile

        return check_dockerfile
    if kind is Kind.LOCAL:
        from bigray.cluster.checking.local_toml import check_local_toml

        return check_local_toml
    return _check_kube if kind is Kind.KUBE else _check_ray_up


def _check_kube(text: str) -> Iterator[Fault]:
    from bigray.cluster.checking.kube import check_kube

    try:
        yield from check_kube(read_yaml(text))
    except YamlFaults as error:
        yield from error.faults


def _check_ray_up(text: str) -> Iterator[Fault]:
    from bigray.cluster.checking.ray_up import check_ray_up

    try:
        first, *others = read_yaml(text)
    except YamlFaults as error:
        yield from error.faults
        return
    yield from check_ray_up(first)
    if others:
        yield Fault("", "a second document; `ray up` takes one", others[0].line_of(()))
