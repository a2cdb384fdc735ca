"""From a version, as every answer names it in `x-bigray-version`, back to the training that made it (driver).

Manifests are read as plain JSON and not as this bigray's `BundleManifest`: a bundle of an older or a newer schema is
not served, but where it came from can still be told.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigray.bundle import WEIGHTS
from bigray.errors import SpecError, StorageError
from bigray.storage import MANIFEST, Storage, open_storage

BUNDLE_FOLDER = "bundle"
"""Of a run; as `bigray.paths` has it, of which serving knows nothing."""
VERSION_DIGITS = 12
MIN_DIGITS = 6
MOST_NEAR = 3
_OF_ORIGIN = frozenset(
    {"run", "trial", "model", "step", "epoch", "metrics", "config", "seeds", "data_fingerprint", "git", "versions"}
)
_ASKED = re.compile(r"(?:.*:)?\s*['\"]?([0-9a-f]{6,64})['\"]?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Lineage:
    """Where a version came from. A field is empty or None where the bundle's schema did not have it yet."""

    version: str
    bundle: str
    """Where it lies."""
    copies: tuple[str, ...] = ()
    """Further places that hold the same weights."""
    schema_version: int | None = None
    name: str = ""
    """The job's name."""
    weights_sha256: str = ""
    files: tuple[str, ...] = ()
    task: str = ""
    target: str = ""
    inputs: tuple[str, ...] = ()
    """Names of the columns."""
    run: str = ""
    trial: str = ""
    model: str = ""
    """Its name in the job file."""
    factory: str = ""
    step: int | None = None
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """On the validation rows."""
    config: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    data_fingerprint: str = ""
    git: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """What else the manifest says of the origin."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Found:
    """A manifest, and the folder that it lies in."""

    version: str
    location: str
    place: tuple[str, str]
    """The same for the same folder, however its location is written."""
    manifest: dict[str, Any]


def find_lineage(what: str, folders: Sequence[str], known: Mapping[str, str]) -> Lineage:
    """The training behind a version.

    `what`: the version, a beginning of it (6 digits at least), or the whole header line of an answer.
    `folders`: storages, runs or bundles to search. `known`: bundle of each version that was served, looked up first.

    Raises:
        SpecError: `what` names no version.
        StorageError: no bundle has it, or the beginning is that of several.
    """
    asked = parse_version(what)
    if asked in known and (served := _read_at(known[asked])) is not None and served.version == asked:
        return _describe([served])
    bundles = [*_known_bundles(known), *_bundles_below(folders)]
    matching = [found for found in bundles if found.version.startswith(asked)]
    versions = {found.version for found in matching} | {version for version in known if version.startswith(asked)}
    if len(versions) > 1:
        names = ", ".join(sorted(versions))
        raise StorageError(f"'{asked}' is the beginning of {len(versions)} versions: {names}; give more digits")
    if not matching:
        raise StorageError(_not_found(asked, folders, known, bundles))
    return _describe(matching)


def parse_version(what: str) -> str:
    """The digits of a version, a beginning of it, a whole SHA-256 or a header line.

    Raises:
        SpecError: there are none.
    """
    match = _ASKED.fullmatch(what.strip())
    if match is None:
        raise SpecError(
            f"'{what.strip()}': no version; it has {VERSION_DIGITS} hex digits ({MIN_DIGITS} of them at least), "
            "as in the header x-bigray-version of an answer"
        )
    return match[1].lower()[:VERSION_DIGITS]


def _known_bundles(known: Mapping[str, str]) -> Iterator[_Found]:
    yield from (found for location in known.values() if (found := _read_at(location)) is not None)


def _bundles_below(folders: Sequence[str]) -> Iterator[_Found]:
    """Of each run in a storage; a folder may also be a run, or a bundle, itself."""
    for folder in folders:
        root = open_storage(folder)
        places = [root, root.child(BUNDLE_FOLDER), *(root.child(name, BUNDLE_FOLDER) for name in root.list_names())]
        yield from (found for place in places if (found := _read(place)) is not None)


def _read_at(location: str) -> _Found | None:
    try:
        return _read(open_storage(location))
    except StorageError:  # of a scheme that this machine has no client for
        return None


def _read(storage: Storage) -> _Found | None:
    """None where there is no manifest of a bundle; that one is broken must not end a search through many."""
    try:
        manifest = json.loads(storage.read_bytes(MANIFEST))
        digest = manifest["files"][WEIGHTS]["sha256"]
        root = str(Path(storage.root).resolve()) if storage.is_local else storage.root
        place = (str(storage.filesystem.type_name), root)
        return _Found(digest[:VERSION_DIGITS].lower(), storage.uri, place, manifest)
    except (StorageError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _describe(matching: Sequence[_Found]) -> Lineage:
    first = matching[0]
    manifest = first.manifest
    origin, outputs = _section(manifest, "origin"), _section(manifest, "outputs")
    columns = _section(manifest, "inputs").get("columns") or ()
    told = {name: origin[name] for name in _OF_ORIGIN if name in origin}
    others = {found.place: found.location for found in matching if found.place != first.place}
    return Lineage(
        version=first.version,
        bundle=first.location,
        copies=tuple(others.values()),
        schema_version=manifest.get("schema_version"),
        name=str(manifest.get("name", "")),
        weights_sha256=manifest["files"][WEIGHTS]["sha256"],
        files=tuple(sorted(manifest["files"])),
        task=str(outputs.get("task", "")),
        target=str(outputs.get("target", "")),
        inputs=tuple(str(column.get("name", "")) for column in columns if isinstance(column, dict)),
        factory=str(_section(manifest, "factory").get("factory", "")),
        more={name: value for name, value in origin.items() if name not in _OF_ORIGIN},
        **told,
    )


def _section(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = manifest.get(name)
    return section if isinstance(section, dict) else {}


def _not_found(asked: str, folders: Sequence[str], known: Mapping[str, str], bundles: Sequence[_Found]) -> str:
    served = next((version for version in known if version.startswith(asked)), None)
    if served is not None:
        now = _read_at(known[served])
        became = f"holds version {now.version} now" if now else "is gone"
        return f"version {served} was served from {known[served]}, but that bundle {became}; give a folder with a copy"
    versions = dict.fromkeys([*known, *(found.version for found in bundles)])
    near = difflib.get_close_matches(asked, versions, n=MOST_NEAR, cutoff=0.0)
    others = f"; nearest: {', '.join(near)}" if near else ""
    searched = f"{len(bundles):,} bundle{'s' if len(bundles) != 1 else ''} below {', '.join(folders) or 'no folder'}"
    return f"version {asked}: not served here, and not in {searched}{others}; give the storage of its run (--storage)"
