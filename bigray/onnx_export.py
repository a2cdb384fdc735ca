"""A module -> the bytes of its ONNX graph, where the graph answers as the module does. Imports torch when called."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

FloatArray = NDArray[np.float32]

TOLERANCE = 1e-4
"""Largest accepted |onnx - torch|, relative to the largest |output|."""


def export_onnx(module: nn.Module, rows: FloatArray) -> tuple[bytes | None, str | None]:
    """The graph for any number of preprocessed rows (rows, *shape); or None, and why it cannot be had."""
    try:
        with _quiet():
            model = _to_onnx(module, rows)
            difference = _largest_difference(module, model, rows)
    except Exception as error:  # the exporter raises many kinds; without a graph the factory serves, so say why
        return None, f"export failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if not difference <= TOLERANCE:  # so asked, NaN is refused too
        return None, f"its outputs differ from the module's by {difference:.1e}"
    return model, None


def strip_metadata(model: bytes) -> bytes:
    """Without what tells a person how the graph came about: stack traces, names of Python files, inferred shapes."""
    import onnx

    found = onnx.load_model_from_string(model)
    graph = found.graph
    del found.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    return bytes(found.SerializeToString())


def run_onnx(model: bytes, rows: FloatArray) -> FloatArray:
    """What a graph returns for preprocessed rows."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: rows})[0]  # type: ignore[no-any-return]


def run_module(module: nn.Module, rows: FloatArray) -> FloatArray:
    """What a module returns for preprocessed rows."""
    import torch

    with torch.inference_mode():
        return module(torch.tensor(rows)).float().numpy()  # type: ignore[no-any-return]


def _to_onnx(module: nn.Module, rows: FloatArray) -> bytes:
    import torch

    example = torch.from_numpy(np.repeat(rows[:1], 2, axis=0))  # two rows: a size of 1 would be taken as fixed
    dynamic = {0: torch.export.Dim("rows", min=1)}
    program = torch.onnx.export(
        module, (example,), dynamo=True, dynamic_shapes=(dynamic,), input_names=["features"], verbose=False
    )
    assert program is not None, "torch.onnx.export returns a program when dynamo=True"
    return bytes(program.model_proto.SerializeToString())


def _largest_difference(module: nn.Module, model: bytes, sample: FloatArray) -> float:
    """Relative to the largest output, over one row, a few, and all of them: batch sizes take different kernels."""
    differences = []
    for rows in (sample[:1], sample[:3], sample):
        expected, actual = run_module(module, rows), run_onnx(model, rows)
        differences.append(np.abs(actual - expected).max() / max(1.0, float(np.abs(expected).max())))
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
