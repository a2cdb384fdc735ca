"""A transformer over a row's tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bigray.errors import SpecError
from bigray.models.sizes import check_blocks

if TYPE_CHECKING:
    from torch import nn


def transformer(
    input_shape: tuple[int, ...],
    num_outputs: int,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    mlp_ratio: float = 4,
    dropout: float = 0.0,
    causal: bool = False,
) -> nn.Module:
    """Pre-norm transformer blocks over tokens with learned positions: tokens -> (rows, num_outputs).

    Takes (rows, T), each number a token; (rows, T, F), each T a token of F numbers; or images (rows, C, H, W), each of
    the H lines of pixels a token of C x W numbers. The head reads the mean over the tokens or, where `causal` lets
    tokens see none after them, the last one.

    Attention is torch's `scaled_dot_product_attention` without a mask tensor. Dropout is applied to what each half of a
    block adds and never to attention weights, so the fused kernels serve training too: flash attention on the CPU; on
    a GPU flash for bf16 and fp16, memory-efficient for fp32. An ONNX export spells it out as matrix products and a
    softmax.
    """
    check_tokens(input_shape, width, depth, heads, mlp_ratio, dropout)
    from bigray.models.transformer_modules import Transformer

    num_tokens = input_shape[1 if len(input_shape) == 3 else 0]
    num_features, hidden = math.prod(input_shape) // num_tokens, int(mlp_ratio * width)
    return Transformer(num_tokens, num_features, num_outputs, width, depth, heads, hidden, dropout, causal)


def check_tokens(
    input_shape: tuple[int, ...], width: int, depth: int, heads: int, mlp_ratio: float, dropout: float
) -> None:
    """Raise `SpecError` unless `transformer` takes these. Without torch, so that it can be asked before a start."""
    if len(input_shape) not in (1, 2, 3):
        raise SpecError(f"transformer: expected rows of shape (T,), (T, F) or (C, H, W), got {input_shape}")
    check_blocks("transformer", width, depth, heads, mlp_ratio, dropout)
