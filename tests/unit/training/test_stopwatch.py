"""The ledger of a command: every moment is in one of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from bigray.data.dataset import TrainingArrays
from bigray.specs import TrialSpec
from bigray.training.commands import Wish
from bigray.training.context import make_training
from bigray.training.loop import TrialTraining
from bigray.training.stopwatch import PARTS, Stopwatch
from tests.loop_hooks import RecordingHooks
from tests.unit.training.test_loop import ALONE, _begin

MakeTrial = Callable[..., TrialSpec]


class Clock:
    """Moves on by as much as it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TimedHooks(RecordingHooks):
    """Each mark is followed by a second of work: a tick of the clock that only the stopwatch sees."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.stopwatch = Stopwatch(self.clock)

    def tick(self, phase: str) -> None:
        super().tick(phase)
        self.stopwatch.mark(phase)
        self.clock.now += 1.0

    def exchange(self, step: int) -> Wish:
        return Wish()


def test_time_goes_to_the_phase_that_is_left() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    stopwatch.restart("start")
    for phase, spent_s in (("data", 3.0), ("forward", 1.0), ("backward", 2.0), ("step", 4.0), ("report", 5.0)):
        clock.now += spent_s
        stopwatch.mark(phase)
    clock.now += 6.0
    ledger = stopwatch.read()

    assert (ledger.start_s, ledger.data_s, ledger.compute_s, ledger.reporting_s) == (3.0, 1.0, 2.0 + 4.0 + 5.0, 6.0)


def test_the_parts_add_up_to_the_whole_also_with_phases_that_are_none_of_them() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    clock.now += 50.0
    stopwatch.restart("start")
    for number, phase in enumerate([*PARTS, "idle", "export", *PARTS]):
        clock.now += 0.1 * number
        stopwatch.mark(phase)
    ledger = stopwatch.read()

    assert math.isclose(ledger.wall_s, clock.now - 150.0)
    assert ledger.other_s > 0


def test_what_was_measured_is_of_one_command_alone() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    for _ in range(2):
        stopwatch.restart("start")
        clock.now += 2.0
        assert stopwatch.read().wall_s == 2.0


def test_reading_does_not_end_a_phase() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    stopwatch.restart("data")
    clock.now += 1.0
    stopwatch.read()
    clock.now += 1.0
    assert stopwatch.read().data_s == 2.0


def test_the_training_loop_leaves_no_time_unclaimed(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    hooks = TimedHooks()
    training = _begin(make_trial(epochs=2), blobs, hooks)
    hooks.stopwatch.restart("start")
    training.train_to(2)
    ledger = hooks.stopwatch.read()

    assert ledger.wall_s == len(hooks.phases)
    assert ledger.other_s == 0.0
    assert ledger.compute_s == 3.0 * training.progress.step
    assert ledger.evaluation_s == hooks.phases.count("validation")
    assert min(ledger.data_s, ledger.reporting_s, ledger.checkpoint_s) > 0


def test_a_loop_of_ones_own_is_computing_where_it_calls_nothing(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: Callable[[str], str]
) -> None:
    name = user_module(
        """
        def train(context):
            for epoch in context.remaining_epochs:
                for x, y in context.batches(epoch):
                    pass
                context.report({"val_f1": 0.5}, epoch=epoch, model=context.build_model())
                context.should_stop()
        """
    )
    hooks = TimedHooks()
    trial = make_trial(epochs=2, loop=f"{name}:train", metric="val_f1", metric_mode="max")
    training = make_training(trial, blobs, 3, ALONE, hooks)
    hooks.stopwatch.restart("start")
    training.train_to(2)
    ledger = hooks.stopwatch.read()

    assert not isinstance(training, TrialTraining)
    assert ledger.wall_s == len(hooks.phases)
    assert ledger.other_s == 0.0
    assert ledger.compute_s == hooks.phases.count("loop") > 2 * 5
    assert min(ledger.data_s, ledger.reporting_s) > 0


@pytest.mark.parametrize("phase", ["forward", "report"])
def test_the_loop_marks_what_it_does_in_every_step(make_trial: MakeTrial, blobs: TrainingArrays, phase: str) -> None:
    hooks = RecordingHooks()
    _begin(make_trial(epochs=1), blobs, hooks).train_to(1)
    assert hooks.phases.count(phase) >= 5
