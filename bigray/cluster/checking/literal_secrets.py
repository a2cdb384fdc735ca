"""Secrets written into a `ray up` file, and files of secrets that it would copy to every node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.secret_values import secret_in
from bigray.cluster.secrets import SECRET_KEY, is_secret_path

_CREDENTIALS = ("aws_credentials", "gcp_credentials")
_OF_RAY = (".ray", "auth_token")
"""Ray's own token has to be on every node."""


def secrets(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """The path of every secret in a document's values and what it is, never the secret itself."""
    if isinstance(value, dict):
        for key, item in value.items():
            name = str(key)
            if name in _CREDENTIALS or ("/" not in name and SECRET_KEY.search(name) and _is_literal(item)):
                yield (*path, key), f"the value of {name}"
            else:
                yield from secrets(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from secrets(item, (*path, index))
    elif isinstance(value, str) and (kind := secret_in(value)):
        yield path, kind


def is_private(path: str) -> bool:
    """Whether a local path holds keys or credentials, or is a whole home or root folder."""
    plain = path.rstrip("/") or "/"
    if re.fullmatch(r"~|/|\$HOME|/root|/home(/[^/]+)?|/Users/[^/]+", plain) or ".config/gcloud" in plain:
        return True
    *folders, last = plain.split("/")
    names = [(name, True) for name in folders] + [(last, False)]
    return any(name not in _OF_RAY and is_secret_path(name, is_folder=is_folder) for name, is_folder in names)


def _is_literal(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not value.startswith(("$", "~", "/", "<", "{{"))
