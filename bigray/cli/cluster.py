"""`bigray cluster ...`: check the files that people edit, and a cluster of several nodes on this machine. Parse, call,
print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bigray.cli.app import AsJson, app
from bigray.errors import SpecError

cluster = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cluster, name="cluster", help="Check cluster files, and run a cluster of several nodes on this machine.")

Node = Annotated[str, typer.Argument(metavar="NODE", help="The node's name, as in `bigray cluster status`.")]


@cluster.command(
    epilog="Examples: bigray cluster check cluster/onprem.yaml; bigray cluster check cluster/kuberay/*.yaml"
)
def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Of ray up, KubeRay, Slurm, Docker or cluster/local.toml.")
    ],
    as_json: AsJson = False,
) -> None:
    """Look for mistakes in cluster files, without a network, a cloud account or a Ray process.

    A line for each mistake, and exit code 2 where there is one.
    """
    from bigray import console
    from bigray.cluster.checking.reports import check_files

    reports = check_files(files)
    if as_json:
        console.print_json({"files": [report.to_json() for report in reports]})
    else:
        for report in reports:
            for note in report.notes:
                console.say(f"note: {note}")
            if report.is_ok:
                console.print_text(report.summary)
    if faults := [str(fault) for report in reports for fault in report.faults]:
        if as_json:
            raise typer.Exit(SpecError.exit_code)
        raise SpecError(faults)


@cluster.command(
    epilog='Examples: bigray cluster local --nodes 3 --gpus-per-node 2; eval "$(bigray cluster local --nodes 2)"'
)
def local(
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A cluster file, such as cluster/local.toml.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="In all, the head among them.", show_default="3")] = None,
    cpus_per_node: Annotated[
        int | None, typer.Option(help="What Ray counts.", show_default="this machine's, shared out")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Fake GPUs: counted by Ray, with no device.", show_default="0")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a cluster of several real Ray nodes on this machine. It stays until `bigray cluster down`.

    Standard output is the environment in which other commands find it, for `eval`.
    """
    from bigray import console
    from bigray.cluster.dry_run.tables import export_lines, node_table
    from bigray.cluster.local import load_local_spec, local_status, start_local

    spec = load_local_spec(file, nodes=nodes, cpus_per_node=cpus_per_node, gpus_per_node=gpus_per_node)
    started = start_local(spec, console.say)
    status = local_status()
    if as_json:
        console.print_json(status.to_json())
        return
    console.print_table(node_table(status), to_stderr=True)
    for line in export_lines(started.exports):
        console.print_text(line)


@cluster.command(epilog="Example: bigray cluster status --json")
def status(as_json: AsJson = False) -> None:
    """Show the nodes of the cluster on this machine, those that have ended among them."""
    from bigray import console
    from bigray.cluster.dry_run.tables import node_table
    from bigray.cluster.local import local_status

    found = local_status()
    console.print_json(found.to_json()) if as_json else console.print_table(node_table(found))


@cluster.command(epilog="Example: bigray cluster add-node --gpus 2")
def add_node(
    cpus: Annotated[int | None, typer.Option(help="What Ray counts.", show_default="as the others")] = None,
    gpus: Annotated[int | None, typer.Option(help="Fake GPUs.", show_default="as the others")] = None,
    as_json: AsJson = False,
) -> None:
    """Start one more node of the cluster on this machine."""
    from bigray.cluster.local import add_node as add

    node = add(cpus=cpus, gpus=gpus)
    _tell({"node": node.name, "cpus": node.cpus, "gpus": node.gpus}, f"{node.name} is up", as_json)


@cluster.command(epilog="Example: bigray cluster kill-node node-1")
def kill_node(node: Node, as_json: AsJson = False) -> None:
    """Kill every process of a node at once, as when a host loses its power."""
    from bigray.cluster.local import kill_node as kill

    ended = kill(node)
    _tell_end(ended.node, ended.how, ended.processes, as_json)


@cluster.command(epilog="Example: bigray cluster preempt-node node-1 --notice 30")
def preempt_node(
    node: Node,
    notice: Annotated[int, typer.Option(metavar="SECONDS", help="From the notice to the end of the node.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Tell the cluster that a node will go, as a cloud does with spot machines, and end it when its time is up."""
    from bigray.cluster.local import preempt_node as preempt

    ended = preempt(node, notice)
    _tell_end(ended.node, ended.how, ended.processes, as_json)


@cluster.command(epilog="Example: bigray cluster down")
def down(as_json: AsJson = False) -> None:
    """End the cluster on this machine, and remove its files."""
    from bigray.cluster.local import take_down

    ended = take_down()
    nodes = f"{len(ended.nodes)} node{'s' if len(ended.nodes) != 1 else ''}"
    text = f"ended {nodes}, {ended.processes} processes" if ended.processes else "nothing was there"
    _tell({"nodes": list(ended.nodes), "processes": ended.processes}, text, as_json)


def _tell_end(node: str, how: str, processes: int, as_json: bool) -> None:
    _tell({"node": node, "how": how, "processes": processes}, f"{node}: {how}, {processes} processes", as_json)


def _tell(document: dict[str, Any], text: str, as_json: bool) -> None:
    from bigray import console

    console.print_json(document) if as_json else console.say(text)
