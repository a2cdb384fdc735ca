"""What clients notice when processes of an endpoint are killed, with and without the one retry of `bigray.Client`.

    python benchmarks/serve_kills.py [--replica-kills 10] [--proxy-kills 3] [--controller-kills 2]

Two replicas; eight client threads ask at a steady pace, four that ask once and four that ask again where the first
answer is an error or none. Then processes get a SIGKILL, one at a time: replicas, the proxy (in turns HAProxy itself
and the actor of Serve that minds it), and Serve's controller. After each kill it is waited until the process is there
again, or for a minute. A failure belongs to the kill before it; "longest" is the longest that any request took, the
failed ones included. Plain Serve has its own proxy, whose actor is killed, and is
asked a quarter as much: it could not answer more on two cores.

Takes about 10 minutes; two with `--size small`.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from measuring import tell
from serving import (
    CONTROLLER,
    PORT,
    PROXY_ACTORS,
    REPLICA,
    SERVERS,
    URL,
    Model,
    Running,
    parse,
    running,
    show,
    try_each,
    wait_until,
    write_model,
)

from bigray.errors import DeployError
from bigray.serve.client import Client
from bigray.serve.ingress import haproxy_folder

TWO = {"num_replicas": 2}
SERVED = {
    "bigray": SERVERS["bigray"].given(", 2 replicas", deployment=TWO),
    "serve": SERVERS["serve"].given(", 2 replicas", deployment=TWO),
}
SHARES = {"bigray": 1.0, "serve": 0.25}
"""Of `--rate`: plain Serve cannot answer as much on two cores."""
THREADS = 4
"""Of each kind of client."""
BACK_S = 60.0
COLUMNS = ["server", "killed", "times", "back after, at most", "without retry", "failed", "with one retry", "failed",
           "longest, without", "with"]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One request."""

    ended_at: float
    seconds: float
    error: str
    """Empty where it was answered."""


class Callers:
    """Threads that ask at a steady pace, for the length of a `with` block."""

    def __init__(self, body: bytes, *, rate: float, retries: int) -> None:
        """`rate` is that of all threads together."""
        self.asked: list[Asked] = []
        self._body, self._retries, self._every_s = body, retries, THREADS / rate
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(THREADS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
            time.sleep(self._every_s / THREADS)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _ask(self) -> None:
        with Client(URL, timeout_s=10.0, retries=self._retries) as client:
            due = time.monotonic()
            while not self._ended.is_set():
                self.asked.append(ask_once(client, self._body))
                due = max(due + self._every_s, time.monotonic())  # what is late is not made up for by a burst
                self._ended.wait(due - time.monotonic())


def ask_once(client: Client, body: bytes) -> Asked:
    started, error = time.monotonic(), ""
    try:
        client.predict_body(body)
    except DeployError as failure:
        error = str(failure).removeprefix(URL).lstrip(": ")[:60]
    return Asked(time.monotonic(), time.monotonic() - started, error)


@dataclass(frozen=True)
class Kill:
    kind: str
    at: float
    back_s: float
    """Until as many such processes were there as before."""


def main() -> None:
    full = {"replica_kills": 10, "proxy_kills": 3, "controller_kills": 2, "rate": 200.0, "pause_s": 5.0}
    small = {**full, "replica_kills": 1, "proxy_kills": 2, "controller_kills": 1, "pause_s": 2.0}
    options = parse(__doc__ or "", list(SERVED), full, small)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        rows, notes = try_each(options.peers, lambda name: measure(name, model, options))
    found = [row for rows_of_one, _ in rows.values() for row in rows_of_one]
    notes += [f"{SERVED[name].title}: {errors}" for name, (_, errors) in rows.items()]
    show(f"SIGKILL under {options.rate:g} requests/s of each kind of client", COLUMNS, found, notes)


def measure(name: str, model: Model, options: Any) -> tuple[list[list[str]], str]:
    body = model.bodies["json"].file.read_bytes()
    with running(SERVED[name], model) as server:
        if not wait_until(lambda: len(server.named(REPLICA)) == 2, BACK_S):
            raise RuntimeError("there are not two replicas")
        once, again = (Callers(body, rate=SHARES[name] * options.rate, retries=retries) for retries in (0, 1))
        with once, again:
            time.sleep(options.pause_s)
            kills = kill_all(server, name, options)
    kinds = ["nothing yet", *dict.fromkeys(kill.kind for kill in kills)]
    rows = [to_row(SERVED[name].title, kind, kills, once.asked, again.asked) for kind in kinds]
    errors = Counter(asked.error for asked in (*once.asked, *again.asked) if asked.error)
    return rows, ", ".join(f"{count} x {error}" for error, count in errors.most_common(6)) or "no failure"


def kill_all(server: Running, name: str, options: Any) -> list[Kill]:
    # with HAProxy there are both: one minds it, the other answers where it has nobody to send to
    actor = next((each for each in PROXY_ACTORS if server.named(each)), PROXY_ACTORS[0])
    actors = ("proxy's actor", lambda: server.named(actor))
    proxies = [("HAProxy", haproxies), actors] if name == "bigray" else [actors]
    plan = [
        *[("replica", lambda: server.named(REPLICA))] * options.replica_kills,
        *[proxies[number % len(proxies)] for number in range(options.proxy_kills)],
        *[("controller", lambda: server.named(CONTROLLER))] * options.controller_kills,
    ]
    kills = []
    for kind, find in plan:
        kills.append(kill(kind, find))
        tell(f"  killed: {kind}, back after {kills[-1].back_s:.1f} s")
        time.sleep(options.pause_s)
    return kills


def haproxies() -> list[psutil.Process]:
    """Those of this endpoint's own configuration; they may outlive the actor that started them."""
    marker = f"{haproxy_folder(PORT)}/"
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if "haproxy" in (process.info["name"] or "") and marker in command:
            found.append(process)
    return found


def kill(kind: str, find: Callable[[], list[psutil.Process]]) -> Kill:
    before = find()
    if not before:
        raise RuntimeError(f"there is no {kind} to kill")
    at = time.monotonic()
    with contextlib.suppress(psutil.NoSuchProcess):
        before[0].kill()

    def is_back() -> bool:
        now = find()
        return len(now) >= len(before) and before[0] not in now

    return Kill(kind, at, time.monotonic() - at if wait_until(is_back, BACK_S) else float("inf"))


def to_row(title: str, kind: str, kills: Sequence[Kill], once: Sequence[Asked], again: Sequence[Asked]) -> list[str]:
    own = [one for one in kills if one.kind == kind]
    groups = [[asked for asked in each if cause(asked, kills) == kind] for each in (once, again)]
    counts = [(f"{len(group):,}", f"{sum(bool(asked.error) for asked in group):,}") for group in groups]
    longest = [f"{1000 * max((asked.seconds for asked in group), default=0):,.0f} ms" for group in groups]
    back = f"{max(one.back_s for one in own):.1f} s" if own else "-"
    return [title, kind, str(len(own)), back, *(cell for pair in counts for cell in pair), *longest]


def cause(asked: Asked, kills: Sequence[Kill]) -> str:
    """The kind of the kill before the request's end."""
    earlier = [kill.kind for kill in kills if kill.at <= asked.ended_at]
    return earlier[-1] if earlier else "nothing yet"


if __name__ == "__main__":
    main()
