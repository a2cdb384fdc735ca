"""Unknown keys, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.yaml_file import Document
from bigray.errors import did_you_mean

MOST_LISTED = 12


def unknown(key: object, known: Collection[str]) -> str:
    """`is not a key here, did you mean 'x'?`: the message for a key that is not among the known ones."""
    hint = did_you_mean(str(key), known)
    if len(known) > MOST_LISTED and hint.startswith("; known"):
        return "is not a key here"
    return f"is not a key here{hint}"


def unknown_keys(document: Document, path: Path, known: Collection[str]) -> Iterator[Fault]:
    """A fault for each key of the mapping at `path` that is not among the known ones."""
    value = document.value
    for step in path:
        value = value[step]
    for key in value if isinstance(value, dict) else ():
        if key not in known:
            yield document.fault((*path, key), unknown(key, known))


def nearest(key: object, known: Collection[str]) -> str | None:
    """The known key that was probably meant."""
    return next(iter(difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.6)), None)
