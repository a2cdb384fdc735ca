"""Everything a person or a script reads of a result: tables, JSON, one-line errors. The only module that prints."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from bigray.errors import BigrayError
from bigray.results import (
    CrossValidation,
    Finalist,
    HoldoutCheck,
    Kill,
    Leaderboard,
    ModelVerification,
    Resize,
    TrialResult,
    Verification,
)
from bigray.specs import TrialSpec

if TYPE_CHECKING:
    from bigray.cluster.plan import Plan
    from bigray.compression.report import Compression
    from bigray.data.inspection import ColumnReport
    from bigray.data.overview import TableReport, TextReport
    from bigray.explaining import Explained
    from bigray.prediction.predicting import PredictionResult
    from bigray.report import RunReport, Totals
    from bigray.serve.runner import Deployment, EndpointStatus
    from bigray.serve.scaling.simulation import SimulationResult

WHOLE_LEADERBOARD = 40
"""Trials up to which a leaderboard has a row for each; of more, `SHOWN_OF_MANY`."""
SHOWN_OF_MANY = 20
MOST_ERRORS = 5
WIDTH_OF_LEDGER = 105

LOG_WIDTH = 120
"""Columns of a table in a file, which has no width of its own."""

out = Console(highlight=False, width=None if Console().is_terminal else LOG_WIDTH)
err = Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """One JSON document on standard output, for scripts."""
    out.file.write(_dumped(document, indent=2) + "\n")


def print_event(kind: str, trial_id: str, values: Mapping[str, Any]) -> None:
    """One line of JSON on standard output, at once. A reader that went away does not end the run."""
    line = _dumped({"kind": kind, **({"trial": trial_id} if trial_id else {}), **values})
    with suppress(BrokenPipeError):
        out.file.write(line + "\n")
        out.file.flush()


def _dumped(document: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(document, indent=indent, allow_nan=False, default=_as_json)
    except ValueError:  # NaN or an infinity, which JSON has not: rare enough to look for it only then
        return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _as_json(value: Any) -> Any:
    """What JSON has no word for: trials as their ids, other values as plain ones."""
    if isinstance(value, TrialSpec):
        return value.trial_id
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if value is None or isinstance(value, str | int) else _finite(_as_json(value))


def print_error(error: BigrayError) -> None:
    """One line for each fault, on standard error."""
    for line in str(error).splitlines() or [type(error).__name__]:
        err.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def say(text: str) -> None:
    """One plain line on standard error, so that `--json` output stays clean."""
    err.print(text, soft_wrap=True, markup=False)


def print_text(text: str) -> None:
    """A value by itself on standard output, for scripts that take it from there."""
    out.print(text, soft_wrap=True, markup=False)


def print_table(table: RenderableType, *, to_stderr: bool = False) -> None:
    """A table made elsewhere."""
    (err if to_stderr else out).print(table)


class StatusLine:
    """One line on standard error that is written over; where that is no terminal, only what is to stay in a log."""

    def __init__(self, status: Status | None) -> None:
        self._status = status

    def show(self, text: str, *, log: bool = False) -> None:
        if self._status is not None:
            self._status.update(Text(text))
        elif log:
            say(text)

    def clear(self) -> None:
        if self._status is not None:
            self._status.update("")


@contextmanager
def status_line() -> Iterator[StatusLine]:
    """A line for what is going on, gone afterwards."""
    if not err.is_terminal:
        yield StatusLine(None)
        return
    with err.status("") as status:
        yield StatusLine(status)


def print_plan(plan: Plan) -> None:
    """What would start, and where it may go, as tables."""
    from bigray.plan_view import facts, nodes_table

    table = Table(title=f"plan for {plan.job}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    nodes = f"{plan.cluster_nodes} node{'s' if plan.cluster_nodes != 1 else ''}"
    table.add_row("cluster", f"{plan.cluster_cpus:g} CPUs, {plan.cluster_gpus:g} GPUs on {nodes}")
    table.add_row("data", ", ".join(f"{count:,} {part}" for part, count in plan.rows.items()))
    table.add_row("models", ", ".join(plan.models))
    table.add_row("trials", f"{plan.trials:,}, {plan.trials_at_once} at once")
    groups = f"{plan.groups} x {plan.workers_per_group} worker{'s' if plan.workers_per_group > 1 else ''}"
    table.add_row("worker groups", f"{groups} over {plan.backend}, holding {plan.cpus:g} CPUs and {plan.gpus:g} GPUs")
    table.add_row("storage", plan.storage)
    if plan.serve is not None:
        low, high = plan.serve.min_replicas, plan.serve.max_replicas
        count = f"{low}" if low == high else f"{low} to {high}"
        table.add_row("endpoint", f"{count} replicas x {plan.serve.cpus_per_replica:g} CPU, after training")
    for name, text in facts(plan):
        table.add_row(name, Text(text))
    table.add_row("fits", "[green]yes[/]; nothing was started")
    out.print(table)
    if plan.nodes:
        out.print(nodes_table(plan))


def print_leaderboard(board: Leaderboard) -> None:
    """The trials, best first, the finalists where there are any, and the winner in one line."""
    from bigray.report import totals_of, why

    many = len(board.trials) > WHOLE_LEADERBOARD
    statuses = {trial.trial_id: trial.status for trial in board.trials}
    title = f"{board.run_id}: {len(board.trials):,} trials by {board.metric}"
    shown = board.trials[: SHOWN_OF_MANY if many else None]
    out.print(_trial_table(title, shown, statuses, board.metric, board.winner.trial_id))
    if many:
        rest = (statuses[trial.trial_id] for trial in board.trials[SHOWN_OF_MANY:])
        out.print(
            f"and {_counted(rest)}; bigray show {board.run_uri} --top {len(board.trials)} shows all", soft_wrap=True
        )
    _print_errors(board.trials)
    if board.finalists:
        print_finalists(board.finalists, board.metric, why(board.finalists, board.trials, board.metric, board.mode))
    if board.cross_validation:
        print_cross_validation(board.cross_validation, board.metric)
    winner = board.winner
    out.print(
        f"winner: {winner.model_name}, trial {winner.trial_id}, step {winner.best_step:,} (epoch {winner.best_epoch}), "
        f"{board.metric} {winner.metrics[board.metric]:.4f}   {board.wall_s:.1f} s",
        soft_wrap=True,
    )
    if board.efficiency is not None and len(board.trials) > 1:
        out.print(efficiency_line(totals_of(board.trials, board.slots, board.training_wall_s)), soft_wrap=True)
    out.print(f"samples lost {board.samples_lost:,}, repeated {board.samples_repeated:,}")
    out.print(f"bundle: {board.bundle.uri}", soft_wrap=True, markup=False)


def print_budget(text: str, num_ended: int, num_trials: int) -> None:
    """That a run ended early, as asked."""
    reached = f"{num_ended:,} of {num_trials:,} trials had ended"
    say(f"the budget of {text} is used up: {reached}; the same command with a larger --budget goes on")


def print_report(report: RunReport, top: int) -> None:
    """All that a run's journal tells: how it stands, its trials, where their time went."""
    out.print(
        Text.assemble(("run ", "bold"), f"{report.run_id} of job {report.job}, in {report.folder}"), soft_wrap=True
    )
    out.print(Text.assemble(("status ", "bold"), _status_line(report)), soft_wrap=True)
    for note in report.notes:
        out.print(Text.assemble(("note ", "bold"), note), soft_wrap=True)
    counts = ", ".join(f"{count:,} {status}" for status, count in report.counts.items())
    out.print(Text.assemble(("trials ", "bold"), f"{report.num_planned:,}: {counts or 'none begun'}"), soft_wrap=True)
    shown = report.trials[:top]
    if shown:
        title = f"best {len(shown)} by {report.metric}" if len(report.trials) > top else f"by {report.metric}"
        out.print(_trial_table(title, shown, report.statuses, report.metric, report.winner))
        if len(report.trials) > top:
            rest = [report.statuses[trial.trial_id] for trial in report.trials[top:]]
            out.print(f"and {_counted(rest)}; --top {len(report.trials)} shows all")
        _print_errors(report.trials)
        out.print(_ledger_table(shown, report.totals))
        out.print(_totals_line(report.totals), soft_wrap=True)
        out.print(efficiency_line(report.totals), soft_wrap=True)
    for probe in report.probes:
        out.print(f"probe: {describe_probe(probe)}", soft_wrap=True, markup=False)
    if happened := ", ".join(f"{count:,} {_HAPPENED[kind]}" for kind, count in report.events.items() if count):
        out.print(f"on the way: {happened}", soft_wrap=True)
    if report.finalists:
        print_finalists(report.finalists, report.metric, report.why)
    if report.cross_validation:
        print_cross_validation(report.cross_validation, report.metric)
    if report.bundle:
        out.print(f"bundle: {report.bundle}", soft_wrap=True, markup=False)


