"""A run while it goes on: a live table on a terminal, plain lines in a log, JSON lines for machines (driver)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bigray.console import describe_probe, err, print_event, say
from bigray.progress import RunProgress, TrialProgress
from bigray.training.commands import Event

SHOWN_TRIALS = 12
MOST_RUNNING_SHOWN = 8
"""Of more trials than a screen holds; the rest are the best so far."""
LARGE_SWEEP = 40
"""A log has no line for each trial of a sweep with more trials than this."""
MOST_LINES_OF_A_KIND = 20
"""Lines that tell of single trials of a large sweep, such as failures; `bigray show` has all of them."""
PLAIN_INTERVAL_S = 1.0
"""Least time between two epoch lines of one trial in a log."""
SUMMARY_INTERVAL_S = 5.0
LEFT_OUT = ((90, frozenset({"", "loss", "samples/s", "left", "now"})), (120, frozenset({"", "loss", "samples/s"})))
"""Columns of the live table that a terminal narrower than so many characters has no room for."""

_SHOWN_STATUSES = ("running", "paused", "promoted", "waiting")
_ENDED_STATUSES = ("halted", "finished", "stopped early", "diverged", "failed")


@contextmanager
def run_view(*, quiet: bool = False, events: bool = False) -> Iterator[RunView]:
    """A listener for a run's events: a live table on a terminal, plain lines elsewhere, nothing when `quiet`.

    With `events` they go to standard output as JSON lines, and nothing else does.
    """
    if events:
        yield EventLines()
    elif quiet:
        yield QuietView()
    elif not err.is_terminal:
        yield PlainView()
    else:
        view = LiveView()
        with Live(console=err, get_renderable=view.render, refresh_per_second=4, transient=True):
            yield view


class RunView:
    """Takes a run's events; what matters to everybody is a line on standard error."""

    def __init__(self) -> None:
        self.progress = RunProgress()
        self._num_lines: Counter[str] = Counter()

    def __call__(self, event: Event) -> None:
        self.progress.update(event)
        if line := _headline(event):
            self._say_headline(event, line)

    @property
    def is_large(self) -> bool:
        return self.progress.num_trials > LARGE_SWEEP

    def _say_headline(self, event: Event, line: str) -> None:
        if self.is_large and event.trial_id:
            self._num_lines[event.kind] += 1
            if self._num_lines[event.kind] == MOST_LINES_OF_A_KIND:
                line += f" (more lines like this are left out; bigray show {self.progress.run or 'RUN'} has all)"
            elif self._num_lines[event.kind] > MOST_LINES_OF_A_KIND:
                return
        say(line)


class QuietView(RunView):
    """Shows nothing, and still knows how the run stands."""

    def __call__(self, event: Event) -> None:
        self.progress.update(event)


class EventLines(QuietView):
    """Each event as one line of JSON on standard output, as it happens."""

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if event.kind != "ranked":  # the last line is the result
            print_event(event.kind, event.trial_id, event.values)


class LiveView(RunView):
    """A table that is redrawn while the run goes on."""

    def render(self, width: int | None = None) -> RenderableType:
        progress = self.progress
        elapsed_s = time.monotonic() - progress.started
        if not progress.trials:
            return Text(f"{progress.phase} ... {elapsed_s:.0f} s", style="dim")
        return Group(*_header(progress, elapsed_s), _live_table(progress, width or err.width))


