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
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

PORT = 8155
PEERS = {
    "bigray": "bigray: HAProxy, orjson, ONNX Runtime, batches without a timer",
    "serve": "Ray Serve as documented: @serve.batch, defaults, torch",
    "serve-haproxy": "the same code behind HAProxy, RAY_SERVE_THROUGHPUT_OPTIMIZED=1",
    "fastapi": "FastAPI + uvicorn, one process, no batches, torch",
    "litserve": "LitServe, batches of 64, 2 ms, torch",
}
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated subset of: " + ", ".join(PEERS))
    parser.add_argument("--serve-peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--bundle", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_peer:
        SERVERS[options.serve_peer](options.bundle)
    else:
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
    if name == "litserve" and not is_installed("litserve"):
        raise RuntimeError("not installed: pip install litserve")
    command = [sys.executable, __file__, "--serve-peer", name, "--bundle", bundle]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment(name), stdout=output, stderr=output, start_new_session=True
        )
        try:
            wait_until_answering(server, (folder / "body.json").read_bytes(), log)
            run_wrk(folder, 2)
            return run_wrk(folder, seconds)
        finally:
            end(server)


def environment(name: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_SERVE_")}
    return kept | (HAPROXY if name == "serve-haproxy" else {})


def wait_until_answering(server: subprocess.Popen[bytes], body: bytes, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{PORT}/predict", body, {"content-type": "application/json"})
            answer = json.loads(urllib.request.urlopen(request, timeout=5).read())
        except (OSError, ValueError):
            time.sleep(0.2)
            continue
        if len(answer["predictions"][0]["probabilities"]) != 10:
            raise RuntimeError(f"answers with something else: {answer}")
        return
    raise RuntimeError("did not start: " + (log.read_text().strip().splitlines() or ["no output"])[-1])


def run_wrk(folder: Path, seconds: int) -> float:
    command = ["wrk", "-t1", "-c16", f"-d{seconds}s", "-s", str(folder / "post.lua"), f"http://127.0.0.1:{PORT}/predict"]
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
            table.add_row(PEERS[name], "-", skipped[name], "")
            continue
        each = " ".join(f"{rate:,.0f}" for rate in rates[name])
        ratio = f"{medians['bigray'] / medians[name]:.1f}x" if "bigray" in medians and name != "bigray" else ""
        table.add_row(PEERS[name], f"{medians[name]:,.0f}", each, ratio)
    Console(width=130).print(table)


def machine() -> str:
    packages = ("ray", "torch", "onnxruntime", "fastapi", "uvicorn", "litserve", "orjson")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages if is_installed(name))
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}; {versions}; load {load:.1f}"


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        return


class TorchModel:
    """What the peers run: the bundle's weights in eager torch, standardised as bigray does, one thread."""

    def __init__(self, location: str) -> None:
        import safetensors.torch
        import torch

        from bigray.bundle import ModelBundle
        from bigray.models import build_model

        torch.set_num_threads(1)
        bundle = ModelBundle.load(location)
        manifest = bundle.manifest
        self.module = build_model(manifest.factory.factory, manifest.factory.params, (784,), 10).eval()
        self.module.load_state_dict(safetensors.torch.load(bundle.weights))
        self.mean = torch.tensor(manifest.preprocessing.mean)
        self.std = torch.tensor(manifest.preprocessing.std)

    def __call__(self, images: list[list[float]]) -> list[dict[str, object]]:
        import torch

        with torch.inference_mode():
            logits = self.module((torch.tensor(images) - self.mean) / self.std)
            probabilities = torch.softmax(logits, dim=1)
            labels = probabilities.argmax(dim=1).tolist()
        return [
            {"label": label, "probabilities": row} for label, row in zip(labels, probabilities.tolist(), strict=True)
        ]


def serve_bigray(bundle: str) -> None:
    from bigray.cluster.connect import connect
    from bigray.serve import runner
    from bigray.serve.config import load_serve

    with connect():
        runner.deploy(bundle, load_serve("serve/local.yaml").with_port(PORT))
        wait_for_interrupt()
        runner.shutdown()


def serve_with_ray(bundle: str) -> None:
    import ray
    from ray import serve

    @serve.deployment
    class Documented:
        def __init__(self, location: str) -> None:
            self.model = TorchModel(location)

        @serve.batch()
        async def predict(self, images: list[list[float]]) -> list[dict[str, object]]:
            return self.model(images)

        async def __call__(self, request):  # type: ignore[no-untyped-def]
            body = await request.json()
            return {"predictions": [await self.predict(record["image"]) for record in body["records"]]}

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Documented.bind(bundle), route_prefix="/predict")
    wait_for_interrupt()
    serve.shutdown()
    ray.shutdown()


def serve_with_fastapi(bundle: str) -> None:
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Record(BaseModel):
        image: list[float]

    class Body(BaseModel):
        records: list[Record]

    model, app = TorchModel(bundle), FastAPI()

    async def predict(body):  # type: ignore[no-untyped-def]
        return {"predictions": model([record.image for record in body.records])}

    predict.__annotations__["body"] = Body  # a class of this function, which a postponed annotation cannot name
    app.post("/predict")(predict)
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")


def serve_with_litserve(bundle: str) -> None:
    import litserve

    server = litserve.LitServer(LitModel(bundle, max_batch_size=64, batch_timeout=0.002), accelerator="cpu")
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")


def make_lit_model() -> type:
    import litserve

    class LitApi(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
        """One image a request, as LitServe's batching expects."""

        def __init__(self, location: str, **options: object) -> None:
            super().__init__(**options)
            self.location = location

        def setup(self, device: str) -> None:
            self.model = TorchModel(self.location)

        def decode_request(self, request: dict[str, list[dict[str, list[float]]]]) -> list[float]:
            return request["records"][0]["image"]

        def batch(self, inputs: list[list[float]]) -> list[list[float]]:
            return inputs

        def predict(self, x: list[list[float]]) -> list[dict[str, object]]:
            return self.model(x)

        def unbatch(self, output: list[dict[str, object]]) -> list[dict[str, object]]:
            return output

        def encode_response(self, output: dict[str, object]) -> dict[str, object]:
            return {"predictions": [output]}

    return LitApi


def LitModel(location: str, **options: object) -> object:  # noqa: N802
    return make_lit_model()(location, **options)


SERVERS: dict[str, Callable[[str], None]] = {
    "bigray": serve_bigray,
    "serve": serve_with_ray,
    "serve-haproxy": serve_with_ray,
    "fastapi": serve_with_fastapi,
    "litserve": serve_with_litserve,
}


if __name__ == "__main__":
    main()
