"""Whether a value or a line of a checked file holds a secret in clear: by the name it is given, or by its own form."""

from __future__ import annotations

import re

from bigray.cluster.secrets import SECRET_KEY, SECRET_VALUES, is_uri_with_secret

_OPTION = re.compile(r"""(?:^|[\s'";])--?(?P<name>[A-Za-z][\w-]*)(?:=|\s+)['"]?(?P<value>[^\s'"]+)""")
_ASSIGNED = re.compile(r"""\b(?P<name>[A-Za-z_]\w*)\s*[=:]\s*['"]?(?P<value>[^\s'"]+)""")
_PASSWORD = re.compile(r"(?i)passw|passphrase|secret|credentials")
_ECHOED = re.compile(r"(?:echo|printf)\s+(?!['\"]?\$)\S.*>+\s*\S*auth_token")


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


def secret_in(text: str) -> str | None:
    """What of a line or a command is a secret, such as "the value of HF_TOKEN"; None where nothing is."""
    for what, pattern in SECRET_VALUES.items():
        if pattern.search(text):
            return what
    if any(is_uri_with_secret(word) for word in text.split()):
        return "an address with a key in it"
    for pattern in (_OPTION, _ASSIGNED):
        for name, value in pattern.findall(text):
            if (SECRET_KEY.search(name) or name.lower().endswith("credentials")) and _is_value(value, name):
                return f"the value of {name}"
    return "a token" if _ECHOED.search(text) else None


def _is_value(text: str, name: str) -> bool:
    """Not a word of settings, nor a reference: a variable, a command's output, a path, a placeholder. A number may be a
    count of tokens, and a password."""
    if re.fullmatch(r"true|false|none|null", text, re.IGNORECASE):
        return False
    if re.fullmatch(r"[\d._,]+", text) and not _PASSWORD.search(name):
        return False
    return not text.startswith(("$", "/", "~", "<", "`", "{", "-"))
