"""API keys: who may ask an endpoint, for what, and how often.

A key file is JSON on a local disk or in an object store. It holds the SHA-256 of each secret and never a secret: a
secret has 32 random bytes, so the hash of one that leaks cannot be turned back. Revoked keys stay in the file, so that
a log's key id can be looked up later.

Two processes may change a file at the same time. On a local disk (and NFS with locks) each change holds a lock that
the kernel takes from a process that dies, so none is lost. An object store has no such lock: the file is read again
right before it is written, and a change that came between is kept; only two writes within that last moment can still
lose the first of them, and `bigray keys list` shows it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from bigray.errors import DiskFull, SpecError, StorageError, did_you_mean
from bigray.serve.clock import utc_now as _now
from bigray.storage import TEMPORARY, Storage, open_storage

if TYPE_CHECKING:
    from rich.table import Table

FORMAT: Final = 1
NAME_PATTERN = r"[A-Za-z0-9._-]{1,64}"
MAX_SECRET_LENGTH = 128
"""Longer ones are none of ours (56 characters), and are not worth hashing."""
WRITE_ATTEMPTS = 5

Scope = Literal["predict", "admin"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", repr=False)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Key(_Document):
    """One key as the file holds it."""

    id: str = Field(pattern="^[0-9a-f]{8}$")
    """Public: in the secret, in logs and in tables."""
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    """Whose it is; unique among the live keys of a file."""
    sha256: Sha256
    """Of the whole secret, in hex."""
    scopes: frozenset[Scope] = Field(min_length=1)
    rate_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Requests a second over all replicas; None for no limit."""
    created: str
    """ISO, UTC."""
    revoked: str | None = None
    """When it stopped to count, ISO, UTC."""

    @property
    def is_live(self) -> bool:
        return self.revoked is None

    def allows(self, scope: str) -> bool:
        """`admin` includes the other scopes."""
        return scope in self.scopes or "admin" in self.scopes

    @field_serializer("scopes")
    def _sorted_scopes(self, scopes: frozenset[Scope]) -> list[str]:
        return sorted(scopes)


Keys = tuple[Key, ...]


class _KeysDocument(_Document):
    """The whole file."""

    format: Literal[1] = FORMAT
    keys: Keys = ()

    @model_validator(mode="after")
    def _each_is_one(self) -> _KeysDocument:
        live = [key.name for key in self.keys if key.is_live]
        if len({key.id for key in self.keys}) < len(self.keys) or len(set(live)) < len(live):
            raise ValueError("two keys have the same id, or two live ones the same name")
        return self


class KeyRing:
    """The keys of one file, ready to be asked (replica). Never changes: a changed file makes a new ring."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys: Keys = tuple(keys)
        self._live = {key.id: (bytes.fromhex(key.sha256), key) for key in self.live}
        # digests of secrets that were right once, so that a caller's next requests cost one hash and one look-up
        self._verified: dict[bytes, Key] = {}

    @property
    def live(self) -> Keys:
        return tuple(key for key in self.keys if key.is_live)

    def authenticate(self, secret: str) -> Key | None:
        """The live key with this secret, in the same time for an unknown id as for a wrong secret."""
        if len(secret) > MAX_SECRET_LENGTH:
            return None
        digest = hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
        return self._verified.get(digest) or self._verify(secret, digest)

    def _verify(self, secret: str, digest: bytes) -> Key | None:
        expected, key = self._live.get(secret_id(secret), _NOBODY)
        if not hmac.compare_digest(expected, digest) or key is None:
            return None
        self._verified[digest] = key
        return key


_NOBODY: tuple[bytes, Key | None] = (bytes(32), None)


@dataclass(frozen=True)
class KeyFile:
    """Where keys are kept."""

    storage: Storage
    """The folder."""
    name: str
    place: str
    """What the user wrote, for messages."""

    def read(self) -> bytes | None:
        """Its content as it is; None where there is no file."""
        return None if self.storage.file_size(self.name) is None else self.storage.read_bytes(self.name)

    def replace(self, content: bytes) -> None:
        """Write it whole and durably; on a local disk nobody but its owner can read it, at no moment."""
        if not self.storage.is_local:
            self.storage.write_bytes(self.name, content)
            return
        with _telling(self.place, "write"):
            _write_privately(self._path, content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers out where the storage can: see the top of this file."""
        with _file_lock(self._path.with_name(f".{self.name}.lock"), self.place) if self.storage.is_local else _NO_LOCK:
            yield

    @property
    def _path(self) -> Path:
        return Path(self.storage.root) / self.name


