"""The winning weights -> bundle, with `model.onnx` where the export gives the same answers (rank 0 of a group)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from bigray.bundle import GOLDEN_ROWS, BundleManifest, Golden, ModelCard, save_bundle
from bigray.data.targets import Targets
from bigray.errors import StorageError
from bigray.inference import row_outputs
from bigray.models import build_model
from bigray.paths import BUNDLE, RunPaths
from bigray.specs import TrialSpec
from bigray.training.answers import Exported
from bigray.training.checkpoint import load_checkpoint
from bigray.training.evaluation import evaluate, is_evaluated
from bigray.training.sharded import JoinedTensors
from bigray.training.tensor_files import pack_tensors

CHECKED_ROWS = 256
TOLERANCE = 1e-4
"""Largest accepted |onnx - torch|, relative to the largest |output|."""
EVALUATION_ROWS = 1024
"""Most rows of one forward pass over the validation rows; bounds memory."""


def export_bundle(
    paths: RunPaths,
    trial: TrialSpec,
    manifest: BundleManifest,
    sample: NDArray[np.float32],
    *,
    golden_rows: NDArray[np.float32] | None = None,
    targets: Targets | None = None,
    holdout: bytes | None = None,
    on_progress: Callable[[], object] = lambda: None,
) -> Exported:
    """Write `bundle/` from the trial's best weights.

    `sample` holds the validation rows as the model sees them (rows, *model_input_shape): on the first the ONNX export
    must agree with the module, and with `targets` all are counted in the confusion matrix. `golden_rows` are codes
    (rows, *input_shape), to which the module's answers are kept. `holdout` goes in as it is. `on_progress` is called
    between forward passes.
    """
    checkpoint = load_checkpoint(paths, trial, warn=logging.getLogger(__name__).warning)
    if checkpoint is None:
        raise StorageError(f"{paths.storage.uri}/{paths.trial(trial.trial_id)}: no checkpoint to export")
    if checkpoint.progress.best_step != manifest.origin.step:
        raise StorageError(
            f"{paths.storage.uri}/{paths.trial(trial.trial_id)}: its checkpoint holds the best weights of step "
            f"{checkpoint.progress.best_step:,}, not of step {manifest.origin.step:,}, which won; run it again"
        )
    weights = dict(JoinedTensors(checkpoint.files, checkpoint.best_file(), checkpoint.place))
    module = build_model(
        trial.model.factory, trial.model.params, manifest.model_input_shape, manifest.outputs.num_outputs
    )
    module.load_state_dict(weights)
    onnx, why_no_onnx = _export_onnx(module.eval(), sample[:CHECKED_ROWS])
    golden = _ask_golden(module, golden_rows, manifest) if golden_rows is not None else None
    card = (manifest.card or ModelCard()).model_copy(
        update={"num_parameters": sum(parameter.numel() for parameter in module.parameters())}
    )
    described = manifest.model_copy(update={"card": card})
    if golden is not None and targets is not None and is_evaluated(manifest.outputs):
        outputs = _forward_in_parts(module, sample, on_progress)
        described = evaluate(outputs, targets, manifest.outputs, trial.training).described(described)
    save_bundle(paths.storage, BUNDLE, described, pack_tensors(weights), onnx, golden, holdout)
    return Exported(paths.bundle.uri, why_no_onnx)


def _ask_golden(module: torch.nn.Module, rows: NDArray[np.float32], manifest: BundleManifest) -> Golden | None:
    """Codes as they are of a caller's rows, and the module's answers; None where it has none that could be served."""
    chosen = rows[:GOLDEN_ROWS]
    try:
        answers = _forward(module, manifest.preprocessing.apply(chosen))
        outputs = row_outputs(answers, chosen, manifest.outputs)
    except Exception:  # say, operators for a GPU alone: the weights are worth keeping, and the ONNX export told why
        return None
    # a task of one's own may make answers of fewer outputs, or more, than there are classes: an endpoint does not
    return Golden(chosen, outputs) if outputs.shape[1] == manifest.outputs.num_outputs else None


def _forward_in_parts(
    module: torch.nn.Module, sample: NDArray[np.float32], on_progress: Callable[[], object]
) -> NDArray[np.float32]:
    """Outputs of all rows, (rows, num_outputs)."""
    answers = []
    for start in range(0, len(sample), EVALUATION_ROWS):
        on_progress()
        answers.append(_forward(module, sample[start : start + EVALUATION_ROWS]))
    return np.concatenate(answers)


def _forward(module: torch.nn.Module, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        # a copy, since rows from the object store are read-only, which torch warns of
        return module(torch.tensor(rows)).float().numpy()  # type: ignore[no-any-return]


def _export_onnx(module: torch.nn.Module, sample: NDArray[np.float32]) -> tuple[bytes | None, str | None]:
    try:
        with _quiet():
            model = _to_onnx(module, sample)
            difference = _largest_difference(module, model, sample)
    except Exception as error:  # the exporter raises many kinds; without ONNX the factory serves, so say why and go on
        return None, f"export failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if not difference <= TOLERANCE:  # so asked, NaN is refused too
        return None, f"its outputs differ from the module's by {difference:.1e}"
    return model, None


def _to_onnx(module: torch.nn.Module, sample: NDArray[np.float32]) -> bytes:
    rows = torch.export.Dim("rows", min=1)
    example = torch.from_numpy(np.repeat(sample[:1], 2, axis=0))  # two rows: a size of 1 would be taken as fixed
    program = torch.onnx.export(
        module, (example,), dynamo=True, dynamic_shapes=({0: rows},), input_names=["features"], verbose=False
    )
    assert program is not None, "torch.onnx.export returns a program when dynamo=True"
    return bytes(program.model_proto.SerializeToString())


def _largest_difference(module: torch.nn.Module, model: bytes, sample: NDArray[np.float32]) -> float:
    """Relative to the largest output, over one row, a few, and all of them: batch sizes take different kernels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    differences = []
    for rows in (sample[:1], sample[:3], sample):
        expected = _forward(module, rows)
        (actual,) = session.run(None, {session.get_inputs()[0].name: rows})
        differences.append(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))
    return float(np.max(differences))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs its progress to the console; a failure still raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
