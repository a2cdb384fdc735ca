"""What the peers run: the bundle's weights in eager torch on one thread, standardised as bigray does."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch

from bigray.bundle import ModelBundle
from bigray.models import build_model


class TorchModel:
    def __init__(self, location: str) -> None:
        torch.set_num_threads(1)
        bundle = ModelBundle.load(location)
        spec = bundle.manifest
        self.module = build_model(
            spec.factory.factory, spec.factory.params, spec.inputs.input_shape, spec.outputs.num_outputs
        ).eval()
        self.module.load_state_dict(safetensors.torch.load(bundle.weights))
        self.mean = torch.tensor(spec.preprocessing.mean)
        self.std = torch.tensor(spec.preprocessing.std)

    def __call__(self, images: list[list[float]]) -> list[dict[str, Any]]:
        """One prediction for each image."""
        with torch.inference_mode():
            probabilities = torch.softmax(self.module((torch.tensor(images) - self.mean) / self.std), dim=1)
        rows = zip(probabilities.argmax(dim=1).tolist(), probabilities.tolist(), strict=True)
        return [{"label": label, "probabilities": row} for label, row in rows]