class PlainView(RunView):
    """A line for what matters, at most one a second for each trial's epochs; of a large sweep, one every five."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.progress = RunProgress(clock)
        self._clock = clock
        self._last_line: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if event.trial_id not in self.progress.trials:
            return
        if self.is_large:
            if self._is_due("", SUMMARY_INTERVAL_S):
                say(summary_line(self.progress))
        elif event.kind == "epoch" and self._is_due(event.trial_id, PLAIN_INTERVAL_S):
            say(_epoch_line(self.progress.trials[event.trial_id], self.progress.metric))
        elif event.kind == "state":
            say(_state_line(self.progress, event))

    def _is_due(self, what: str, interval_s: float) -> bool:
        now = self._clock()
        if now - self._last_line.get(what, -math.inf) < interval_s:
            return False
        self._last_line[what] = now
        return True


def summary_line(progress: RunProgress) -> str:
    """How a sweep stands, in one line."""
    parts = [f"{progress.num_ended:,} of {progress.num_trials:,} trials ended"]
    shown = ("running", "paused", "promoted", "diverged", "failed")
    parts += [f"{progress.counts[name]:,} {name}" for name in shown if progress.counts[name]]
    return ", ".join([*parts, *_leader(progress), *_pace(progress)])


def _header(progress: RunProgress, elapsed_s: float) -> list[Text]:
    ended = f"{progress.num_ended:,} of {progress.num_trials:,} trials ended"
    first = ", ".join([f"{progress.phase} ... {ended}", f"{elapsed_s:.0f} s", *_pace(progress)])
    if progress.num_trials <= SHOWN_TRIALS:
        return [Text(", ".join([first, *_leader(progress)]), style="bold")]
    counts = {**progress.counts, "waiting": progress.num_waiting}
    shown = [f"{counts[name]:,} {name}" for name in (*_SHOWN_STATUSES, *_ENDED_STATUSES) if counts.get(name)]
    lines = [Text(first, style="bold"), Text(" · ".join(shown))]
    if happened := _happened(progress):
        lines.append(Text(happened, style="dim"))
    return [*lines, *(Text(line, style="green") for line in _leader(progress, with_settings=True))]


def _happened(progress: RunProgress) -> str:
    words = {
        "promoted": "promotions",
        "exploited": "takeovers of weights",
        "retried": "split after running out of memory",
        "recycled": "workers replaced for their memory",
    }
    return ", ".join(f"{progress.happened[kind]:,} {word}" for kind, word in words.items() if progress.happened[kind])


def _leader(progress: RunProgress, *, with_settings: bool = False) -> list[str]:
    leader = progress.leader
    if leader is None or leader.best is None:
        return []
    about = leader.trial.trial_id
    if with_settings:
        about += f", lr {leader.settings['lr']:g}, batch {leader.settings['global_batch_size']}"
    return [f"best {progress.metric} {leader.best:.4f} ({about})"]


def _pace(progress: RunProgress) -> list[str]:
    """Trials a second, or a minute, and the time left by it; nothing before it means something."""
    pace, left_s = progress.trials_per_s, progress.remaining_s
    if pace is None:
        return []
    rate = f"{pace:.{0 if pace >= 10 else 1}f} trials/s" if pace >= 0.5 else f"{pace * 60:.1f} trials/min"
    return [rate] if left_s is None else [rate, f"about {_seconds(left_s)} left"]


def _live_table(progress: RunProgress, width: int) -> Table:
    table = Table(box=None, padding=(0, 1))
    left_out = next((names for limit, names in LEFT_OUT if width < limit), frozenset())
    columns = ("trial", "lr", "batch", "epochs", "", "loss", "now", "best", "samples/s", "left", "status")
    rows = _rows_to_show(progress)
    longest = max(len(row.trial.trial_id) for row in rows) if rows else 0
    for name in columns:
        if name not in left_out:
            table.add_column(
                progress.metric if name == "now" else name,
                justify="left" if name in ("trial", "", "status") else "right",
                min_width=min(longest, 24) if name == "trial" else None,
                no_wrap=True,
            )
    for row in rows:
        cells = zip(columns, _live_cells(row, progress.metric), strict=True)
        table.add_row(*[cell for name, cell in cells if name not in left_out])
    return table


def _rows_to_show(progress: RunProgress) -> list[TrialProgress]:
    """What runs, then the best so far, as many as fit a screen; a short run is shown whole, in its own order."""
    if len(progress.trials) <= SHOWN_TRIALS:
        return list(progress.trials.values())
    running = list(progress.running.values())[-MOST_RUNNING_SHOWN:]
    shown = {row.trial.trial_id for row in running}
    best = [row for row in progress.best_rows(SHOWN_TRIALS) if row.trial.trial_id not in shown]
    return [*running, *best][:SHOWN_TRIALS]


def _live_cells(row: TrialProgress, metric: str) -> list[RenderableType]:
    epochs = row.trial.training.epochs
    settings = row.settings
    return [
        row.trial.trial_id,
        f"{settings['lr']:g}",
        str(settings["global_batch_size"]),
        f"{row.epoch}/{epochs}",
        ProgressBar(total=epochs, completed=row.epoch, width=16),
        _number(row.train_loss),
        _number(row.metrics.get(metric)),
        _number(row.best),
        _rate(row.samples_per_s),
        _seconds(row.remaining_s),
        _status_of(row),
    ]


def _status_of(row: TrialProgress) -> str:
    notes = [f"micro-batch {row.micro_batch_size}"] if row.micro_batch_size else []
    notes += [f"weights of {row.source}"] if row.source else []
    return f"{row.status} ({', '.join(notes)})" if notes else row.status


def _headline(event: Event) -> str | None:
    values = event.values
    match event.kind:
        case "starting":
            num_trials = max(len(values["trials"]), values.get("total") or 0)
            return f"starting {values['run']}: {num_trials:,} trials, in {values['folder']}"
        case "resuming":
            ended, total = values["ended"], max(len(values["trials"]), values.get("total") or 0)
            return f"resuming {values['run']} at step {values['step']:,}: {ended:,} of {total:,} trials had ended"
        case "complete":
            return f"{values['run']} is complete already; reading its results (--new runs it again)"
        case "note":
            return f"note: {values['text']}"
        case "warning":
            return f"warning: {event.trial_id}: {values['text']}"
        case "resumed":
            return f"{event.trial_id}: goes on at step {values['step']:,}, from {values['from']}"
        case "failed":
            return f"{event.trial_id} failed: {values['error']}"
        case _:
            return _sweep_headline(event) or _group_headline(event)


def _sweep_headline(event: Event) -> str | None:
    """What was decided about trials."""
    values = event.values
    match event.kind:
        case "probe":
            return describe_probe(values)
        case "retried":
            return (
                f"{event.trial_id}: out of memory ({values['error']}); goes on with micro-batches of "
                f"{values['micro_batch_size']} rows and the same global batch"
            )
        case "budget":
            return f"budget of {values['text']} is used up: ending where each trial has reported"
        case "finalists":
            seeds = f" with {values['seeds']} seeds each" if "seeds" in values else ""
            folds = f" on each of {values['folds']} folds" if "folds" in values else ""
            return f"training the best {len(values['trials'])} again{seeds}{folds}: {', '.join(values['trials'])}"
        case "cross_validated":
            half = (values["high"] - values["low"]) / 2
            return (
                f"{values['model_name']} has the best mean over {len(values['values'])} folds, {values['mean']:.4f} ± "
                f"{half:.4f}; training it on the usual split"
            )
        case _:
            return None


def _group_headline(event: Event) -> str | None:
    """What happened to the processes of a group, by itself or on purpose."""
    values = event.values
    match event.kind:
        case "lost":
            return f"lost a worker{_of(event)}: {_place(event)}, {values['how']}"
        case "recycled":
            return f"replaced a worker{_of(event)}: rank {values['rank']} (pid {values['pid']}), {values['why']}"
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
    return (
        f"{row.trial.trial_id}: {row.status} at epoch {row.epoch}, best {progress.metric} {_number(row.best)} "
        f"(lr {row.settings['lr']:g}, batch {row.settings['global_batch_size']}); "
        f"{progress.num_ended} of {progress.num_trials} trials ended"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
