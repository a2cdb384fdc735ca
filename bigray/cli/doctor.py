"""The command that examines a live cluster: parse, call, print."""

from __future__ import annotations

from typing import Annotated

import typer

from bigray.cli.app import Address, AsJson, app, existing_cluster
from bigray.errors import ClusterError, SpecError


@app.command(
    epilog="Examples: bigray doctor --storage /shared/runs; "
    "bigray doctor --address 10.0.0.1:6379 --job examples/digits/job.toml --json"
)
def doctor(
    address: Address = None,
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB", help="Try the storage that this job file names.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URI", help="Try this storage: a folder, s3://bucket/prefix.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Examine a cluster: versions, token, ports, clocks, memory, disks, GPUs, links between nodes, storage.

    Works on a cluster whose CPUs are all in use, takes at most 20 seconds, leaves nothing behind, and exits with 5
    where a check fails.
    """
    from bigray import console
    from bigray.cluster.connect import connect
    from bigray.cluster.doctor.examine import examine
    from bigray.cluster.doctor.table import report_table, summary
    from bigray.loading import load_job
    from bigray.storage import open_storage

    if job is not None and storage is not None:
        raise SpecError("--storage: --job names one already; give one of the two")
    uri = load_job(job).storage if job is not None else storage
    place = open_storage(uri) if uri is not None else None
    with connect(existing_cluster(address), is_lenient=True):  # of the token it tells
        report = examine(place)
    if as_json:
        console.print_json(report.to_json())
    else:
        console.print_table(report_table(report))
        console.print_text(summary(report))
    if report.has_failed:
        raise typer.Exit(ClusterError.exit_code)
