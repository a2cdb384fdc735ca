"""Jobs of a cluster through its dashboard: start them once, list, follow and stop them (driver side, any machine).

A submission's id comes from what it is, so that the same command finds the job that it started: it is followed where it
runs, and started once more, as another attempt, where it has ended. The run itself goes on from its storage.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shlex
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from bigray.cluster.connect import prepare_environment
from bigray.cluster.package import write_zip
from bigray.cluster.refusals import COPY_TOKEN, open_to_others, token_fault, token_place
from bigray.cluster.submission import Submission
from bigray.errors import ClusterError, did_you_mean

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
GCS_PORT = 6379
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 60
"""Between SIGTERM and SIGKILL. Ray's 3 s are too short for a checkpoint, for which a run takes up to 20 s."""
RAYS_STOP_WAIT_S = 3
KEY = "bigray"
"""Of a job's metadata: the hash of what was submitted. Nothing else of a submission is kept there."""
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = {"GET": 15.0}
SLOW_ANSWER_TIMEOUT_S = 120.0
"""Of other requests: the dashboard answers once it has handed on a package."""
SILENT_S = 5.0
"""After so long without output the job is asked for how it stands."""
RECONNECT_SILENT_S = 60.0
"""After so long the connection is made anew: one whose other end is gone would stay silent for ever."""
LOST_S = 180.0
"""A dashboard that does not answer for so long is given up. A head that is started anew takes less."""
LONGEST_PAUSE_S = 10.0
MOST_RACES = 3
"""With others that submit the same at the same moment."""
STOPPED_EXIT_CODE = 128 + 15
ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it."""

    id: str
    status: str
    command: str
    started_s: float | None = None
    """Since the epoch."""
    ended_s: float | None = None
    code: int | None = None
    """The exit code of its process; None where it has not ended by itself."""
    reason: str = ""
    """The first line of why it failed."""
    key: str | None = None
    """None where bigray did not submit it."""
    stop_wait_s: int = RAYS_STOP_WAIT_S

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def exit_code(self) -> int:
        """What to end with once the job has: its own code, or one that says how it was ended."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return STOPPED_EXIT_CODE
        code = ClusterError.exit_code if self.code is None else self.code
        return 128 - code if code < 0 else code or ClusterError.exit_code  # negative: ended by that signal

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "status": self.status,
            "command": self.command,
            "started_s": self.started_s,
            "ended_s": self.ended_s,
            "exit_code": self.exit_code if self.has_ended else None,
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class Decision:
    """Under which id a submission runs."""

    id: str
    attempt: int
    is_running: bool


@dataclass(frozen=True)
class Watch:
    """Where what a job prints goes, and what is to be said about it."""

    write: Callable[[str], None]
    say: Callable[[str], None]


