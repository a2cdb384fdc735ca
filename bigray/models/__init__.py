"""Model factories: plain functions of `(input_shape, num_outputs, **params)` that return a `torch.nn.Module`.

Nothing here imports torch until a factory is called, so a job file can be checked in milliseconds.
"""

from bigray.models.cnn import cnn
from bigray.models.language_model import language_model
from bigray.models.linear import linear
from bigray.models.mlp import mlp
from bigray.models.resnet import resnet
from bigray.models.resolve import build_model, load_factory
from bigray.models.transformer import transformer

__all__ = ["build_model", "cnn", "language_model", "linear", "load_factory", "mlp", "resnet", "transformer"]
