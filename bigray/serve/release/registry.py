"""A channel's state and its replicas' reports, in the key-value store of Ray's control service.

    <app>/<base>/state/<revision>     one key for each revision, never written twice
    <app>/<base>/report/<replica>     one key for each replica, written over and over

That makes writing a compare-and-set: of two writers who have read revision 7, one makes the key of revision 8 and the
other is told that it is there. No actor has to stay up for it, and replicas read it whoever deployed them.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Protocol

from bigray.errors import ClusterError, DeployError, last_line
from bigray.serve.release.record import ChannelState, ReplicaReport

NAMESPACE = b"bigray"
KEPT_REVISIONS = 32
"""The newest ones stay. Readers need one; but a writer who is slow between looking and writing has to find its
revision taken, not removed. Only where as many were written meanwhile it cannot tell, and then says that it lost."""
MOST_ATTEMPTS = 200
WAIT_S = 0.005


class KeyValue(Protocol):
    """What the registry needs of a store that all processes share."""

    def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
        """Set a key; without `overwrite`, only one that is not there. Returns whether the key is new."""

    def get(self, key: bytes) -> bytes | None: ...

    def keys(self, prefix: bytes) -> list[bytes]:
        """All keys that begin with `prefix`."""

    def delete(self, key: bytes) -> None:
        """Remove a key that may be gone already."""


class RayKeyValue:
    """Ray's own store, kept by the head node. Ray has to be connected.

    `ray.experimental.internal_kv` is what Serve keeps its own state in; the public API has no store. It is used for
    its put without overwriting, which the control service decides in one step.
    """

    def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
        from ray.experimental.internal_kv import _internal_kv_put

        return not _asking(lambda: _internal_kv_put(key, value, overwrite, namespace=NAMESPACE))

    def get(self, key: bytes) -> bytes | None:
        from ray.experimental.internal_kv import _internal_kv_get

        found: bytes | None = _asking(lambda: _internal_kv_get(key, namespace=NAMESPACE))
        return found

    def keys(self, prefix: bytes) -> list[bytes]:
        from ray.experimental.internal_kv import _internal_kv_list

        return list(_asking(lambda: _internal_kv_list(prefix, namespace=NAMESPACE)))

    def delete(self, key: bytes) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        _asking(lambda: _internal_kv_del(key, namespace=NAMESPACE))


class MemoryKeyValue:
    """A store of one process, for an endpoint without Ray; any thread may call it."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: bytes, value: bytes, *, overwrite: bool) -> bool:
        with self._lock:
            is_new = key not in self._values
            if is_new or overwrite:
                self._values[key] = value
            return is_new

    def get(self, key: bytes) -> bytes | None:
        with self._lock:
            return self._values.get(key)

    def keys(self, prefix: bytes) -> list[bytes]:
        with self._lock:
            return [key for key in self._values if key.startswith(prefix)]

    def delete(self, key: bytes) -> None:
        with self._lock:
            self._values.pop(key, None)


def shared_store() -> KeyValue:
    """The store of the cluster that this process is connected to."""
    return RayKeyValue()


