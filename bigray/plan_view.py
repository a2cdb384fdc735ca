"""A plan, node by node, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from bigray.cluster.placement import NodePlan
from bigray.cluster.plan import Plan

NODES_SHOWN = 40
"""Of a large cluster; --json has all."""
GROUPS_SHOWN = 4
"""Of one node."""


def nodes_table(plan: Plan) -> Table:
    """Where the groups may go, and what stays free beside them."""
    title = "one placement that works"
    if len(plan.nodes) > NODES_SHOWN:
        title += f" (the first {NODES_SHOWN} of {len(plan.nodes)} nodes)"
    table = Table(title=title, title_justify="left")
    table.add_column("node", overflow="fold")
    for heading in ("workers", "stays free", "object store"):
        table.add_column(heading)
    if plan.serve is not None:
        table.add_column("replicas, after training", justify="right")
    for node in plan.nodes[:NODES_SHOWN]:
        row = [node.name, workers_text(node.workers), _free(node), size_text(node.object_store_bytes)]
        table.add_row(*row, *([str(node.replicas)] if plan.serve is not None else []))
    return table


def workers_text(workers: Mapping[str, int]) -> str:
    """`2 of group 1, 1 of group 3`."""
    shown = [f"{count} of group {group}" for group, count in list(workers.items())[:GROUPS_SHOWN]]
    if rest := sum(list(workers.values())[GROUPS_SHOWN:]):
        shown.append(f"{rest} of {len(workers) - GROUPS_SHOWN} more")
    return ", ".join(shown) or "none"


def facts(plan: Plan) -> list[tuple[str, str]]:
    """What the run takes beside its workers, of what is known: a name and a text for each."""
    rows = []
    if any(plan.gpus_by_type):
        rows.append(
            ("GPUs", ", ".join(f"{count:g} {kind or 'of unknown type'}" for kind, count in plan.gpus_by_type.items()))
        )
    if plan.data_bytes:
        stores = [node.object_store_bytes for node in plan.nodes if node.object_store_bytes is not None]
        least = f"; the smallest object store has {size_text(min(stores))}" if stores else ""
        rows.append(("in the object store", f"{size_text(plan.data_bytes)}{least}"))
    footprint = plan.footprint
    if plan.checkpoints_bytes is not None:
        free = footprint.storage_free_bytes
        room = f"; {size_text(free)} free there" if free is not None else ""
        each = size_text(footprint.checkpoint_bytes)
        rows.append(("checkpoints", f"up to {size_text(plan.checkpoints_bytes)} at once, {each} each{room}"))
    if footprint.package_bytes is not None:
        rows.append(("package", f"{size_text(footprint.package_bytes)} for bigray submit"))
    if plan.serve is not None and plan.replicas_beside_training is not None:
        rows.append(
            ("beside training", f"room for {plan.replicas_beside_training} of {plan.serve.min_replicas} replicas")
        )
    return rows + [("note", text) for text in plan.notes]


def size_text(size_bytes: float | None) -> str:
    if size_bytes is None:
        return "not known"
    if size_bytes < 2**20:
        return f"{size_bytes / 2**10:,.1f} KiB"
    return f"{size_bytes / 2**20:,.1f} MiB" if size_bytes < 2**30 else f"{size_bytes / 2**30:,.1f} GiB"


def _free(node: NodePlan) -> str:
    gpus = f", {node.free_gpus:g} of {node.gpus:g} GPUs{' ' + node.accelerator if node.accelerator else ''}"
    return f"{node.free_cpus:g} of {node.cpus:g} CPUs{gpus if node.gpus else ''}"
