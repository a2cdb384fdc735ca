"""Whether a line of a script holds a secret in clear: by the name it is given, or by its own form."""

from __future__ import annotations

import re

from bigray.cluster.secrets import SECRET_KEY, SECRET_VALUES, is_uri_with_secret

_ASSIGNED = re.compile(r"""\b(?P<name>[A-Za-z_]\w*)\s*[=:]\s*['"]?(?P<value>[^\s'"]+)""")


def secret_in(line: str) -> str | None:
    """What of a line is a secret in clear, such as `HF_TOKEN` or "a private key"; None where nothing is."""
    for what, pattern in SECRET_VALUES.items():
        if pattern.search(line):
            return what
    if any(is_uri_with_secret(word) for word in line.split()):
        return "an address with a key in it"
    return next((name for name, value in _ASSIGNED.findall(line) if SECRET_KEY.search(name) and _is_value(value)), None)


def _is_value(text: str) -> bool:
    """Not a number or a word of settings, nor a reference: a variable, a command's output, a path, a placeholder."""
    if re.fullmatch(r"[\d._,]+|true|false|none|null", text, re.IGNORECASE):
        return False
    return len(text) >= 4 and not text.startswith(("$", "/", "~", "<", "`", "{"))