class Registry:
    """One channel's keys (driver and replicas).

    `base` is the bundle that the application was started with: an application that is started anew with another one
    begins a history of its own. Every method raises `ClusterError` where the store does not answer.
    """

    def __init__(self, app: str, base: str, store: KeyValue | None = None) -> None:
        self.app = app
        self._store = shared_store() if store is None else store
        self._app_prefix = f"{_hashed(app)}/".encode()
        self._states = self._app_prefix + f"{_hashed(base)}/state/".encode()
        self._reports = self._app_prefix + f"{_hashed(base)}/report/".encode()

    def revision(self) -> int:
        """The newest revision, 0 where there is none; cheaper than reading it."""
        return max(self._revisions(), default=0)

    def read(self) -> ChannelState | None:
        """The newest state; None where there is none.

        Raises:
            DeployError: what is stored is no state, as another version of bigray may have left it.
        """
        while newest := self.revision():
            # it may have been removed just now; a newer one is there then, or the whole channel is gone
            if (data := self._store.get(self._state_key(newest))) is not None:
                return self._parsed(newest, data)
        return None

    def write(self, state: ChannelState) -> bool:
        """Make this the newest state; False where another writer has made its revision, and nothing is changed."""
        earlier = self._revisions()
        if state.revision != max(earlier, default=0) + 1:
            return False
        key, value = self._state_key(state.revision), _signed(state)
        if not self._store.put(key, value, overwrite=False) and self._store.get(key) != value:
            return False  # where it is our own, an answer was lost and the put was sent twice
        if self.revision() >= state.revision + KEPT_REVISIONS:
            return False  # our key may have been another's before, and removed
        for revision in earlier:
            if revision <= state.revision - KEPT_REVISIONS:
                self._store.delete(self._state_key(revision))
        return True

    def report(self, report: ReplicaReport) -> None:
        """Replace what this replica said before."""
        self._store.put(self._report_key(report.replica), report.to_bytes(), overwrite=True)

    def reports(self) -> tuple[ReplicaReport, ...]:
        """The last word of each replica, by replica; one that cannot be read counts as not given."""
        found = []
        for key in self._store.keys(self._reports):
            data = self._store.get(key)
            try:
                found.append(ReplicaReport.from_bytes(data or b""))
            except ValueError:
                continue
        return tuple(sorted(found, key=lambda report: report.replica))

    def forget(self, replica_id: str) -> None:
        """Remove a replica's report: it is gone."""
        self._store.delete(self._report_key(replica_id))

    def clear(self) -> None:
        """Remove all that is stored for the application, whatever it was started with."""
        for key in self._store.keys(self._app_prefix):
            self._store.delete(key)

    def _revisions(self) -> list[int]:
        names = (key.removeprefix(self._states) for key in self._store.keys(self._states))
        return [int(name) for name in names if name.isdigit()]

    def _state_key(self, revision: int) -> bytes:
        return self._states + f"{revision:012d}".encode()

    def _report_key(self, replica_id: str) -> bytes:
        return self._reports + _hashed(replica_id).encode()

    def _parsed(self, revision: int, data: bytes) -> ChannelState:
        try:
            return ChannelState.from_bytes(data.partition(b"\n")[2])
        except ValueError:
            raise DeployError(
                f"application '{self.app}': the stored state of revision {revision} cannot be read by this bigray; "
                "delete the application and deploy it again"
            ) from None


def update(registry: Registry, transition: Callable[[ChannelState], ChannelState]) -> ChannelState:
    """Read the state, take a step, write it; again with the newer state where another writer was faster.

    Returns:
        The state as written, or as it was where the step changes nothing.

    Raises:
        DeployError: the step is refused, or there is no state to change.
    """
    for _ in range(MOST_ATTEMPTS):
        before = registry.read()
        if before is None:
            raise DeployError(f"application '{registry.app}': nothing has been deployed under this name yet")
        after = transition(before)
        if after == before or registry.write(after):
            return after
        time.sleep(random.uniform(0, WAIT_S))  # two writers in step would meet again
    raise DeployError(f"application '{registry.app}': its state keeps being changed by others; try again")


def _signed(state: ChannelState) -> bytes:
    """The state with a line of its own before it, so that a writer knows its own among equal ones."""
    return uuid.uuid4().hex.encode() + b"\n" + state.to_bytes()


def _hashed(text: str) -> str:
    """Names and locations may hold anything; a key of them has a fixed length and no separator."""
    return blake2b(text.encode(errors="backslashreplace"), digest_size=12).hexdigest()


def _asking(call: Callable[[], Any]) -> Any:
    """What Ray's store answers; that it does not is a fault of the cluster."""
    from ray.exceptions import RayError
    from ray.experimental.internal_kv import _internal_kv_initialized

    if not _internal_kv_initialized():
        raise ClusterError("Ray is not connected, and what an endpoint serves is kept in its cluster")
    try:
        return call()
    except (RayError, RuntimeError) as error:
        raise ClusterError(f"the cluster's head node does not answer: {last_line(error)}") from error
