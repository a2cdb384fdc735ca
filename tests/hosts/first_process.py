"""The first process of a host, as a program: `python first_process.py SETUP`, SETUP being a `Setup` in JSON.

It mounts what the host has for itself, says "ready", reaps whatever is orphaned there, and ends when its standard input
does. The other end of that is held by the test, so a test that is killed takes its hosts along: with the first process
of a pid namespace all others end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from json import dumps, loads


@dataclass(frozen=True)
class Setup:
    """What is made before anything runs on the host."""

    hostname: str
    mounts: tuple[tuple[str, ...], ...]
    """Arguments of `mount`, one after the other."""

    def to_json(self) -> str:
        return dumps(asdict(self))


def main(setup: Setup) -> None:
    socket.sethostname(setup.hostname)
    # copies of the other hosts' network namespaces, which would keep those alive as long as this host
    subprocess.run(["umount", "--recursive", "--lazy", "/run/netns"], check=False, stderr=subprocess.DEVNULL)
    for mount in setup.mounts:
        subprocess.run(["mount", *mount], check=True)
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    os.write(sys.stdout.fileno(), b"ready\n")
    while not (select.select([0], [], [], 1.0)[0] and not os.read(0, 1)):
        reap()  # a signal that came just before the wait


def reap() -> None:
    with contextlib.suppress(ChildProcessError):  # nobody is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main(Setup(**loads(sys.argv[1])))