def find_dashboard(address: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The dashboard's URL: the argument, else `RAY_API_SERVER_ADDRESS`, else `RAY_ADDRESS`, else the one here.

    Raises:
        ClusterError: it is an address of Ray itself, or none.
    """
    named = [("--address", address), *((name, environment.get(name)) for name in ADDRESS_VARIABLES)]
    place, text = next(((place, text) for place, text in named if text), ("", "auto"))
    if text == "auto":
        return DEFAULT_DASHBOARD
    shown = f"--address {text}" if place == "--address" else f"{place}={text}"
    scheme, separator, _ = text.partition("://")
    try:
        parts = urlsplit(text if separator else f"//{text}")
        host, port = _bracketed(parts), parts.port
    except ValueError as error:
        raise ClusterError(f"{shown}: not an address ({error}); use http://HOST:8265") from error
    if "@" in parts.netloc:
        raise ClusterError(
            f"{place}: an address may hold no name and password; the token of a cluster is kept in a file"
        )
    is_rays_own = port == GCS_PORT or (place == "RAY_ADDRESS" and not separator and port != 8265)
    if is_rays_own or scheme == "ray":
        raise ClusterError(
            f"{shown}: is where programs join Ray, and jobs go to the dashboard; use --address http://{host}:8265"
        )
    if not host or (separator and scheme not in ("http", "https")):
        raise ClusterError(f"{shown}: not the URL of a dashboard; use http://HOST:8265")
    if separator:
        return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}"  # a proxy may have it below a path
    return f"http://{host}:{port or 8265}"


def _bracketed(parts: SplitResult) -> str:
    host = parts.hostname or ""
    return f"[{host}]" if ":" in host else host


def check_token() -> str:
    """Where the token for the cluster is, in words.

    Raises:
        ClusterError: others can read its file, or there is none where one is named or asked for.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return "no token (RAY_AUTH_MODE=disabled)"
    place = token_place()
    if place is None and mode != "token":
        return "no token"
    if fault := token_fault():
        raise ClusterError(fault.replace("it asks for", "RAY_AUTH_MODE asks for"))
    if isinstance(place, Path) and (permissions := open_to_others(place)):
        raise ClusterError(
            f"{place}: other users can read the cluster's token (mode {permissions:04o}); "
            f"chmod 600 {shlex.quote(str(place))}"
        )
    return f"the token in {place}"


def decide(submission_id: str, key: str, jobs: Iterable[Job]) -> Decision:
    """Whether a submission runs already, or which attempt it is to be. Pure.

    Raises:
        ClusterError: another submission runs under this id.
    """
    attempts: dict[int, Job] = {}
    for job in jobs:
        if match := re.fullmatch(rf"{re.escape(submission_id)}(?:\.(\d+))?", job.id):
            attempts[int(match[1] or 1)] = job
    newest = max(attempts, default=0)
    if newest and not attempts[newest].has_ended:
        running = attempts[newest]
        if running.key != key:
            raise ClusterError(
                f"{running.id}: runs another command or folder; end it with bigray stop {running.id}, or use "
                f"another --id"
            )
        return Decision(running.id, newest, is_running=True)
    attempt = newest + 1
    return Decision(submission_id if attempt == 1 else f"{submission_id}.{attempt}", attempt, is_running=False)


class Jobs:
    """A connection to the Jobs API of one cluster."""

    def __init__(self, client: JobSubmissionClient, dashboard: str, token: str) -> None:
        self._client = client
        self.dashboard = dashboard
        self._token = token

    @classmethod
    def at(cls, address: str | None) -> Jobs:
        """Connect to a dashboard, with the token of this user.

        Raises:
            ClusterError: nothing answers, it refuses the token, or its Ray is of another version.
        """
        dashboard = find_dashboard(address)
        token = check_token()
        _check_listening(dashboard)
        prepare_environment(joining=True)
        from ray.job_submission import JobSubmissionClient

        with _telling(dashboard, token), _only_at(dashboard):
            client = JobSubmissionClient(dashboard)
        _check_version(dashboard, client._server_ray_version)
        client._do_request = functools.partial(_request_in_time, client._do_request)
        return cls(client, dashboard, token)

    @property
    def option(self) -> str:
        """What a command line needs to come here."""
        return "" if self.dashboard == DEFAULT_DASHBOARD else f" --address {self.dashboard}"

    def submit(self, submission: Submission) -> Decision:
        """Start a job, unless this very submission runs already.

        Raises:
            ClusterError: the cluster refuses it, or runs another one under its id.
            SpecError, StorageError: the folder cannot be packed.
        """
        with tempfile.TemporaryDirectory(prefix="bigray-package-") as folder:
            file = Path(folder) / "package.zip"
            packed = None if submission.package is None else write_zip(submission.package, file)
            key = submission.key(packed)
            submission_id = submission.id or f"{submission.name}-{key[:10]}"
            for _ in range(MOST_RACES):
                decision = decide(submission_id, key, self.list())
                if decision.is_running or self._start(decision.id, submission, key, file if packed else None):
                    return decision
        raise ClusterError(f"{decision.id}: the cluster has this id and shows no such job; choose another with --id")

    def _start(self, job_id: str, submission: Submission, key: str, package: Path | None) -> bool:
        """False where someone else has just taken the id."""
        wait = os.environ.get(STOP_WAIT_VARIABLE, "")
        environment: dict[str, Any] = {
            "env_vars": {STOP_WAIT_VARIABLE: wait if wait.isdigit() else str(STOP_WAIT_S)},
        }
        if package is not None:
            environment["working_dir"] = str(package)
        if submission.pins:
            environment["pip"] = {"packages": list(submission.pins)}
        try:
            with self._telling():
                self._client.submit_job(
                    entrypoint=submission.command,
                    submission_id=job_id,
                    runtime_env=environment,
                    metadata={KEY: key},
                    **submission.resources.arguments(),
                )
        except _Taken:
            return False
        return True

    def list(self) -> list[Job]:
        """Every job that was submitted, the newest first; without programs that joined by themselves."""
        with self._telling():
            found = [_job_of(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started_s or 0.0, reverse=True)

    def find(self, job_id: str) -> Job:
        """One job.

        Raises:
            ClusterError: there is none of this id; with the nearest one, or all.
        """
        jobs = {job.id: job for job in self.list()}
        if job_id not in jobs:
            near = did_you_mean(job_id, jobs) if jobs else "; it knows none: a head that is started anew forgets them"
            raise ClusterError(f"{job_id}: no such job at {self.dashboard}{near}")
        return jobs[job_id]

    def logs(self, job_id: str) -> str:
        """What it has printed so far."""
        with self._telling():
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str, say: Callable[[str], None]) -> Job:
        """Ask a job to end, by SIGTERM, and wait until it has: a run makes a checkpoint first.

        Raises:
            ClusterError: there is no such job, or it goes on.
        """
        job = self.find(job_id)
        if job.has_ended:
            say(f"{job.id} has ended already: {job.status}")
            return job
        if job.stop_wait_s < STOP_WAIT_S:
            say(
                f"{job.id} is killed after {job.stop_wait_s} s, which can be too short for a checkpoint: it was "
                f"submitted with no longer {STOP_WAIT_VARIABLE} in its environment"
            )
        with self._telling():
            self._client.stop_job(job_id)
        say(f"{job.id} is asked to end; a run makes a checkpoint first ({job.stop_wait_s} s at most)")
        deadline_s = time.monotonic() + job.stop_wait_s + 30.0
        while not (job := self.find(job_id)).has_ended:
            if time.monotonic() > deadline_s:
                raise ClusterError(f"{job.id}: has not ended; look into it with bigray logs {job.id}{self.option}")
            time.sleep(0.5)
        return job

    def follow(self, job_id: str, watch: Watch) -> Job:
        """Pass on what a job prints, from its beginning, until it ends; a connection that drops is made anew.

        Raises:
            ClusterError: the cluster does not answer any more, or has forgotten the job.
            KeyboardInterrupt: the job goes on.
        """
        return asyncio.run(_Follower(self, job_id, watch).follow())

    def hint(self, job_id: str) -> str:
        """What can be done about a job that goes on."""
        return f"follow it with bigray logs {job_id} -f{self.option}, end it with bigray stop {job_id}{self.option}"

    def _telling(self) -> contextlib.AbstractContextManager[None]:
        return _telling(self.dashboard, self._token)


class _Unreachable(ClusterError):
    """The dashboard does not answer now; it may be on its way back."""


class _Taken(ClusterError):
    """There is a job of this id."""


class _Follower:
    """Where one reader of a job's output has got to."""

    def __init__(self, jobs: Jobs, job_id: str, watch: Watch) -> None:
        self._jobs = jobs
        self._id = job_id
        self._watch = watch
        self._written = 0
        """Characters that were passed on: every connection tells all from the beginning."""
        self._lost_since_s: float | None = None
        self._has_told_of_waiting = False

    async def follow(self) -> Job:
        pause_s = 0.5
        while True:
            before = self._written
            await self._tail()
            job = await self._ask()
            if job is not None and job.has_ended:
                await self._write_rest()
                return job
            pause_s = 0.5 if self._written > before else min(2 * pause_s, LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _tail(self) -> None:
        """Pass on what one connection tells, until it ends, fails or is silent for too long."""
        seen = 0
        silent_s = 0.0
        stream = self._jobs._client.tail_job_logs(self._id)
        coming: asyncio.Task[str | None] | None = None
        try:
            while silent_s < RECONNECT_SILENT_S:
                coming = coming or asyncio.create_task(_next_of(stream))
                done, _ = await asyncio.wait({coming}, timeout=SILENT_S)
                if not done:
                    silent_s += SILENT_S
                    job = await self._ask()
                    if job is None or job.has_ended:
                        return
                    self._tell_of_waiting(job)
                    continue
                text = coming.result()
                if text is None:
                    return
                coming, silent_s = None, 0.0
                self._write(text, seen)
                seen += len(text)
        finally:
            if coming is not None:
                coming.cancel()
                with contextlib.suppress(BaseException):
                    await coming

    def _tell_of_waiting(self, job: Job) -> None:
        if job.status == "PENDING" and not self._has_told_of_waiting:
            self._has_told_of_waiting = True
            self._watch.say(f"{job.id} waits: for its packages, or for a node with the resources of its own process")

    def _write(self, text: str, position: int) -> None:
        new = text[max(0, self._written - position) :]
        if new:
            self._watch.write(new)
            self._written += len(new)

    async def _ask(self) -> Job | None:
        """How the job stands; None while nobody answers."""
        try:
            job = await asyncio.to_thread(self._jobs.find, self._id)
        except _Unreachable as error:
            now_s = time.monotonic()
            if self._lost_since_s is None:
                self._lost_since_s = now_s
                self._watch.say(f"{error}; the job may well go on, trying again for {LOST_S:.0f} s")
            elif now_s - self._lost_since_s > LOST_S:
                raise ClusterError(
                    f"{self._jobs.dashboard}: no answer for {LOST_S:.0f} s; if the cluster is gone, the same bigray "
                    f"submit, or bigray resume RUN, goes on from storage on another"
                ) from error
            return None
        if self._lost_since_s is not None:
            self._watch.say(f"{self._jobs.dashboard} answers again")
            self._lost_since_s = None
        return job

    async def _write_rest(self) -> None:
        """What came between the last words of a connection and the end of the job."""
        with contextlib.suppress(ClusterError):
            self._write(await asyncio.to_thread(self._jobs.logs, self._id), 0)


async def _next_of(stream: AsyncIterator[str]) -> str | None:
    """None where the connection has ended, whyever: how the job stands is asked next."""
    from aiohttp import ClientError

    try:
        return await anext(stream, None)
    except (ClientError, OSError, RuntimeError, ValueError):
        return None


def _job_of(details: JobDetails) -> Job:
    environment = (details.runtime_env or {}).get("env_vars") or {}
    wait = str(environment.get(STOP_WAIT_VARIABLE, ""))
    status = str(details.status.value)
    reasons = [line.strip().removesuffix(":") for line in (details.message or "").splitlines() if line.strip()]
    return Job(
        id=str(details.submission_id),
        status=status,
        command=details.entrypoint,
        started_s=None if details.start_time is None else details.start_time / 1000,
        ended_s=None if not details.end_time else details.end_time / 1000,
        code=details.driver_exit_code,
        reason=reasons[0].removesuffix(", last available logs (truncated to 20,000 chars)")
        if reasons and status == "FAILED"
        else "",
        key=(details.metadata or {}).get(KEY),
        stop_wait_s=int(wait) if wait.isdigit() else RAYS_STOP_WAIT_S,
    )


def _request_in_time(request: Callable[..., Any], method: str, endpoint: str, **options: Any) -> Any:
    """Ray's requests wait for an answer for ever; what it does not know it passes on to `requests`."""
    timeout = (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S.get(method, SLOW_ANSWER_TIMEOUT_S))
    return request(method, endpoint, timeout=timeout, **options)


def _check_listening(dashboard: str) -> None:
    """Ray's client waits two minutes for a machine that is not there."""
    parts = urlsplit(dashboard)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return  # the way leads over another machine
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"{dashboard}: nothing answers ({error.strerror or error}); start a cluster, or give the URL of a "
            f"dashboard that can be reached from here with --address"
        ) from error


@contextlib.contextmanager
def _only_at(dashboard: str) -> Iterator[None]:
    """Ray's client prefers these variables to the address that it is given."""
    before = {name: os.environ.pop(name, None) for name in ADDRESS_VARIABLES}
    os.environ[ADDRESS_VARIABLES[0]] = dashboard
    try:
        yield
    finally:
        del os.environ[ADDRESS_VARIABLES[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_version(dashboard: str, theirs: str | None) -> None:
    """A job of a bigray that is made for one minor version of Ray would fail in the middle on another."""
    ours = version("ray")
    if theirs is not None and theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ClusterError(
            f"{dashboard}: runs Ray {theirs}, and here is Ray {ours}; install ray=={theirs} here with a bigray that "
            f"goes with it, or use a cluster of Ray {'.'.join(ours.split('.')[:2])}"
        )


@contextlib.contextmanager
def _telling(dashboard: str, token: str) -> Iterator[None]:
    """Turn what Ray's client raises into one line that names the place and the way out."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(_refusal(dashboard, token, str(error))) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        text = str(error)
        if "already exists" in text:
            raise _Taken(f"{dashboard}: {_reason(error)}") from error
        if "Request Entity Too Large" in text:
            raise ClusterError(f"{dashboard}: takes no package of this size; name folders in .rayignore") from error
        if isinstance(error, OSError):
            raise _Unreachable(f"{dashboard}: does not answer ({_reason(error)})") from error
        if "status code 5" in text:
            raise _Unreachable(f"{dashboard}: answers with an error: {_reason(error)}") from error
        raise ClusterError(f"{dashboard}: {_reason(error)}") from error


def _refusal(dashboard: str, token: str, text: str) -> str:
    if "Authentication required" in text:
        return f"{dashboard}: asks for a token, and this user has none: {COPY_TOKEN}"
    return f"{dashboard}: refuses {token}, which is not this cluster's: {COPY_TOKEN}"


def _reason(error: BaseException) -> str:
    """The line of an error, or of a remote traceback within it, that says what was wrong."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:300]
