"""What the serving benchmarks share: servers in processes of their own, one model and its requests, readings by the
tenth of a second, and tables."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from measuring import HERE, clean_environment, print_table, tell
from serve_peers.commands import ANSWERS

PORT = 8155
URL = f"http://127.0.0.1:{PORT}"
START_S = 120.0
END_S = 60.0
PACKAGES = ("bigray", "ray", "torch", "onnxruntime", "fastapi", "uvicorn", "litserve", "orjson", "k6")
TUNED = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""The flags that make Serve quickest."""
REPLICA, CONTROLLER = "ray::ServeReplica", "ray::ServeController"
PROXY_ACTORS = ("ray::HAProxyManager", "ray::ProxyActor")
"""How the processes of Serve's actors call themselves."""
COMPUTING: Mapping[str, Any] = {"factory": "serve_peers.slow_models:computing", "params": {}, "shape": (1, 28, 28)}
"""Options of `write_model`: some milliseconds of arithmetic a row."""
WAITING: Mapping[str, Any] = {"factory": "serve_peers.slow_models:waiting", "params": {}, "onnx": False}
"""5 ms a row in which nothing is computed."""


@dataclass(frozen=True)
class Server:
    """A program of `serve_peers/`, started as `PROGRAM BUNDLE PORT OPTIONS`."""

    title: str
    program: str
    module: str = "ray"
    """What it needs to be installed."""
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    bodies: tuple[str, ...] = ("json",)
    """Names of the requests it takes (`write_bodies`)."""

    def given(self, title: str = "", **options: Any) -> Server:
        """The same with other options, and more to its title."""
        return replace(self, title=self.title + title, options={**self.options, **options})


SERVERS = {
    "bigray": Server("bigray", "bigray_server.py", bodies=("json", "oip", "npy")),
    "serve": Server("Ray Serve as documented, @serve.batch", "ray_server.py"),
    "serve-flags": Server("the same, HAProxy and throughput flags", "ray_server.py", environment=TUNED),
    "serve-tuned": Server(
        "Ray Serve tuned: flags, orjson, ONNX", "ray_tuned_server.py", environment=TUNED, bodies=("json", "raw")
    ),
    "fastapi": Server("FastAPI + uvicorn, pydantic, torch", "fastapi_server.py", "fastapi", bodies=("json", "raw")),
    "fastapi-tuned": Server(
        "FastAPI tuned: orjson, ONNX, uvloop", "fastapi_tuned_server.py", "fastapi", bodies=("json", "raw")
    ),
    "litserve": Server("LitServe, batches of 64, 2 ms", "litserve_server.py", "litserve"),
    "bentoml": Server("BentoML, adaptive batches, ONNX", "bentoml_server.py", "bentoml"),
}


@dataclass(frozen=True)
class Body:
    """One request, in a file for `wrk` and k6."""

    path: str
    file: Path
    headers: Mapping[str, str]

    @property
    def url(self) -> str:
        return URL + self.path


@dataclass(frozen=True)
class Model:
    """A bundle on disk, requests for it, and the answer to them."""

    bundle: str
    version: str
    bodies: Mapping[str, Body]
    expected: tuple[float, ...]
    """Probabilities."""


def write_model(folder: Path, *, seed: int = 0, shape: tuple[int, ...] = (784,), **options: Any) -> Model:
    """An untrained model for `shape` and ten classes; `options` go to `write_sample_bundle`. The rows asked for are the
    same for each seed."""
    from bigray.bundle import ModelBundle
    from bigray.data.features import Column
    from bigray.inference import Predictor
    from bigray.serve.sample import write_sample_bundle

    folder.mkdir(parents=True, exist_ok=True)
    bundle = write_sample_bundle(str(folder), seed=seed, columns=(Column(name="image", shape=shape),), **options)
    loaded = ModelBundle.load(bundle)
    fitted = loaded.manifest.preprocessing
    constants = {"mean": fitted.center, "std": fitted.scale}
    reshaped = {name: np.reshape(value, (-1, *[1] * (len(shape) - 1))).tolist() for name, value in constants.items()}
    Path(f"{bundle}.json").write_text(json.dumps({**reshaped, "shape": shape, "version": loaded.version}))
    row = np.random.default_rng(0).random((1, *shape)).round(4).astype(np.float32)
    factories = (loaded.manifest.factory.factory,)
    answer = Predictor(loaded, allow_factories=factories).run(row).probabilities
    assert answer is not None, "it is a classification"
    return Model(bundle, loaded.version, write_bodies(folder, row), tuple(answer[0].tolist()))