_NO_LOCK = nullcontext()


def open_key_file(location: str | os.PathLike[str]) -> KeyFile:
    """The key file at a local path or URI; it need not be there yet.

    Raises:
        SpecError: the location names no file.
        StorageError: its storage cannot be opened.
    """
    text = os.fspath(location)
    # what follows `?` says how to reach an object store and belongs to the folder
    path, mark, options = text.partition("?") if "://" in text else (text, "", "")
    folder, slash, name = path.rpartition("/")
    if not name or name in (".", "..", "~"):
        raise SpecError(f"{text}: expected a key file such as keys.json, got a folder")
    return KeyFile(open_storage((folder or slash or ".") + mark + options), name, text)


def load_ring(location: str | os.PathLike[str]) -> KeyRing:
    """The keys of a file that must be there.

    Raises:
        StorageError: there is none, or what is there is no key file; one line.
    """
    return read_ring(open_key_file(location))


def read_ring(file: KeyFile) -> KeyRing:
    """As `load_ring`."""
    content = file.read()
    if content is None:
        raise StorageError(f"{file.place}: no key file here; make one with `bigray keys add NAME --file {file.place}`")
    return KeyRing(parse_keys(content, file.place))


def list_keys(location: str | os.PathLike[str]) -> Keys:
    """Every key of a file, revoked ones too, in the order they were made."""
    return load_ring(location).keys


def create_key(
    location: str | os.PathLike[str],
    name: str,
    scopes: Sequence[str] = ("predict",),
    rate_per_s: float | None = None,
) -> str:
    """Add a key to a file, which is made where there is none; returns the secret, which is kept nowhere.

    Raises:
        SpecError: the name is not one or is taken, a scope is unknown, or the rate is not a positive number.
        StorageError: the file cannot be read or written, or is none of ours.
    """
    file = open_key_file(location)
    _check_request(name, scopes, rate_per_s)
    secret = _new_secret()
    key = Key(
        id=secret_id(secret),
        name=name,
        sha256=hashlib.sha256(secret.encode()).hexdigest(),
        scopes=frozenset(scopes),
        rate_per_s=rate_per_s,
        created=_now(),
    )
    _change(file, lambda keys: (_with_key(keys, key, file.place), key))
    return secret


def revoke_key(location: str | os.PathLike[str], id_or_name: str) -> Key:
    """Take a key out of use; endpoints refuse it as soon as they have read the file again (2 s).

    Raises:
        SpecError: no live key has this id or name.
        StorageError: the file cannot be read or written, or is none of ours.
    """
    file = open_key_file(location)
    read_ring(file)  # revoking in a file that is not there must not make one
    return _change(file, lambda keys: _without_key(keys, id_or_name, _now(), file.place))


