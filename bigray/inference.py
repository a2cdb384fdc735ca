"""Bundle in, predictions out: the same code answers offline and in the replica.

ONNX Runtime runs `model.onnx` where the bundle has one: then no torch is imported and no user code runs. Otherwise the
module is rebuilt from its factory, and only a factory that the caller allows.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.bundle import ModelBundle, OutputSchema
from bigray.data.text import lengths
from bigray.errors import DeployError

FloatArray = NDArray[np.float32]
BUILT_IN_FACTORIES = ("bigray.models:*",)


@dataclass(frozen=True)
class Predictions:
    """Answers for a batch of rows."""

    labels: list[Any] | None
    """Class of each row (str or int), of a language task the next token, of a multilabel task the list of the row's
    labels; None for regression."""
    probabilities: FloatArray | None
    """(rows, classes), each row sums to 1; (rows, labels) of a multilabel task, each by itself; None for regression."""
    values: FloatArray | None
    """(rows,) predicted target; None for other tasks."""

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON object a row: `{"label", "probabilities"}` or `{"value"}`."""
        if self.values is not None:
            return [{"value": value} for value in self.values.tolist()]
        assert self.labels is not None
        assert self.probabilities is not None
        rows = zip(self.labels, self.probabilities.tolist(), strict=True)
        return [{"label": label, "probabilities": row} for label, row in rows]


class Predictor:
    """A loaded model. Thread-safe for concurrent `run` calls with ONNX Runtime; holds no state between calls."""

    def __init__(
        self, bundle: ModelBundle, *, num_threads: int = 1, allow_factories: Sequence[str] = BUILT_IN_FACTORIES
    ) -> None:
        self.manifest = bundle.manifest
        self.backend = "onnxruntime" if bundle.onnx is not None else "torch"
        self._preprocess = bundle.manifest.preprocessing.function()
        self._forward = (
            _onnx_forward(bundle.onnx, num_threads)
            if bundle.onnx is not None
            else _torch_forward(bundle, num_threads, allow_factories)
        )

    def outputs(self, features: FloatArray) -> FloatArray:
        """Codes of rows (rows, *input_shape), before preprocessing -> what the model itself returns.

        That is (rows, num_outputs): logits, or values; of a language task the logits behind the last token.
        """
        return row_outputs(self._forward(self._preprocess(features)), features, self.manifest.outputs)

    def run(self, features: FloatArray) -> Predictions:
        """Codes of rows (rows, *input_shape), before preprocessing -> predictions."""
        return interpret(self.outputs(features), self.manifest.outputs)

    def run_table(self, table: pa.Table) -> Predictions:
        """Rows of an Arrow table that has the bundle's input columns -> predictions."""
        return self.run(self.manifest.inputs.from_table(table))


def check_factory(bundle: ModelBundle, allow_factories: Sequence[str]) -> None:
    """Raise `DeployError` where serving this bundle would run a factory that is not allowed."""
    factory = bundle.manifest.factory.factory
    if bundle.onnx is None and not any(fnmatch.fnmatchcase(factory, pattern) for pattern in allow_factories):
        raise DeployError(
            f"bundle of run '{bundle.manifest.origin.run}': has no model.onnx and its factory '{factory}' is not "
            f"allowed; add it to 'allow_factories' in the serve file if you trust that code"
        )


def row_outputs(outputs: FloatArray, features: FloatArray, schema: OutputSchema) -> FloatArray:
    """What a module returns for some rows -> the (rows, num_outputs) that answer them.

    `features` are those rows before preprocessing: of a language task a window may end in padding.
    """
    if schema.task == "language":
        outputs = outputs[np.arange(len(outputs)), lengths(features) - 1]
    return outputs.reshape(len(outputs), -1)


def interpret(outputs: FloatArray, schema: OutputSchema) -> Predictions:
    """Outputs (rows, num_outputs) -> predictions: the one place where logits become answers."""
    if schema.task == "regression":
        return Predictions(labels=None, probabilities=None, values=outputs.reshape(-1))
    if schema.task == "binary":
        probabilities = np.concatenate([sigmoid(-outputs), sigmoid(outputs)], axis=1)
    else:
        probabilities = sigmoid(outputs) if schema.task == "multilabel" else softmax(outputs)
    return Predictions(decide(probabilities, schema), probabilities, None)


def decide(probabilities: FloatArray, schema: OutputSchema) -> list[Any]:
    """The labels of rows by their probabilities (rows, classes) and the thresholds of the schema."""
    names = schema.class_names
    if schema.task == "binary":
        is_positive = probabilities[:, 1] >= np.float32(schema.decision[0])
        return [names[i] for i in is_positive.astype(np.int64).tolist()]
    if schema.task == "multilabel":
        has_label = probabilities >= np.asarray(schema.decision, np.float32)
        return [[name for name, has in zip(names, row, strict=True) if has] for row in has_label.tolist()]
    winners: list[int] = probabilities.argmax(axis=1).tolist()
    return [names[i] for i in winners] if names else winners


def sigmoid(logits: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)) of each; the exponential is of a number below 0, so that it cannot overflow."""
    exponentials = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, exponentials) / (1 + exponentials)  # type: ignore[no-any-return]


def softmax(logits: FloatArray) -> FloatArray:
    """(rows, classes) -> the same shape; shifted by each row's maximum so that it cannot overflow."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


def _onnx_forward(model: bytes, num_threads: int) -> Callable[[FloatArray], FloatArray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _torch_forward(
    bundle: ModelBundle, num_threads: int, allow_factories: Sequence[str]
) -> Callable[[FloatArray], FloatArray]:
    check_factory(bundle, allow_factories)
    spec = bundle.manifest.factory
    import safetensors.torch
    import torch

    from bigray.models import build_model

    torch.set_num_threads(num_threads)
    module = build_model(
        spec.factory, spec.params, bundle.manifest.model_input_shape, bundle.manifest.outputs.num_outputs
    )
    module.load_state_dict(safetensors.torch.load(bundle.weights))
    module.eval()

    def forward(x: FloatArray) -> FloatArray:
        with torch.inference_mode():
            return module(torch.from_numpy(x)).numpy()  # type: ignore[no-any-return]

    return forward