def write_bodies(folder: Path, row: Any) -> dict[str, Body]:
    """One row as JSON, in the Open Inference Protocol's binary extension, as `.npy`, and as mere bytes."""
    raw = row.tobytes()
    tensor = {"name": "image", "shape": row.shape, "datatype": "FP32", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    (folder / "json").write_text(json.dumps({"records": [{"image": row[0].astype(float).round(4).tolist()}]}))
    (folder / "oip").write_bytes(header + raw)
    (folder / "raw").write_bytes(raw)
    with (folder / "npy").open("wb") as file:
        np.save(file, row, allow_pickle=False)
    binary, npy = "application/octet-stream", "application/x-npy"
    length = {"inference-header-content-length": str(len(header))}
    return {
        "json": Body("/predict", folder / "json", {"content-type": "application/json"}),
        "oip": Body("/v2/models/sample/infer", folder / "oip", {"content-type": binary, **length}),
        "npy": Body("/predict", folder / "npy", {"content-type": npy, "accept": npy}),
        "raw": Body("/raw", folder / "raw", {"content-type": binary}),
    }


def ask(body: Body, timeout_s: float = 10.0) -> bytes:
    """One answer; `OSError` where there is none, or an error."""
    request = urllib.request.Request(body.url, body.file.read_bytes(), dict(body.headers))
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return bytes(answer.read())


def probabilities_in(answer: bytes, kind: str) -> Any:
    """The ten probabilities of an answer to the body of this name; binary ones end with them, as float32."""
    if kind != "json":
        return np.frombuffer(answer[-40:], "<f4")
    document = json.loads(answer)
    return np.asarray((document["predictions"] if isinstance(document, dict) else document)[0]["probabilities"])


def check_answers(model: Model, server: Server) -> None:
    """`RuntimeError` where it answers one of its bodies with something else than the model says."""
    for kind in server.bodies:
        found = probabilities_in(ask(model.bodies[kind]), kind)
        if found.shape != (10,) or not np.allclose(found, model.expected, atol=1e-4):
            raise RuntimeError(f"answers {kind} with something else: {found}")


class Running:
    """A server that answers: what can be asked of it and of its processes."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self._answers = process, folder / "answers"

    def do(self, command: str, *arguments: Any, timeout_s: float = 300.0) -> dict[str, Any]:
        """Have the program obey one of its commands; `{"result" or "error", "seconds"}`."""
        assert self.process.stdin is not None, "it is a pipe"
        known = len(self._lines())
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while len(lines := self._lines()) == known:
            if time.monotonic() > deadline or self.process.poll() is not None:
                return {"error": f"no answer to {command}", "seconds": timeout_s}
            time.sleep(0.02)
        answer: dict[str, Any] = json.loads(lines[known])
        return answer

    def _lines(self) -> list[str]:
        text = self._answers.read_text() if self._answers.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def family(self) -> list[psutil.Process]:
        """The program and all below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def named(self, *prefixes: str) -> list[psutil.Process]:
        """Those of its processes whose command line begins so, by age."""
        found = [one for one in self.family() if _command(one).startswith(prefixes)]
        return sorted(found, key=lambda one: one.pid)

    def models(self) -> list[psutil.Process]:
        """The processes that hold the model."""
        return self.named(REPLICA) or self.family()[:1]


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def rss_mb(processes: Sequence[psutil.Process]) -> float:
    """Memory of them together; those that have ended have none."""
    return sum(map(_rss, processes)) / 2**20


def _rss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


@contextlib.contextmanager
def running(server: Server, model: Model) -> Iterator[Running]:
    """Start a server and wait until it gives the model's answers; ended with the block, with all its processes.

    Raises:
        RuntimeError: it does not run here, and why.
    """
    if not _is_installed(server):
        raise RuntimeError(_how_to_install(server))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [server.python, str(HERE / "serve_peers" / server.program), model.bundle, str(PORT)]
                + ([json.dumps(server.options)] if server.options else []),
                env=clean_environment(**server.environment, **{ANSWERS: str(folder / "answers")}),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            found = Running(process, folder)
            try:
                _wait_until_answering(process, model.bodies["json"], folder / "log")
                check_answers(model, server)
                yield found
            finally:
                _end(found)


def _is_installed(server: Server) -> bool:
    search = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({server.module!r}) is None)"
    command = [server.python, "-c", search]
    return subprocess.run(command, capture_output=True, check=False, timeout=START_S).returncode == 0


