"""The shakespeare example at small size: from a text file to a model that goes on writing it, without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigray.bundle import BundleManifest, FactorySpec, ModelBundle, ModelCard, Origin, pack_holdout
from bigray.data.dataset import Dataset, prepare_dataset
from bigray.inference import Predictor
from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.serve.assembly import assemble
from bigray.serve.config import BundleArgs
from bigray.serve.release.paired import row_losses
from bigray.specs import JobSpec, TrialSpec
from bigray.storage import open_storage
from bigray.training.answers import Exported
from bigray.training.checkpoint import Progress
from bigray.training.checkpoint_writer import save_checkpoint
from bigray.training.export import export_bundle
from bigray.training.loop import TrialTraining, Worker
from bigray.training.stack_refusal import why_not_stacked
from bigray.training.tasks import load_task
from bigray.training.tensor_files import pack_tensors
from bigray.training.validation import EVALUATION_OUTPUTS, Validation
from tests.loop_hooks import RecordingHooks

VERSE = "To be, or not to be, that is the question.\nWhether 'tis nobler in the mind to suffer\n"
SMALL = [
    "data.context=16",
    "data.stride=8",
    "models.transformer.params={ width = 32, depth = 1, heads = 2 }",
    "training.epochs=6",
    "training.schedule={ kind = 'cosine', warmup_steps = 20 }",
    "training.lr=1e-2",
]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    job: JobSpec
    trial: TrialSpec
    dataset: Dataset
    metrics: dict[str, float]
    bundle: ModelBundle
    exported: Exported


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shakespeare")
    (folder / "input.txt").write_text(VERSE * 40)
    settings = [f"data.source={folder}/input.txt", f"storage={folder}/runs", *SMALL]
    job = load_job(Path(__file__).parents[3] / "examples/shakespeare/job.toml", settings)
    dataset = prepare_dataset(job.data, "language")
    trial = TrialSpec(
        trial_id="0-net",
        model_name="transformer",
        model=job.models["transformer"],
        training=job.training,
        seed=0,
    )
    hooks = RecordingHooks()
    training = TrialTraining(trial, dataset.arrays, dataset.outputs.num_outputs, Worker(0, 1, CPU), hooks)
    training.train_to(job.training.epochs)
    paths = RunPaths(open_storage(folder), "shakespeare-1")
    weights = pack_tensors(training.module.state_dict())
    files = {"model.safetensors": weights, "best.safetensors": weights}
    save_checkpoint(paths, trial, 1, Progress(epoch=6, step=10, best_epoch=6, best_step=10), files)
    exported = export_bundle(
        paths,
        trial,
        _manifest(trial, dataset),
        dataset.arrays.x_val,
        golden_rows=dataset.golden_rows,
        targets=dataset.arrays.y_val,
        holdout=pack_holdout(dataset.holdout),
    )
    return Trained(job, trial, dataset, hooks.reports[-1]["metrics"], ModelBundle.load(exported.uri), exported)


def _manifest(trial: TrialSpec, dataset: Dataset) -> BundleManifest:
    return BundleManifest(
        name="shakespeare",
        origin=Origin(
            run="shakespeare-1",
            trial=trial.trial_id,
            model=trial.model_name,
            step=10,
            epoch=6,
            metrics={},
            config=trial.training.model_dump(mode="json"),
            seeds={"job": 0},
            data_fingerprint=dataset.fingerprint,
            git=None,
            versions={},
        ),
        inputs=dataset.inputs,
        preprocessing=dataset.preprocessing,
        outputs=dataset.outputs,
        factory=FactorySpec(factory=trial.model.factory, params=trial.model.params),
        example=dataset.example,
        card=ModelCard(rows=dataset.num_rows),
    )


def test_the_model_learns_the_text(trained: Trained) -> None:
    guess = np.log(trained.dataset.outputs.num_outputs)

    assert trained.metrics["val_loss"] < 0.5 < guess
    assert trained.metrics["val_perplexity"] == pytest.approx(np.exp(trained.metrics["val_loss"]))


def test_it_is_exported_to_onnx_and_goes_on_from_any_length_of_prompt(trained: Trained) -> None:
    assert trained.exported.why_no_onnx is None
    predictor = Predictor(trained.bundle)
    rows = trained.dataset.inputs.from_records([{"text": text} for text in ("o", "To b", "r not to be, that i")])

    assert predictor.backend == "onnxruntime"
    assert predictor.run(rows).labels[1:] == ["e", "s"]  # type: ignore[index]


def test_its_loss_on_sealed_rows_is_in_nats(trained: Trained) -> None:
    answers = Predictor(trained.bundle).run_table(trained.dataset.holdout)
    losses = row_losses(answers, trained.dataset.holdout_targets(), trained.dataset.outputs)

    assert 0 < losses.mean() < 0.5


@pytest.mark.parametrize("stream", [True, False])
def test_an_endpoint_writes_the_text_on(trained: Trained, stream: bool) -> None:
    app = assemble(trained.exported.uri, BundleArgs(bundle=trained.exported.uri), num_threads=1).app
    asked = {"prompt": "To be, or not", "temperature": 0, "stop": ",", "stream": stream}
    body = asyncio.run(_post(app, json.dumps(asked).encode()))
    if stream:
        events = [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n")[:-1]]
        assert events.pop() == {"done": True, "tokens": 7}
        assert "".join(event["text"] for event in events) == " to be"
    else:
        document = json.loads(body)
        assert (document["text"], document["tokens"]) == (" to be", 7)


async def _post(app: Callable[..., Any], body: bytes) -> bytes:
    sent: list[dict[str, Any]] = []
    gone = asyncio.Event()
    left = [body]

    async def receive() -> dict[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop()}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": "/generate", "headers": []}, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


def test_it_is_trained_alone_and_the_line_says_why(trained: Trained) -> None:
    arrays, outputs = trained.dataset.arrays, trained.dataset.outputs

    why = why_not_stacked(trained.trial, arrays, outputs.num_outputs, CPU)
    assert why == "training.task = 'language' is of trials trained alone"


def test_a_forward_pass_of_validation_has_a_bounded_number_of_outputs(trained: Trained) -> None:
    rows, context, tokens = 2000, 128, 256
    targets = np.zeros((rows, context), np.int64)
    arrays = type(trained.dataset.arrays)(targets[:1], targets[:1], targets.astype(np.float32), targets)
    validation = Validation(load_task(trained.trial.training, tokens, targets), tokens, arrays, CPU)

    assert max(map(len, validation._chunks)) * context * tokens <= EVALUATION_OUTPUTS
