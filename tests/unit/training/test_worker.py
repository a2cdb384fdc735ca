"""A worker's commands from the switchboard to storage, in one process: threads where Ray has actors."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from bigray.bundle import BundleManifest
from bigray.data.dataset import TrainingArrays
from bigray.errors import OutOfMemory, TrainingFailed
from bigray.journal import Journal
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.training import worker as module
from bigray.training.checkpoint import committed_steps, read_checkpoint, weights_sha256
from bigray.training.commands import Event, Lane, Probe, ProbeStack, TakeOver, TrainStack, TrainTo, TrialState, Wish
from bigray.training.isolation import CleanState
from bigray.training.lanes import read_trial
from bigray.training.loop import Worker
from bigray.training.membership import Member
from bigray.training.setup import GroupSetup
from bigray.training.stack import StackedTraining
from bigray.training.switchboard import Switchboard
from bigray.training.trial_hooks import StackHooks
from tests.stacks import save_stack
from tests.unit.training.test_loop import _train

MakeTrial = Callable[..., TrialSpec]


class Call:
    """`actor.method` of a switchboard on another thread's loop."""

    def __init__(self, method: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> None:
        self._method, self._loop = method, loop

    def remote(self, *arguments: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(self._method(*arguments), self._loop)


class Actor:
    """A real switchboard, called as an actor is."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.board = Switchboard(1, 1, "here")

    def __getattr__(self, name: str) -> Call:
        return Call(getattr(self.board, name), self._loop)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


class Group:
    """A group of one worker, which is a thread of this process."""

    def __init__(self, paths: RunPaths, data: TrainingArrays, folds: tuple[TrainingArrays, ...] = ()) -> None:
        self.paths, self.actor, self.journal = paths, Actor(), Journal.open(paths)
        attempt = self.journal.attempt
        self.setup = GroupSetup(0, self.actor, data, 3, paths, attempt, threads_per_worker=1, folds=folds)
        self.process = module._Process(self.setup, Member("here", "127.0.0.1", os.getpid(), 0, 1), torch.device("cpu"))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._keys = iter(range(10**6))
        self.events: list[Event] = []

    def _serve(self) -> None:
        torch.set_num_threads(1)
        with contextlib.suppress(SystemExit):  # a process that makes room for another
            while (seat := self.process.take_seat(0)) is not None:
                self.process.sit(*seat)

    def do(self, command: Any) -> Any:
        return self.begin(command).result(60)[2]

    def begin(self, command: Any) -> Future[Any]:
        return self.actor.work.remote(str(next(self._keys)), command)

    def of(self, kind: str, trial_id: str | None = None) -> list[Event]:
        self.events += self.actor.take_events.remote(0.0).result(10)
        return [event for event in self.events if event.kind == kind and trial_id in (None, event.trial_id)]

    def join(self) -> None:
        self._thread.join(30)

    def end(self) -> None:
        self.actor.stop_all.remote().result(10)
        self._thread.join(30)
        self.process.close()
        self.actor.end()


@pytest.fixture
def group(paths: RunPaths, blobs: TrainingArrays, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    def get(reference: Any) -> Any:
        return reference.result(60) if isinstance(reference, Future) else reference

    monkeypatch.setattr(ray, "get", get)
    group = Group(paths, blobs)
    yield group
    group.end()


def _named(trial: TrialSpec, name: str, **training: Any) -> TrialSpec:
    changed = trial.training.model_copy(update=training)
    return trial.model_copy(update={"trial_id": name, "training": changed})


def _lanes(trial: TrialSpec) -> tuple[TrialSpec, ...]:
    return tuple(_named(trial, f"{number:03d}-net", lr=lr) for number, lr in enumerate((0.05, 0.01, 0.002)))


def _losses(events: list[Event]) -> list[float]:
    return [value for event in events for value in (event.values["train_loss"], event.values["metrics"]["val_loss"])]


# one trial


def test_a_trial_is_trained_from_rung_to_rung_with_a_ledger_for_each(group: Group, make_trial: MakeTrial) -> None:
    trial = make_trial(epochs=4)
    for epoch in (2, 4):
        state = group.do(TrainTo(trial, epoch))
        ledger = state.ledger
        assert state.epoch == epoch
        assert state.num_parameters == 4 * 8 + 8 + 8 * 3 + 3
        assert min(ledger.start_s, ledger.data_s, ledger.compute_s, ledger.evaluation_s, ledger.checkpoint_s) > 0
        assert ledger.other_s < 0.02 * ledger.wall_s
        assert ledger.cpu_s > 0
        assert ledger.peak_rss_bytes > 50_000_000
        assert (ledger.gpu_s, ledger.peak_gpu_bytes) == (0.0, 0)
    assert [event.values["epoch"] for event in group.of("epoch")] == [1, 2, 3, 4]
    assert not group.of("resumed")


def test_a_command_that_rests_ends_with_its_epoch_and_so_does_what_was_waiting(
    group: Group, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch, user_module: Callable[[str], str]
) -> None:
    from bigray.training import heartbeat

    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.01)
    name = user_module(
        """
        import time
        from torch import nn
        class Slow(nn.Linear):
            def forward(self, x):
                time.sleep(0.01)
                return super().forward(x)
        def make(shape, outputs): return Slow(shape[0], outputs)
        """
    )
    group.process.clean = CleanState()  # in which the user's module can be found
    trial = make_trial(f"{name}:make", {}, epochs=400)
    working = group.begin(TrainTo(trial, 400))
    while not group.of("epoch") and not working.done():
        group.actor.check_storage.remote().result(10)
    assert not working.done(), working.exception()
    assert group.actor.rest_all.remote().result(10) == 1
    state = working.result(60)[2]

    assert 1 <= state.epoch < 400
    assert state.ended is None
    assert state.epoch < group.do(TrainTo(trial, 400)).epoch < 400


def test_no_memory_is_raised_with_its_rows_and_the_next_trial_is_as_ever(
    group: Group, make_trial: MakeTrial, blobs: TrainingArrays, user_module: Callable[[str], str]
) -> None:
    name = user_module(
        """
        import torch
        from torch import nn
        class Greedy(nn.Linear):
            def forward(self, x):
                torch.empty(2**60 if len(x) > 8 and self.training else 0, dtype=torch.uint8)
                return super().forward(x)
        def make(shape, outputs): return Greedy(shape[0], outputs)
        """
    )
    group.process.clean = CleanState()  # in which the user's module can be found
    greedy = make_trial(f"{name}:make", {})
    with pytest.raises(OutOfMemory) as caught:
        group.do(TrainTo(_named(greedy, "greedy"), 4))
    assert caught.value.rows == 16

    state = group.do(TrainTo(_named(greedy, "greedy", micro_batch_size=8), 4))
    assert (state.ended, state.micro_batch_size) == ("finished", None), "who splits a trial tells of it"
    trial = make_trial()
    state = group.do(TrainTo(trial, 4))
    assert state.metrics == _train(trial, blobs)[0].progress.metrics
    assert state.micro_batch_size is None


def test_a_trial_takes_over_another_and_has_its_weights(group: Group, make_trial: MakeTrial, paths: RunPaths) -> None:
    source, taker = _named(make_trial(epochs=6), "source"), _named(make_trial(epochs=6), "taker", lr=0.01)
    group.do(TrainTo(source, 2))
    command = TrainTo(taker, 4, TakeOver(source, 2))
    state = group.do(command)

    (event,) = group.of("exploited", "taker")
    file = read_checkpoint(paths, source, committed_steps(paths, "source")[0])
    assert event.values == {"source": "source", "epoch": 2, "sha256": weights_sha256(file.tensors("model") or {})}
    assert (state.epoch, next(number for number, _ in state.improvements)) == (4, 1)
    assert [event.values["epoch"] for event in group.of("epoch", "taker")] == [3, 4]

    group.do(TrainTo(source, 4))
    again = group.do(command)
    assert replace(again, ledger=state.ledger) == state, "it is where it was"
    assert len(group.of("exploited")) == 1


@pytest.mark.parametrize("keep_begin", [False, True])
def test_the_checkpoint_a_command_begins_from_stays_where_it_may_be_taken_over_only(
    group: Group, make_trial: MakeTrial, paths: RunPaths, keep_begin: bool
) -> None:
    """Else the newest stay: of two, one can be damaged."""
    trial = make_trial(epochs=6, checkpoint_every_s=1e-6)
    group.do(TrainTo(trial, 1))
    begin = committed_steps(paths, trial.trial_id)[0]
    group.do(TrainTo(trial, 6, keep_begin=keep_begin))

    told = sorted(event.values["step"] for event in group.of("checkpoint"))
    assert told[-2] > begin
    expected = [told[-1], begin if keep_begin else told[-2]]
    assert committed_steps(paths, trial.trial_id) == expected


def test_a_source_that_is_not_there_is_told(group: Group, make_trial: MakeTrial) -> None:
    source, taker = _named(make_trial(), "source"), _named(make_trial(), "taker")
    with pytest.raises(TrainingFailed, match="no checkpoint of the end of epoch 2 to take over"):
        group.do(TrainTo(taker, 4, TakeOver(source, 2)))
    assert group.do(TrainTo(source, 1)).epoch == 1


# stacks


def test_the_lanes_of_a_stack_are_what_the_trials_are_alone(group: Group, make_trial: MakeTrial) -> None:
    trials = _lanes(make_trial())
    states = group.do(TrainStack("leg-1", tuple(map(Lane, trials)), 4))
    stacked = [_losses(group.of("epoch", trial.trial_id)) for trial in trials]

    for trial, state, curve in zip(trials, states, stacked, strict=True):
        alone = _named(trial, f"{trial.trial_id}-alone")
        expected: TrialState = group.do(TrainTo(alone, 4))
        assert (state.epoch, state.step, state.ended) == (4, 20, "finished")
        assert state.num_parameters == expected.num_parameters
        assert curve == pytest.approx(_losses(group.of("epoch", alone.trial_id)), abs=1e-4)


def test_the_lanes_share_their_ranks_time(group: Group, make_trial: MakeTrial) -> None:
    states = group.do(TrainStack("leg-1", tuple(map(Lane, _lanes(make_trial()))), 2))

    assert len({state.ledger.wall_s for state in states}) == 1
    assert states[0].ledger.compute_s > 0
    assert states[0].ledger.other_s < 0.02 * states[0].ledger.wall_s


def test_a_stack_that_is_asked_for_again_is_not_trained_again(group: Group, make_trial: MakeTrial) -> None:
    command = TrainStack("leg-1", tuple(map(Lane, _lanes(make_trial()))), 2)
    first = group.do(command)
    num_epochs = len(group.of("epoch"))
    again = group.do(command)

    assert [replace(state, ledger=first[0].ledger) for state in again] == first
    assert len(group.of("epoch")) == num_epochs == 2 * 3


def _wish_once(monkeypatch: pytest.MonkeyPatch, step: int, wish: Callable[[], Wish]) -> None:
    """What stacks are asked to do after so many steps of all attempts together; nothing at any other."""
    steps = itertools.count(1)
    monkeypatch.setattr(StackHooks, "_own_wish", lambda hooks: wish() if next(steps) == step else Wish())


def _break() -> Wish:
    raise module.GenerationBroken


def _epochs(group: Group, trial: TrialSpec) -> list[int]:
    return [event.values["epoch"] for event in group.of("epoch", trial.trial_id)]


def test_a_stack_that_is_stopped_goes_on_from_the_end_of_its_epoch(
    group: Group, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = _lanes(make_trial(epochs=6))
    _wish_once(monkeypatch, 18, lambda: Wish(save=True, stop=True))
    states = group.do(TrainStack("leg-1", tuple(map(Lane, trials)), 6))

    assert [(state.epoch, state.ended) for state in states] == [(6, "finished")] * 3
    for trial in trials:
        assert _epochs(group, trial) == [1, 2, 3, 4, 5, 6]
        alone = _named(trial, f"{trial.trial_id}-alone")
        group.do(TrainTo(alone, 6))
        expected = _losses(group.of("epoch", alone.trial_id))
        assert _losses(group.of("epoch", trial.trial_id)) == pytest.approx(expected, abs=1e-4)


def test_a_stack_that_rests_is_gone_on_with_when_it_is_asked_for_again(
    group: Group, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = TrainStack("leg-1", tuple(map(Lane, _lanes(make_trial(epochs=6)))), 6)
    _wish_once(monkeypatch, 8, lambda: Wish(rest=True))
    rested = group.do(command)
    again = group.do(command)

    assert [state.epoch for state in rested] == [2, 2, 2]
    assert rested[0].num_parameters == again[0].num_parameters == 4 * 8 + 8 + 8 * 3 + 3
    assert [state.epoch for state in again] == [6, 6, 6]
    assert _epochs(group, command.lanes[1].trial) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("every_s", "epochs"), [(1e-6, [1, 2, 3, 4, 5]), (1e6, [1, 2, 3, 1, 2, 3, 4, 5])])
def test_a_stack_whose_group_is_lost_goes_on_from_what_was_due_to_be_saved(
    group: Group, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch, every_s: float, epochs: list[int]
) -> None:
    trials = _lanes(make_trial(epochs=5, checkpoint_every_s=every_s))
    _wish_once(monkeypatch, 18, _break)
    group.do(TrainStack("leg-1", tuple(map(Lane, trials)), 5))

    assert _epochs(group, trials[2]) == epochs


def test_lanes_that_stand_at_different_epochs_are_brought_to_one(group: Group, make_trial: MakeTrial) -> None:
    """One has a checkpoint of its own, two come out of a stack, and one begins."""
    trials = [_named(make_trial(epochs=6), f"{number:03d}-net", lr=0.01 * (number + 1)) for number in range(4)]
    group.do(TrainTo(trials[0], 3))
    group.do(TrainStack("leg-1", (Lane(trials[1]), Lane(trials[2])), 1))
    lanes = (Lane(trials[0]), Lane(trials[1], "leg-1"), Lane(trials[2], "leg-1"), Lane(trials[3]))
    command = TrainStack("leg-2", lanes, 5)
    states = group.do(command)

    assert [state.epoch for state in states] == [5] * 4
    for trial in trials:
        assert _epochs(group, trial) == [1, 2, 3, 4, 5]
        alone = _named(trial, f"{trial.trial_id}-alone")
        group.do(TrainTo(alone, 5))
        expected = _losses(group.of("epoch", alone.trial_id))
        assert _losses(group.of("epoch", trial.trial_id)) == pytest.approx(expected, abs=1e-4)
        assert read_trial(group.setup, "leg-2", trial).progress.epoch == 5
    assert [state.epoch for state in group.do(command)] == [5] * 4
    assert _epochs(group, trials[0]) == [1, 2, 3, 4, 5], "it was not trained again"


def test_a_stack_goes_on_from_what_a_group_of_two_had_committed(
    group: Group, make_trial: MakeTrial, paths: RunPaths, blobs: TrainingArrays
) -> None:
    trials = _lanes(make_trial(epochs=6))
    for rank, epochs in enumerate((2, 3)):
        worker = Worker(rank, 2, torch.device("cpu"))
        training = StackedTraining(trials[rank::2], blobs, 3, worker, _Silent())
        training.train_to(epochs)
        save_stack(paths, "leg-1", rank, 1, training)
    states = group.do(TrainStack("leg-1", tuple(map(Lane, trials)), 4))

    assert [state.epoch for state in states] == [4, 4, 4]
    assert [_epochs(group, trial) for trial in trials] == [[3, 4], [4], [3, 4]]


def test_a_stack_with_nothing_left_to_do_holds_its_lanes(group: Group, make_trial: MakeTrial) -> None:
    trials = _lanes(make_trial())
    group.do(TrainStack("leg-1", tuple(map(Lane, trials)), 4))
    states = group.do(TrainStack("leg-2", tuple(Lane(trial, "leg-1") for trial in trials), 4))

    assert [(state.epoch, state.ended) for state in states] == [(4, "finished")] * 3
    assert read_trial(group.setup, "leg-2", trials[1]).progress.epoch == 4


class _Silent:
    """Hooks of a stack in which nothing is wished and nobody listens."""

    def tick(self, phase: str) -> None: ...

    def exchange(self, step: int) -> Wish:
        return Wish()

    def on_epoch(self, lane: int, report: dict[str, Any]) -> None: ...


def test_lanes_go_on_in_another_stack_and_alone(group: Group, make_trial: MakeTrial, paths: RunPaths) -> None:
    first, second, third = _lanes(make_trial())
    group.do(TrainStack("leg-1", (Lane(first), Lane(second), Lane(third)), 1))
    group.do(TrainStack("leg-2", (Lane(third, "leg-1"), Lane(first, "leg-1")), 2))
    state = group.do(TrainTo(third, 4, stack="leg-2"))

    assert [event.values["epoch"] for event in group.of("epoch", third.trial_id)] == [1, 2, 3, 4]
    alone = _named(third, "alone")
    group.do(TrainTo(alone, 4))
    expected = _losses(group.of("epoch", "alone"))
    assert _losses(group.of("epoch", third.trial_id)) == pytest.approx(expected, abs=1e-4)
    assert (state.epoch, state.ended) == (4, "finished")
    assert committed_steps(paths, third.trial_id)[0] == 20
    assert group.do(TrainTo(third, 4, stack="leg-2")).epoch == 4, "its own checkpoint is further than the stack"


def test_a_probe_says_what_keeps_a_trial_from_being_stacked_or_how_long_steps_take(
    group: Group, make_trial: MakeTrial
) -> None:
    refused: Probe = group.do(ProbeStack(make_trial(exact=True), 4))
    large: Probe = group.do(ProbeStack(make_trial(), 10**12))
    timed: Probe = group.do(ProbeStack(make_trial(), 4))

    assert refused.why_not
    assert not refused.is_stacked
    assert (large.why_not or "").startswith("1000000000000 lanes would need about")
    assert timed.why_not is None
    assert timed.alone_step_s > 0
    assert timed.stacked_step_s is not None


def test_a_model_whose_steps_take_long_is_not_stacked(
    group: Group, make_trial: MakeTrial, user_module: Callable[[str], str]
) -> None:
    name = user_module(
        """
        import time
        from torch import nn
        class Slow(nn.Linear):
            def forward(self, x):
                time.sleep(0.25 if len(x) > 4 else 0)
                return super().forward(x)
        def make(shape, outputs): return Slow(shape[0], outputs)
        """
    )
    group.process.clean = CleanState()  # in which the user's module can be found
    probe: Probe = group.do(ProbeStack(make_trial(f"{name}:make", {}), 4))

    assert probe.alone_step_s > 0.25
    assert probe.stacked_step_s is None
    assert not probe.is_stacked
    assert (probe.why_not or "").startswith("a step alone takes 0.")


def test_a_process_that_cannot_be_cleaned_makes_room_for_a_fresh_one(
    group: Group, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    group.process.clean = CleanState()
    group.do(TrainTo(_named(make_trial(), "first"), 1))
    monkeypatch.chdir(tmp_path)
    folder.rmdir()
    monkeypatch.setattr(os, "_exit", sys.exit)  # of the thread that is the worker here
    waiting = group.begin(TrainTo(_named(make_trial(), "second"), 1))
    group.join()

    (event,) = group.of("recycled")
    assert "what cannot be put back: FileNotFoundError" in event.values["why"]
    assert not waiting.done()
    assert not group.of("epoch", "second")


def test_the_best_lane_of_a_stack_can_be_exported(
    group: Group, make_trial: MakeTrial, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigray.training.commands import ExportBundle

    seen: list[TrialSpec] = []
    monkeypatch.setattr(
        module, "export_bundle", lambda paths, trial, manifest, sample, **_: seen.append(trial) or _Exported()
    )
    trials = _lanes(make_trial())
    states = group.do(TrainStack("leg-1", tuple(map(Lane, trials)), 4))
    manifest: BundleManifest = None  # type: ignore[assignment]  # the export itself is tested elsewhere
    group.do(ExportBundle(trials[1], manifest, "leg-1"))

    assert seen == [trials[1]]
    (step,) = committed_steps(paths, trials[1].trial_id)
    own = read_checkpoint(paths, trials[1], step)
    assert own.progress.best_step == states[1].best_step
    assert weights_sha256(own.tensors("model") or {}) == weights_sha256(
        read_trial(group.setup, "leg-1", trials[1]).tensors("model") or {}
    )


class _Exported:
    why_no_onnx = None
