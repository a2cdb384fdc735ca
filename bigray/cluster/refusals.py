"""Why a cluster cannot be joined: one line with the cause and the next command, in place of what Ray says."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bigray.errors import ClusterError

_RAY_AND_PYTHON = r"started with:\s+Ray: (\S+)\s+Python: (\S+)"
VERSIONS = re.compile(f"(?s){_RAY_AND_PYTHON}.*?{_RAY_AND_PYTHON}")
UNAUTHENTICATED = re.compile(
    r"(?i)unauthenticated|InvalidAuthToken|AuthenticationError|no authentication token|couldn't find an authentication"
)
NO_NODE_HERE = "No node info found matching"
NOTHING_RUNS = "Could not find any running Ray instance"
NOT_REACHED = re.compile(r"(?i)failed to connect|timed? ?out|unavailable|connection refused|deadline exceeded|no route")
CONNECT_TIMEOUT_S = 3.0
"""Of one attempt."""
COPY_TOKEN = (
    "copy ~/.ray/auth_token of its head node to this user's (mode 600), or name the file in RAY_AUTH_TOKEN_PATH"
)


def explain(error: BaseException, address: str) -> str:
    """What an exception of Ray's, raised while joining the cluster at `address`, means."""
    text = "\n".join(f"{type(cause).__name__}: {cause}" for cause in _causes(error))
    return f"{address}: cannot connect to Ray: {_reason(text, address) or _first_line(error)}"


def _reason(text: str, address: str) -> str | None:
    if found := VERSIONS.search(text):
        theirs, ours = found.group(1, 2), found.group(3, 4)
        return (
            f"it runs Ray {theirs[0]} and Python {theirs[1]}, this is Ray {ours[0]} and Python {ours[1]}: "
            f"pip install 'ray[default]=={ours[0]}' with Python {ours[1]} on its nodes and start it again"
        )
    if UNAUTHENTICATED.search(text):
        return token_fault() or f"it refuses the token of {token_place()}: {COPY_TOKEN}"
    if NO_NODE_HERE in text:
        return (
            f"no Ray node runs on this machine: join it first with ray start --address={address}, "
            "or send the job there with bigray submit"
        )
    if NOTHING_RUNS in text:
        return "no Ray runs on this machine: start it with ray start --head, or name a cluster with --address"
    if NOT_REACHED.search(text):
        return "nothing answers there: look on its head node with ray status, or start it there with ray start --head"
    return None


def token_place() -> Path | str | None:
    """Where Ray finds this user's token: a variable that holds it, a file (there or not), or nowhere."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(named)
    default = Path.home() / ".ray" / "auth_token"
    return default if default.exists() else None


def token_fault() -> str | None:
    """What keeps this process from showing a token at all; None where it has one to show."""
    place = token_place()
    if place is None:
        return f"it asks for a token, and this user has none: {COPY_TOKEN}"
    if isinstance(place, Path):
        try:
            if not place.read_bytes().strip():
                return f"the token file {place} is empty: {COPY_TOKEN}"
        except OSError as error:
            return f"the token file {place} cannot be read ({error.strerror}): {COPY_TOKEN}"
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return (
            f"it asks for a token, and RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} keeps it back: unset RAY_AUTH_MODE"
        )
    return None


def open_to_others(file: Path) -> int | None:
    """Permissions of a token file that other users may read or write; None where they may not."""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError:
        return None
    return mode if mode & 0o066 else None


def check_before_joining(address: str, patience_s: float, *, is_lenient: bool = False) -> None:
    """Find in seconds what Ray would try for half a minute, or end the process for.

    A head that is starting is waited for, up to `patience_s`. `is_lenient` takes a token that others can read.

    Raises:
        ClusterError: nothing listens at the address, it wants another token, or others can read the token.
    """
    if address == "local":  # one that is started, not joined
        return
    _check_token(address, is_lenient=is_lenient)
    found = _found_here() if address == "auto" else address
    place = host_and_port(found)
    if place is None:
        return
    _wait_for_listener(*place, found, patience_s)
    _ask_for_the_cluster(found)


def _check_token(address: str, *, is_lenient: bool) -> None:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return
    if fault := token_fault():  # Ray's client ends the process where it finds no token
        fault = fault.replace("it asks for", "RAY_AUTH_MODE asks for")
        raise ClusterError(f"{address}: cannot connect to Ray: {fault}")
    place = token_place()
    if isinstance(place, Path) and not is_lenient and (mode := open_to_others(place)):
        raise ClusterError(
            f"{place}: other users can read the cluster's token (mode {mode:04o}): chmod 600 {shlex.quote(str(place))}"
        )


def _found_here() -> str:
    """The cluster that 'auto' means; its file may be of one that has ended."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto") or "auto")
    except ConnectionError as error:
        raise ClusterError(explain(error, "auto")) from error


def host_and_port(address: str) -> tuple[str, int] | None:
    """None for 'auto', and for addresses with a scheme: those go another way."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        return None
    return host.strip("[]"), int(port)


def _wait_for_listener(host: str, port: int, address: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            is_name = isinstance(error, socket.gaierror)
            if is_name or time.monotonic() > deadline:
                reason = f"{host} is no known host" if is_name else f"nothing answers there ({_why(error)})"
                raise ClusterError(
                    f"{address}: cannot connect to Ray: {reason}: start it with ray start --head there, "
                    "or name the address that ray status shows on its head node"
                ) from error
        time.sleep(0.5)


def _why(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else (error.strerror or type(error).__name__).lower()


def _ask_for_the_cluster(address: str) -> None:
    """One call to the control plane: a token that it refuses is refused at once, where Ray tries 20 times."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined, unused-ignore]

    try:
        with _without_rays_warnings():
            GcsClient(address=address)
    except Exception as error:
        if UNAUTHENTICATED.search(f"{type(error).__name__}: {error}"):
            raise ClusterError(explain(error, address)) from error
        # whatever else it is, Ray tries again and has the last word


@contextlib.contextmanager
def _without_rays_warnings() -> Iterator[None]:
    """Ray's C++ writes a line of its own to standard error before it raises; ours says the same, with the way out."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
