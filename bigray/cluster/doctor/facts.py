"""What was measured, as plain values: they travel from the nodes to the driver, and `checks` judges them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenFacts:
    """How a process finds Ray's token. The token itself is in none of the facts."""

    mode: str
    """Of Ray's authentication: `token` or `disabled`."""
    place: str = ""
    """The file, or the variable that holds the token itself; empty where there is none."""
    file_mode: int | None = None
    """Permission bits of the file; None where it is no file, or cannot be looked at."""


@dataclass(frozen=True)
class NodeInRay:
    """A live node as Ray's control plane lists it."""

    node_id: str
    ip: str
    gpus: float = 0.0
    object_store_bytes: float = 0.0
    is_head: bool = False
    has_fake_gpus: bool = False
    """Of a dry run: they are counted, and are not there."""


@dataclass(frozen=True)
class NodeFacts:
    """A node as a process on it sees it."""

    machine: str
    """The same for nodes that share a machine and its network."""
    versions: dict[str, str]
    token: TokenFacts
    plasma_folder: str
    """Where the object store lies; empty where that is not known."""
    shm_bytes: int | None
    """Size of /dev/shm; None where there is none."""
    session_folder: str
    disk_total_bytes: int
    disk_free_bytes: int
    interface: str
    """That has the node's address in Ray; empty where none has."""
    gloo_interface: str
    """That gloo binds to: by its setting, else by the name of the host."""
    gloo_setting: str = ""
    """`GLOO_SOCKET_IFNAME` of Ray's workers on the node."""


@dataclass(frozen=True)
class Node:
    """A node, and what came of examining it."""

    name: str
    in_ray: NodeInRay
    facts: NodeFacts | None
    error: str = ""
    """Why there are no facts."""


@dataclass(frozen=True)
class RingPlace:
    """What a node brings to a ring."""

    port: int
    """Of its store."""
    gpus_in_torch: int
    """Devices that `torch.cuda` can use."""


@dataclass(frozen=True)
class RingFacts:
    """An all-reduce between two nodes."""

    first: str
    second: str
    backend: str
    seconds: float | None
    """Median; None where the two did not reach each other."""
    error: str = ""
    seconds_with_interface: float | None = None
    """Of a failed one tried again, each node on the interface that has its address in Ray."""


@dataclass(frozen=True)
class ClockFacts:
    """A node's clock against the driver's."""

    ahead_s: float
    round_trip_s: float
    """The offset is known to half of this."""


@dataclass(frozen=True)
class DoorFacts:
    """A port that takes changes, and what it answered to requests without a token."""

    what: str
    address: str
    is_public: bool
    """It listens on more than the loopback address."""
    answers: dict[str, int | None]
    """HTTP status by request; None where there was no answer in time."""
    node: str | None = None


@dataclass(frozen=True)
class StorageFacts:
    """A file written from one node and read from the others."""

    uri: str
    writer: str
    sha256: str = ""
    reads: dict[str, str] = field(default_factory=dict)
    """Hash that each reader found, by its name."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why a reader, or the writer, could not; an empty text where the file was not there."""
    is_local: bool = True
    left_behind: str = ""
    """The file, where it could not be removed."""