def print_finalists(finalists: Sequence[Finalist], metric: str, reason: str | None) -> None:
    """The finalists with what their seeds (or folds) came to, the winner first, and what decided."""
    table = Table(title="finalists, trained again", title_justify="left", box=SIMPLE_HEAD)
    columns = ("finalist", finalists[0].over, f"mean {metric}", "95 % interval", "", "parameters", "ms a row")
    for name in columns:
        table.add_column(name, justify="left" if name in ("finalist", "") else "right", no_wrap=True)
    is_tie = sum(finalist.is_tied for finalist in finalists) > 1
    for number, finalist in enumerate(finalists):
        half = (finalist.high - finalist.low) / 2
        has_values = bool(finalist.values)
        table.add_row(
            finalist.trial_id,
            str(len(finalist.values)),
            f"{finalist.mean:.4f}" + (f" ± {half:.4f}" if len(finalist.values) > 1 else "") if has_values else "-",
            f"{finalist.low:.4f} to {finalist.high:.4f}" if len(finalist.values) > 1 else "-",
            "tie" if is_tie and finalist.is_tied else "",
            f"{finalist.num_parameters:,}",
            f"{finalist.latency_ms:.3g}" if finalist.latency_ms is not None else "-",
            style="bold green" if number == 0 else None,
        )
    out.print(table)
    if reason:
        out.print(f"why: {reason}", soft_wrap=True, markup=False)


