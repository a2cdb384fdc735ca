"""Pruned weights trained on: which job trains them, on which data, and what becomes of the bundle. In one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from bigray.bundle import WEIGHTS, BundleManifest, FactorySpec, Golden, ModelBundle, Origin, pack_holdout, save_bundle
from bigray.compression.compressing import Method, compress
from bigray.compression.fine_tuning import FineTuning, share_of_zeros, training_job
from bigray.data.dataset import Dataset
from bigray.errors import DeployError, SpecError, TrainingFailed
from bigray.models import build_model
from bigray.onnx_export import run_module
from bigray.specs import JobSpec
from bigray.storage import open_storage
from bigray.training.loop import TrialTraining, Worker
from bigray.training.request import RunRequest, make_request
from bigray.training.runner import training_trials
from tests.integration.jobs import make_job
from tests.loop_hooks import RecordingHooks

NO_GRAPH = "bigray.compression.change.export_onnx"


def _train_here(request: RunRequest, run: str, folder: Path) -> str:
    """The one trial of a request -> a bundle without a graph, which takes seconds to export."""
    trial, dataset = request.trials[0], request.dataset
    training = TrialTraining(
        trial, dataset.arrays, dataset.outputs.num_outputs, Worker(0, 1, torch.device("cpu")), RecordingHooks()
    )
    training.train_to(trial.training.epochs)
    weights = dict(training.best_weights or {})
    module = build_model(
        trial.model.factory, trial.model.params, dataset.model_input_shape, dataset.outputs.num_outputs
    )
    module.load_state_dict(weights)
    manifest = BundleManifest(
        name=request.job.name,
        origin=Origin(
            run=run,
            trial=trial.trial_id,
            model=trial.model_name,
            step=training.progress.best_step,
            epoch=training.progress.best_epoch,
            metrics={"val_accuracy": 0.5},
            config=trial.training.model_dump(mode="json"),
            seeds={},
            data_fingerprint=dataset.fingerprint,
            git=None,
            versions={},
        ),
        inputs=dataset.inputs,
        preprocessing=dataset.preprocessing,
        outputs=dataset.outputs,
        factory=FactorySpec(factory=trial.model.factory, params=trial.model.params),
        example=dataset.example,
    )
    rows = dataset.golden_rows
    golden = Golden(rows, run_module(module.eval(), dataset.preprocessing.apply(rows)))
    packed = safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()})
    save_bundle(open_storage(folder / run), "bundle", manifest, packed, None, golden, pack_holdout(dataset.holdout))
    return str(folder / run / "bundle")


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    job = make_job(tmp_path, workers=1, epochs=3, lr=0.02, weight_decay=0.01)
    split = job.data.split.model_copy(update={"validation": 0.2, "holdout": 0.3})
    return job.model_copy(update={"data": job.data.model_copy(update={"split": split})})


@pytest.fixture
def source(job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(NO_GRAPH, lambda module, rows: (None, "not asked for"))
    monkeypatch.setattr("bigray.compression.report.ROUNDS", 2)
    return _train_here(make_request(job, training_trials(job)), "blobs-1a2b3c", tmp_path / "runs")


class _Here:
    """Trains as the command line does, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, list[JobSpec]()
        self.done = False

    def __call__(self, job: JobSpec, check: Callable[[Dataset], None]) -> str:
        self.jobs.append(job)
        request = make_request(job, training_trials(job))
        check(request.dataset)
        self.done = True
        return _train_here(request, f"{request.run_id}", self.folder / "runs")


def test_pruned_weights_are_trained_on_with_their_zeros_and_become_a_version_of_the_bundle(
    job: JobSpec, source: str, tmp_path: Path
) -> None:
    train = _Here(tmp_path)
    made = compress(source, Method("prune", 0.8), max_drop=1, fine_tuning=FineTuning(job, train, epochs=2))
    old, new = ModelBundle.load(source), ModelBundle.load(made.location)

    assert made.location == f"{source}-prune-0.8-fine-tuned"
    assert made.pruned is not None
    assert share_of_zeros(new.weights) == made.zeros[1] == made.pruned.zeros == pytest.approx(0.8, abs=0.01)
    assert made.score.after >= made.pruned.metric
    assert made.pruned.sizes == {WEIGHTS: made.sizes[WEIGHTS][1]}
    assert any(note.startswith("pruned alone: accuracy ") for note in made.notes)
    assert made.to_json()["pruned"]["run"] == made.pruned.run
    origin, derived = new.manifest.origin, new.manifest.derived_from
    assert derived is not None
    assert (derived.version, derived.method, derived.amount) == (old.version, "prune", 0.8)
    assert (origin.run, origin.metrics) == (Path(made.pruned.run).name, {"val_accuracy": 0.5}), "those of these weights"
    assert (train.jobs[0].training.epochs, train.jobs[0].models["mlp"].keep_zeros) == (2, True)
    assert not Path(f"{made.location}-scratch").exists()

    again = compress(source, Method("prune", 0.8), max_drop=1, fine_tuning=FineTuning(job, train, epochs=2))
    assert again.version == made.version
    with pytest.raises(SpecError, match="something else at"):
        compress(source, Method("prune", 0.8), max_drop=1, out=made.location)


