"""Whether images, pip commands and version fields agree with the versions that bigray was tested with."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from packaging.version import InvalidVersion, Version

import bigray

LEAST_PYTHON = (3, 11)
MOVING_TAGS = frozenset({"latest", "nightly", "master", "main", "edge", "stable", "dev"})
RAY_IMAGES = ("rayproject/ray", "rayproject/ray-ml", "rayproject/ray-llm", "rayproject/ray-extra")


@dataclass(frozen=True)
class Image:
    """A container image's reference, taken apart."""

    repository: str
    tag: str | None
    digest: str | None
    ray: str | None
    """Ray's version, where the tag tells it."""
    python: tuple[int, int] | None
    """As `py311` in the tag tells it."""
    has_cuda: bool


def wanted_version(package: str = "ray") -> str | None:
    """The version in constraints.txt beside the package where there is one, else the one installed, else None."""
    pinned = _constraints().get(_normal(package))
    if pinned is not None:
        return pinned
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_image(reference: str) -> Image:
    """`rayproject/ray:2.60.0-py311-gpu@sha256:...` taken apart."""
    name, _, digest = reference.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon of a registry's port
        repository, tag = name, ""
    is_ray = repository.removeprefix("docker.io/") in RAY_IMAGES
    version = re.match(r"(\d+\.\d+\.\d+(?:\.?(?:rc|dev)\d+)?)", tag) if is_ray else None
    version = version or re.search(r"ray-?(\d+\.\d+\.\d+)", tag)
    python = re.search(r"(?:^|-)py(\d)(\d+)(?:-|$)", tag)
    return Image(
        repository,
        tag or None,
        digest or None,
        version.group(1) if version else None,
        (int(python.group(1)), int(python.group(2))) if python else None,
        bool(re.search(r"-(gpu|cu\d+)", tag)),
    )


def image_fault(reference: str) -> str | None:
    """What is wrong with an image: not pinned, or of another Ray or an older Python than bigray's; None if nothing."""
    image = parse_image(reference)
    if image.tag is None and image.digest is None:
        return f"{reference!r} has no tag, so it is whatever is newest; write {_example(image)!r}"
    if image.digest is None and (image.tag or "").split("-")[0] in MOVING_TAGS:
        return f"the tag {image.tag!r} moves; write {_example(image)!r}"
    if image.ray is not None and (fault := ray_version_fault(image.ray)):
        return f"{reference!r}: {fault}"
    if image.python is not None and image.python < LEAST_PYTHON:
        return f"{reference!r} has Python {image.python[0]}.{image.python[1]}, bigray needs 3.11 or newer"
    return None


def ray_version_fault(version: str) -> str | None:
    """What is wrong with a Ray version that a file names; None where it is the wanted one."""
    wanted = wanted_version("ray")
    if wanted is None or version == wanted:
        return None
    return f"Ray {version} is not the {wanted} of constraints.txt; every node and the client need the same"


def pip_faults(command: str) -> Iterator[str]:
    """What is wrong with the `pip install` calls in a shell command: requirements that are not pinned to constraints.

    A call with `-c FILE` or `-r FILE` is bound by that file; one that names only files or folders is left alone.
    """
    for arguments in _pip_installs(command):
        bound = any(re.match(r"(-c|--constraint|-r|--requirement)", argument) for argument in arguments)
        for requirement in _requirements(arguments):
            if fault := requirement_fault(requirement, bound):
                yield fault


def requirement_fault(requirement: str, bound: bool = False) -> str | None:
    """What is wrong with one requirement, such as `torch==2.13.0`; `bound` where a constraints file holds for it."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s*(\[[^\]]*\])?\s*(.*)", requirement)
    if match is None or "@" in match.group(3):
        return None
    name, version = match.group(1), match.group(3)
    wanted = wanted_version(name)
    if version.startswith("==") and "*" not in version:
        found = version.removeprefix("==").strip()
        if wanted is None or _same(found, wanted):
            return None
        return f"{name}=={found} is not the {wanted} of constraints.txt"
    if bound:
        return None
    shown = f"{name}{match.group(2) or ''}=={wanted or '...'}"
    return f"{requirement!r} is not pinned; write {shown!r} or install with -c constraints.txt"


def _pip_installs(command: str) -> Iterator[list[str]]:
    """The arguments after `pip install` of each call in a command line."""
    for part in re.split(r"&&|\|\||[;|()\n]", command.replace("\\\n", " ")):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a quote that spans parts: nothing that can be judged here
            continue
        for index in range(len(words) - 1):
            if re.search(r"(^|/)pip[\d.]*$", words[index]) and words[index + 1] == "install":
                yield words[index + 2 :]
                break


def _requirements(arguments: list[str]) -> Iterator[str]:
    """What is named, without options and their values, and without files, folders and addresses."""
    taking_a_value = False
    for argument in arguments:
        if taking_a_value:
            taking_a_value = False
        elif argument.startswith("-"):
            taking_a_value = _TAKES_A_VALUE.fullmatch(argument) is not None
        elif not argument.startswith((".", "/", "~", "$", "<", ">", "git+", "http:", "https:")) and "/" not in argument:
            yield argument


_TAKES_A_VALUE = re.compile(
    r"-[cretif]|--(constraint|requirement|editable|target|index-url|extra-index-url|find-links|root|prefix|python"
    r"|platform|timeout|retries|cache-dir|progress-bar|no-binary|only-binary)"
)


def _example(image: Image) -> str:
    ray = wanted_version("ray")
    return f"{image.repository}:{ray}-py311" if image.repository in RAY_IMAGES else f"{image.repository}:VERSION"


def _same(found: str, wanted: str) -> bool:
    """Equal as versions: 2.13 is 2.13.0, and a local build such as 2.13.0+cpu is of that version."""
    try:
        return Version(Version(found).public) == Version(Version(wanted).public)
    except InvalidVersion:
        return found == wanted


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@lru_cache(maxsize=1)
def _constraints() -> dict[str, str]:
    """The pins of the checkout's constraints.txt; empty where bigray is installed without it."""
    path = Path(bigray.__file__).parent.parent / "constraints.txt"
    if not path.is_file():
        return {}
    pins = re.findall(r"(?m)^([\w.-]+)==(\S+)", path.read_text())
    return {_normal(name): version for name, version in pins}
