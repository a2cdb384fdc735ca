"""Links of hosts as the kernel makes them: a switch in a network namespace of its own, and a wire to each host.

Everything is inside namespaces of this package's names: no interface of the machine itself is made, named or touched.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

PREFIX = "bigray-hosts-"
"""Of every network namespace that is made here."""
BRIDGE = "switch"
INTERFACE = "eth0"
"""A host's own end of its wire."""
NOWHERE = "02:00:00:00:de:ad"
"""A hardware address that nobody has."""
LONGEST_WAIT_IN_QUEUE = "400ms"


@dataclass(frozen=True)
class Link:
    """The wire between a host and the switch."""

    switch: str
    """The network namespace of the switch."""
    port: str
    """The switch's end of the wire, in that namespace."""
    namespace: str
    """The host's network namespace, where the wire ends in `eth0`."""

    def cut(self) -> None:
        """Pull the cable: the host sees that it has no carrier."""
        ip("link", "set", "dev", self.port, "down", namespace=self.switch)

    def drop(self) -> None:
        """Lose every packet, either way, without a sign: the carrier stays, and nobody is told.

        The port leaves the bridge, and what arrives there ends.
        """
        ip("link", "set", "dev", self.port, "nomaster", namespace=self.switch)

    def mend(self) -> None:
        """Undo `cut` and `drop`: a port of this bridge forwards at once, since no spanning tree is kept."""
        ip("link", "set", "dev", self.port, "master", BRIDGE, namespace=self.switch)
        ip("link", "set", "dev", self.port, "up", namespace=self.switch)

    def slow(self, megabits_per_s: float) -> None:
        """Limit both directions by a token bucket; what waits longer than 0.4 s is lost, as in a full queue."""
        rate = f"{int(megabits_per_s * 1e6)}bit"
        bucket = f"{max(4_000, int(megabits_per_s * 1e6 / 8 / 100))}b"  # 10 ms of it, and more than one packet
        limit = ("root", "tbf", "rate", rate, "burst", bucket, "latency", LONGEST_WAIT_IN_QUEUE)
        for namespace, device in ((self.switch, self.port), (self.namespace, INTERFACE)):
            _tc("qdisc", "replace", "dev", device, *limit, namespace=namespace)

    def unslow(self) -> None:
        for namespace, device in ((self.switch, self.port), (self.namespace, INTERFACE)):
            _tc("qdisc", "del", "dev", device, "root", namespace=namespace)

    def lose_towards(self, address: str) -> None:
        """Lose what this host sends to one other, in silence; what comes from there still arrives."""
        entry = (address, "lladdr", NOWHERE, "dev", INTERFACE, "nud", "permanent")
        ip("neigh", "replace", *entry, namespace=self.namespace)

    def find_again(self, address: str) -> None:
        """Undo `lose_towards`."""
        ip("neigh", "del", address, "dev", INTERFACE, namespace=self.namespace)


def make_switch(namespace: str) -> None:
    """A network namespace with a bridge in it, and nothing else."""
    ip("netns", "add", namespace)
    ip("link", "add", "name", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0", namespace=namespace)
    ip("link", "set", "dev", BRIDGE, "up", namespace=namespace)


def make_link(switch: str, port: str, namespace: str, address: str) -> Link:
    """A network namespace for a host, wired to the switch, with an address in its /24 and the loopback up."""
    ip("netns", "add", namespace)
    ends = ("link", "add", "name", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
    ip(*ends, namespace=switch)
    link = Link(switch, port, namespace)
    link.mend()
    ip("address", "add", f"{address}/24", "dev", INTERFACE, namespace=namespace)
    for device in ("lo", INTERFACE):
        ip("link", "set", "dev", device, "up", namespace=namespace)
    # programs find their own address by asking which one would reach the outside: nothing answers there
    ip("route", "add", "default", "dev", INTERFACE, namespace=namespace)
    return link


def unmake_link(link: Link) -> None:
    """Take a host's wire and its network namespace away."""
    ip("link", "del", "dev", link.port, namespace=link.switch)
    ip("netns", "del", link.namespace)


def namespaces(number: int | None = None) -> list[str]:
    """Network namespaces of this package's names, of one network or of all."""
    prefix = PREFIX if number is None else f"{PREFIX}{number}-"
    names = [line.split()[0] for line in ip("netns", "list").splitlines() if line.strip()]
    return sorted(name for name in names if name.startswith(prefix))


def process_ids(namespace: str) -> list[int]:
    """Processes that are in a network namespace."""
    return [int(line) for line in ip("netns", "pids", namespace).split()]


def ip(*words: str, namespace: str | None = None) -> str:
    """Run `ip`, in a network namespace where one is given; what it printed.

    Raises:
        RuntimeError: with what `ip` said.
    """
    return _run(["ip", *(("-netns", namespace) if namespace else ()), *words])


def _tc(*words: str, namespace: str) -> None:
    _run(["tc", "-netns", namespace, *words])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
