"""How soon a second replica helps when the load quadruples, and how steady the number of replicas is when it does not.

    python benchmarks/serve_autoscale.py [--thrash-minutes 10] [--after-seconds 120]

A model of some milliseconds of arithmetic a row (two convolutions), so that one replica on one core answers a few
hundred requests a second at most; how many, `wrk` measures first, with one replica and no autoscaling. k6 then sends
40 % of it for 20 s, and from there on four times as much: 160 %, which two replicas can answer. A replica counts from
its first answer on: of bigray, as `GET /stats` tells of it, read every 0.1 s on new connections; of plain Serve, as its
answers name it. bigray runs with serve/autoscale.yaml, and once with one spare replica; Serve with its default
autoscaling (`autoscaling_config={"min_replicas": 1, "max_replicas": 2}`). "settled" are the last 30 s.

With `--thrash-minutes` a constant load follows, 70 % of what one replica can do, on a server started afresh; told is
how often the number of its replica processes changes.

Takes about 45 minutes, of which 10 for each server are the constant load; two or three with `--size small`.
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

from load import Phase, Report, load, wrk
from measuring import tell
from serving import (
    COMPUTING,
    REPLICA,
    SERVERS,
    URL,
    Model,
    Running,
    Watching,
    parse,
    running,
    show,
    try_each,
    wait_until,
    write_model,
)

FILE = "serve/autoscale.yaml"
SPARE = {"autoscaling_config": {"policy": {"policy_kwargs": {"spare": 1}}}}
BOUNDS = {"min_replicas": 1, "max_replicas": 2}
SERVED = {
    "bigray": SERVERS["bigray"].given(", spare 0", file=FILE),
    "bigray-spare": SERVERS["bigray"].given(", spare 1", file=FILE, deployment=SPARE),
    "serve": SERVERS["serve"].given(", default autoscaling", deployment={"autoscaling_config": BOUNDS}),
}
FIXED = {name: SERVERS["bigray" if name.startswith("bigray") else name] for name in SERVED}
"""With one replica, to measure what it can do."""
BASE, STEP, CONSTANT = 0.4, 4.0, 0.7
SETTLED_S = 30
COLUMNS = ["server", "one replica/s", "step to/s", "2nd answers after", "p99 before", "step", "settled",
           "failed before", "in the step", "settled", "not sent", "changes at constant load"]  # fmt: skip


def main() -> None:
    full = {"before_seconds": 20, "after_seconds": 120, "capacity_seconds": 8, "thrash_minutes": 10.0}
    small = {"before_seconds": 8, "after_seconds": 25, "capacity_seconds": 2, "thrash_minutes": 0.2}
    options = parse(__doc__ or "", list(SERVED), full, small)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), **COMPUTING)
        rows, notes = try_each(options.peers, lambda name: measure(name, model, options))
    title = f"load times {STEP:g} at once; then {options.thrash_minutes:g} minutes at {CONSTANT:.0%} of one replica"
    show(title, COLUMNS, list(rows.values()), notes)


def measure(name: str, model: Model, options: Any) -> list[str]:
    with running(FIXED[name], model):
        capacity = wrk(model.bodies["json"], options.capacity_seconds)
    with running(SERVED[name], model) as server:
        if name == "bigray-spare" and not wait_until(lambda: len(server.named(REPLICA)) > 1, 60):
            raise RuntimeError("the spare replica did not come")
        row = step(name, model, capacity, options)
    changes = "-"
    if options.thrash_minutes > 0:
        with running(SERVED[name], model) as server:
            changes = constant(server, model, capacity, 60 * options.thrash_minutes)
    return [SERVED[name].title, *row, changes]


def step(name: str, model: Model, capacity: float, options: Any) -> list[str]:
    low, high = BASE * capacity, STEP * BASE * capacity
    until_settled = max(1, options.after_seconds - SETTLED_S)
    phases = (
        Phase("before", low, options.before_seconds),
        Phase("step", high, until_settled, options.before_seconds),
        Phase("settled", high, options.after_seconds - until_settled, options.before_seconds + until_settled),
    )
    with (
        Watching(answering_replicas, 0.1) as replicas,
        load(model.bodies["json"], *phases, replica_header="X-Replica") as under_way,
    ):
        report = under_way.wait()
    at = replicas.first(lambda found: found > 1) if name.startswith("bigray") else second(report)
    outcomes = [report.phases[phase.name] for phase in phases]
    return [
        *(f"{rate:,.0f}" for rate in (capacity, high)),
        in_seconds(at, report.phases["step"].started_at),
        *(outcome.latency() for outcome in outcomes),
        *(outcome.failures() for outcome in outcomes),
        f"{report.not_sent:,}",
    ]


def answering_replicas() -> int:
    """Of bigray: those that have answered a request for the model."""
    with urllib.request.urlopen(f"{URL}/stats", timeout=2) as answer:
        return sum(replica["requests"] > 0 for replica in json.loads(answer.read())["replicas"])


def second(report: Report) -> float | None:
    """When the second replica was first met by a caller of the load."""
    times = sorted(report.replicas.values())
    return times[1] if len(times) > 1 else None


def in_seconds(at: float | None, since: float) -> str:
    if at is None:
        return "never"
    return f"{at - since:.1f} s" if at > since else "was there"


def constant(server: Running, model: Model, capacity: float, seconds: float) -> str:
    """How often the number of replicas changes."""
    tell(f"  constant load for {seconds:.0f} s")
    phase = Phase("constant", CONSTANT * capacity, round(seconds))
    with Watching(lambda: len(server.named(REPLICA)), 0.5) as counts, load(model.bodies["json"], phase) as under_way:
        report = under_way.wait()
    seen = counts.values
    changes = sum(before != after for before, after in pairwise(seen))
    failed = report.phases["constant"].failures()
    return f"{changes} ({min(seen)} to {max(seen)} replicas), failed {failed}"


if __name__ == "__main__":
    main()