def _how_to_install(server: Server) -> str:
    if server.module == "bentoml":  # what it pins does not go with what bigray needs
        packages = "bentoml onnxruntime numpy"
        return f"python -m venv DIR && DIR/bin/pip install {packages}, then --bentoml-python DIR/bin/python"
    return f"not installed: pip install {server.module}"


def _wait_until_answering(process: subprocess.Popen[bytes], body: Body, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            ask(body)
            return
        except (OSError, http.client.HTTPException):
            time.sleep(0.2)
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
    raise RuntimeError(f"did not start: {last[0][:200]}")


def _end(server: Running) -> None:
    family = server.family()
    with contextlib.suppress(ProcessLookupError):
        server.process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(timeout=END_S)
    for process in family:  # one that has ended is known by its start time, whoever has its number now
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=10)
    server.process.wait(timeout=10)
    assert server.process.stdin is not None, "it is a pipe"
    with contextlib.suppress(OSError):
        server.process.stdin.close()
    time.sleep(1)  # for the port


class Watching:
    """Asks for something again and again in a thread, for the length of a `with` block."""

    def __init__(self, probe: Callable[[], Any], every_s: float) -> None:
        """A probe that fails gives None."""
        self.readings: list[tuple[float, Any]] = []
        """Unix time, and what was found."""
        self._probe, self._every_s = probe, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=30)

    @property
    def values(self) -> list[Any]:
        return [value for _, value in self.readings if value is not None]

    def first(self, is_it: Callable[[Any], bool]) -> float | None:
        """When it was first so."""
        return next((at for at, value in self.readings if value is not None and is_it(value)), None)

    def _read(self) -> None:
        while not self._ended.is_set():
            value = None
            with contextlib.suppress(Exception):  # while a server is killed or ends, anything may be raised
                value = self._probe()
            self.readings.append((time.time(), value))
            self._ended.wait(self._every_s)


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Ask ten times a second, for so long; whether it became so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def parse(description: str, peers: Sequence[str], full: Mapping[str, Any], small: Mapping[str, Any]) -> Any:
    """`--peers`, `--size`, and an option for each number of the two sizes, which goes before what the size says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: a minute or so, as a proof")
    parser.add_argument("--peers", default=",".join(peers), help="comma-separated subset of: " + ", ".join(peers))
    for name, value in full.items():
        help_text = f"{value} for full, {small[name]} for small"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=help_text)
    options = parser.parse_args()
    options.peers = [name for name in peers if name in options.peers.split(",")]
    for name, value in (full if options.size == "full" else small).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def try_each(names: Sequence[str], measure: Callable[[str], Any]) -> tuple[dict[str, Any], list[str]]:
    """What was measured of each, and a line for each that could not be."""
    results: dict[str, Any] = {}
    skipped = []
    for name in names:
        tell(f"{time.strftime('%H:%M:%S')} {name} ...")
        try:
            results[name] = measure(name)
        except (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            skipped.append(f"{name}: {' '.join(str(error).split())}")
            tell(skipped[-1])
    return results, skipped


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """The table, with what it was measured on."""
    print_table(title, columns, rows, "\n".join(notes), PACKAGES, width=170)
