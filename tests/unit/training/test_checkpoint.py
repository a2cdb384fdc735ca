from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigray.errors import CorruptFile, StorageError
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, sha256
from bigray.training.checkpoint import (
    FORMAT,
    PROGRESS,
    Checkpoint,
    Progress,
    SnapshotBuffers,
    StateDict,
    load_checkpoint,
    pack_optimizer,
    read_checkpoint,
    unpack_optimizer,
)
from bigray.training.checkpoint_writer import save_checkpoint
from bigray.training.tensor_files import pack_tensors, unpack_tensors

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture
def trial(make_trial: MakeTrial) -> TrialSpec:
    return make_trial()


def _progress(step: int) -> Progress:
    return Progress(epoch=step // 5, batch=step % 5, step=step, best_epoch=1, best_metrics={"val_loss": 0.1 + step})


def _files(step: int) -> dict[str, bytes]:
    return {
        "model.safetensors": pack_tensors({"w": torch.full((2, 2), float(step))}),
        "optimizer.safetensors": pack_tensors({"0.step": torch.tensor(float(step))}),
    }


def _save(paths: RunPaths, trial: TrialSpec, *steps: int) -> None:
    for step in steps:
        save_checkpoint(paths, trial, 1, _progress(step), _files(step))


def _folder(paths: RunPaths, trial: TrialSpec, step: int) -> Path:
    return Path(paths.storage.root) / paths.checkpoint(trial.trial_id, step)


def _load(paths: RunPaths, trial: TrialSpec) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return load_checkpoint(paths, trial, warnings.append), warnings


def test_a_checkpoint_is_read_back_as_it_was(paths: RunPaths, trial: TrialSpec) -> None:
    progress = replace(_progress(12), samples_repeated=3, lr_scale=0.5, improvements=((1, 0.25), (2, 0.5)))
    save_checkpoint(paths, trial, 1, progress, _files(12))

    assert _load(paths, trial) == (Checkpoint(progress, _files(12)), [])


def test_the_tensors_of_a_checkpoint_are_found_by_their_stem(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 12)
    checkpoint = read_checkpoint(paths, trial, 12)
    model = checkpoint.tensors("model")

    assert model is not None
    assert model["w"].equal(torch.full((2, 2), 12.0))
    assert checkpoint.tensors("ema") is None


@pytest.mark.parametrize(
    ("stems", "best"), [(("model",), "model"), (("model", "ema"), "ema"), (("model", "ema", "best"), "best")]
)
def test_the_best_weights_are_the_current_ones_unless_there_are_older_ones(stems: tuple[str, ...], best: str) -> None:
    assert Checkpoint(Progress(), {f"{stem}.safetensors": b"" for stem in stems}).best_file() == best


def test_the_best_weights_of_a_sharded_checkpoint_are_found_too() -> None:
    files = {f"{stem}-00001-of-00001.safetensors": b"" for stem in ("model", "ema")}

    assert Checkpoint(Progress(), files).best_file() == "ema"


def test_a_trial_without_checkpoints_starts_afresh(paths: RunPaths, trial: TrialSpec) -> None:
    assert _load(paths, trial) == (None, [])


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 9, 100)

    assert _load(paths, trial) == (Checkpoint(_progress(100), _files(100)), [])


def test_an_unfinished_checkpoint_is_passed_over_in_silence(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1, 2)
    (_folder(paths, trial, 2) / MANIFEST).unlink()

    assert _load(paths, trial) == (Checkpoint(_progress(1), _files(1)), [])


def test_a_trial_of_which_none_was_ever_finished_starts_afresh(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1)
    (_folder(paths, trial, 1) / MANIFEST).unlink()

    assert _load(paths, trial) == (None, [])


