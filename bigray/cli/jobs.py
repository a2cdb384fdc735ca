"""The commands that send work to a cluster and look after it there: parse, call, print.

What each does is in `bigray.cluster.submission` and `bigray.cluster.jobs`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from bigray.cli.app import AsEvents, AsJson, JobFile, Output, Overrides, SearchFile, app, raise_faults
from bigray.errors import ClusterError

if TYPE_CHECKING:
    from bigray.cluster.jobs import Jobs
    from bigray.cluster.submission import Submission, Wishes

GIB = 2**30

Dashboard = Annotated[
    str | None,
    typer.Option("--address", help="The cluster's dashboard, http://head:8265. [env: RAY_API_SERVER_ADDRESS]"),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id, as bigray jobs lists it.")]
Install = Annotated[
    bool, typer.Option("--install", help="Have Ray install what constraints.txt pins, for this job alone.")
]
ChosenId = Annotated[
    str | None, typer.Option("--id", metavar="ID", help="The job's id, in the place of one made of what is sent.")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not follow the job's output.")]
Cpus = Annotated[float, typer.Option("--entrypoint-cpus", min=0, help="CPUs for the job's own process.")]
Gpus = Annotated[float, typer.Option("--entrypoint-gpus", min=0, help="GPUs for the job's own process.")]
Memory = Annotated[float, typer.Option("--entrypoint-memory", metavar="GIB", min=0, help="Memory for it, in GiB.")]
Custom = Annotated[
    list[str] | None,
    typer.Option("--entrypoint-resource", metavar="NAME=AMOUNT", help="A custom resource for it, such as head=1."),
]


@app.command(epilog="Example: bigray submit examples/digits/job.toml --address http://head:8265 --set storage=/shared")
def submit(
    job: JobFile,
    search: SearchFile = None,
    serve: Annotated[str, typer.Option("--serve", help="A serve file.")] = "serve/local.yaml",
    set_: Overrides = None,
    address: Dashboard = None,
    exit_: Annotated[bool, typer.Option("--exit", help="End the endpoint after the check.")] = False,
    no_wait: NoWait = False,
    install: Install = False,
    entrypoint_cpus: Cpus = 0.0,
    entrypoint_gpus: Gpus = 0.0,
    entrypoint_memory: Memory = 0.0,
    entrypoint_resource: Custom = None,
    id_: ChosenId = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send `bigray run` to a cluster as a Ray job, with this folder, and follow it. The same command again follows the
    job that runs, or goes on where it has ended."""
    from bigray.cluster.package import find_package
    from bigray.cluster.submission import EntrypointResources, JobFiles, Wishes, check_secrets, make_submission
    from bigray.cluster.submission import parse_resources as parse
    from bigray.workflow import read_files

    raise_faults(_output_faults(as_json, no_wait, dry_run))
    memory_bytes = round(entrypoint_memory * GIB)
    resources = EntrypointResources(entrypoint_cpus, entrypoint_gpus, memory_bytes, parse(entrypoint_resource or ()))
    files = JobFiles(job, search, serve, tuple(set_ or ()))
    check_secrets(files)
    asked = read_files(job, files.overrides, search, serve)
    submission = make_submission(asked.job, files, find_package(), Wishes(install, resources, id_, exit_))
    _send(submission, address, follow=not no_wait, dry_run=dry_run, as_json=as_json)


@app.command(epilog="Example: bigray jobs --address http://head:8265")
def jobs(address: Dashboard = None, as_json: AsJson = False) -> None:
    """List the jobs of a cluster, the newest first."""
    from bigray import console
    from bigray.cluster.job_tables import jobs_table
    from bigray.cluster.jobs import Jobs

    there = Jobs.at(address)
    found = there.list()
    if as_json:
        console.print_json([job.to_json() for job in found])
    elif found:
        console.print_table(jobs_table(found))
    else:
        console.say(f"no jobs at {there.dashboard}; a head that is started anew forgets them")


@app.command(epilog="Example: bigray logs digits-3f2a91c05e -f")
def logs(
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; the exit code is the job's own.")
    ] = False,
    address: Dashboard = None,
) -> None:
    """Print what a job has printed."""
    from bigray.cluster.jobs import Jobs

    there = Jobs.at(address)
    there.find(job_id)
    if follow:
        raise typer.Exit(_follow(there, job_id))
    _write(there.logs(job_id))


@app.command(epilog="Example: bigray stop digits-3f2a91c05e")
def stop(job_id: JobId, address: Dashboard = None, as_json: AsJson = False) -> None:
    """Ask a job to end, and wait until it has. A run makes a checkpoint first; the same submission goes on from it."""
    from bigray import console
    from bigray.cluster.jobs import Jobs

    there = Jobs.at(address)
    running = not there.find(job_id).has_ended
    ended = there.stop(job_id, console.say)
    if as_json:
        console.print_json(ended.to_json())
    elif running:
        console.say(f"{ended.id} has ended: {ended.status}")


