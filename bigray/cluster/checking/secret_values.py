"""Whether one named value of a file is a secret in clear: by its name, or by how it looks."""

from __future__ import annotations

import re

from bigray.cluster.secrets import SECRET_KEY, SECRET_VALUES, is_uri_with_secret


def is_secret(name: str, value: object) -> bool:
    """Whether a variable holds a secret in clear; references, paths and placeholders (`<...>`) are none."""
    if not isinstance(value, str) or not value.strip() or is_placeholder(value):
        return False
    if any(pattern.search(value) for pattern in SECRET_VALUES.values()) or is_uri_with_secret(value):
        return True
    return bool(SECRET_KEY.search(name)) and not value.startswith("/")


def is_placeholder(value: str) -> bool:
    """Whether a text only stands for one that is filled in later."""
    return bool(re.fullmatch(r"\s*(<[^<>]*>|\$\(?\{?[A-Za-z_]\w*\}?\)?)\s*", value))
