"""What other clients notice while somebody sends what no client should.

    python benchmarks/serve_hostile.py [--gigabytes 1] [--slow 500]

One 784-256-10 MLP; k6 sends 100 requests a second and is the other clients. First nobody disturbs it; then, one after
the other, each for as long as it takes and at most for a minute:

    large, announced    a body of 1 GB with its length in the header
    large, chunked      the same in chunks of 64 KB, of no announced length
    slow                500 connections that send a byte of their body each second
    deep JSON           100,000 brackets within each other, again and again
    tiny chunks         a body of 500,000 chunks of one byte

Told are the others' p99 and failures, what the attacker got back, whether the process that holds the model is the same
one, and how its memory grew. FastAPI keeps whatever comes: it is given the same, so have some gigabytes of memory free.

Takes about 6 minutes; two with `--size small`.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from load import Outcome, Phase, load
from serving import PORT, SERVERS, Model, Running, Watching, parse, rss_mb, running, show, try_each, write_model

PEERS = ["bigray", "fastapi-tuned"]
LONGEST_S = 60.0
PIECE = 2**16
DEEP = b'{"records":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
COLUMNS = ["server", "attack", "others: p50", "p99", "longest", "failed", "attacker got", "same process", "MB before",
           "most", "after"]  # fmt: skip

Attack = Callable[[], Awaitable[str]]
"""Says what came back, in a few words."""


def main() -> None:
    full = {"gigabytes": 1.0, "slow": 500, "chunks": 500_000, "seconds": 30, "rate": 100.0}
    small = {"gigabytes": 0.1, "slow": 50, "chunks": 20_000, "seconds": 5, "rate": 50.0}
    options = parse(__doc__ or "", PEERS, full, small)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        tables, notes = try_each(options.peers, lambda name: measure(name, model, options))
    rows = [row for table in tables.values() for row in table]
    show(f"{options.rate:g} requests/s of others, beside hostile clients", COLUMNS, rows, notes)


def measure(name: str, model: Model, options: Any) -> list[list[str]]:
    size = int(options.gigabytes * 2**30)
    attacks: dict[str, Attack] = {
        "none": lambda: nothing(options.seconds),
        "large, announced": lambda: send_body(f"content-length: {size}", as_it_is, size),
        "large, chunked": lambda: send_body("transfer-encoding: chunked", as_chunk, size),
        "slow": lambda: be_slow(options.slow, options.seconds),
        "deep JSON": lambda: send_deep(options.seconds),
        "tiny chunks": lambda: send_tiny(options.chunks),
    }
    with running(SERVERS[name], model) as server:
        return [
            [SERVERS[name].title, kind, *suffer(server, model, attack, options.rate)]
            for kind, attack in attacks.items()
        ]


def suffer(server: Running, model: Model, attack: Attack, rate: float) -> list[str]:
    """One attack beside the others' requests."""
    models = server.models()
    before_mb = rss_mb(models)
    # it is stopped when the attack is over
    phase = Phase("others", rate, LONGEST_S + 30)
    with Watching(lambda: rss_mb(models), 0.2) as memory, load(model.bodies["json"], phase) as under_way:
        time.sleep(2)
        got = asyncio.run(bounded(attack))
        report = under_way.stop()
    is_same = models == server.models()
    sizes = [f"{size:,.0f}" for size in (before_mb, max([before_mb, *memory.values]), rss_mb(models))]
    return [*others(report.phases["others"]), got, "yes" if is_same else "no", *sizes]


def others(outcome: Outcome) -> list[str]:
    return [*(outcome.latency(share) for share in ("p(50)", "p(99)", "max")), outcome.failures()]


async def bounded(attack: Attack) -> str:
    try:
        return await asyncio.wait_for(attack(), LONGEST_S)
    except TimeoutError:
        return f"went on for {LONGEST_S:.0f} s"
    except OSError as error:
        return f"{type(error).__name__}"


async def nothing(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "-"


class Connection:
    """A socket that says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        # read at once: a connection that is reset forgets what it had to say
        self._first_line = asyncio.ensure_future(reader.readline())

    @classmethod
    async def open(cls, header: str) -> Connection:
        """Connected, and the head of a request sent."""
        connection = cls(*await asyncio.open_connection("127.0.0.1", PORT))
        head = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{header}\r\n\r\n"
        await connection.send(head.encode())
        return connection

    async def send(self, data: bytes) -> None:
        """`ConnectionError` where it has been closed."""
        self._writer.write(data)
        await self._writer.drain()

    async def status(self, wait_s: float) -> str:
        """The answer's status, `closed`, or `nothing` in time."""
        await asyncio.wait([self._first_line], timeout=wait_s)
        if not self._first_line.done():
            return "nothing"
        if self._first_line.exception() is not None:
            return "closed"
        parts = self._first_line.result().split()
        return parts[1].decode() if len(parts) > 1 else "closed"

    def close(self) -> None:
        self._first_line.cancel()
        with contextlib.suppress(OSError):
            self._writer.close()


def as_it_is(data: bytes) -> bytes:
    return data


def as_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def send_body(header: str, frame: Callable[[bytes], bytes], size: int) -> str:
    """As much of a body as is taken."""
    connection = await Connection.open(header)
    piece, sent = frame(b" " * PIECE), 0
    with contextlib.suppress(ConnectionError):
        while sent < size:
            await connection.send(piece)
            sent += PIECE
        if frame is as_chunk:
            await connection.send(b"0\r\n\r\n")
    status = await connection.status(20)
    connection.close()
    return f"{status} after {sent / 2**20:,.0f} MB"


async def be_slow(count: int, seconds: float) -> str:
    """What each connection got, at the end."""
    results = await asyncio.gather(*(trickle(seconds) for _ in range(count)))
    return ", ".join(f"{number} x {what}" for what, number in Counter(results).most_common(4))


async def trickle(seconds: float) -> str:
    try:
        connection = await Connection.open("content-length: 10000")
    except OSError:
        return "not connected"
    status = "nothing"
    with contextlib.suppress(ConnectionError):
        for _ in range(int(seconds)):
            await connection.send(b" ")
            if (status := await connection.status(1.0)) != "nothing":
                break
    connection.close()
    return status


async def send_deep(seconds: float) -> str:
    """One request after the other."""
    statuses: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        statuses[await send_deep_once()] += 1
    return ", ".join(f"{number:,} x {what}" for what, number in statuses.most_common(3))


async def send_deep_once() -> str:
    connection = await Connection.open(f"content-length: {len(DEEP)}")
    with contextlib.suppress(ConnectionError):
        await connection.send(DEEP)
    status = await connection.status(20)
    connection.close()
    return status


async def send_tiny(count: int) -> str:
    """A thousand chunks in each write; most of them arrive in one piece, and are chunks all the same."""
    connection = await Connection.open("transfer-encoding: chunked")
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < count:
            await connection.send(as_chunk(b" ") * 1000)
            sent += 1000
        await connection.send(b"0\r\n\r\n")
    status = await connection.status(20)
    connection.close()
    return f"{status} after {sent:,} chunks"


if __name__ == "__main__":
    main()
