"""The Tune side of a trial: an actor that borrows a live worker group and trains it from rung to rung.

It imports no torch and holds no CPU. With `reuse_actors=True` Tune hands the same actor the next trial through
`reset_config`, so a trial starts without starting a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune import Trainable

from bigray.errors import TrainingFailed
from bigray.specs import TrialSpec
from bigray.training.commands import Event, TrainTo
from bigray.training.switchboard import ask

EPOCH = "epoch"
"""What Tune's schedulers count."""


class GroupTrial(Trainable):  # type: ignore[misc]
    """One Tune trial at a time. `config["trial"]` is a trial's id; one `step` trains to the trial's next rung."""

    _spec: TrialSpec
    _rungs: tuple[int, ...]
    """Those still to come."""
    _group: int | None

    def setup(
        self, config: dict[str, Any], trials: Mapping[str, tuple[TrialSpec, tuple[int, ...]]], switchboard: Any
    ) -> None:
        self._trials, self._switchboard = trials, switchboard
        self._begin(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._begin(new_config["trial"])
        return True

    def cleanup(self) -> None:
        self._end()

    def step(self) -> dict[str, Any]:
        """Train to the next rung; reports the best value so far, so that one noisy epoch costs no trial its place."""
        spec = self._spec.training
        target = self._rungs[0]
        try:
            state = ask(self._switchboard.execute.remote(self._group, TrainTo(self._spec, target)))
        except TrainingFailed as error:
            self._tell(Event("failed", self._spec.trial_id, {"error": str(error)}))
            self._end()  # here, since Tune may end the actor of a failed trial without asking it to clean up
            raise
        self._tell(Event.of_state(self._spec.trial_id, state))
        self._rungs = self._rungs[1:]
        is_done = state.ended is not None and state.epoch <= target
        if is_done:
            self._end()
        return {EPOCH: target, spec.selection_metric: state.best_value_at(target), "done": is_done}

    def _begin(self, trial_id: str) -> None:
        self._spec, self._rungs = self._trials[trial_id]
        self._group = ask(self._switchboard.lease.remote())
        self._tell(Event("started", trial_id, {"group": self._group}))

    def _end(self) -> None:
        if self._group is not None:
            ask(self._switchboard.release.remote(self._group))
        self._group = None

    def _tell(self, event: Event) -> None:
        ask(self._switchboard.push.remote(event))
