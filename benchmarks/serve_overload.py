"""What a server does when ten times as much is asked of it as it can answer.

    python benchmarks/serve_overload.py [--seconds 60] [--times 10] [--model waiting]

A model of 5 ms a row, in batches of up to four rows in bigray: by default one that waits, as if an accelerator did the
work, since on few cores a client with ten times the load would take the time of a model that computes (`--model
computing` has that). Its capacity is measured by `wrk` with 16 connections; then k6 sends ten times as many requests,
at even intervals, for a minute. Told are the goodput (answers with 200 a second) as a share of the capacity, how long
these and the refusals (503) took, and the memory of the process that holds the model. Plain Serve has its default,
`max_queued_requests=-1`: what it cannot answer waits, up to the client's own limit of 10 s.

Takes about 4 minutes; a minute with `--size small`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from load import Phase, Report, in_ms, load, wrk
from serving import COMPUTING, SERVERS, WAITING, Model, Watching, parse, rss_mb, running, show, try_each, write_model

ARGS = {"max_batch_size": 4, "allow_factories": ["serve_peers.slow_models:*"]}
SERVED = {
    "bigray": SERVERS["bigray"].given(args=ARGS),
    "serve-tuned": SERVERS["serve-tuned"].given(", queue as by default"),
    "serve-bounded": SERVERS["serve-tuned"].given(", 200 may wait", deployment={"max_queued_requests": 200}),
}
MODELS = {"waiting": WAITING, "computing": COMPUTING}
COLUMNS = ["server", "capacity/s", "asked/s", "goodput/s", "of capacity", "200: p50", "p99", "503: p50", "p99", "503s",
           "other failures", "not sent", "MB: before", "most", "after"]  # fmt: skip


def main() -> None:
    full = {"seconds": 60, "capacity_seconds": 8, "times": 10.0, "model": "waiting"}
    options = parse(__doc__ or "", list(SERVED), full, {**full, "seconds": 8, "capacity_seconds": 2})
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), **MODELS[options.model])
        rows, notes = try_each(options.peers, lambda name: measure(name, model, options))
    title = f"{options.times:g} times the capacity for {options.seconds} s; a model of 5 ms a row, {options.model}"
    show(title, COLUMNS, list(rows.values()), notes)


def measure(name: str, model: Model, options: Any) -> list[str]:
    body = model.bodies["json"]
    with running(SERVED[name], model) as server:
        capacity = wrk(body, options.capacity_seconds)
        models = server.models()
        before_mb = rss_mb(models)
        with (
            Watching(lambda: rss_mb(models), 0.5) as memory,
            load(body, Phase("over", options.times * capacity, options.seconds)) as under_way,
        ):
            report = under_way.wait()
        after_mb = rss_mb(models)
    sizes = [f"{size:,.0f}" for size in (before_mb, max([before_mb, *memory.values]), after_mb)]
    return [SERVED[name].title, *outcome(report, capacity, options), *sizes]


def outcome(report: Report, capacity: float, options: Any) -> list[str]:
    over = report.phases["over"]
    goodput = over.counts.get("200", 0) / options.seconds
    others = {kind: count for kind, count in over.counts.items() if kind not in ("200", "503")}
    shed = [in_ms(over.shed_ms.get(share)) for share in ("p(50)", "p(99)")]
    return [
        *(f"{rate:,.0f}" for rate in (capacity, options.times * capacity, goodput)),
        f"{goodput / capacity:.0%}",
        *(over.latency(share) for share in ("p(50)", "p(99)")),
        *shed,
        f"{over.counts.get('503', 0):,}",
        ", ".join(f"{count:,} {kind}" for kind, count in others.items()) or "0",
        f"{report.not_sent:,}",
    ]


if __name__ == "__main__":
    main()
