"""The winning weights -> bundle, with `model.onnx` where the export gives the same answers (rank 0 of a group)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, save_bundle
from bigray.errors import StorageError
from bigray.models import build_model
from bigray.paths import BUNDLE, RunPaths
from bigray.specs import TrialSpec
from bigray.training.answers import Exported
from bigray.training.checkpoint import load_checkpoint
from bigray.training.sharded import JoinedTensors
from bigray.training.tensor_files import pack_tensors

CHECKED_ROWS = 256
TOLERANCE = 1e-4
"""Largest accepted |onnx - torch|, relative to the largest |output|."""


def export_bundle(paths: RunPaths, trial: TrialSpec, manifest: BundleManifest, sample: NDArray[np.float32]) -> Exported:
    """Write `bundle/` from the trial's best weights.

    `sample` holds standardised rows (rows, *input_shape) on which the ONNX export must agree with the module.
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
        trial.model.factory, trial.model.params, manifest.inputs.input_shape, manifest.outputs.num_outputs
    )
    module.load_state_dict(weights)
    onnx, why_no_onnx = _export_onnx(module.eval(), sample[:CHECKED_ROWS])
    save_bundle(paths.storage, BUNDLE, manifest, pack_tensors(weights), onnx)
    return Exported(paths.bundle.uri, why_no_onnx)


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
        with torch.inference_mode():
            expected = module(torch.from_numpy(rows)).numpy()
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
