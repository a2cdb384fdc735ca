"""`bigray run` as a Ray job: token, address, working folder and follow-up handled (driver side, any machine)."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bigray.cluster.connect import prepare_environment
from bigray.errors import ClusterError, SpecError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"


def run_command(job: str, *, search: str | None, serve: str, overrides: Sequence[str], leave: bool) -> str:
    """The shell command that the job runs on the cluster."""
    words = ["python", "-m", "bigray", "run", job, "--serve", serve]
    if search is not None:
        words += ["--search", search]
    for override in overrides:
        words += ["--set", override]
    if leave:
        words.append("--exit")
    return shlex.join(words)


def submit_job(command: str, *, storage: str, address: str | None, follow: bool) -> int:
    """Submit a command with the current folder as its working directory; returns the exit code to end with.

    Raises:
        SpecError: the storage is a relative path, which would be inside a folder that Ray deletes with the job.
        ClusterError: nothing answers at the address, or it refuses the token.
    """
    if "://" not in storage and not os.path.isabs(os.path.expanduser(storage)):
        raise SpecError(
            f"storage: '{storage}' is relative, and a job's own folder is deleted with it; "
            f"name one the whole cluster sees: --set storage=/shared/runs, or s3://bucket/prefix"
        )
    prepare_environment(joining=True)
    client, dashboard = _client(address)
    job_id = client.submit_job(entrypoint=command, runtime_env={"working_dir": "."})
    print(f"submitted {job_id} to {dashboard}: {command}", file=sys.stderr)
    if not follow:
        print(f"follow it with: ray job logs --address {dashboard} -f {job_id}", file=sys.stderr)
        return 0
    return _follow(client, dashboard, job_id)


def _client(address: str | None) -> tuple[JobSubmissionClient, str]:
    from ray.job_submission import JobSubmissionClient

    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    dashboard = named if named and named != "auto" else DEFAULT_DASHBOARD
    try:
        return JobSubmissionClient(dashboard), dashboard
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ClusterError(f"{dashboard}: cannot submit: {reason}") from error


def _follow(client: JobSubmissionClient, dashboard: str, job_id: str) -> int:
    """Print the job's output until it ends; its own exit code is ours."""
    try:
        asyncio.run(_print_logs(client, job_id))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; end it with: ray job stop --address {dashboard} {job_id}", file=sys.stderr)
        raise
    info = client.get_job_info(job_id)
    if str(info.status.value) == "SUCCEEDED":
        return 0
    reason = next(iter((info.message or "no reason given").splitlines()))
    print(f"error: {job_id} {info.status.value}: {reason}", file=sys.stderr)
    return info.driver_exit_code or ClusterError.exit_code


async def _print_logs(client: JobSubmissionClient, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)
