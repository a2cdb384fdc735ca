"""`weights` and `freeze` of a model: what training starts from, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bigray.data.dataset import TrainingArrays
from bigray.errors import SpecError
from bigray.models import build_model
from bigray.models.transfer import start_from, weights_sha256
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.training.checkpoint import SnapshotBuffers
from bigray.training.loop import TrialTraining, Worker
from bigray.training.request import make_request
from bigray.training.runner import training_trials
from tests.integration.jobs import make_job
from tests.loop_hooks import RecordingHooks, to_checkpoint

MLP = "bigray.models:mlp"


def _module(num_outputs: int = 3) -> torch.nn.Module:
    return build_model(MLP, {"hidden": [8]}, (4,), num_outputs)


def _model(file: Path | None, **fields: Any) -> ModelSpec:
    return ModelSpec(factory=MLP, params={"hidden": [8]}, weights=None if file is None else str(file), **fields)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of an mlp of 4 inputs, 8 hidden units and 5 outputs."""
    torch.manual_seed(7)
    save_file(_module(5).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_are_taken_by_name_and_a_new_head_stays_as_it_was(file: Path) -> None:
    before, module = _module(5), _module(3)
    assert start_from(before, _model(file)) is None
    head = module.get_parameter("3.weight").clone()

    told = start_from(module, _model(file))

    assert torch.equal(module.get_parameter("1.weight"), before.get_parameter("1.weight"))
    assert torch.equal(module.get_parameter("3.weight"), head)
    assert told is not None
    assert told.endswith(
        "2 of 4 tensors taken; not taken for its shape: 3.weight (3, 8) (there (5, 8)), 3.bias (3,) (there (5,))"
    )
    assert "\n" not in told


def test_other_number_types_are_converted_and_names_that_differ_are_told(tmp_path: Path) -> None:
    half = torch.ones(8, 4, dtype=torch.float16)
    save_file({"1.weight": half, "encoder.weight": half.clone()}, tmp_path / "half.safetensors")
    module = _module()

    told = start_from(module, _model(tmp_path / "half.safetensors"))

    assert torch.equal(module.get_parameter("1.weight"), torch.ones(8, 4))
    assert told is not None
    assert "not in the file: 1.bias, 3.weight, 3.bias; not in the model: encoder.weight" in told


def test_frozen_parameters_are_those_that_a_pattern_matches() -> None:
    module = _module()
    start_from(module, _model(None, freeze=("1.*",)))

    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"3.weight", "3.bias"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"freeze": ("stem.*",)}, r"^freeze: 'stem\.\*' matches no parameter"),
        ({"freeze": ("*",)}, r"^freeze: \['\*'\] leave nothing to train"),
        ({"weights": "no/such.safetensors"}, r"^weights: '.*/no/such\.safetensors': no such file$"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        start_from(_module(), ModelSpec(factory=MLP, **fields))


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(100)], ids=["empty", "pickle", "zip"]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)

    with pytest.raises(SpecError, match="not a safetensors file"):
        start_from(_module(), _model(tmp_path / "weights.pt"))


def test_a_file_in_which_nothing_fits_is_refused_with_both_sides_names(tmp_path: Path) -> None:
    save_file({f"encoder.{n}": torch.ones(n) for n in range(1, 7)}, tmp_path / "other.safetensors")

    with pytest.raises(SpecError, match=r"none of its 6 tensors is a parameter .* and 2 more, the model 1\.weight"):
        start_from(_module(), _model(tmp_path / "other.safetensors"))


def test_a_path_is_made_whole_where_it_is_read_and_a_uri_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    assert _model(Path("a/b.safetensors")).weights == str(tmp_path / "a/b.safetensors")
    assert ModelSpec(factory=MLP, weights="s3://bucket/b.safetensors").weights == "s3://bucket/b.safetensors"


def _trial(model: ModelSpec) -> TrialSpec:
    settings = TrainingSpec(task="classification", epochs=3, global_batch_size=8, lr=0.05)
    return TrialSpec(trial_id="0-net", model_name="net", model=model, training=settings, seed=0)


def _data() -> TrainingArrays:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    return TrainingArrays(x, y, x[:9], y[:9])


def test_training_starts_from_the_file_tells_once_what_does_not_fit_and_leaves_the_frozen_part(file: Path) -> None:
    hooks = RecordingHooks()
    worker = Worker(0, 1, torch.device("cpu"))
    training = TrialTraining(_trial(_model(file, freeze=("1.*",))), _data(), 3, worker, hooks)
    taken = _module(5)
    start_from(taken, _model(file))
    head = training.module.get_parameter("3.weight").clone()

    training.train_to(1)
    training.train_to(3)

    assert torch.equal(training.module.get_parameter("1.weight"), taken.get_parameter("1.weight"))
    assert not torch.equal(training.module.get_parameter("3.weight"), head)
    assert len(hooks.warnings) == 1
    assert "2 of 4 tensors taken" in hooks.warnings[0]


def test_a_trial_that_goes_on_has_its_checkpoints_weights_and_tells_nothing(file: Path) -> None:
    worker, hooks, trial = Worker(0, 1, torch.device("cpu")), RecordingHooks(), _trial(_model(file))
    whole = TrialTraining(trial, _data(), 3, worker, RecordingHooks(save_at={5}))
    whole.train_to(3)
    resumed = TrialTraining(trial, _data(), 3, worker, hooks)
    resumed.restore(whole.hooks.checkpoints[0])  # type: ignore[attr-defined]
    resumed.train_to(3)

    assert hooks.warnings == []
    before, after = (to_checkpoint(training.snapshot(SnapshotBuffers())).files for training in (whole, resumed))
    assert before == after


def test_other_bytes_are_another_run_and_another_place_is_not(tmp_path: Path, file: Path) -> None:
    def run_id(path: Path) -> str:
        job = make_job(tmp_path, models={"net": _transferred(path)})
        return make_request(job, training_trials(job)).run_id

    save_file({"1.bias": torch.ones(8)}, tmp_path / "mine.safetensors")
    first = run_id(tmp_path / "mine.safetensors")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "mine.safetensors").read_bytes())
    assert run_id(tmp_path / "copy.safetensors") == first

    save_file({"1.bias": torch.zeros(8)}, tmp_path / "mine.safetensors")
    assert run_id(tmp_path / "mine.safetensors") != first
    assert weights_sha256(_model(None)) is None


def test_a_file_that_does_not_suit_the_model_is_told_before_anything_starts(tmp_path: Path) -> None:
    save_file({"other": torch.ones(8)}, tmp_path / "other.safetensors")
    job = make_job(tmp_path, models={"net": _transferred(tmp_path / "other.safetensors")})

    with pytest.raises(SpecError, match=r"^models\.net\.weights: '.*': none of its 1 tensors"):
        make_request(job, training_trials(job))


def _transferred(path: Path) -> dict[str, Any]:
    return {"factory": MLP, "params": {"hidden": [8]}, "weights": str(path)}
