"""Everything a person sees: tables, the live view, one-line errors. The only module that prints.

On a terminal a run is a live table; in a log file or CI the same events are plain lines.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bigray.cluster.plan import Plan
from bigray.errors import BigrayError
from bigray.progress import RunProgress, TrialProgress
from bigray.results import HoldoutCheck, Kill, Leaderboard, ModelVerification, Resize, Verification
from bigray.serve.runner import Deployment, EndpointStatus
from bigray.training.commands import Event

SHOWN_TRIALS = 12
PLAIN_INTERVAL_S = 1.0
"""Least time between two epoch lines of one trial in a log."""

LOG_WIDTH = 120
"""Columns of a table in a file, which has no width of its own."""

out = Console(highlight=False, width=None if Console().is_terminal else LOG_WIDTH)
err = Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """One JSON document on standard output, for scripts."""
    out.file.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def print_error(error: BigrayError) -> None:
    """One line for each fault, on standard error."""
    for line in str(error).splitlines() or [type(error).__name__]:
        err.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def say(text: str) -> None:
    """One plain line on standard error, so that `--json` output stays clean."""
    err.print(text, soft_wrap=True, markup=False)


def print_plan(plan: Plan) -> None:
    """What would start, as a table."""
    table = Table(title=f"plan for {plan.job}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    nodes = f"{plan.cluster_nodes} node{'s' if plan.cluster_nodes != 1 else ''}"
    table.add_row("cluster", f"{plan.cluster_cpus:g} CPUs, {plan.cluster_gpus:g} GPUs on {nodes}")
    table.add_row("data", ", ".join(f"{count:,} {part}" for part, count in plan.rows.items()))
    table.add_row("models", ", ".join(plan.models))
    table.add_row("trials", f"{plan.trials}, {plan.trials_at_once} at once")
    groups = f"{plan.groups} x {plan.workers_per_group} worker{'s' if plan.workers_per_group > 1 else ''}"
    table.add_row("worker groups", f"{groups} over {plan.backend}, holding {plan.cpus:g} CPUs and {plan.gpus:g} GPUs")
    table.add_row("storage", plan.storage)
    if plan.serve is not None:
        low, high = plan.serve.min_replicas, plan.serve.max_replicas
        count = f"{low}" if low == high else f"{low} to {high}"
        table.add_row("endpoint", f"{count} replicas x {plan.serve.cpus_per_replica:g} CPU, after training")
    table.add_row("fits", "[green]yes[/]; nothing was started")
    out.print(table)


def print_leaderboard(board: Leaderboard) -> None:
    """All trials, best first, and the winner in one line."""
    metrics = [board.metric, *(name for name in board.winner.metrics if name != board.metric)]
    shown = metrics if out.width >= LOG_WIDTH else [board.metric]
    title = f"{board.run_id}: {len(board.trials)} trials by {board.metric}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("trial", "lr", "batch", "status", "epochs", "best at", *shown):
        table.add_column(name, justify="right" if name not in ("trial", "status") else "left", no_wrap=True)
    for number, trial in enumerate(board.trials):
        values = [f"{trial.metrics[name]:.4f}" if name in trial.metrics else "-" for name in shown]
        cells = [
            trial.trial_id,
            f"{trial.config['lr']:g}",
            str(trial.config["global_batch_size"]),
            trial.status,
            str(trial.epochs),
            str(trial.best_epoch) if trial.metrics else "-",
            *values,
        ]
        table.add_row(*cells, style="bold green" if number == 0 else None)
    out.print(table)
    for trial in board.trials:
        if trial.error:
            out.print(Text(f"{trial.trial_id} failed: {trial.error}", style="red"), soft_wrap=True)
    winner = board.winner
    out.print(
        f"winner: {winner.model_name}, trial {winner.trial_id}, step {winner.best_step:,} (epoch {winner.best_epoch}), "
        f"{board.metric} {winner.metrics[board.metric]:.4f}   {board.wall_s:.1f} s",
        soft_wrap=True,
    )
    out.print(f"samples lost {board.samples_lost:,}, repeated {board.samples_repeated:,}")
    out.print(f"bundle: {board.bundle.uri}", soft_wrap=True, markup=False)


def print_deployment(deployment: Deployment, curl: str) -> None:
    """Where the endpoint is and how to ask it."""
    out.print(f"\nserving {deployment.model} version {deployment.version} at {deployment.url}", soft_wrap=True)
    out.print(curl, soft_wrap=True, markup=False)


def print_holdout(check: HoldoutCheck) -> None:
    """What the endpoint answered on the sealed holdout."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in check.metrics.items())
    verdict = "[green]all equal the offline answers[/]" if check.all_equal else "[bold red]NOT all equal[/]"
    out.print(
        f"holdout over HTTP: {check.num_rows} rows, {metrics}; {check.num_equal}/{check.num_rows} answers equal, "
        f"{verdict} (largest difference {check.largest_difference:.1e})",
        soft_wrap=True,
    )


