"""Where the lanes of a stack come from and what became of them, on storage (worker)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from bigray.errors import StorageError
from bigray.specs import TrialSpec
from bigray.training.checkpoint import Checkpoint, Progress, load_to_go_on
from bigray.training.commands import Lane, TrainStack, TrialState
from bigray.training.setup import GroupSetup
from bigray.training.stack_checkpoint import find_lanes, read_lane, read_lanes, save_lane


def read_trial(setup: GroupSetup, stack: str, trial: TrialSpec) -> Checkpoint:
    """A trial's state at the end of a command of that stack.

    Raises:
        StorageError: it is not there, or damaged.
    """
    return read_lane(setup.paths, stack, trial)


def beginnings_of(
    setup: GroupSetup, name: str, lanes: Sequence[Lane], warn: Callable[[TrialSpec, str], None]
) -> list[Checkpoint | None]:
    """What each lane of stack `name` goes on from: the furthest of what was committed of it on the way, of its own
    newest checkpoint, and of its state in the stack before.
    """
    on_the_way = _on_the_way(setup, name, lanes, warn)
    # what the stack before left is looked for only where nothing was committed since: it may be gone by then
    missing = [lane for lane, found in zip(lanes, on_the_way, strict=True) if found is None and lane.stack is not None]
    before = dict(
        zip(
            (lane.trial.trial_id for lane in missing),
            read_lanes(setup.paths, [(str(lane.stack), lane.trial) for lane in missing]),
            strict=True,
        )
    )
    beginnings: list[Checkpoint | None] = []
    for lane, found in zip(lanes, on_the_way, strict=True):
        own = load_to_go_on(setup.paths, lane.trial, partial(warn, lane.trial))
        beginnings.append(_furthest(found or before.get(lane.trial.trial_id), _at_epoch_end(own)))
    return beginnings


def _on_the_way(
    setup: GroupSetup, name: str, lanes: Sequence[Lane], warn: Callable[[TrialSpec, str], None]
) -> list[Checkpoint | None]:
    try:
        return find_lanes(setup.paths, [(name, lane.trial) for lane in lanes])
    except StorageError as error:  # the lanes can go on from where the command began
        warn(lanes[0].trial, f"a stack begins anew: {error}")
        return [None] * len(lanes)


def _furthest(one: Checkpoint | None, other: Checkpoint | None) -> Checkpoint | None:
    if one is None or other is None:
        return one or other
    return other if one.progress.step < other.progress.step else one


def _at_epoch_end(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """A stack cannot go on inside an epoch; a trial that has ended there does not go on."""
    if checkpoint is None or (checkpoint.progress.batch and checkpoint.progress.ended is None):
        return None
    return checkpoint


def next_to_train(beginnings: Sequence[Checkpoint | None], epoch: int) -> tuple[list[int], int]:
    """The lanes that are furthest behind, and the epoch that they can be trained to before others join them. Pure.

    All of them, to `epoch`, in a stack that is at one place; none where nothing is left to do.
    """
    at = {lane: 0 if each is None else each.progress.epoch for lane, each in enumerate(beginnings) if _goes_on(each)}
    at = {lane: place for lane, place in at.items() if place < epoch}
    if not at:
        return [], epoch
    first, *later = sorted(set(at.values()))
    return [lane for lane, place in at.items() if place == first], min([*later, epoch])


def _goes_on(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is None or checkpoint.progress.ended is None


def states_of(setup: GroupSetup, command: TrainStack) -> list[TrialState] | None:
    """Where the lanes stand, if all of this command is committed already; the driver was told, or died before."""
    try:
        found = read_lanes(setup.paths, [(command.name, lane.trial) for lane in command.lanes])
    except StorageError:  # not committed yet, or of another set of lanes
        return None
    if any(each.progress.ended is None and each.progress.epoch < command.epoch for each in found):
        return None
    return states_at(found)


def states_at(lanes: Sequence[Checkpoint | None], num_parameters: int = 0) -> list[TrialState]:
    """What is told of lanes of one model; one that has not begun is told of as well.

    `num_parameters`: of each, where it is known; else they are counted.
    """
    num_parameters = num_parameters or max(0 if lane is None else _num_parameters(lane) for lane in lanes)
    progresses = [Progress() if lane is None else lane.progress for lane in lanes]
    return [replace(progress.to_state(), num_parameters=num_parameters) for progress in progresses]


def _num_parameters(checkpoint: Checkpoint) -> int:
    """What can be stacked has no other tensors."""
    weights = {} if checkpoint.is_record else checkpoint.tensors("model") or {}
    return sum(tensor.numel() for tensor in weights.values())


def save_as_own(setup: GroupSetup, stack: str, trial: TrialSpec) -> None:
    """Make a trial's state in a stack its own checkpoint."""
    save_lane(setup.paths, trial, setup.attempt, read_trial(setup, stack, trial))
