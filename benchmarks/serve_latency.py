"""How long answers take when requests arrive at a rate, whether the server keeps up or not.

    python benchmarks/serve_latency.py [--seconds 60] [--share 0.6]

One 784-256-10 MLP, a JSON record of 784 numbers. Of each server first the capacity is measured: what 16 callers of k6
get that ask again as soon as they are answered. Then k6 sends requests at 60 % of that rate, at even intervals (open
loop: a slow answer does not delay the next request, so waiting is not left out). Times are from the sending of a
request, with the connection if one has to be made.

Client and server share the cores, and k6 takes many times as much of them as `wrk`: the capacity that `wrk` finds is
told too, but 60 % of it is more than the machine has beside k6. What k6 takes of the cores is in the last column.

Takes about 6 minutes; a minute with `--size small`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from load import SHARES, Phase, capacity_beside_k6, load, wrk
from serving import SERVERS, Model, parse, running, show, try_each, write_model

PEERS = ["bigray", "fastapi-tuned", "serve-tuned", "serve"]
COLUMNS = [
    "server",
    "wrk/s",
    "capacity/s",
    "asked/s",
    "answered/s",
    "p50",
    "p95",
    "p99",
    "p99.9",
    "failed",
    "not sent",
    "client",
]


def main() -> None:
    full = {"rounds": 1, "seconds": 60, "capacity_seconds": 8, "share": 0.6}
    options = parse(__doc__ or "", PEERS, full, {**full, "seconds": 5, "capacity_seconds": 2})
    rows: list[list[str]] = []
    notes = ["client: cores that k6 took; not sent: requests for which none of its callers was free"]
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for _ in range(options.rounds):
            found, skipped = try_each(options.peers, lambda name: measure(name, model, options))
            rows += found.values()
            notes += skipped
    show(f"open loop at {options.share:.0%} of each server's capacity, {options.seconds} s", COLUMNS, rows, notes)


def measure(name: str, model: Model, options: Any) -> list[str]:
    body = model.bodies["json"]
    with running(SERVERS[name], model):
        wrk(body, 2)
        by_wrk = wrk(body, options.capacity_seconds)
        capacity = capacity_beside_k6(body, by_wrk, options.capacity_seconds)
        rate = options.share * capacity
        # the first seconds are those in which k6 makes its connections
        phases = (Phase("warm", rate, 5), Phase("steady", rate, options.seconds, starts_at_s=5))
        with load(body, *phases) as running_load:
            report = running_load.wait()
    steady = report.phases["steady"]
    rates = [f"{each:,.0f}" for each in (by_wrk, capacity, rate, steady.counts.get("200", 0) / options.seconds)]
    latencies = [steady.latency(share) for share in SHARES]
    client = f"{report.client_cores:.2f}"
    return [SERVERS[name].title, *rates, *latencies, steady.failures(), f"{report.not_sent:,}", client]


if __name__ == "__main__":
    main()
