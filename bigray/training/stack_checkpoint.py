"""A stack on storage, and any lane of it as an ordinary checkpoint (worker; reading also where a bundle is exported).

stacks/<name>/<rank>-of-<ranks>/
  lanes.safetensors   all tensors of the rank's lanes, each named `<lane>/<stem>/<name>`: model/..., optimizer/...
  lanes.json          their progress, in the same order

The manifest, written last, names the trials, so that a lane is found without reading the tensors. One file of tensors:
each file costs a wait for the disk, and a stack is saved after a second of training.

A stack may be committed several times on its way; a rank replaces what its own folder held. The folder's name tells the
number of ranks, too: with another number the lanes are dealt out anew, and no rank may replace what another one is to
go on from.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigray.errors import StorageError
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, Content, commit_folder, read_files, read_manifest, remove_leftovers
from bigray.training.checkpoint import Checkpoint, Progress, StateDict
from bigray.training.checkpoint_writer import save_checkpoint
from bigray.training.sharded import JoinedTensors
from bigray.training.tensor_files import check_tensor_file, pack_tensors, tensor_chunks

if TYPE_CHECKING:
    import torch

    from bigray.training.stack import StackedTraining

FORMAT = 1
"""Of the folder; in its manifest. A higher number is a newer bigray's."""
LANES, TENSORS = "lanes.json", "lanes.safetensors"


StackedLane = tuple[TrialSpec, Progress, "dict[str, StateDict] | None"]
"""A lane as it is saved: its tensors by stem, None where only its record is left."""


def save_lanes(
    paths: RunPaths, name: str, rank_of: tuple[int, int], attempt: int, lanes: Sequence[StackedLane]
) -> None:
    """Commit the lanes of a rank in place of what its folder held. The tensors are written as they lie in memory.

    `rank_of`: the rank, and how many there are.

    Raises:
        DiskFull: nothing of it is left on storage.
        StorageError: it cannot be written, or a newer attempt has taken over.
    """
    paths.fence(attempt)
    folder = f"{paths.stack(name)}/{rank_of[0]}-of-{rank_of[1]}"
    tensors = {
        f"{lane}/{stem}/{key}": tensor
        for lane, (_, _, state) in enumerate(lanes)
        for stem, named in (state or {}).items()
        for key, tensor in named.items()
    }
    files: dict[str, Content] = {
        LANES: json.dumps([vars(progress) for _, progress, _ in lanes]).encode(),
        TENSORS: tensor_chunks(tensors),
    }
    entries = [
        {"trial_id": trial.trial_id, "config_hash": trial.config_hash, "step": progress.step, "record": state is None}
        for trial, progress, state in lanes
    ]
    commit_folder(
        paths.storage,
        folder,
        files,
        {"format": FORMAT, "attempt": attempt, "lanes": entries},
        token=f"{attempt:04d}-{secrets.token_hex(4)}",
        before_commit=lambda: paths.fence(attempt),
    )
    remove_leftovers(paths.storage, folder, read_manifest(paths.storage, folder))


def state_of(checkpoint: Checkpoint) -> dict[str, StateDict] | None:
    """The tensors of a lane, by stem; None where only its record is left."""
    if checkpoint.is_record:
        return None
    found = {stem: checkpoint.tensors(stem) for stem in ("model", "optimizer", "best")}
    return {stem: tensors for stem, tensors in found.items() if tensors is not None}


def lanes_of(training: StackedTraining) -> list[StackedLane]:
    """The lanes of a training as they stand."""
    states = (training.lane_state(lane) for lane in range(len(training.lanes)))
    return list(zip(training.lanes, training.progresses(), states, strict=True))


def as_checkpoint(lane: StackedLane) -> Checkpoint:
    """A lane as it would be read back."""
    _, progress, state = lane
    files = {f"{stem}.safetensors": pack_tensors(tensors) for stem, tensors in (state or {}).items()}
    return Checkpoint(progress, files, state is None)


def read_lane(paths: RunPaths, name: str, trial: TrialSpec) -> Checkpoint:
    """One lane of a stack as the trial's own checkpoint, verified; whichever rank had it.

    Raises:
        StorageError: the stack has no such lane, or it is damaged, of other settings, or of a newer bigray.
    """
    return read_lanes(paths, [(name, trial)])[0]


def read_lanes(paths: RunPaths, wanted: Sequence[tuple[str, TrialSpec]]) -> list[Checkpoint]:
    """As `read_lane` for several, (stack, trial) each: a rank's folder that holds many of them is read once.

    Raises:
        StorageError: as `read_lane`.
    """
    found: list[Checkpoint] = []
    for (name, trial), checkpoint in zip(wanted, find_lanes(paths, wanted), strict=True):
        if checkpoint is None:
            place = f"{paths.storage.uri}/{paths.stack(name)}"
            raise StorageError(f"{place}: no committed lane of trial '{trial.trial_id}'")
        found.append(checkpoint)
    return found


def find_lanes(paths: RunPaths, wanted: Sequence[tuple[str, TrialSpec]]) -> list[Checkpoint | None]:
    """As `read_lanes`, with None for what no rank of its stack has committed.

    A commit that replaces a folder while it is read is read instead.

    Raises:
        StorageError: a lane is damaged, of other settings, or of a newer bigray.
    """
    while True:
        stacks = {name: _ranks(paths, name) for name in {name for name, _ in wanted}}
        try:
            return _find_in(paths, stacks, wanted)
        except StorageError:
            if all(_ranks(paths, name) == ranks for name, ranks in stacks.items()):
                raise