def print_cross_validation(models: Sequence[CrossValidation], metric: str) -> None:
    """Each model over its folds, the best mean first, and what becomes of the first."""
    table = Table(title="cross-validation", title_justify="left", box=SIMPLE_HEAD)
    for name in ("model", "folds", f"mean {metric}", "std", "95 % interval", "parameters"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for number, model in enumerate(models):
        has_interval, missing = len(model.values) > 1, model.num_folds - len(model.values)
        table.add_row(
            model.model_name,
            f"{len(model.values)} of {model.num_folds}" if missing else str(model.num_folds),
            f"{model.mean:.4f}" if model.values else "-",
            f"{model.deviation:.4f}" if has_interval else "-",
            f"{model.low:.4f} to {model.high:.4f}" if has_interval else "-",
            f"{model.num_parameters:,}",
            style="bold green" if number == 0 and model.values else None,
        )
    out.print(table)
    best = models[0]
    if best.values:
        out.print(
            f"{best.model_name} has the best mean; exported is its trial {best.final_trial} on the usual split",
            soft_wrap=True,
            markup=False,
        )


def efficiency_line(totals: Totals) -> str:
    """What share of the groups' time was training, and what that means."""
    if totals.efficiency is None:
        return "efficiency: no trial has been trained yet"
    groups = f"{totals.slots} group{'s' if totals.slots != 1 else ''}"
    return (
        f"efficiency {totals.efficiency:.0%}: {totals.ledger.compute_s:.1f} s of training steps in "
        f"{totals.training_wall_s:.1f} s x {groups}; the rest is what the ledger names, and waiting between trials"
    )


def describe_probe(values: Mapping[str, Any]) -> str:
    """What a probe measured and chose, in one line."""
    what = f"{values.get('model', '-')}, batch {values.get('batch', '-')}"
    choice = "trained stacked" if values.get("is_stacked") else "trained one by one"
    if values.get("why_not"):
        return f"{what}: {choice}, cannot be stacked: {values['why_not']}"
    times = [("alone", values.get("alone_step_s")), ("stacked", values.get("stacked_step_s"))]
    shown = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in times if seconds is not None)
    return f"{what}: {choice} (a step of one trial: {shown})"


