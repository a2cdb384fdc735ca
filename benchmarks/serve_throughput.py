"""Requests per second of a bigray endpoint beside its peers, on this machine.

    python benchmarks/serve_throughput.py [--rounds 3] [--seconds 8]

One 784-256-10 MLP and one request body for all: a JSON record with 784 numbers, answered with label and probabilities.
The client is `wrk` with one thread and 16 connections. Each peer runs in its own processes, started afresh for every
round, one after the other. Printed are the median round, and bigray's ratio to it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

PORT = 8155
FOLDER = Path(__file__).parent / "serve_peers"
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


@dataclass(frozen=True)
class Peer:
    """A server to measure: one program of `serve_peers/`, which takes a bundle and a port."""

    title: str
    program: str
    package: str
    environment: dict[str, str] = field(default_factory=dict)


PEERS = {
    "bigray": Peer("bigray", "bigray_server.py", "ray"),
    "serve": Peer("Ray Serve as documented, @serve.batch", "ray_server.py", "ray"),
    "serve-haproxy": Peer("the same, HAProxy and throughput flags", "ray_server.py", "ray", HAPROXY),
    "fastapi": Peer("FastAPI + uvicorn, one process, no batches", "fastapi_server.py", "fastapi"),
    "litserve": Peer("LitServe, batches of 64, 2 ms", "litserve_server.py", "litserve"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated subset of: " + ", ".join(PEERS))
    options = parser.parse_args()
    compare([name for name in PEERS if name in options.peers.split(",")], options.rounds, options.seconds)


def compare(names: list[str], rounds: int, seconds: int) -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_inputs(Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in names}
        skipped: dict[str, str] = {}
        for _ in range(rounds):
            for name in names:
                if name in skipped:
                    continue
                try:
                    rates[name].append(measure(name, bundle, Path(folder), seconds))
                except RuntimeError as error:
                    skipped[name] = str(error)
    print_results(rates, skipped, rounds, seconds)


def write_inputs(folder: Path) -> str:
    from bigray.serve.sample import write_sample_bundle

    body = {"records": [{"image": np.random.default_rng(0).random(784).round(4).tolist()}]}
    (folder / "body.json").write_text(json.dumps(body))
    (folder / "post.lua").write_text(
        f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f'local file = io.open("{folder}/body.json")\nwrk.body = file:read("*a")\nfile:close()\n'
    )
    return write_sample_bundle(str(folder))


def measure(name: str, bundle: str, folder: Path, seconds: int) -> float:
    """Start a peer, warm it up, and return its requests per second; RuntimeError says why it cannot run."""
    peer = PEERS[name]
    if not is_installed(peer.package):
        raise RuntimeError(f"not installed: pip install {peer.package}")
    command = [sys.executable, str(FOLDER / peer.program), bundle, str(PORT)]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment(peer), stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until_answering(server, (folder / "body.json").read_bytes(), log)
            run_wrk(folder, 2)
            return run_wrk(folder, seconds)
        finally:
            end(server)


def environment(peer: Peer) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_SERVE_")}
    return kept | peer.environment


def wait_until_answering(server: subprocess.Popen[bytes], body: bytes, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            request = urllib.request.Request(
                f"http://127.0.0.1:{PORT}/predict", body, {"content-type": "application/json"}
            )
            answer = json.loads(urllib.request.urlopen(request, timeout=5).read())
        except (OSError, ValueError):
            time.sleep(0.2)
            continue
        if len(answer["predictions"][0]["probabilities"]) != 10:
            raise RuntimeError(f"answers with something else: {answer}")
        return
    raise RuntimeError("did not start: " + (log.read_text().strip().splitlines() or ["no output"])[-1])


def run_wrk(folder: Path, seconds: int) -> float:
    command = [
        "wrk",
        "-t1",
        "-c16",
        f"-d{seconds}s",
        "-s",
        str(folder / "post.lua"),
        f"http://127.0.0.1:{PORT}/predict",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in output:
        raise RuntimeError(re.search(r"Non-2xx.*", output)[0])  # type: ignore[index]
    return float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1])  # type: ignore[index]


def end(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
    time.sleep(1)


def print_results(rates: dict[str, list[float]], skipped: dict[str, str], rounds: int, seconds: int) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    title = f"wrk -t1 -c16 -d{seconds}s, median of {rounds} rounds"
    table = Table(title=title, caption=machine(), caption_justify="left")
    table.add_column("server")
    table.add_column("requests/s", justify="right")
    table.add_column("rounds", justify="right")
    table.add_column("bigray is", justify="right")
    for name in rates:
        if name in skipped:
            table.add_row(PEERS[name].title, "-", skipped[name], "")
            continue
        each = " ".join(f"{rate:,.0f}" for rate in rates[name])
        ratio = f"{medians['bigray'] / medians[name]:.1f}x" if "bigray" in medians and name != "bigray" else ""
        table.add_row(PEERS[name].title, f"{medians[name]:,.0f}", each, ratio)
    Console(width=130).print(table)


def machine() -> str:
    packages = ("ray", "torch", "onnxruntime", "fastapi", "uvicorn", "litserve", "orjson")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages if is_installed(name))
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}; {versions}; load {load:.1f}"
    )


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
