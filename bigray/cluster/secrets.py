"""What may not leave this machine with a job: files that hold secrets, and secrets written into a job's files. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from bigray.storage import CREDENTIALS, SECRET_PARAMETERS

SECRET_NAMES = (
    ".env",
    ".env.*",
    ".env-*",
    ".env_*",
    ".envrc",
    "*.env",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.keystore",
    "*.ppk",
    "*.kdbx",
    "*.tfstate*",
    "*.tfvars",
    ".terraformrc",
    ".htpasswd",
    ".npmrc",
    ".vault-token",
    "kubeconfig",
    "secrets.json",
    "secrets.toml",
    "secrets.yaml",
    "secrets.yml",
    ".netrc",
    "_netrc",
    ".pypirc",
    ".pgpass",
    ".boto",
    ".s3cfg",
    ".git-credentials",
    "auth_token",
    "*credentials*.json",
    ".aws",
    ".azure",
    ".docker",
    ".gcloud",
    ".gnupg",
    ".kube",
    ".ray",
    ".ssh",
)
"""Files and folders that hold secrets, by their names in lower case."""
_KEY_FILE = re.compile(r"id_[^.]+")
"""A private key of ssh. With an ending, such as `id_columns.csv`, it is none."""
_PRIVATE_KEY = re.compile(rb"\s*-----BEGIN [A-Z ]*PRIVATE KEY")
_PRIVATE_KEY_INSIDE = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY")
HEAD_BYTES = 4096
"""Of a file, looked at for a private key."""

SECRET_KEY = re.compile(
    r"(?i)(?:^|[._-])(?:\w*secret\w*|\w*passw(?:or)?d|passphrase|\w*api_?key|\w*access_?key(?:_id)?|\w*private_?key|\w*token)$"
)
"""A setting that is a secret by its name."""
_VOCABULARY = re.compile(r"(?i)(?:^|[._-])(?:pad|bos|eos|unk|mask|sep|cls|stop|start)_token$")
"""A token of a text, which is none."""
SECRET_VALUES = {
    "an access key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})"),
    "a token of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a key of Google": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a token of Slack": re.compile(r"\bxox[abprs]-[0-9A-Za-z-]{10,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"),
}
"""What is a secret by its form."""

WAY_OUT = "a job's files and command can be read by all who use the cluster; set it in the environment of its nodes"


def is_secret_path(name: str, *, is_folder: bool) -> bool:
    """Whether a file or folder holds secrets by its name alone."""
    lower = name.lower()
    if any(fnmatchcase(lower, pattern) for pattern in SECRET_NAMES):
        return True
    return not is_folder and _KEY_FILE.fullmatch(lower) is not None


def holds_private_key(name: str, head: bytes) -> bool:
    """Whether a file is a private key, or the JSON of a service account that has one, by its first bytes."""
    if _PRIVATE_KEY.match(head):
        return True
    return name.lower().endswith(".json") and _PRIVATE_KEY_INSIDE.search(head) is not None


def secrets_in_text(place: str, text: str) -> Iterator[str]:
    """One fault for each line, comments too, that holds what is a secret by its form; never the secret itself."""
    for number, line in enumerate(text.splitlines(), start=1):
        for what, pattern in SECRET_VALUES.items():
            if pattern.search(line):
                yield f"{place}:{number}: holds {what}; {WAY_OUT}"


def secrets_in_document(place: str, document: Any, key: str = "") -> Iterator[str]:
    """One fault for each setting whose name says that it is a secret, and each URI that has one in it."""
    if isinstance(document, Mapping):
        for name, value in document.items():
            yield from secrets_in_document(place, value, f"{key}.{name}" if key else str(name))
    elif isinstance(document, list | tuple):
        for value in document:
            yield from secrets_in_document(place, value, key)
    elif isinstance(document, str) and document:
        if SECRET_KEY.search(key) and not _VOCABULARY.search(key):
            yield f"{place}: {key}: holds a secret; {WAY_OUT}"
        elif is_uri_with_secret(document):
            yield f"{place}: {key}: a URI may hold no key and secret; {WAY_OUT}"


def is_uri_with_secret(value: str) -> bool:
    """As `bigray.storage` refuses it."""
    if "://" not in value:
        return False
    return CREDENTIALS.search(value) is not None or SECRET_PARAMETERS.search(value) is not None
