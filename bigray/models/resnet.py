"""A residual network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from bigray.errors import SpecError
from bigray.models.sizes import is_count, is_widths

if TYPE_CHECKING:
    from torch import nn

NORMS = ("batch", "group")


def resnet(
    input_shape: tuple[int, ...],
    num_outputs: int,
    depth: int = 20,
    widths: Sequence[int] = (16, 32, 64),
    norm: Literal["batch", "group"] = "batch",
    stem_stride: int = 1,
    dropout: float = 0.0,
) -> nn.Module:
    """The residual network of He et al. 2015 (arXiv 1512.03385, section 4.2): images -> (rows, num_outputs).

    Takes (rows, H, W) or (rows, C, H, W). A stage for each of `widths`, of blocks of two 3x3 convolutions; each stage
    but the first halves the image. With three widths `depth` is 6n + 2: 8, 14, 20, 32, 44, 56. Shortcuts have no
    parameters, and a block starts as the identity (Goyal et al. 2017, arXiv 1706.02677, section 5.1).

    `norm = "batch"` normalises over the rows of one worker's forward pass: the result depends on the number of workers
    (with `exact` on the shards alone). "group" (Wu and He 2018, arXiv 1803.08494; 8 channels a group) looks at each
    row by itself, and is slower on the CPU. `stem_stride = 2` halves the image in the first convolution: a quarter of
    the work. Weights are laid out channels-last.

    For CIFAR-10 on few cores: `depth = 8, widths = [24, 64, 128], stem_stride = 2`.
    """
    check_resnet(input_shape, depth, widths, norm, stem_stride, dropout)
    import torch

    from bigray.models.resnet_modules import ResNet

    channels = 1 if len(input_shape) == 2 else input_shape[0]
    blocks_a_stage = (depth - 2) // (2 * len(widths))
    network = ResNet(channels, num_outputs, blocks_a_stage, tuple(widths), norm, stem_stride, dropout)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def check_resnet(
    input_shape: tuple[int, ...], depth: int, widths: Sequence[int], norm: str, stem_stride: int, dropout: float
) -> None:
    """Raise `SpecError` unless `resnet` takes these. Without torch, so that it can be asked before a start."""
    if len(input_shape) not in (2, 3):
        raise SpecError(f"resnet: expected images of shape (H, W) or (C, H, W), got {input_shape}")
    if not widths or not is_widths(widths):
        raise SpecError(
            f"resnet: widths must be one or more whole numbers from 1, such as [16, 32, 64], got {widths!r}"
        )
    if not is_count(depth):
        raise SpecError(f"resnet: depth must be a whole number from 1, got {depth!r}")
    step = 2 * len(widths)
    if depth < step + 2 or (depth - 2) % step:
        raise SpecError(
            f"resnet: depth {depth} cannot be cut into {len(widths)} equal stages; use {step}n + 2, such as "
            f"{step + 2} or {3 * step + 2}"
        )
    if norm not in NORMS:
        raise SpecError(f"resnet: norm must be 'batch' or 'group', got {norm!r}")
    if stem_stride not in (1, 2):
        raise SpecError(f"resnet: stem_stride must be 1 or 2, got {stem_stride}")
    if not 0 <= dropout < 1:
        raise SpecError(f"resnet: dropout must be at least 0 and less than 1, got {dropout}")
