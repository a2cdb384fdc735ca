"""Where the lanes of a stack come from and what became of them, on storage (worker)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from bigray.errors import StorageError
from bigray.specs import TrialSpec
from bigray.training.checkpoint import Checkpoint, load_to_go_on
from bigray.training.commands import Lane, TrainStack, TrialState
from bigray.training.setup import GroupSetup
from bigray.training.stack_checkpoint import read_lane, read_lanes, save_lane


def read_trial(setup: GroupSetup, stack: str, trial: TrialSpec) -> Checkpoint:
    """A trial's state at the end of a command of that stack.

    Raises:
        StorageError: it is not there, or damaged.
    """
    return read_lane(setup.paths, stack, trial)


def beginnings_of(
    setup: GroupSetup, lanes: Sequence[Lane], warn: Callable[[TrialSpec, str], None]
) -> list[Checkpoint | None]:
    """What each lane goes on from: the further of its own newest checkpoint and of its state in another stack."""
    stacked = [(lane.stack, lane.trial) for lane in lanes if lane.stack is not None]
    of_stacks = iter(read_lanes(setup.paths, stacked))
    found: list[Checkpoint | None] = []
    for lane in lanes:
        own = load_to_go_on(setup.paths, lane.trial, partial(warn, lane.trial))
        other = None if lane.stack is None else next(of_stacks)
        is_further = other is not None and (own is None or own.progress.step < other.progress.step)
        found.append(other if is_further else own)
    return found


def states_of(setup: GroupSetup, command: TrainStack) -> list[TrialState] | None:
    """Where the lanes stand, if all of this command is committed already; the driver was told, or died before."""
    try:
        found = read_lanes(setup.paths, [(command.name, lane.trial) for lane in command.lanes])
    except StorageError:  # not committed yet, or of another set of lanes
        return None
    if any(each.progress.ended is None and each.progress.epoch < command.epoch for each in found):
        return None
    return [replace(each.progress.to_state(), num_parameters=_num_parameters(each)) for each in found]


def _num_parameters(checkpoint: Checkpoint) -> int:
    """What can be stacked has no other tensors."""
    weights = {} if checkpoint.is_record else checkpoint.tensors("model") or {}
    return sum(tensor.numel() for tensor in weights.values())


def save_as_own(setup: GroupSetup, stack: str, trial: TrialSpec) -> None:
    """Make a trial's state in a stack its own checkpoint."""
    save_lane(setup.paths, trial, setup.attempt, read_trial(setup, stack, trial))
