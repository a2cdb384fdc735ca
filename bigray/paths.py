"""The only owner of file names in a run folder.

<storage>/<run>/
  run.json                      what was asked for, seeds, versions, git revision, data fingerprint
  journal/<attempt>.jsonl       append-only events of each attempt
  trials/<trial>/ckpt-<step>/   committed checkpoints
  trials/<trial>/batch_size.json   what global_batch_size = "auto" came to
  stacks/<name>/<rank>-of-<ranks>/   trials that were trained together; gone when the run is complete
  bundle/                       the exported winner

<storage>/verify-<hash>-<number>/   one `bigray verify`
  verification.json             what came out
  reference/<run>/              the run without faults
  disturbed/<run>/              the runs with faults, one for each model

<storage>/.bigray/              what the runs share
  micro_batches/<key>.json      largest micro-batch of a model on a kind of device
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bigray.errors import StorageError
from bigray.storage import Storage

RUN_FILE = "run.json"
JOURNAL = "journal"
BUNDLE = "bundle"
STACKS = "stacks"
SHARED = ".bigray"
VERIFICATION = "verification.json"
REFERENCE = "reference"
DISTURBED = "disturbed"
_CHECKPOINT = re.compile(r"ckpt-(\d{10})")
_ATTEMPT = re.compile(r"(\d{4,})\.jsonl")


@dataclass(frozen=True)
class RunPaths:
    """One run's folder. Picklable: the driver hands it to workers."""

    storage: Storage
    """Rooted at the run folder itself."""
    run_id: str

    @property
    def bundle(self) -> Storage:
        return self.storage.child(BUNDLE)

    @property
    def shared(self) -> Storage:
        """Beside the runs: what they share. No run has this name, they all end in a hash."""
        return self.storage.parent.child(SHARED)

    @staticmethod
    def micro_batch_file(key: str) -> str:
        """In `shared`."""
        return f"micro_batches/{key}.json"

    @staticmethod
    def batch_size_file(trial_id: str) -> str:
        return f"{RunPaths.trial(trial_id)}/batch_size.json"

    @staticmethod
    def trial(trial_id: str) -> str:
        return f"trials/{trial_id}"

    @staticmethod
    def checkpoint(trial_id: str, step: int) -> str:
        return f"{RunPaths.trial(trial_id)}/ckpt-{step:010d}"

    @staticmethod
    def stack(name: str) -> str:
        return f"{STACKS}/{name}"

    @staticmethod
    def journal_file(attempt: int) -> str:
        return f"{JOURNAL}/{attempt:04d}.jsonl"

    def attempts(self) -> list[int]:
        """Attempts that have a journal file, oldest first. Numbers can be missing: files get lost or moved."""
        names = self.storage.list_names(JOURNAL)
        return sorted(int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name)))

    def fence(self, attempt: int) -> None:
        """Let only the newest attempt write: what an older one still has in hand is not committed any more.

        Raises:
            StorageError: an attempt with a higher number has started.
        """
        newest = max(self.attempts(), default=attempt)
        if newest > attempt:
            raise StorageError(
                f"{self.storage.uri}: attempt {newest} has taken over this run; this process is attempt {attempt}"
            )

    def checkpoint_steps(self, trial_id: str) -> list[int]:
        """Steps that have a checkpoint folder, committed or not, newest first."""
        names = self.storage.list_names(self.trial(trial_id))
        return sorted((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))), reverse=True)
