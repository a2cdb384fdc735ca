"""The winning weights -> bundle, with `model.onnx` where the export gives the same answers (rank 0 of a group)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bigray.bundle import GOLDEN_ROWS, BundleManifest, Golden, ModelCard, save_bundle
from bigray.data.row_file import RowFile
from bigray.data.targets import Targets
from bigray.errors import StorageError
from bigray.inference import row_outputs
from bigray.models import build_model
from bigray.onnx_export import export_onnx, run_module
from bigray.paths import BUNDLE, RunPaths
from bigray.specs import TrialSpec
from bigray.training.answers import Exported
from bigray.training.checkpoint import load_checkpoint
from bigray.training.evaluation import evaluate, is_evaluated
from bigray.training.sharded import JoinedTensors
from bigray.training.tensor_files import pack_tensors

CHECKED_ROWS = 256
EVALUATION_ROWS = 1024
"""Most rows of one forward pass over the validation rows; bounds memory."""


def export_bundle(
    paths: RunPaths,
    trial: TrialSpec,
    manifest: BundleManifest,
    sample: NDArray[np.float32] | RowFile,
    *,
    golden_rows: NDArray[np.float32] | None = None,
    targets: Targets | None = None,
    holdout: bytes | None = None,
    on_progress: Callable[[], object] = lambda: None,
) -> Exported:
    """Write `bundle/` from the trial's best weights.

    `sample` holds the validation rows as the model sees them (rows, *model_input_shape): on the first the ONNX export
    must agree with the module, and with `targets` all are counted in the bundle's evaluation. `golden_rows` are codes
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
    onnx, why_no_onnx = export_onnx(module.eval(), sample[:CHECKED_ROWS])
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
        answers = run_module(module, manifest.preprocessing.apply(chosen))
        outputs = row_outputs(answers, chosen, manifest.outputs)
    except Exception:  # say, operators for a GPU alone: the weights are worth keeping, and the ONNX export told why
        return None
    # a task of one's own may make answers of fewer outputs, or more, than there are classes: an endpoint does not
    return Golden(chosen, outputs) if outputs.shape[1] == manifest.outputs.num_outputs else None


def _forward_in_parts(
    module: torch.nn.Module, sample: NDArray[np.float32] | RowFile, on_progress: Callable[[], object]
) -> NDArray[np.float32]:
    """Outputs of all rows, (rows, num_outputs)."""
    answers = []
    for start in range(0, len(sample), EVALUATION_ROWS):
        on_progress()
        answers.append(run_module(module, sample[start : start + EVALUATION_ROWS]))
    return np.concatenate(answers)
