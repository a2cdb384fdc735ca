"""Eight-bit weights and activations in the ONNX graph; the factory is not needed.

Post-training static quantization by ONNX Runtime, in its QDQ form: the range of each activation is taken from the
bundle's golden rows, which are rows of validation, so that the sealed holdout stays unseen. The ranges are fixed, not
taken from the batch at hand as dynamic quantization does: a row gets the same answer alone and among others. Weights
take seven of the eight bits, one scale a channel: on CPUs without VNNI two products of eight bits overflow the sixteen
they are added in (onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import ONNX, ModelBundle
from bigray.compression.change import Changed
from bigray.errors import SpecError
from bigray.onnx_export import strip_metadata

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float32]

QUANTIZED = (
    "Conv",
    "Gemm",
    "MatMul",
    "Relu",
    "MaxPool",
    "Add",
    "Reshape",
    "Flatten",
    "GlobalAveragePool",
    "ReduceMean",
)
"""Operators between convolutions that pass on eight bits. In a graph without any, such as a transformer, only what has
weights does, `CALCULATING`: sums of what comes in and what a layer makes of it need more than eight bits."""
CALCULATING = ("Conv", "Gemm", "MatMul")


def quantize(bundle: ModelBundle, rows: FloatArray) -> Changed:
    """The graph in eight bits and the weights, for explanations, in sixteen. `rows` (rows, *shape) are preprocessed.

    Raises:
        SpecError: the bundle has no graph, or one with nothing to quantize, or it is of eight bits already.
    """
    if bundle.onnx is None:
        raise SpecError(f"--int8: the bundle has no {ONNX}, which is what is quantized; use --prune")
    operators = _operators(bundle.onnx)
    if "QuantizeLinear" in operators:
        raise SpecError(f"--int8: the {ONNX} of this bundle is of eight bits already")
    if operators.isdisjoint(CALCULATING):
        raise SpecError(f"--int8: {ONNX} has no layer to quantize (of: {', '.join(CALCULATING)})")
    return Changed(halve(bundle.weights), quantize_graph(bundle.onnx, rows))


def quantize_graph(model: bytes, rows: FloatArray) -> bytes:
    """An ONNX graph -> the same with weights and activations of eight bits; the output stays float32."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="bigray-int8-") as folder, _quiet():
        plain, folded, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "folded", "done"))
        plain.write_bytes(strip_metadata(model))
        # folds batch norm into the convolution before it, which has then one scale for both
        quant_pre_process(str(plain), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded),
            str(done),
            _reader(str(folded), rows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED if "Conv" in _operators(model) else CALCULATING),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # an output of 256 levels would make equals of classes that are near each other
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"], "MatMulConstBOnly": True},
        )
        return strip_metadata(done.read_bytes())


def halve(weights: bytes) -> bytes:
    """safetensors -> the same with float32 tensors as float16, but for those that hold larger numbers than it can."""
    import safetensors.torch

    tensors = safetensors.torch.load(weights)
    return bytes(safetensors.torch.save({name: _half(tensor) for name, tensor in tensors.items()}))


def _half(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if tensor.dtype != torch.float32:
        return tensor
    is_too_large = tensor.numel() > 0 and float(tensor.abs().max()) > torch.finfo(torch.float16).max
    return tensor if is_too_large else tensor.half()


def _operators(model: bytes) -> set[str]:
    import onnx

    return {str(node.op_type) for node in onnx.load_model_from_string(model).graph.node}


def _reader(model: str, rows: FloatArray) -> Any:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader

    name = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        """All rows at once: they are few."""

        def __init__(self) -> None:
            self._batches = iter([{name: rows}])

        def get_next(self) -> dict[str, FloatArray] | None:
            return next(self._batches, None)

    return Rows()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer warns on the root logger of what is done here as it advises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
