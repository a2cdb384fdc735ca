"""From a run's events to its leaderboard: pure, so that a finished run and a running one are read the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from bigray.results import TrialResult
from bigray.specs import TrialSpec

SHOWN_SETTINGS = ("lr", "global_batch_size")


def trial_results(trials: Sequence[TrialSpec], events: Iterable[Mapping[str, Any]]) -> list[TrialResult]:
    """The result of each trial that was started, from the last state its group reported.

    A trial that could have gone on but did not was halted by the scheduler.
    """
    states: dict[str, Mapping[str, Any]] = {}
    errors: dict[str, str] = {}
    for event in events:
        if event["kind"] == "state":
            states[event["trial"]] = event
            errors.pop(event["trial"], None)
        elif event["kind"] == "failed":
            errors.setdefault(event["trial"], event["error"])
    return [
        _result(trial, states.get(trial.trial_id), errors.get(trial.trial_id))
        for trial in trials
        if trial.trial_id in states or trial.trial_id in errors
    ]


def rank(results: Iterable[TrialResult], metric: str, mode: Literal["max", "min"]) -> tuple[TrialResult, ...]:
    """Best first by the metric of each trial's own best epoch; ties go to the lower loss, then to the earlier trial.

    Trials without a metric (failed, diverged at once) come last.
    """
    sign = -1.0 if mode == "max" else 1.0

    def key(result: TrialResult) -> tuple[float, float, float, str]:
        if metric not in result.metrics:
            return (1.0, 0.0, 0.0, result.trial_id)
        loss = result.metrics.get("val_loss", math.inf)  # a loop of one's own need not report it
        return (0.0, sign * result.metrics[metric], loss, result.trial_id)

    return tuple(sorted(results, key=key))


def settings_of(trial: TrialSpec, names: Sequence[str] = SHOWN_SETTINGS) -> dict[str, Any]:
    """The trial's settings that a table shows."""
    values = trial.training.model_dump()
    return {name: values[name] for name in names}


def _result(trial: TrialSpec, state: Mapping[str, Any] | None, error: str | None) -> TrialResult:
    state = state or {}
    return TrialResult(
        trial_id=trial.trial_id,
        model_name=trial.model_name,
        config=settings_of(trial),
        status="failed" if error else (state.get("ended") or "halted"),
        epochs=state.get("epoch", 0),
        best_epoch=state.get("best_epoch", 0),
        best_step=state.get("best_step", 0),
        # a failed trial's newest checkpoint may be past its last report: it cannot win by metrics of other weights
        metrics={} if error else dict(state.get("best_metrics", {})),
        error=error,
        samples_lost=state.get("samples_lost", 0),
        samples_repeated=state.get("samples_repeated", 0),
    )