@app.command(epilog="Example: bigray resume /shared/runs/digits-1a2b3c --address http://other-head:8265")
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder on storage that the cluster sees.")],
    here: Annotated[
        bool, typer.Option("--here", help="Go on in this process, in the place of a job on a cluster.")
    ] = False,
    address: Annotated[
        str | None, typer.Option("--address", help="The cluster's dashboard; with --here, the cluster to join.")
    ] = None,
    no_wait: NoWait = False,
    install: Install = False,
    id_: ChosenId = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; send nothing.")] = False,
    as_json: AsJson = False,
    as_events: AsEvents = False,
) -> None:
    """Go on with a run whose job has ended, on another cluster too: from its folder, without the job file."""
    from bigray import console
    from bigray.cluster.submission import Wishes
    from bigray.report import read_report

    raise_faults(_resume_faults(here, no_wait, install, id_, dry_run, as_events))
    if read_report(run).status == "complete":
        console.say(f"{run}: is complete; deploy it with bigray deploy {run}")
        if as_json:
            console.print_json({"run": run, "status": "complete"})
        return
    if here:
        _resume_here(run, address, Output(as_json, as_events))
        return
    raise_faults(_output_faults(as_json, no_wait, dry_run))
    submission = _resubmission(run, Wishes(install, id=id_))
    _send(submission, address, follow=not no_wait, dry_run=dry_run, as_json=as_json)


def _resubmission(run: str, wishes: Wishes) -> Submission:
    from bigray.cluster.package import find_package
    from bigray.cluster.submission import make_resubmission, needs_folder
    from bigray.report import find_run
    from bigray.workflow import recorded_job

    paths, document = find_run(run)
    job = recorded_job(document)
    return make_resubmission(run, paths.run_id, job, find_package() if needs_folder(job) else None, wishes)


def _resume_here(run: str, address: str | None, output: Output) -> None:
    from bigray.cli.training import Asked, train_or_tune
    from bigray.workflow import recorded_request

    raise_faults(output.faults())
    request, search = recorded_request(run)
    train_or_tune(Asked(request, search, address, new=False, output=output))


def _output_faults(as_json: bool, no_wait: bool, dry_run: bool) -> list[str]:
    if as_json and not (no_wait or dry_run):
        return ["--json: standard output is the job's; give --no-wait or --dry-run with it"]
    return []


def _resume_faults(
    here: bool, no_wait: bool, install: bool, job_id: str | None, dry_run: bool, as_events: bool
) -> list[str]:
    of_a_job = {"--no-wait": no_wait, "--install": install, "--id": job_id is not None, "--dry-run": dry_run}
    if here:
        return [f"{name}: is for a job on a cluster; remove it, or --here" for name, given in of_a_job.items() if given]
    return ["--events: is for --here; a job prints for people"] if as_events else []


def _send(submission: Submission, address: str | None, *, follow: bool, dry_run: bool, as_json: bool) -> None:
    """Tell what is sent, send it, and follow it; ends the command."""
    from bigray import console
    from bigray.cluster.job_tables import package_document
    from bigray.cluster.jobs import Jobs

    package = None if submission.package is None else package_document(submission.package)
    document = {"command": submission.command, "package": package, "install": list(submission.pins)}
    if not as_json:
        _show_package(submission)
    if dry_run:
        if as_json:
            console.print_json({**document, "resources": asdict(submission.resources)})
        else:
            console.say(f"would run: {submission.command}")
        return
    there = Jobs.at(address)
    decision = there.submit(submission)
    if as_json:
        console.print_json({**document, "dashboard": there.dashboard, **asdict(decision)})
        return
    if decision.is_running:
        console.say(f"{decision.id} runs already at {there.dashboard}")
    else:
        attempt = f" (attempt {decision.attempt})" if decision.attempt > 1 else ""
        console.say(f"submitted {decision.id}{attempt} to {there.dashboard}: {submission.command}")
    if not follow:
        console.say(there.hint(decision.id))
        return
    raise typer.Exit(_follow(there, decision.id))


def _show_package(submission: Submission) -> None:
    from bigray import console
    from bigray.cluster.job_tables import left_out_lines, package_line, package_table

    if submission.package is None:
        console.say("no folder is sent: the job's code and data are bigray's own, or on storage")
        return
    console.say(f"package: {package_line(submission.package)}")
    console.print_table(package_table(submission.package), to_stderr=True)
    for line in left_out_lines(submission.package):
        console.say(line)


def _follow(there: Jobs, job_id: str) -> int:
    """Print the job's output until it ends; its exit code is ours."""
    from bigray import console
    from bigray.cluster.jobs import Watch

    try:
        ended = there.follow(job_id, Watch(_write, console.say))
    except KeyboardInterrupt:
        console.say(f"\n{job_id} goes on; {there.hint(job_id)}")
        raise typer.Exit(130) from None
    if ended.status == "FAILED":
        console.print_error(ClusterError(f"{ended.id} {ended.status}: {ended.reason or 'no reason given'}"))
    elif ended.status == "STOPPED":
        console.say(f"{ended.id} was stopped; the same submission goes on where it stopped")
    return ended.exit_code


def _write(text: str) -> None:
    """On standard output as it comes."""
    from bigray import console

    try:
        console.out.file.write(text)
        console.out.file.flush()
    except BrokenPipeError:  # whoever read it has gone: nothing is left to be said, at the end of the process neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