_HAPPENED = {
    "retried": "trials split after running out of memory",
    "recycled": "workers replaced for their memory",
    "lost": "workers lost",
    "promoted": "promotions",
    "exploited": "takeovers of weights",
}

_LEDGER_COLUMNS = {
    "start": "start_s",
    "data": "data_s",
    "compute": "compute_s",
    "evaluation": "evaluation_s",
    "checkpoint": "checkpoint_s",
    "reporting": "reporting_s",
    "other": "other_s",
    "wall": "wall_s",
    "CPU-s": "cpu_s",
}


def _trial_table(
    title: str, trials: Sequence[TrialResult], statuses: Mapping[str, str], metric: str, winner: str | None
) -> Table:
    columns = _trial_columns(trials, statuses, metric)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("trial", "status") else "right", no_wrap=True)
    for number, trial in enumerate(trials):
        cells = [column[number] for column in columns.values()]
        table.add_row(*cells, style="bold green" if trial.trial_id == winner else None)
    return table


def _trial_columns(trials: Sequence[TrialResult], statuses: Mapping[str, str], metric: str) -> dict[str, list[str]]:
    """The columns that the width has room for: the metric that decides first, then settings, then other metrics."""
    settings = list(trials[0].config)
    others = [name for name in next((trial.metrics for trial in trials if trial.metrics), {}) if name != metric]
    columns = {
        "trial": [trial.trial_id for trial in trials],
        **{_short(key): [_setting(trial.config.get(key)) for trial in trials] for key in settings},
        "status": [_status_cell(statuses[trial.trial_id], trial) for trial in trials],
        "epochs": [str(trial.epochs) for trial in trials],
        "best at": [str(trial.best_epoch) if trial.metrics else "-" for trial in trials],
        **{name: [_metric_cell(trial, name) for trial in trials] for name in (metric, *others)},
    }
    may_go = [*others[::-1], *[_short(key) for key in settings[2:]][::-1], "best at", "epochs"]
    while may_go and _GAP + sum(max(map(len, (name, *cells))) + _GAP for name, cells in columns.items()) > out.width:
        del columns[may_go.pop(0)]
    return columns


_GAP = 2
"""Blanks between two columns, and at the edges."""


def _short(setting: str) -> str:
    return "batch" if setting == "global_batch_size" else setting


def _metric_cell(trial: TrialResult, name: str) -> str:
    return f"{trial.metrics[name]:.4f}" if name in trial.metrics else "-"


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def _status_cell(status: str, trial: TrialResult) -> str:
    split = f" (micro-batch {trial.micro_batch_size}: out of memory)" if trial.micro_batch_size else ""
    return status + split


def _ledger_table(trials: Sequence[TrialResult], totals: Totals) -> Table:
    """Seconds of each trial by what they went into; the parts add up to the wall, waiting came before it."""
    is_wide = out.width >= WIDTH_OF_LEDGER
    title = "ledger, seconds" if is_wide else "ledger, seconds (on a wider terminal: CPU, GPU and memory)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    parts = [name for name in _LEDGER_COLUMNS if is_wide or name != "CPU-s"]
    has_gpus = is_wide and totals.ledger.gpu_s > 0
    table.add_column("trial", no_wrap=True)
    for name in ("waiting", *parts, *(("GPU-s",) if has_gpus else ()), *(("memory",) if is_wide else ())):
        # on a narrow terminal the headings are folded, not the figures
        table.add_column(name, justify="right", overflow="fold", min_width=5, no_wrap=is_wide)
    rows = [(trial.trial_id, trial.waiting_s, trial.ledger) for trial in trials]
    for name, waiting_s, ledger in [*rows, ("all trials", totals.waiting_s, totals.ledger)]:
        cells = [_amount(waiting_s), *[_amount(getattr(ledger, _LEDGER_COLUMNS[part])) for part in parts]]
        cells += [_amount(ledger.gpu_s)] if has_gpus else []
        cells += [_bytes(ledger.peak_rss_bytes)] if is_wide else []
        table.add_row(name, *cells, style="bold" if name == "all trials" else None)
    return table