class Damage:
    """What can happen to a finished checkpoint: each is done to that of step 2, beside a good one of step 1."""

    def __init__(self, folder: Path, good: Path) -> None:
        self.folder, self.good = folder, good

    def _file(self, stem: str, folder: Path | None = None) -> Path:
        (path,) = (folder or self.folder).glob(f"{stem}-*")
        return path

    def _edit_manifest(self, **values: Any) -> None:
        manifest = json.loads((self.folder / MANIFEST).read_text())
        (self.folder / MANIFEST).write_text(json.dumps({**manifest, **values}))

    def _write_with_its_hash(self, stem: str, data: bytes) -> None:
        path = self._file(stem)
        path.write_bytes(data)
        files = json.loads((self.folder / MANIFEST).read_text())["files"]
        entry = next(entry for entry in files.values() if entry["stored"] == path.name)
        entry.update(size=len(data), sha256=sha256(data))
        self._edit_manifest(files=files)

    def bit_flipped(self) -> None:
        data = bytearray(self._file("model").read_bytes())
        data[-1] ^= 1
        self._file("model").write_bytes(data)

    def cut_short(self) -> None:
        self._file("model").write_bytes(self._file("model").read_bytes()[:-4])

    def empty_file(self) -> None:
        self._file("optimizer").write_bytes(b"")

    def zero_page(self) -> None:
        self._file("model").write_bytes(bytes(self._file("model").stat().st_size))

    def missing_file(self) -> None:
        self._file("optimizer").unlink()

    def files_swapped(self) -> None:
        first, second = self._file("model"), self._file("optimizer")
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)

    def files_of_two_steps(self) -> None:
        self._file("model").write_bytes(self._file("model", self.good).read_bytes())

    def stale_manifest(self) -> None:
        shutil.copy(self.good / MANIFEST, self.folder / MANIFEST)

    def manifest_cut_short(self) -> None:
        data = (self.folder / MANIFEST).read_bytes()
        (self.folder / MANIFEST).write_bytes(data[: len(data) // 2])

    def manifest_of_zeros(self) -> None:
        (self.folder / MANIFEST).write_bytes(bytes(512))

    def other_model(self) -> None:
        self._edit_manifest(config_hash="0123456789ab")

    def newer_format(self) -> None:
        self._edit_manifest(format=FORMAT + 1)

    def no_format(self) -> None:
        self._edit_manifest(format="2")

    def header_length(self) -> None:
        data = self._file("model").read_bytes()
        self._file("model").write_bytes((2**63).to_bytes(8, "little") + data[8:])

    def header_length_with_its_hash(self) -> None:
        data = self._file("model").read_bytes()
        self._write_with_its_hash("model", (2**63).to_bytes(8, "little") + data[8:])

    def progress_of_another_step(self) -> None:
        self._write_with_its_hash("progress", json.dumps(asdict(_progress(7))).encode())

    def progress_of_a_newer_bigray(self) -> None:
        self._write_with_its_hash("progress", json.dumps({"step": 2, "phase_of_moon": 1}).encode())

    def progress_not_json(self) -> None:
        self._write_with_its_hash("progress", b"step 2")

    def no_progress(self) -> None:
        files = json.loads((self.folder / MANIFEST).read_text())["files"]
        del files[PROGRESS]
        self._edit_manifest(files=files)

    def no_weights(self) -> None:
        files = json.loads((self.folder / MANIFEST).read_text())["files"]
        self._edit_manifest(files={PROGRESS: files[PROGRESS]})

    def folder_renamed(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.good, self.folder)


KINDS_OF_DAMAGE = {
    "bit_flipped": r"model-\S+: corrupt, expected sha256 \w{64}, found \w{64}",
    "cut_short": r"model-\S+: corrupt, expected size \d+, found \d+",
    "empty_file": r"optimizer-\S+: corrupt, expected size \d+, found 0",
    "zero_page": r"model-\S+: corrupt, expected sha256 \w{64}, found \w{64}",
    "missing_file": r"optimizer-\S+: corrupt, expected size \d+, found no file",
    "files_swapped": r"model-\S+: corrupt, expected size \d+, found \d+",
    "files_of_two_steps": r"model-\S+: corrupt, expected sha256 \w{64}, found \w{64}",
    "stale_manifest": r"manifest\.json: expected step 2, found 1",
    "manifest_cut_short": r"manifest\.json: not a manifest: .+",
    "manifest_of_zeros": r"manifest\.json: not a manifest: .+",
    "other_model": r"manifest\.json: of another model or settings, expected \w{12}, found 0123456789ab",
    "newer_format": r"manifest\.json: expected format 2 or lower, found 3; a newer bigray wrote it",
    "no_format": r"manifest\.json: expected format 2 or lower, found 2",
    "header_length": r"model-\S+: corrupt, expected sha256 \w{64}, found \w{64}",
    "header_length_with_its_hash": r"model\.safetensors: not a safetensors file: expected a header of .*, found \d+",
    "progress_of_another_step": r"progress\.json: expected step 2, found 7",
    "progress_of_a_newer_bigray": r"progress\.json: not a trial's progress: unknown 'phase_of_moon'",
    "progress_not_json": r"progress\.json: not a trial's progress: .+",
    "no_progress": r"manifest\.json: expected progress\.json among its files, found none",
    "no_weights": r"manifest\.json: expected files of weights, found none",
    "folder_renamed": r"manifest\.json: expected step 2, found 1",
}


@pytest.mark.parametrize("kind", KINDS_OF_DAMAGE)
def test_a_damaged_checkpoint_is_named_in_one_line_and_the_good_one_before_it_is_used(
    paths: RunPaths, trial: TrialSpec, kind: str
) -> None:
    _save(paths, trial, 1, 2)
    getattr(Damage(_folder(paths, trial, 2), _folder(paths, trial, 1)), kind)()

    checkpoint, warnings = _load(paths, trial)

    assert checkpoint == Checkpoint(_progress(1), _files(1))
    (warning,) = warnings
    place = r"\S+/trials/0-net/ckpt-0000000002/"
    assert _matches(f"{place}{KINDS_OF_DAMAGE[kind]}; going back to the checkpoint of step 1", warning)


@pytest.mark.parametrize("kind", KINDS_OF_DAMAGE)
def test_where_no_checkpoint_is_usable_the_trial_does_not_start_afresh_in_silence(
    paths: RunPaths, trial: TrialSpec, kind: str
) -> None:
    _save(paths, trial, 1, 2)
    getattr(Damage(_folder(paths, trial, 2), _folder(paths, trial, 1)), kind)()
    next(_folder(paths, trial, 1).glob("optimizer-*")).unlink()

    with pytest.raises(StorageError) as caught:
        load_checkpoint(paths, trial, pytest.fail)

    assert caught.value.exit_code == 4
    way_out = r"; no checkpoint of this trial can be used \(2 there\): bring the files back, or remove \S+0-net to .+"
    assert _matches(rf"\S+/ckpt-0000000002/{KINDS_OF_DAMAGE[kind]}{way_out}", str(caught.value))


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None  # without DOTALL: a second line does not match


def test_several_damaged_checkpoints_give_one_warning_about_the_newest(paths: RunPaths, make_trial: MakeTrial) -> None:
    trial = make_trial(keep={"last": 3})
    _save(paths, trial, 1, 2, 3)
    for step in (2, 3):
        next(_folder(paths, trial, step).glob("model-*")).write_bytes(b"")

    _, warnings = _load(paths, trial)

    (warning,) = warnings
    assert "ckpt-0000000003/model-" in warning
    assert warning.endswith("found 0 (and 1 more); going back to the checkpoint of step 1")


def test_damage_is_told_apart_from_a_file_that_was_never_right(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1)
    next(_folder(paths, trial, 1).glob("model-*")).write_bytes(b"")

    with pytest.raises(CorruptFile):
        read_checkpoint(paths, trial, 1)


def test_a_checkpoint_that_other_settings_made_is_not_gone_on_with(paths: RunPaths, make_trial: MakeTrial) -> None:
    _save(paths, make_trial(lr=0.1), 1)

    with pytest.raises(StorageError, match=r"ckpt-0000000001/manifest\.json: of another model or settings, expected"):
        _load(paths, make_trial(lr=0.3))


def test_a_file_of_pickle_is_never_run(paths: RunPaths, trial: TrialSpec, tmp_path: Path) -> None:
    """Bytes with the right hash in the manifest, as whoever may write to storage can put there."""
    _save(paths, trial, 1, 2)
    canary = tmp_path / "canary"
    hostile = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    Damage(_folder(paths, trial, 2), _folder(paths, trial, 1))._write_with_its_hash("model", hostile)

    checkpoint, _ = _load(paths, trial)

    assert checkpoint is not None
    assert checkpoint.progress.step == 1
    assert not canary.exists()


def test_the_state_of_a_trial_is_its_progress() -> None:
    progress = replace(_progress(7), ended="finished")
    state = progress.to_state()

    assert (state.epoch, state.step, state.ended, state.best_metrics) == (1, 7, "finished", {"val_loss": 7.1})


def test_a_snapshot_does_not_change_when_training_goes_on() -> None:
    weights = {"w": torch.ones(3), "steps": torch.tensor(4)}
    copies = SnapshotBuffers().copy("model", weights)
    for tensor in weights.values():
        tensor.add_(1)

    assert copies["w"].equal(torch.ones(3))
    assert copies["steps"].item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_values_of_every_type_are_copied(dtype: torch.dtype) -> None:
    tensors = {"flat": torch.tensor([0.0, 1.0, 2.0]).to(dtype), "empty": torch.empty(0, 2, dtype=dtype)}
    copies = SnapshotBuffers().copy("model", tensors)

    for name, tensor in tensors.items():
        assert copies[name].equal(tensor)
        assert copies[name].dtype == dtype


def test_the_memory_of_a_snapshot_is_used_again_by_the_next(paths: RunPaths) -> None:
    buffers = SnapshotBuffers()
    first = buffers.copy("model", {"w": torch.ones(3)})["w"].data_ptr()
    second = buffers.copy("model", {"w": torch.zeros(3)})["w"]

    assert second.data_ptr() == first
    assert second.equal(torch.zeros(3))


def test_a_tensor_of_another_shape_or_type_gets_other_memory() -> None:
    buffers = SnapshotBuffers()
    for tensor in (torch.ones(3), torch.ones(4), torch.ones(4, dtype=torch.float64)):
        copy = buffers.copy("model", {"w": tensor})["w"]
        assert copy.equal(tensor)
        assert copy.dtype == tensor.dtype


def test_each_file_of_a_snapshot_has_its_own_memory() -> None:
    buffers = SnapshotBuffers()
    model, best = buffers.copy("model", {"w": torch.ones(3)}), buffers.copy("best", {"w": torch.zeros(3)})

    assert model["w"].equal(torch.ones(3))
    assert best["w"].equal(torch.zeros(3))
    assert buffers.copy("optimizer", {}) == {}


def test_parameters_and_views_are_copied_as_plain_contiguous_tensors() -> None:
    tensors: StateDict = {"p": torch.nn.Parameter(torch.ones(2)), "t": torch.arange(6.0).reshape(2, 3).T}
    copies = SnapshotBuffers().copy("model", tensors)

    assert not copies["p"].requires_grad
    assert copies["t"].is_contiguous()
    assert copies["t"].equal(tensors["t"])


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
    ],
    ids=["momentum", "stateless", "adamw", "asgd"],
)
def test_optimizer_state_survives(make: Callable[..., torch.optim.Optimizer]) -> None:
    def stepped() -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
        optimizer = make(parameters)
        sum((p**2).sum() for p in parameters).backward()
        return optimizer

    source, copy = stepped(), stepped()
    source.step()
    unpack_optimizer(copy, unpack_tensors(pack_tensors(pack_optimizer(source))))
    before, after = source.state_dict()["state"], copy.state_dict()["state"]

    for number, state in after.items():
        assert set(state) == {slot for slot, value in before[number].items() if value is not None}
        for slot, value in state.items():
            assert torch.equal(value, before[number][slot])
    assert copy.state_dict()["param_groups"] == source.state_dict()["param_groups"]


def test_optimizer_state_that_is_no_tensor_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["history"] = ["a"]

    with pytest.raises(StorageError, match="optimizer state 'history': expected a tensor, found a list"):
        pack_optimizer(optimizer)