def _find_in(
    paths: RunPaths, stacks: Mapping[str, Sequence[_Rank]], wanted: Sequence[tuple[str, TrialSpec]]
) -> list[Checkpoint | None]:
    found: dict[int, Checkpoint] = {}
    by_folder: dict[str, list[int]] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for number, (name, trial) in enumerate(wanted):
        if (rank := _rank_of(stacks[name], trial)) is None:
            continue
        by_folder.setdefault(rank.folder, []).append(number)
        manifests[rank.folder] = rank.manifest
    for folder, numbers in by_folder.items():
        held = _read_folder(paths, folder, manifests[folder])
        for number in numbers:
            found[number] = held.checkpoint(wanted[number][1])
    return [found.get(number) for number in range(len(wanted))]


def save_lane(paths: RunPaths, trial: TrialSpec, attempt: int, checkpoint: Checkpoint) -> None:
    """Commit a lane's state as the trial's own checkpoint: what stays when the stack is gone.

    Raises:
        StorageError: only the record of the lane is left, it cannot be written, or a newer attempt has taken over.
    """
    checkpoint.best_file()  # refuses where there are no weights
    save_checkpoint(paths, trial, attempt, checkpoint.progress, checkpoint.files)


@dataclass(frozen=True)
class _Rank:
    """One rank's committed folder."""

    folder: str
    manifest: dict[str, Any]

    def lane_of(self, trial_id: str) -> int | None:
        ids = [entry["trial_id"] for entry in self.manifest["lanes"]]
        return ids.index(trial_id) if trial_id in ids else None


@dataclass(frozen=True)
class _Held:
    """A rank's folder, read and verified."""

    rank: _Rank
    place: str
    progresses: list[Progress]
    tensors: Mapping[str, torch.Tensor]
    names: dict[int, dict[str, list[str]]]
    """Lane -> stem -> the names of its tensors."""

    def checkpoint(self, trial: TrialSpec) -> Checkpoint:
        lane = self.rank.lane_of(trial.trial_id)
        assert lane is not None, "found by its trial"
        entry = self.rank.manifest["lanes"][lane]
        if entry["config_hash"] != trial.config_hash:
            raise StorageError(
                f"{self.place}/{MANIFEST}: lane '{trial.trial_id}' is of another model or settings, "
                f"expected {trial.config_hash}, found {entry['config_hash']}"
            )
        files = {
            f"{stem}.safetensors": pack_tensors({name.split("/", 2)[2]: self.tensors[name] for name in names})
            for stem, names in self.names.get(lane, {}).items()
        }
        return Checkpoint(self.progresses[lane], files, bool(entry["record"]), self.place)


def _ranks(paths: RunPaths, name: str) -> list[_Rank]:
    """Committed folders of a stack; what has no manifest was never finished."""
    folders = [f"{paths.stack(name)}/{rank}" for rank in paths.storage.list_names(paths.stack(name))]
    committed = [folder for folder in folders if paths.storage.exists(f"{folder}/{MANIFEST}")]
    return [_Rank(folder, _checked_manifest(paths, folder)) for folder in committed]


def _checked_manifest(paths: RunPaths, folder: str) -> dict[str, Any]:
    manifest = read_manifest(paths.storage, folder)
    place = f"{paths.storage.uri}/{folder}/{MANIFEST}"
    written = manifest.get("format")
    if not isinstance(written, int) or not 1 <= written <= FORMAT:
        raise StorageError(f"{place}: expected format {FORMAT} or lower, found {written}")
    try:
        for entry in manifest["lanes"]:
            str(entry["trial_id"]), str(entry["config_hash"]), int(entry["step"]), bool(entry["record"])
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{place}: not a stack's manifest: {error}") from error
    if missing := [name for name in (LANES, TENSORS) if name not in manifest["files"]]:
        raise StorageError(f"{place}: expected {missing[0]} among its files, found none")
    return manifest


def _rank_of(ranks: Sequence[_Rank], trial: TrialSpec) -> _Rank | None:
    """The rank that took a trial furthest: with another number of ranks an older save may lie beside the newest."""
    having = [(rank, lane) for rank in ranks if (lane := rank.lane_of(trial.trial_id)) is not None]
    if not having:
        return None
    return max(having, key=lambda pair: (pair[0].manifest["lanes"][pair[1]]["step"], pair[0].manifest["attempt"]))[0]


def _read_folder(paths: RunPaths, folder: str, manifest: dict[str, Any]) -> _Held:
    place = f"{paths.storage.uri}/{folder}"
    files = read_files(paths.storage, folder, manifest)
    progresses = _progresses(files.pop(LANES), len(manifest["lanes"]), f"{place}/{LANES}")
    check_tensor_file(files[TENSORS], f"{place}/{TENSORS}")
    tensors = JoinedTensors(files, TENSORS.partition(".")[0], place)
    names: dict[int, dict[str, list[str]]] = {}
    for name in tensors:
        lane, stem, _ = name.split("/", 2)
        names.setdefault(int(lane), {}).setdefault(stem, []).append(name)
    return _Held(_Rank(folder, manifest), place, progresses, tensors, names)


def _progresses(data: bytes, num_lanes: int, place: str) -> list[Progress]:
    try:
        documents = json.loads(data)
        for document in documents:
            document["improvements"] = tuple((epoch, value) for epoch, value in document["improvements"])
        progresses = [Progress(**document) for document in documents]
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{place}: not the progress of lanes: {error}") from error
    if len(progresses) != num_lanes:
        raise StorageError(f"{place}: expected {num_lanes} lanes, found {len(progresses)}")
    return progresses