def print_verification(found: Verification) -> None:
    """What each model went through, and how it compares with its undisturbed twin."""
    for model in found.models:
        out.print(_fault_table(model))
        table = Table(show_header=False, box=None, padding=(0, 1))
        for part, comparison in _comparisons(model):
            table.add_row(Text(part, style="bold"), Text(comparison))
        style = "bold green" if model.is_same else "bold red"
        table.add_row(Text("verdict", style="bold"), Text(f"{model.model_name}: {model.verdict}", style=style))
        out.print(table)
        for note in model.notes:
            out.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    asked = "bit-equal weights (training.exact)" if found.exact else "weights equal within the optimizer's tolerance"
    out.print(f"asked for {asked}; {found.wall_s:.1f} s; both runs are in {found.folder}", soft_wrap=True, markup=False)


def _fault_table(model: ModelVerification) -> Table:
    title = f"{model.model_name}: {len(model.kills)} of {model.kills_planned} kills"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("fault", "rank", "at step", "goes on at", "from", "recovery"):
        table.add_column(name, justify="left" if name in ("fault", "from") else "right", no_wrap=True)
    resize = model.resize
    resize_step = resize.step if resize is not None and resize.step is not None else math.inf
    rows = [_kill_cells(kill) for kill in model.kills if kill.step < resize_step]
    if resize is not None:
        rows.append(_resize_cells(resize))
    rows += [_kill_cells(kill) for kill in model.kills if kill.step >= resize_step]
    for cells in rows:
        table.add_row(*cells)
    return table


def _kill_cells(kill: Kill) -> tuple[str, ...]:
    recovery = "-" if kill.recovery_s is None else f"{kill.recovery_s:.1f} s"
    went_on_at = _count(kill.went_on_at_step)
    return ("SIGKILL", str(kill.rank), f"~{kill.step:,}", went_on_at, kill.went_on_from or "-", recovery)


def _resize_cells(resize: Resize) -> tuple[str, ...]:
    before, after = resize.workers_before, resize.workers_after
    what = f"resize {before} -> {after} workers" if before != after else f"restart with {after} workers"
    return (what, "-", _count(resize.step), _count(resize.step), "storage", "-")


