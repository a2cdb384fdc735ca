"""From a run's events to its leaderboard: pure, so that a finished run and a running one are read the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pydantic import BaseModel

from bigray.results import Ledger, TrialResult, TrialStatus
from bigray.specs import TrialSpec

SHOWN_SETTINGS = ("lr", "global_batch_size")
"""Always shown of a trial, before what else was searched."""

DIVERGED = "diverged"
_PARTS_OF_LEDGER = frozenset(part.name for part in fields(Ledger))
_TRAINING_KINDS = frozenset({"started", "state", "failed"})
"""Events at which a group takes a trial or hands it back."""


def trial_results(
    trials: Sequence[TrialSpec], events: Iterable[Mapping[str, Any]], names: Sequence[str] = SHOWN_SETTINGS
) -> list[TrialResult]:
    """The result of each trial that was started, from what its group reported; `names`: settings of its `config`.

    Metrics and epochs are those of the last state; ledgers and waits add up over all of them, also where a leg was done
    again after a kill: that was work too. A trial that could have gone on but did not was halted by the scheduler.
    Trials that were proposed later are taken from the events.
    """
    known = {trial.trial_id: trial for trial in trials}
    found: dict[str, _Found] = {}
    for event in events:
        if event["kind"] == "proposed":
            known |= {trial.trial_id: trial for trial in proposed_trials(event)}
        elif event["kind"] in _HEARD:
            found.setdefault(event["trial"], _Found()).hear(event)
    return [_result(trial, found[name], names) for name, trial in known.items() if name in found and found[name].began]


def rank(results: Iterable[TrialResult], metric: str, mode: Literal["max", "min"]) -> tuple[TrialResult, ...]:
    """Best first by the metric of each trial's own best epoch; ties go to the lower loss, then to the earlier trial.

    Trials without a metric (failed, diverged) come last.
    """
    sign = -1.0 if mode == "max" else 1.0

    def key(result: TrialResult) -> tuple[float, float, float, str]:
        value = result.metrics.get(metric, math.nan)
        if not math.isfinite(value) or result.status == DIVERGED:
            return (1.0, 0.0, 0.0, result.trial_id)
        loss = result.metrics.get("val_loss", math.inf)  # a loop of one's own need not report it
        return (0.0, sign * value, loss, result.trial_id)

    return tuple(sorted(results, key=key))


def searched_names(search: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The settings by which a search's trials differ, learning rate and batch size first; of a search spec as JSON."""
    spaces = [search.get("space") or {}, *(search.get("spaces") or {}).values()] if search else []
    return tuple(dict.fromkeys([*SHOWN_SETTINGS, *(key for space in spaces for key in space)]))


def settings_of(trial: TrialSpec, names: Sequence[str] = SHOWN_SETTINGS) -> dict[str, Any]:
    """The trial's settings that a table shows, as JSON has them."""
    return {name: _plain(getattr(trial.training, name)) for name in names}


def proposed_trials(event: Mapping[str, Any]) -> list[TrialSpec]:
    """Trials that a `proposed` event of the journal tells of."""
    return [trial if isinstance(trial, TrialSpec) else TrialSpec.model_validate(trial) for trial in event["trials"]]


def training_wall_s(events: Iterable[Mapping[str, Any]]) -> float:
    """From the first trial's start to the last one's end in each attempt, added up: not what lay between attempts."""
    ends: dict[int, tuple[float, float]] = {}
    for event in events:
        if event["kind"] in _TRAINING_KINDS:
            first, last = ends.get(event["attempt"], (event["time"], event["time"]))
            ends[event["attempt"]] = (min(first, event["time"]), max(last, event["time"]))
    return sum(last - first for first, last in ends.values())


def slots(events: Iterable[Mapping[str, Any]]) -> int:
    """Worker groups that trained at once: of the attempt that had most of them."""
    groups = [event["plan"]["groups"] for event in events if event["kind"] == "attempt" and "plan" in event]
    return max(groups, default=1)


def ledger_of(values: Mapping[str, Any] | None) -> Ledger:
    """A ledger as the journal has it. Parts that this version does not know are left out, missing ones are 0."""
    return Ledger(**{name: value for name, value in (values or {}).items() if name in _PARTS_OF_LEDGER})


@dataclass
class _Found:
    """What the events of one trial come to."""

    state: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    micro_batch_size: int | None = None
    waiting_s: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def began(self) -> bool:
        return bool(self.state) or self.error is not None

    def hear(self, event: Mapping[str, Any]) -> None:
        _HEARD[event["kind"]](self, event)

    def _state(self, event: Mapping[str, Any]) -> None:
        self.state, self.error = event, None
        self.micro_batch_size = event.get("micro_batch_size") or self.micro_batch_size
        self.waiting_s += event.get("waited_s") or 0.0
        self.ledger = self.ledger.plus(ledger_of(event.get("ledger")))

    def _failed(self, event: Mapping[str, Any]) -> None:
        self.error = self.error or event["error"]

    def _retried(self, event: Mapping[str, Any]) -> None:
        self.error = None
        self.micro_batch_size = event.get("micro_batch_size") or self.micro_batch_size


_HEARD = {"state": _Found._state, "failed": _Found._failed, "retried": _Found._retried}


def _result(trial: TrialSpec, found: _Found, names: Sequence[str]) -> TrialResult:
    state = found.state
    status: TrialStatus = "failed" if found.error else (state.get("ended") or "halted")
    return TrialResult(
        trial_id=trial.trial_id,
        model_name=trial.model_name,
        config=settings_of(trial, names),
        status=status,
        epochs=state.get("epoch", 0),
        best_epoch=state.get("best_epoch", 0),
        best_step=state.get("best_step", 0),
        # a failed trial's newest checkpoint may be past its last report: it cannot win by metrics of other weights;
        # settings that end in NaN are none to deploy, whatever the epochs before were worth
        metrics={} if status in ("failed", DIVERGED) else dict(state.get("best_metrics", {})),
        error=found.error,
        samples_lost=state.get("samples_lost", 0),
        samples_repeated=state.get("samples_repeated", 0),
        num_parameters=state.get("num_parameters", 0),
        micro_batch_size=found.micro_batch_size,
        waiting_s=found.waiting_s,
        ledger=found.ledger,
        fold=trial.fold,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
