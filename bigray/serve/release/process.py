"""The other end of a candidate process: start it, ask it over HTTP, and see that it ends (driver)."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.errors import DeployError
from bigray.inference import Predictions, decide
from bigray.serve.wire.protocol import encode_request

FloatArray = NDArray[np.float32]

JSON = {"content-type": "application/json"}
ROWS_PER_REQUEST = 256
BYTES_PER_REQUEST = 2 * 2**20
"""Of raw rows; as JSON they take three times as much."""
_ENDED_WITHIN_S = 2.0
_LAST_BYTES = 4096


@dataclass(frozen=True)
class ProcessSettings:
    """What a candidate process may have."""

    num_threads: int
    allow_factories: Sequence[str]
    memory_mb: int | None
    load_timeout_s: float
    request_timeout_s: float


class CandidateProcess:
    """One bundle served by a process of its own, from the block's beginning to its end, Ctrl-C included."""

    def __init__(self, bundle: str, settings: ProcessSettings) -> None:
        self._settings = settings
        self._command = _command(bundle, settings)
        self._connection: http.client.HTTPConnection | None = None

    def __enter__(self) -> CandidateProcess:
        self._errors = tempfile.TemporaryFile()
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(self._settings.num_threads),
            start_new_session=True,  # Ctrl-C goes to the driver alone, and its own children end with it
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):  # not reaped before this, so the number is still its own
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._connection is not None:
            self._connection.close()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def wait_until_ready(self) -> float:
        """Wait until it takes requests; returns the seconds that took.

        Raises:
            DeployError: it refused the bundle, crashed, ran out of memory, or was not ready in time.
        """
        if self._connection is None:
            document = self._read_report()
            if "error" in document:
                raise DeployError(self._describe(document))
            timeout_s = self._settings.request_timeout_s
            self._connection = http.client.HTTPConnection("127.0.0.1", document["port"], timeout=timeout_s)
        return time.monotonic() - self._started_at

    def ask(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[bytes, Mapping[str, str]]:
        """`POST`; the answer's body and its headers, names in lower case.

        Raises:
            DeployError: another status than 200, no answer in time, or the process is gone.
        """
        self.wait_until_ready()
        assert self._connection is not None, "it is ready"
        try:
            self._connection.request("POST", path, body, dict(headers))
            answer = self._connection.getresponse()
            content = answer.read()
        except TimeoutError:
            self._connection.close()
            raise DeployError(f"POST {path}: no answer within {self._settings.request_timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise DeployError(f"POST {path}: {self._how_it_ended() or f'no answer: {error}'}") from None
        if answer.status != 200:
            raise DeployError(f"POST {path}: answered {answer.status}: {_error_text(content)}")
        return content, {name.lower(): value for name, value in answer.getheaders()}

    def _read_report(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        descriptor, line = self._process.stdout.fileno(), b""
        deadline = self._started_at + self._settings.load_timeout_s
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise DeployError(f"hangs: not loaded within {self._settings.load_timeout_s:g} s")
            part = os.read(descriptor, 4096)
            if not part:
                raise DeployError(self._how_it_ended() or "closed its output before it was ready")
            line += part
        document: dict[str, Any] = json.loads(line)
        return document

    def _describe(self, report: Mapping[str, Any]) -> str:
        if report["kind"] == "memory":
            return self._out_of_memory(report["error"])
        if report["kind"] == "exit":
            return f"crashed: its code ended the process ({report['error']})"
        return str(report["error"])

    def _how_it_ended(self) -> str:
        """What became of the process; empty while it lives. It is left for `__exit__` to reap."""
        deadline = time.monotonic() + _ENDED_WITHIN_S
        while True:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                break
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.01)
        last = self._last_words()
        if "bad_alloc" in last or "MemoryError" in last:
            return self._out_of_memory(last)
        if ended.si_code == os.CLD_EXITED:
            how = f"crashed: its process ended with exit code {ended.si_status}"
        else:
            how = f"crashed: its process was ended by {signal.Signals(ended.si_status).name}"
            if ended.si_status == signal.SIGKILL:
                how += ", as the kernel does when the machine has no memory left"
        return f"{how}: {last}" if last else how

    def _out_of_memory(self, last: str) -> str:
        limit = self._settings.memory_mb
        allowed = "" if limit is None else f"; it may have {limit:,} MB"
        return f"out of memory{allowed}: {last}"

    def _last_words(self) -> str:
        size = self._errors.seek(0, io.SEEK_END)
        self._errors.seek(max(0, size - _LAST_BYTES))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return " ".join(lines[-1].split())[:200] if lines else ""


def ask_json(process: CandidateProcess, rows: FloatArray, manifest: BundleManifest) -> Predictions:
    """Predictions for rows of these codes (rows, *input_shape) as records of JSON, the way people ask."""
    answers: list[dict[str, Any]] = []
    for part in cut(rows):
        body = orjson.dumps({"records": _records(part, manifest)}, option=orjson.OPT_SERIALIZE_NUMPY)
        content, _ = process.ask("/predict", body, JSON)
        answers.extend(orjson.loads(content)["predictions"])
    # a NaN is null in JSON, which numpy makes a NaN of again
    if manifest.outputs.task == "regression":
        return Predictions(None, None, np.array([answer["value"] for answer in answers], dtype=np.float32))
    probabilities = np.array([answer["probabilities"] for answer in answers], dtype=np.float32)
    return Predictions([answer["label"] for answer in answers], probabilities, None)


def ask_binary(process: CandidateProcess, rows: FloatArray, manifest: BundleManifest) -> Predictions:
    """The same through the Open Inference Protocol, with raw tensors both ways: the way inference clients ask."""
    path = f"/v2/models/{quote(manifest.name, safe='')}/infer"
    name = "prediction" if manifest.outputs.task == "regression" else "probabilities"
    parts = []
    for part in cut(rows):
        body, header_length = encode_request(manifest.inputs, part, (name,))
        content, headers = process.ask(path, body, {"Inference-Header-Content-Length": str(header_length)})
        length = int(headers.get("inference-header-content-length", len(content)))
        shape = orjson.loads(content[:length])["outputs"][0]["shape"]
        parts.append(np.frombuffer(content, dtype="<f4", offset=length).reshape(shape))
    return to_predictions(np.concatenate(parts), manifest)


def _records(codes: FloatArray, manifest: BundleManifest) -> list[dict[str, Any]]:
    """As arrays where a code is its value: their numbers then keep their shortest form."""
    schema = manifest.inputs
    if not schema.is_plain:
        return schema.to_records(codes)
    values = [[row] for row in codes] if schema.is_tensor else codes
    return [dict(zip((column.name for column in schema.columns), row, strict=True)) for row in values]


def cut(rows: FloatArray) -> list[FloatArray]:
    """Parts that each go into one request."""
    size = max(1, min(ROWS_PER_REQUEST, BYTES_PER_REQUEST // max(1, rows[:1].nbytes)))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def to_predictions(answers: FloatArray, manifest: BundleManifest) -> Predictions:
    """Probabilities (rows, classes) or values (rows,) -> predictions."""
    if manifest.outputs.task == "regression":
        return Predictions(None, None, answers.reshape(-1))
    return Predictions(decide(answers, manifest.outputs), answers, None)


def _command(bundle: str, settings: ProcessSettings) -> list[str]:
    memory = [] if settings.memory_mb is None else ["--memory-mb", str(settings.memory_mb)]
    options = ["--threads", str(settings.num_threads), *memory, "--allow", *settings.allow_factories]
    return [sys.executable, "-m", "bigray.serve.release.candidate", bundle, *options]


def _environment(num_threads: int) -> dict[str, str]:
    """The driver's own, with its import path: what it can import, the bundle's factory can be found in."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(num_threads)}


def _error_text(content: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(orjson.loads(content)["error"])[:300]
    return content[:80].decode(errors="replace")