def keys_table(ring: KeyRing) -> Table:
    """The rows of `bigray keys list`; there are no secrets to show."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for heading in ("id", "name", "scopes", "rate", "created", "state"):
        table.add_column(heading, justify="right" if heading == "rate" else "left", no_wrap=heading == "id")
    for key in ring.keys:
        rate = "-" if key.rate_per_s is None else f"{key.rate_per_s:g}/s"
        state = "live" if key.is_live else f"revoked {key.revoked}"
        style = None if key.is_live else "dim"
        table.add_row(key.id, key.name, ", ".join(sorted(key.scopes)), rate, key.created, state, style=style)
    return table


def parse_keys(content: bytes, place: str) -> Keys:
    """The keys in a file's content.

    Raises:
        StorageError: it is no key file; one line that names the place and holds nothing of the content.
    """
    try:
        document = json.loads(content)
        found = document.get("format") if isinstance(document, dict) else None
    except (ValueError, RecursionError):
        raise StorageError(f"{place}: not a key file: not JSON") from None
    if found != FORMAT:  # first: the fields of another format may be other ones
        raise StorageError(f"{place}: not a key file that this bigray reads: format {found!r:.20}, expected {FORMAT}")
    try:
        return _KeysDocument.model_validate(document).keys
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        problem = " ".join(f"{where}: {first['msg']}".split()).removeprefix(": ")
        raise StorageError(f"{place}: not a key file: {problem}") from None


def secret_id(secret: str) -> str:
    """The id in a secret, or what stands in its place in something else: a text that no key has as its id."""
    prefix, _, rest = secret.partition("_")
    return rest.partition("_")[0] if prefix == "bgr" else ""


def _new_secret() -> str:
    return f"bgr_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"


def _check_request(name: str, scopes: Sequence[str], rate_per_s: float | None) -> None:
    faults = []
    if not re.fullmatch(NAME_PATTERN, name):
        faults.append(f"name: {name!r} is not one; use up to 64 letters, digits, '-', '_' and '.'")
    if not scopes:
        faults.append(f"scopes: none given; known: {', '.join(sorted(get_args(Scope)))}")
    faults += [f"scopes: unknown {one!r}{did_you_mean(one, get_args(Scope))}" for one in scopes if not _is_scope(one)]
    if rate_per_s is not None and not (math.isfinite(rate_per_s) and rate_per_s > 0):
        faults.append(f"rate_per_s: expected a number above 0, got {rate_per_s}")
    if faults:
        raise SpecError(faults)


def _is_scope(name: str) -> bool:
    return name in get_args(Scope)


def _with_key(keys: Keys, key: Key, place: str) -> Keys:
    if any(one.is_live and one.name == key.name for one in keys):
        raise SpecError(f"{place}: there is a live key named '{key.name}'; revoke it first, or choose another name")
    if any(one.id == key.id for one in keys):  # one chance in four billion for each key there is
        raise SpecError(f"{place}: the id {key.id} is taken; run the same command again")
    return (*keys, key)


def _without_key(keys: Keys, id_or_name: str, at: str, place: str) -> tuple[Keys, Key]:
    live = [key for key in keys if key.is_live]
    # an id is exact, so it goes before a name that looks like one
    found = [key for key in live if key.id == id_or_name] or [key for key in live if key.name == id_or_name]
    if not found:
        if any(id_or_name in (key.id, key.name) for key in keys):
            raise SpecError(f"{place}: key '{id_or_name}' is revoked already")
        known = did_you_mean(id_or_name, [key.name for key in live]) if live else "; there are no live keys"
        raise SpecError(f"{place}: no key with the id or name '{id_or_name}'{known}")
    revoked = found[0].model_copy(update={"revoked": at})
    return tuple(revoked if key.id == revoked.id else key for key in keys), revoked


def _change(file: KeyFile, change: Callable[[Keys], tuple[Keys, Key]]) -> Key:
    """Apply `change` to what the file holds now, however many others change it too; returns the key it is about."""
    with file.locked():
        for _ in range(WRITE_ATTEMPTS):
            before = file.read()
            keys, key = change(() if before is None else parse_keys(before, file.place))
            document = _KeysDocument(keys=keys).model_dump(mode="json")
            if file.read() == before:  # else somebody wrote meanwhile, and his change counts too
                file.replace(json.dumps(document, indent=2).encode() + b"\n")
                return key
    raise StorageError(f"{file.place}: others keep changing it; try again")


@contextmanager
def _file_lock(path: Path, place: str) -> Iterator[None]:
    """One process or thread at a time; the empty file stays, since removing it would let two in."""
    with _telling(place, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _telling(place, "lock"):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_privately(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)  # of a process that died: the lock is ours
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # why it failed is the story to tell
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


@contextmanager
def _telling(place: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{place}: cannot {action}: {error.strerror or error}") from error