def _totals_line(totals: Totals) -> str:
    ledger = totals.ledger
    wall_s = ledger.wall_s or math.inf
    names = [name for name in _LEDGER_COLUMNS if name not in ("wall", "CPU-s")]
    shares = {name: getattr(ledger, _LEDGER_COLUMNS[name]) / wall_s for name in names}
    most = sorted(shares, key=lambda name: -shares[name])
    return "the groups' time: " + ", ".join(f"{name} {shares[name]:.0%}" for name in most if shares[name] >= 0.005)


def _status_line(report: RunReport) -> str:
    if report.status == "complete":
        return f"complete, winner {report.winner}"
    if report.status == "budget used up":
        return f"budget of {report.budget} used up; the same command with a larger --budget goes on"
    return (
        f"not complete: interrupted, or still running (last event {_ago(report.idle_s)} ago); the same command goes on"
    )


def _counted(statuses: Iterable[str]) -> str:
    counts = Counter(statuses)
    listed = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    return f"{counts.total():,} more ({listed})"


def _print_errors(trials: Sequence[TrialResult]) -> None:
    failed = [trial for trial in trials if trial.error]
    for trial in failed[:MOST_ERRORS]:
        out.print(Text(f"{trial.trial_id} failed: {trial.error}", style="red"), soft_wrap=True)
    if len(failed) > MOST_ERRORS:
        out.print(Text(f"{len(failed) - MOST_ERRORS:,} more failed", style="red"))


def _amount(seconds: float) -> str:
    """With as many digits as say something, and no more than fit a column."""
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:,.1f}" if seconds < 1000 else f"{seconds:,.0f}"


