"""What a person sees while a deployment goes on: the gate's checks, replicas that load, a canary's numbers (driver)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bigray import console

if TYPE_CHECKING:
    from bigray.serve.release.gate import GateReport
    from bigray.serve.rollout import Progress
    from bigray.serve.runner import DeployWatch

LOG_EVERY_S = 5.0
"""In a file, a canary is a line so often."""


@contextmanager
def watching(*, quiet: bool) -> Iterator[DeployWatch]:
    """A watch that shows: in a terminal one line that is written over, in a file few lines; `quiet` shows nothing."""
    from bigray.serve.runner import DeployWatch

    if quiet:
        yield DeployWatch()
        return
    with console.status_line() as line:
        view = _View(line)
        yield DeployWatch(view.on_check, view.on_gate, view.on_progress)


class _View:
    def __init__(self, line: console.StatusLine) -> None:
        self._line = line
        self._told_at_s = 0.0

    def on_check(self, name: str, state: str) -> None:
        self._line.show(f"gate: {name} {state}")

    def on_gate(self, report: GateReport) -> None:
        from bigray.serve.release.tables import gate_table

        self._line.clear()
        console.print_table(gate_table(report.checks), to_stderr=True)

    def on_progress(self, progress: Progress) -> None:
        text = describe_progress(progress)
        if progress.stage == "watching" and progress.elapsed_s - self._told_at_s >= LOG_EVERY_S:
            self._told_at_s = progress.elapsed_s
            self._line.show(text, log=True)
        else:
            self._line.show(text)


def describe_progress(progress: Progress) -> str:
    """One line."""
    if progress.stage == "watching" and progress.comparison is not None:
        from bigray.serve.release.judge import describe

        return f"{progress.elapsed_s:.0f} s: {describe(progress.comparison)}"
    what = {"loading": "have loaded it", "switching": "have switched to it", "watching": "are watched"}[progress.stage]
    return f"{progress.ready} of {progress.replicas} replicas {what}"
