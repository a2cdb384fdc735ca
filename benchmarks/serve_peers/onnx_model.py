"""The bundle's `model.onnx` on one thread of ONNX Runtime, without bigray and torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from model import TorchModel


class OnnxModel:
    """Reads the graph in the bundle's folder, and its constants beside it: `{bundle}.json`."""

    def __init__(self, bundle: str) -> None:
        constants = json.loads(Path(f"{bundle}.json").read_text())
        self.version: str = constants["version"]
        self.shape: list[int] = constants["shape"]
        self._mean, self._std = (np.asarray(constants[name], np.float32) for name in ("mean", "std"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            f"{bundle}/model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def probabilities(self, rows: Any) -> Any:
        """(rows, *shape) raw float32 -> (rows, classes) float32."""
        logits = self._session.run(None, {self._input: (rows - self._mean) / self._std})[0]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def records(self, images: Any) -> list[dict[str, Any]]:
        """Images as nested lists -> label and probabilities of each, as numpy values."""
        probabilities = self.probabilities(np.asarray(images, np.float32))
        return [{"label": int(row.argmax()), "probabilities": row} for row in probabilities]

    def raw(self, body: bytes) -> bytes:
        """float32 bytes of images -> float32 bytes of their probabilities."""
        return self.probabilities(np.frombuffer(body, np.float32).reshape(-1, *self.shape)).tobytes()


def quickest_model(bundle: str) -> OnnxModel | TorchModel:
    """ONNX Runtime where the bundle has a graph for it, else torch."""
    if (Path(bundle) / "model.onnx").exists():
        return OnnxModel(bundle)
    from model import TorchModel

    return TorchModel(bundle)
