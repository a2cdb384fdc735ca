"""Requests per second of a bigray endpoint beside its peers, on this machine.

    python benchmarks/serve_throughput.py [--rounds 3] [--seconds 8] [--bentoml-python DIR/bin/python]

One 784-256-10 MLP and one row of 784 numbers for all, answered with its probabilities (and its label, but for `npy` and
mere bytes, where it is the largest of them). The client is `wrk` with one thread and 16 connections, which asks again
as soon as it is answered. Each server runs in its own processes, started afresh for every round, one after the other;
what it answers is compared with the model's own answer first. Requests:

    json    a record of JSON                                                    6 KB
    oip     Open Inference Protocol v2, binary tensors both ways                3 KB
    npy     an array of numpy's both ways                                       3 KB
    raw     float32 bytes both ways, a route of the peer's own                  3 KB

BentoML's requirements conflict with bigray's, so it lives in a virtual environment of its own:
`python -m venv DIR && DIR/bin/pip install bentoml onnxruntime numpy`, and is left out where none is given.

Takes about 10 minutes; a minute or two with `--size small`.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from load import wrk
from measuring import tell
from serving import SERVERS, Model, Server, parse, running, show, try_each, write_model

Rates = dict[tuple[str, str], list[float]]
"""Requests a second by server and request, one a round."""

WARM_UP_S = 2


def main() -> None:
    full = {"rounds": 3, "seconds": 8, "bentoml_python": ""}
    options = parse(__doc__ or "", list(SERVERS), full, {**full, "rounds": 1, "seconds": 2})
    servers = dict(SERVERS)
    if options.bentoml_python:
        servers["bentoml"] = replace(servers["bentoml"], python=options.bentoml_python)
    with tempfile.TemporaryDirectory() as folder:
        rates, skipped = compare(servers, options.peers, write_model(Path(folder)), options.rounds, options.seconds)
    notes = [*skipped, *versions_elsewhere(servers["bentoml"])]
    title = f"wrk -t1 -c16 -d{options.seconds}s, median of {options.rounds} rounds"
    show(title, ["server", "request", "requests/s", "rounds", "bigray is"], to_rows(servers, rates), notes)


def compare(
    servers: dict[str, Server], names: list[str], model: Model, rounds: int, seconds: int
) -> tuple[Rates, list[str]]:
    rates: Rates = {}
    all_skipped: list[str] = []
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        measured, skipped = try_each(names, lambda name: measure(servers[name], model, seconds))
        names = [name for name in names if name in measured]  # what does not run now is not tried again
        all_skipped += skipped
        for name, by_body in measured.items():
            for body, rate in by_body.items():
                rates.setdefault((name, body), []).append(rate)
    return rates, all_skipped


def measure(server: Server, model: Model, seconds: int) -> dict[str, float]:
    rates = {}
    with running(server, model):
        for kind in server.bodies:
            wrk(model.bodies[kind], WARM_UP_S)
            rates[kind] = wrk(model.bodies[kind], seconds)
    return rates


def to_rows(servers: dict[str, Server], rates: Rates) -> list[list[str]]:
    """JSON is compared with bigray's JSON, and any binary request with the best of bigray's."""
    medians = {key: statistics.median(values) for key, values in rates.items()}
    own = {kind: rate for (name, kind), rate in medians.items() if name == "bigray"}
    binary = max((rate for kind, rate in own.items() if kind != "json"), default=None)
    rows = []
    for (name, kind), values in sorted(
        rates.items(), key=lambda item: (item[0][1] != "json", list(rates).index(item[0]))
    ):
        other = own.get("json") if kind == "json" else binary
        ratio = f"{other / medians[name, kind]:.2f}x" if other and name != "bigray" else ""
        each = " ".join(f"{rate:,.0f}" for rate in values)
        rows.append([servers[name].title, kind, f"{medians[name, kind]:,.0f}", each, ratio])
    return rows


def versions_elsewhere(bentoml: Server) -> list[str]:
    """Of what runs in another virtual environment."""
    code = "from importlib.metadata import version as v; print(v('bentoml'), 'with onnxruntime', v('onnxruntime'))"
    done = subprocess.run([bentoml.python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    return [f"bentoml {done.stdout.strip()}"] if done.returncode == 0 else []


if __name__ == "__main__":
    main()