def _comparisons(model: ModelVerification) -> Iterator[tuple[str, str]]:
    weights, metrics, samples, reference = model.weights, model.metrics, model.samples, model.reference_samples
    if weights is None:
        yield "weights", "none to compare"
    elif weights.is_bit_equal:
        yield "weights", "bit-equal"
    else:
        relative = "not comparable" if weights.relative is None else f"relative difference {weights.relative:.1e}"
        yield "weights", f"{relative}, most in '{weights.worst}'"
    differ = "all equal" if metrics.largest == 0 else "not comparable"
    if metrics.largest:
        differ = f"largest difference {metrics.largest:.1e}"
    yield "metrics", f"{metrics.num_epochs} epochs, {differ}"
    counts = f"lost {samples.lost:,}, repeated {samples.repeated:,}"
    yield "samples", f"{counts} (undisturbed: lost {reference.lost:,}, repeated {reference.repeated:,})"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def print_status(rows: tuple[EndpointStatus, ...]) -> None:
    """What Serve runs."""
    if not rows:
        out.print("nothing is served on this cluster")
        return
    table = Table()
    for name in ("name", "state", "replicas", "url", "bundle"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = "green" if row.state == "RUNNING" else "yellow"
        replicas = f"{row.replicas_running} of {row.replicas_target}"
        table.add_row(row.name, f"[{style}]{row.state}[/]", replicas, row.url, row.bundle)
    out.print(table)
    for row in rows:
        if row.message:
            out.print(f"{row.name}: {row.message}", soft_wrap=True, markup=False)


def print_predictions(predictions: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    for prediction in predictions:
        out.file.write(json.dumps(prediction) + "\n")


@contextmanager
def run_view(*, quiet: bool = False) -> Iterator[RunView]:
    """A listener for a run's events: a live table on a terminal, plain lines elsewhere, nothing when `quiet`."""
    if quiet or not err.is_terminal:
        yield PlainView(quiet=quiet)
        return
    view = LiveView()
    with Live(console=err, get_renderable=view.render, refresh_per_second=4, transient=True):
        yield view


class RunView:
    """Takes a run's events."""

    def __init__(self) -> None:
        self.progress = RunProgress()

    def __call__(self, event: Event) -> None:
        self.progress.update(event)
        if line := _headline(event):
            say(line)


class LiveView(RunView):
    """A table that is redrawn while the run goes on."""

    def render(self) -> RenderableType:
        progress = self.progress
        elapsed = time.monotonic() - progress.started
        if not progress.trials:
            return Text(f"{progress.phase} ... {elapsed:.0f} s", style="dim")
        header = f"{progress.phase} ... {progress.num_ended} of {len(progress.trials)} trials, {elapsed:.0f} s"
        leader = progress.leader
        if leader is not None and leader.best is not None:
            header += f", best {progress.metric} {leader.best:.4f} ({leader.trial.trial_id})"
        return Group(Text(header, style="bold"), self._table())

    def _table(self) -> Table:
        progress = self.progress
        table = Table(box=None, padding=(0, 1))
        columns = ("trial", "lr", "batch", "epochs", "", "loss", progress.metric, "best", "samples/s", "left", "status")
        for name in columns:
            table.add_column(name, justify="left" if name in ("trial", "", "status") else "right")
        for row in _rows_to_show(progress):
            table.add_row(*_live_cells(row, progress.metric))
        return table


class PlainView(RunView):
    """A line for what matters, at most one a second for each trial's epochs."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet
        self._last_line: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if self._quiet:
            return
        super().__call__(event)
        if event.kind == "epoch" and self._is_due(event):
            say(_epoch_line(self.progress.trials[event.trial_id], self.progress.metric))
        elif event.kind == "state":
            say(_state_line(self.progress, event))

    def _is_due(self, event: Event) -> bool:
        now = time.monotonic()
        if now - self._last_line.get(event.trial_id, -math.inf) < PLAIN_INTERVAL_S:
            return False
        self._last_line[event.trial_id] = now
        return True


def _headline(event: Event) -> str | None:
    values = event.values
    match event.kind:
        case "starting":
            return f"starting {values['run']}: {len(values['trials'])} trials, in {values['folder']}"
        case "resuming":
            ended, total = values["ended"], len(values["trials"])
            return f"resuming {values['run']} at step {values['step']:,}: {ended} of {total} trials had ended"
        case "complete":
            return f"{values['run']} is complete already; reading its results (--new runs it again)"
        case "warning":
            return f"warning: {event.trial_id}: {values['text']}"
        case "resumed":
            return f"{event.trial_id}: goes on at step {values['step']:,}, from {values['from']}"
        case "failed":
            return f"{event.trial_id} failed: {values['error']}"
        case _:
            return _group_headline(event)


def _group_headline(event: Event) -> str | None:
    """What happened to the processes of a group, by itself or on purpose."""
    values = event.values
    match event.kind:
        case "lost":
            return f"lost a worker{_of(event)}: {_place(event)}, {values['how']}"
        case "hang":
            return f"hang{_of(event)}: {values['text']}"
        case "regrouped":
            return f"the group goes on with {values['workers']} workers{_of(event)}"
        case "killed":
            return f"verify: SIGKILL to {_place(event)}{_of(event)}, at about step {values['step']:,}"
        case "held":
            return f"verify: stopped the group{_of(event)} at about step {values['step']:,}, to go on with another"
        case _:
            return None


def _place(event: Event) -> str:
    return f"rank {event.values['rank']} (pid {event.values['pid']} on {event.values['node']})"


def _of(event: Event) -> str:
    return f" of {event.trial_id}" if event.trial_id else ""


def _epoch_line(row: TrialProgress, metric: str) -> str:
    return (
        f"{row.trial.trial_id}: epoch {row.epoch}/{row.trial.training.epochs}, loss {_number(row.train_loss)}, "
        f"{metric} {_number(row.metrics.get(metric))}, {_rate(row.samples_per_s)} samples/s, "
        f"{_seconds(row.remaining_s)} left"
    )


def _state_line(progress: RunProgress, event: Event) -> str:
    row = progress.trials[event.trial_id]
    best = f"{row.best:.4f}" if row.best is not None else "-"
    return (
        f"{row.trial.trial_id}: {row.status} at epoch {row.epoch}, best {progress.metric} {best} "
        f"(lr {row.settings['lr']:g}, batch {row.settings['global_batch_size']}); "
        f"{progress.num_ended} of {len(progress.trials)} trials ended"
    )


def _rows_to_show(progress: RunProgress) -> list[TrialProgress]:
    """What runs, then the best so far, as many as fit a screen; a short run is shown whole, in its own order."""
    rows = list(progress.trials.values())
    if len(rows) <= SHOWN_TRIALS:
        return rows
    sign = -1.0 if progress.mode == "max" else 1.0

    def key(row: TrialProgress) -> tuple[bool, bool, float]:
        return (row.status not in ("running", "paused"), row.best is None, sign * (row.best or 0.0))

    return sorted((row for row in rows if row.status != "waiting"), key=key)[:SHOWN_TRIALS]


def _live_cells(row: TrialProgress, metric: str) -> list[RenderableType]:
    epochs = row.trial.training.epochs
    value = row.metrics.get(metric)
    return [
        row.trial.trial_id,
        f"{row.settings['lr']:g}",
        str(row.settings["global_batch_size"]),
        f"{row.epoch}/{epochs}",
        ProgressBar(total=epochs, completed=row.epoch, width=16),
        _number(row.train_loss),
        _number(value),
        _number(row.best),
        _rate(row.samples_per_s),
        _seconds(row.remaining_s),
        row.status,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
