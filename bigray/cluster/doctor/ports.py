"""Ports through which a cluster is changed: who may reach them, and what they answer without a token (on the node)."""

from __future__ import annotations

import http.client
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigray.cluster.doctor.facts import DoorFacts

LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp."""
TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Request:
    """One that changes nothing even where it is let in: a look, or a body that is refused for its form."""

    method: str
    path: str
    body: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


DASHBOARD = (
    Request("GET", "/api/jobs/"),
    Request("POST", "/api/jobs/", "{}"),
    Request("GET", "/api/serve/applications/"),
)
AGENT = (Request("POST", "/api/job_agent/jobs/", "{}"),)
"""Each node's agent starts jobs too, at the node's own address."""


@dataclass(frozen=True)
class Door:
    """What to knock at."""

    what: str
    host: str
    port: int
    requests: tuple[Request, ...]


def door(what: str, address: str, requests: tuple[Request, ...]) -> Door | None:
    """Of `host:port`, with or without a scheme; None where there is no such address."""
    host, _, port = address.partition("://")[2 if "://" in address else 0].rstrip("/").rpartition(":")
    return Door(what, host.strip("[]"), int(port), requests) if host and port.isdecimal() else None


def knock(doors: Sequence[Door], node: str) -> list[DoorFacts]:
    """Ask each without a token (node)."""
    listening = listening_here()
    return [
        DoorFacts(
            what=door.what,
            address=f"{door.host}:{door.port}",
            is_public=_is_public(door, listening),
            answers={request.name: ask(door.host, door.port, request) for request in door.requests},
            node=node,
        )
        for door in doors
    ]


def ask(host: str, port: int, request: Request, timeout_s: float = TIMEOUT_S) -> int | None:
    """The status of the answer to a request without a token; None where none came in time. No proxy is used."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"} if request.body else {}
    try:
        connection.request(request.method, request.path, request.body, headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def listening_here() -> dict[int, frozenset[str]]:
    """Addresses by port that something on this machine listens at."""
    texts = [path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    return listening("\n".join(texts))


def listening(table: str) -> dict[int, frozenset[str]]:
    """The same of the text of /proc/net/tcp and /proc/net/tcp6."""
    found: dict[int, set[str]] = {}
    for line in table.splitlines():
        words = line.split()
        if len(words) > 3 and words[3] == LISTENS:
            address, _, port = words[1].partition(":")
            found.setdefault(int(port, 16), set()).add(_address(address))
    return {port: frozenset(addresses) for port, addresses in found.items()}


def _address(digits: str) -> str:
    """The kernel writes each word of four bytes in the order of the machine, which is little-endian here."""
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _is_public(door: Door, listening: Mapping[int, frozenset[str]]) -> bool:
    """By the sockets; where none is seen, as in another network namespace, by the address that was given."""
    addresses = listening.get(door.port) or {door.host}
    return not all(_is_loopback(address) for address in addresses)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
