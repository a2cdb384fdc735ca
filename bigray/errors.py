"""Every error bigray raises on purpose.

BigrayError                     exit code
├── SpecError                   2   a file or option is wrong; lists every fault
│   ├── CapacityError           2   the cluster cannot hold what was asked for, ever or now
│   └── ImageTooLarge           2   a picture with more pixels or scans than one may have
├── TrainingFailed              3   a trial raised, diverged, or its workers died too often
│   ├── OutOfMemory             3   a worker had no memory for a forward or backward pass
│   └── GroupLost               3   no worker group is left to train on; the trial itself has not failed
├── StorageError                4   a path cannot be read or written
│   ├── CorruptFile             4   a file's bytes do not match its manifest
│   └── DiskFull                4   no space left, or a quota is used up
├── ClusterError                5   no cluster at the address, or it was lost
│   └── Preempted               5   a worker's node is about to go away
└── DeployError                 6   the endpoint did not come up, or refused the bundle

Each message is one line that names the place, the value and the way out. All of them survive pickling, since Ray
carries them between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "BigrayError",
    "CapacityError",
    "ClusterError",
    "CorruptFile",
    "DeployError",
    "DiskFull",
    "GroupLost",
    "ImageTooLarge",
    "OutOfMemory",
    "Preempted",
    "SpecError",
    "StorageError",
    "TrainingFailed",
    "did_you_mean",
    "last_line",
]


class BigrayError(Exception):
    """The root. `exit_code` is what the command line exits with."""

    exit_code = 1


class SpecError(BigrayError):
    """What the user asked for is wrong. `faults` holds one line for each fault, all of them found together."""

    exit_code = 2

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


class CapacityError(SpecError):
    """The cluster has not the CPUs, GPUs or nodes, or not free; the message holds the numbers and what would fit."""


class ImageTooLarge(SpecError):
    """More pixels or scans than a picture may have; found before it is decoded."""


class TrainingFailed(BigrayError):
    """A trial could not be trained; the message ends with the first line of the worker's own error."""

    exit_code = 3


class OutOfMemory(TrainingFailed):
    """No memory, on the device or off it; `rows` of the largest forward pass of a worker, which half would do with."""

    def __init__(self, message: str, rows: int) -> None:
        self.message, self.rows = message, rows
        super().__init__(message, rows)

    def __str__(self) -> str:
        return self.message


class GroupLost(TrainingFailed):
    """A worker group has ended, and there is no other: running the same command again goes on."""


class StorageError(BigrayError):
    """A storage path cannot be read or written."""

    exit_code = 4


class CorruptFile(StorageError):
    """A committed file does not match its manifest: by its hash, or by another property named in `what`."""

    def __init__(self, path: str, expected: str, actual: str, what: str = "sha256") -> None:
        self.path, self.expected, self.actual, self.what = path, expected, actual, what
        super().__init__(path, expected, actual, what)

    def __str__(self) -> str:
        return f"{self.path}: corrupt, expected {self.what} {self.expected}, found {self.actual}"


class DiskFull(StorageError):
    """No space left, or a quota is used up. What was committed before is untouched."""


class ClusterError(BigrayError):
    """There is no Ray cluster where one was expected, or it went away."""

    exit_code = 5


class Preempted(ClusterError):
    """A worker leaves its node before the node does; its group goes on elsewhere."""


class DeployError(BigrayError):
    """The endpoint did not become healthy, or the bundle may not be served."""

    exit_code = 6


def last_line(error: BaseException) -> str:
    """An exception in one line: the last of its text, since Ray puts the remote traceback before the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: `, did you mean 'x'?`, or the list of what is known where nothing is near."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(options)}"
