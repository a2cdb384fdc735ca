from __future__ import annotations

import inspect
import pickle

import pytest

from bigray import errors
from bigray.errors import (
    BigrayError,
    CapacityError,
    ClusterError,
    CorruptFile,
    DeployError,
    DiskFull,
    GroupLost,
    ImageTooLarge,
    OutOfMemory,
    Preempted,
    SpecError,
    StorageError,
    TrainingFailed,
    did_you_mean,
)

EXAMPLES = [
    BigrayError("something else"),
    SpecError(["job.toml: lr: wrong", "job.toml: epochs: wrong"]),
    SpecError("one fault"),
    CapacityError(["2 workers need 8 CPUs"]),
    ImageTooLarge("more than 50 million pixels; send a smaller one"),
    TrainingFailed("trial 3: ValueError: boom"),
    GroupLost("no worker group is left: worker group 0 ended"),
    OutOfMemory("out of memory in a forward pass of 64 rows", 64),
    StorageError("runs: cannot write"),
    CorruptFile("runs/a.safetensors", "aa", "bb"),
    CorruptFile("runs/a.safetensors", "12", "no file", what="size"),
    DiskFull("runs: cannot write: No space left on device; free some, then run the same command again"),
    ClusterError("10.0.0.1:6379: nobody answers"),
    Preempted("worker 1: its node is going away"),
    DeployError("not healthy"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_trip_between_processes(error: BigrayError) -> None:
    rebuilt = pickle.loads(pickle.dumps(error))

    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert rebuilt.exit_code == error.exit_code
    assert vars(rebuilt) == vars(error)


def test_every_error_of_the_tree_is_among_the_examples() -> None:
    tree = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BigrayError)}

    assert tree == {type(error) for error in EXAMPLES}


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (BigrayError, 1),
        (SpecError, 2),
        (CapacityError, 2),
        (ImageTooLarge, 2),
        (TrainingFailed, 3),
        (StorageError, 4),
        (CorruptFile, 4),
        (DiskFull, 4),
        (ClusterError, 5),
        (Preempted, 5),
        (DeployError, 6),
    ],
)
def test_the_exit_code_tells_the_kind_of_error(kind: type[BigrayError], code: int) -> None:
    assert kind.exit_code == code


def test_every_fault_of_a_spec_gets_its_own_line() -> None:
    error = SpecError(["first", "second"])

    assert error.faults == ("first", "second")
    assert str(error) == "first\nsecond"


def test_a_corrupt_file_is_named_with_both_hashes() -> None:
    assert str(CorruptFile("a.bin", "11", "22")) == "a.bin: corrupt, expected sha256 11, found 22"


def test_a_file_of_another_size_is_named_with_both_sizes() -> None:
    assert str(CorruptFile("a.bin", "11", "9", what="size")) == "a.bin: corrupt, expected size 11, found 9"


def test_a_near_miss_is_suggested() -> None:
    assert did_you_mean("num_worker", ["num_workers", "seed"]) == ", did you mean 'num_workers'?"


def test_a_word_near_nothing_gets_the_list_of_what_is_known() -> None:
    assert did_you_mean("zzz", ["seed", "name"]) == "; known: name, seed"
