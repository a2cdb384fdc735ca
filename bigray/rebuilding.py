"""The module of a bundle, rebuilt from its factory: for what an ONNX graph cannot do, gradients and pruning.

`Predictor` answers from `model.onnx` and runs no user code where there is one; this runs the factory, so the caller
has to allow it whether or not the bundle has an ONNX graph.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bigray.bundle import WEIGHTS, BundleManifest, ModelBundle
from bigray.errors import DeployError, StorageError
from bigray.inference import BUILT_IN_FACTORIES

if TYPE_CHECKING:
    from torch import nn


def is_allowed(manifest: BundleManifest, allow_factories: Sequence[str] = BUILT_IN_FACTORIES) -> bool:
    """Whether the bundle's factory matches one of the patterns; imports nothing."""
    return any(fnmatch.fnmatchcase(manifest.factory.factory, pattern) for pattern in allow_factories)


def rebuild_module(bundle: ModelBundle, allow_factories: Sequence[str] = BUILT_IN_FACTORIES) -> nn.Module:
    """The bundle's module with its weights in float32, in evaluation mode (driver or replica; imports torch).

    Raises:
        DeployError: the factory is not allowed; it is then not even imported.
        SpecError: the factory cannot be found, or fails.
        StorageError: the weights are not those of the module that the factory makes.
    """
    manifest = bundle.manifest
    if not is_allowed(manifest, allow_factories):
        raise DeployError(
            f"bundle of run '{manifest.origin.run}': its module has to be rebuilt by the factory "
            f"'{manifest.factory.factory}', which is not allowed; allow it if you trust that code"
        )
    import safetensors.torch

    from bigray.models import build_model

    shape = manifest.preprocessing.output_shape(manifest.inputs.input_shape)
    spec = manifest.factory
    module = build_model(spec.factory, spec.params, shape, manifest.outputs.num_outputs).float()
    try:
        module.load_state_dict(safetensors.torch.load(bundle.weights))
    except RuntimeError as error:  # names or shapes that do not match
        why = " ".join(str(error).split())[:200]
        raise StorageError(
            f"bundle of run '{manifest.origin.run}': {WEIGHTS} does not fit its factory: {why}"
        ) from None
    return module.eval()