def test_one_that_stays_too_bad_is_refused_and_no_bundle_written(job: JobSpec, source: str, tmp_path: Path) -> None:
    slow = job.model_copy(update={"training": job.training.model_copy(update={"lr": 1e-9})})
    with pytest.raises(DeployError, match=r"--prune, fine-tuned, takes accuracy on .*; no bundle was written"):
        compress(source, Method("prune", 0.98), fine_tuning=FineTuning(slow, _Here(tmp_path), epochs=1))

    assert sorted(path.name for path in Path(source).parent.iterdir()) == ["bundle"]


def test_zeros_that_moved_are_found(job: JobSpec, source: str, tmp_path: Path) -> None:
    def train(job: JobSpec, check: Callable[[Dataset], None]) -> str:
        return source

    with pytest.raises(TrainingFailed, match=r"--fine-tune: zeros of '\d\.weight' did not stay zeros"):
        compress(source, Method("prune", 0.8), max_drop=1, fine_tuning=FineTuning(job, train))


def test_each_key_that_the_job_has_counts_and_the_others_are_as_the_bundle_was_trained(
    job: JobSpec, source: str
) -> None:
    manifest = ModelBundle.load(source).manifest
    document = job.model_dump(mode="json")
    document["training"] = {"task": "classification", "lr": 0.5}
    document["data"]["k_folds"] = 3
    document["models"]["other"] = {"factory": "bigray.models:linear"}
    document["models"]["mlp"]["params"] = {"hidden": [99]}
    asked = FineTuning(JobSpec.model_validate(document), _never)
    made = training_job(manifest, asked, "some.safetensors")

    assert (made.training.lr, made.training.weight_decay, made.training.epochs) == (0.5, 0.01, 3)
    assert list(made.models) == ["mlp"]
    assert made.models["mlp"].params == {"hidden": [16]}, "those of the bundle, which a search may have chosen"
    assert made.data.k_folds is None


def _never(job: JobSpec, check: Callable[[Dataset], None]) -> str:
    raise AssertionError("nothing is started")


def _with(job: JobSpec, place: str, **values: Any) -> JobSpec:
    return job.model_copy(update={place: getattr(job, place).model_copy(update=values)})


def test_a_job_that_does_not_suit_the_bundle_is_refused_in_one_line(job: JobSpec, source: str) -> None:
    linear = job.models["mlp"].model_copy(update={"factory": "bigray.models:linear", "params": {}})
    for other, expected in (
        (
            job.model_copy(update={"models": {"mpl": linear}}),
            "is of model 'mlp', which the job does not have, did you mean 'mpl'",
        ),
        (job.model_copy(update={"models": {"mlp": linear}}), "factory: 'bigray.models:linear' in the job"),
        (_with(job, "training", task="regression"), "training.task: the job is for regression, the bundle for class"),
        (_with(job, "training", strategy="fsdp"), "keep_zeros: is not for strategy = 'fsdp'"),
    ):
        with pytest.raises(SpecError) as refused:
            compress(source, Method("prune", 0.5), fine_tuning=FineTuning(other, _never))
        assert str(refused.value).startswith("--fine-tune: ")
        assert expected in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(SpecError, match=r"^--fine-tune: is for --prune SHARE, .* with --low-rank$"):
        compress(source, Method("low_rank", 0.5), fine_tuning=FineTuning(job, _never))


def test_other_data_are_refused_and_so_is_training_on_the_holdout(job: JobSpec, source: str, tmp_path: Path) -> None:
    def told(data: JobSpec) -> str:
        train = _Here(tmp_path)
        with pytest.raises(SpecError) as refused:
            compress(source, Method("prune", 0.5), max_drop=1, fine_tuning=FineTuning(data, train))
        assert not train.done
        assert "\n" not in str(refused.value)
        assert not Path(f"{source}-prune-0.5-fine-tuned-scratch").exists()
        return str(refused.value)

    arrays = dict(np.load(tmp_path / "blobs.npz"))
    np.savez(tmp_path / "changed.npz", **{**arrays, "f0": arrays["f0"] + 1})
    np.savez(tmp_path / "renamed.npz", **{("g0" if name == "f0" else name): value for name, value in arrays.items()})
    reseeded = job.data.split.model_copy(update={"seed": 5})
    smaller = job.data.split.model_copy(update={"holdout": 0.0})

    assert "fingerprint " in told(_with(job, "data", source=str(tmp_path / "changed.npz")))
    assert "have the input columns g0, f1, f2, f3" in told(_with(job, "data", source=str(tmp_path / "renamed.npz")))
    assert "the job seals other rows than the bundle" in told(_with(job, "data", split=reseeded))
    assert "the job seals other rows than the bundle" in told(_with(job, "data", split=smaller))
    assert "prepares its data otherwise" in told(_with(job, "data", normalize="minmax"))
