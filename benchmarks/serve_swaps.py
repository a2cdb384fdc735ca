"""What clients notice of a new version: failed requests, answers of the wrong model, and how long they wait.

    python benchmarks/serve_swaps.py [--swaps 20] [--requests 100000] [--share 0.5]

Two bundles take turns behind one replica, 20 times, while k6 sends requests at half of the server's capacity (beside k6
itself), without a retry, until 100,000 are done. Each answer names the version it is of, and its probabilities have to
be those of that version: `wrong answer` counts the others. bigray deploys with `--force`, so the gate runs but refuses
nothing; its checks run beside the load, on the same cores, and are part of what is measured. Plain Serve redeploys by
`serve.run` with other arguments, three times: as by default, and with `max_surge_percent=100`, which needs room for a
second replica. "calm" is the same load on the same server before the first swap.

Takes about 15 minutes; two or three with `--size small`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load import Load, Phase, Report, capacity_beside_k6, load, wrk
from measuring import tell
from serving import SERVERS, Model, Running, parse, running, show, try_each, write_model

SERVED = {
    "bigray": SERVERS["bigray"],
    "serve": SERVERS["serve"].given(", serve.run"),
    "serve-surge": SERVERS["serve"].given(", serve.run with surge", deployment={"max_surge_percent": 100}),
}
VERSION_HEADER = {"bigray": "X-Bigray-Version", "serve": "X-Version", "serve-surge": "X-Version"}
"""As k6 spells them."""
CALM_S = 20
START_S = 3
"""Of k6."""
LONGEST_S = 1800
COLUMNS = ["server", "swaps", "seconds a swap", "requests", "requests/s", "failed", "calm: p50", "p99", "swaps: p50",
           "p99", "longest", "not sent", "client"]  # fmt: skip


def main() -> None:
    full = {"swaps": 20, "peer_swaps": 3, "requests": 100_000, "share": 0.5, "capacity_seconds": 8}
    small = {**full, "swaps": 2, "peer_swaps": 1, "requests": 2_000, "capacity_seconds": 2}
    options = parse(__doc__ or "", list(SERVED), full, small)
    with tempfile.TemporaryDirectory() as folder:
        models = [write_model(Path(folder) / str(seed), seed=seed) for seed in (0, 1)]
        rows, notes = try_each(options.peers, lambda name: measure(name, models, options))
    title = f"swaps at {options.share:.0%} of the capacity of one replica"
    show(title, COLUMNS, list(rows.values()), notes)


def measure(name: str, models: Sequence[Model], options: Any) -> list[str]:
    body = models[0].bodies["json"]
    plan = {
        "expected": {model.version: model.expected for model in models},
        "version_header": VERSION_HEADER[name],
    }
    with running(SERVED[name], models[0]) as server:
        by_wrk = wrk(body, options.capacity_seconds)
        capacity = capacity_beside_k6(body, by_wrk, options.capacity_seconds)
        rate = options.share * capacity
        # it is stopped once all is done, so the second phase is as long as it may ever be
        phases = (Phase("calm", rate, CALM_S), Phase("swaps", rate, LONGEST_S, starts_at_s=CALM_S))
        with load(body, *phases, **plan) as under_way:
            time.sleep(CALM_S)
            num_swaps, num_requests = options.swaps, options.requests
            if name != "bigray":
                num_swaps, num_requests = options.peer_swaps, 0
            started = time.monotonic()
            seconds = swap(server, models, num_swaps, under_way)
            wait_for_requests(under_way, num_requests / rate - CALM_S + START_S, started)
            lasted_s = time.monotonic() - started
            report = under_way.stop()
    return [SERVED[name].title, str(len(seconds)), f"{statistics.median(seconds):.1f}", *outcome(report, lasted_s)]


def swap(server: Running, models: Sequence[Model], times: int, under_way: Load) -> list[float]:
    """Deploy the one that is not live, again and again; seconds that each took."""
    seconds = []
    for number in range(times):
        if under_way.is_over():
            raise RuntimeError(f"only {number} of {times} swaps within {LONGEST_S} s")
        answer = server.do("deploy", models[(number + 1) % len(models)].bundle)
        if "error" in answer:
            raise RuntimeError(f"swap {number + 1}: {answer['error']}")
        seconds.append(answer["seconds"])
        tell(f"  swap {number + 1} of {times}: {answer['seconds']:.1f} s")
        time.sleep(1)
    return seconds


def wait_for_requests(under_way: Load, seconds: float, since: float) -> None:
    """Until so many seconds of load have passed, or it has ended."""
    while time.monotonic() - since < seconds and not under_way.is_over():
        time.sleep(0.2)


def outcome(report: Report, lasted_s: float) -> list[str]:
    calm, swaps = report.phases["calm"], report.phases["swaps"]
    kinds = {*calm.counts, *swaps.counts} - {"200"}
    failed = {kind: calm.counts.get(kind, 0) + swaps.counts.get(kind, 0) for kind in kinds}
    return [
        f"{calm.total + swaps.total:,}",
        f"{swaps.total / lasted_s:,.0f}",
        ", ".join(f"{count:,} {kind}" for kind, count in sorted(failed.items())) or "0",
        *(each.latency(share) for each in (calm, swaps) for share in ("p(50)", "p(99)")),
        swaps.latency("max"),
        f"{report.not_sent:,}",
        f"{report.client_cores:.2f}",
    ]


if __name__ == "__main__":
    main()
