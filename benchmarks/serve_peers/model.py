"""What the peers run: the bundle's weights in eager torch on one thread, standardised as bigray does."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.torch
import torch

from bigray.bundle import ModelBundle
from bigray.models import build_model


class TorchModel:
    def __init__(self, location: str) -> None:
        torch.set_num_threads(1)
        bundle = ModelBundle.load(location)
        spec = bundle.manifest
        self.version, self.shape = bundle.version, list(spec.inputs.input_shape)
        self.module = build_model(
            spec.factory.factory, spec.factory.params, spec.model_input_shape, spec.outputs.num_outputs
        ).eval()
        self.module.load_state_dict(safetensors.torch.load(bundle.weights))
        constants = (spec.preprocessing.center, spec.preprocessing.scale)
        self.mean, self.std = (torch.tensor(each).reshape(-1, *[1] * (len(self.shape) - 1)) for each in constants)

    def probabilities(self, rows: Any) -> Any:
        """(rows, *shape) raw float32 -> (rows, classes) float32."""
        with torch.inference_mode():
            return torch.softmax(self.module((torch.as_tensor(rows) - self.mean) / self.std), dim=1).numpy()

    def __call__(self, images: Any) -> list[dict[str, Any]]:
        """One prediction for each image, of nested lists."""
        probabilities = self.probabilities(torch.tensor(images))
        rows = zip(probabilities.argmax(axis=1).tolist(), probabilities.tolist(), strict=True)
        return [{"label": label, "probabilities": row} for label, row in rows]

    def records(self, images: Any) -> list[dict[str, Any]]:
        return self(images)

    def raw(self, body: bytes) -> bytes:
        """float32 bytes of images -> float32 bytes of their probabilities."""
        return self.probabilities(np.frombuffer(body, np.float32).copy().reshape(-1, *self.shape)).tobytes()