def _bytes(count: int) -> str:
    if not count:
        return "-"
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def print_deployment(deployment: Deployment, curl: str) -> None:
    """Where the endpoint is and how to ask it."""
    out.print(f"\nserving {deployment.model} version {deployment.version} at {deployment.url}", soft_wrap=True)
    if deployment.why:
        out.print(f"why: {deployment.why}", soft_wrap=True, markup=False)
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
    for name in ("name", "state", "replicas", "version", "url", "bundle"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = "green" if row.state == "RUNNING" else "yellow"
        replicas = f"{row.replicas_running} of {row.replicas_target}"
        table.add_row(row.name, f"[{style}]{row.state}[/]", replicas, row.version, row.url, row.bundle)
    out.print(table)
    for row in rows:
        if row.rollout:
            out.print(f"{row.name}: {row.rollout} is under way", soft_wrap=True, markup=False)
        if row.message:
            out.print(f"{row.name}: {row.message}", soft_wrap=True, markup=False)


def print_simulation(result: SimulationResult) -> None:
    """What a trace would do to an endpoint: the figures, and charts over time."""
    from bigray.serve.scaling.tables import simulation_chart, simulation_table

    out.print(simulation_table(result))
    out.print(simulation_chart(result, min(out.width, LOG_WIDTH)))


def print_predictions(predictions: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    for prediction in predictions:
        out.file.write(json.dumps(prediction) + "\n")


def print_compression(made: Compression) -> None:
    """A compressed bundle beside the one it was made from."""
    amount = "" if made.amount is None else f" {made.amount:g}"
    table = Table(title=f"{made.method}{amount} of {made.source}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", made.source_version, made.version, ""):
        table.add_column(name, justify="left" if not name and not table.columns else "right", no_wrap=True)
    totals = (sum(sizes[0] for sizes in made.sizes.values()), sum(sizes[1] for sizes in made.sizes.values()))
    served = "model.onnx" if made.sizes.get("model.onnx", (0, 0))[1] else "weights"
    sizes = {**made.sizes, "all files": totals, f"{served}, packed": made.packed}
    for name, (before, after) in sizes.items():
        table.add_row(name, _exact_bytes(before), _exact_bytes(after), _times(before, after))
    for batch, (before_ms, after_ms) in made.latency_ms.items():
        row = f"ms a row, {batch} at once"
        table.add_row(row, f"{before_ms:.3g}", f"{after_ms:.3g}", _times(before_ms, after_ms))
    score = made.score
    change = f"{score.after - score.before:+.4f}"
    table.add_row(f"{score.metric}, {score.rows:,} rows", f"{score.before:.4f}", f"{score.after:.4f}", change)
    out.print(table)
    for note in made.notes:
        out.print(f"note: {note}", soft_wrap=True, markup=False)
    out.print(f"bundle: {made.location}", soft_wrap=True, markup=False)


MOST_COLUMNS_OF_DATA = 40
"""Columns and classes of a job's data that are shown; --json has all."""


def print_data_report(job: str, found: TableReport) -> None:
    """A job's rows: parts, columns, classes, what is odd about them, and a few of them."""
    report = found.report
    out.print(_parts_line(job, found.rows), soft_wrap=True)
    out.print(_column_table(report.columns, found.shape))
    if report.classes:
        out.print(_class_table(report.target, report.classes, found.rows))
    if found.target_range is not None:
        low, mean, high = found.target_range
        out.print(Text.assemble(("target ", "bold"), f"{report.target}: {low:.4g} to {high:.4g}, mean {mean:.4g}"))
    counts = f"{report.duplicates:,} duplicates, {report.contradictions:,} contradictions"
    leaks = ", ".join(f"{count:,} from {pair.replace(', ', ' to ')}" for pair, count in report.leaks.items())
    out.print(Text.assemble(("rows ", "bold"), f"{counts}, leaks: {leaks or 'none'}"), soft_wrap=True)
    readable = [example for example in report.examples if len(example) > 1]  # of images there is but the target
    for number, example in enumerate(readable):
        shown = dict(list(example.items())[:MOST_COLUMNS_OF_DATA])
        out.print(Text.assemble((f"example {number} ", "bold"), _dumped(shown)), soft_wrap=True)
    _print_warnings(found.warnings)


def print_text_report(job: str, found: TextReport) -> None:
    """A job's text: parts, vocabulary, the beginning."""
    out.print(_parts_line(job, found.rows, f"windows of {found.context} tokens"), soft_wrap=True)
    tokens = ", ".join(f"{count:,} {part}" for part, count in found.tokens.items())
    out.print(Text.assemble(("tokens ", "bold"), f"{tokens}; a token is a {found.level}"), soft_wrap=True)
    shown = "every byte" if found.level == "byte" else json.dumps("".join(found.vocabulary), ensure_ascii=False)
    out.print(Text.assemble(("vocabulary ", "bold"), f"{len(found.vocabulary):,}: {shown}"), soft_wrap=True)
    out.print(Text.assemble(("begins ", "bold"), json.dumps(found.example, ensure_ascii=False)), soft_wrap=True)
    _print_warnings(found.warnings)


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        out.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def _parts_line(job: str, rows: Mapping[str, int], unit: str = "rows") -> Text:
    total = sum(rows.values())
    parts = ", ".join(f"{count:,} {part} ({count / max(total, 1):.0%})" for part, count in rows.items())
    return Text.assemble(("data ", "bold"), f"of {job}: {total:,} {unit}: {parts}")


def _column_table(columns: Sequence[ColumnReport], shape: tuple[int, ...]) -> Table:
    table = Table(title="inputs", title_justify="left", box=SIMPLE_HEAD)
    for name in ("column", "kind", "type", "missing", "distinct", "values", "outliers"):
        is_number = name in ("missing", "distinct", "outliers")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for column in columns[:MOST_COLUMNS_OF_DATA]:
        table.add_row(
            Text(column.name),
            column.kind,
            Text(column.type),
            Text(f"{column.missing:,}", style="yellow" if column.missing else ""),
            _count(column.distinct),
            Text("x".join(map(str, shape)) if shape else _values_of(column)),
            Text(f"{column.outliers:,}", style="yellow" if column.outliers else ""),
        )
    if len(columns) > MOST_COLUMNS_OF_DATA:
        table.add_row(f"and {len(columns) - MOST_COLUMNS_OF_DATA:,} more", *[""] * 6)
    return table


def _values_of(column: ColumnReport) -> str:
    if column.low is not None and column.high is not None and column.mean is not None:
        return f"{column.low:.4g} to {column.high:.4g}, mean {column.mean:.4g}"
    shown = ", ".join(f"{value} ({count:,})" for value, count in column.most_common)
    return shown + (", ..." if (column.distinct or 0) > len(column.most_common) else "")


def _class_table(target: str, classes: Mapping[str, Mapping[str, int]], rows: Mapping[str, int]) -> Table:
    table = Table(title=f"target {target}: {len(classes):,} classes", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("class")
    for part in rows:
        table.add_column(part, justify="right", no_wrap=True)
    for name, counts in list(classes.items())[:MOST_COLUMNS_OF_DATA]:
        shares = ((counts[part], counts[part] / rows[part] if rows[part] else 0.0) for part in rows)
        table.add_row(Text(name), *(f"{count:,} ({share:.1%})" for count, share in shares))
    if len(classes) > MOST_COLUMNS_OF_DATA:
        table.add_row(f"and {len(classes) - MOST_COLUMNS_OF_DATA:,} more", *[""] * len(rows))
    return table


MOST_EXPLAINED = 20
"""Rows of a file whose explanations are shown; --json has all."""
MOST_COLUMNS = 20


def print_explanations(found: Explained) -> None:
    """What speaks for each answer and what against it, the strongest columns first."""
    for number, record in list(zip(found.rows, found.explanation.to_records(), strict=True))[:MOST_EXPLAINED]:
        answer = "the answer" if "label" not in record else repr(record["label"])
        line = f"row {number}: {answer}, output {record['output']:.4g} from {record['base']:.4g}"
        out.print(f"{line} (the attributions lack {record['error']:.1e})", soft_wrap=True, markup=False)
        attributions = record["attributions"]
        if isinstance(attributions, dict):
            out.print(_attribution_table(attributions))
        else:
            out.print("attributions of pixels: --out PNG draws them, --json lists them")
    if len(found.rows) > MOST_EXPLAINED:
        out.print(f"and {len(found.rows) - MOST_EXPLAINED:,} rows more; --json has all")


def print_prediction_result(result: PredictionResult) -> None:
    """Where the predictions are."""
    before = f", {result.parts_done_before:,} of them done before" if result.parts_done_before else ""
    out.print(f"{result.rows:,} rows in {result.parts:,} parts{before}", soft_wrap=True)
    version, run = result.lineage["bundle_version"], result.lineage["run"]
    out.print(f"by version {version} of run {run}: {result.location}", soft_wrap=True, markup=False)


def _attribution_table(attributions: Mapping[str, float]) -> Table:
    shown = sorted(attributions.items(), key=lambda item: -abs(item[1]))[:MOST_COLUMNS]
    largest = max((abs(value) for _, value in shown), default=0.0) or 1.0
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, value in shown:
        bar = Text("█" * max(1, round(10 * abs(value) / largest)), style="red" if value > 0 else "blue")
        table.add_row(Text(name), Text(f"{value:+.4g}"), bar)
    if len(attributions) > MOST_COLUMNS:
        table.add_row(f"and {len(attributions) - MOST_COLUMNS:,} columns more", "", "")
    return table


def _exact_bytes(count: int) -> str:
    return f"{count:,} B" if count else "-"


def _times(before: float, after: float) -> str:
    return f"x {after / before:.3g}" if before else ""
