"""A transformer that says which token comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigray.errors import SpecError
from bigray.models.sizes import check_blocks

if TYPE_CHECKING:
    from torch import nn


def language_model(
    input_shape: tuple[int, ...],
    num_outputs: int,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: float = 4,
    dropout: float = 0.0,
    tie_weights: bool = True,
) -> nn.Module:
    """A decoder of pre-norm blocks (Radford et al. 2019, GPT-2): codes of tokens (rows, T) -> (rows, T, num_outputs).

    Logits at place t are of the token after it, from the tokens up to t. `input_shape` is (T,), the longest context:
    fewer tokens are taken too. Codes are whole numbers from 0 to num_outputs - 1, as integers or as float32; others
    count as the nearest of these. Places are learned, and with `tie_weights` the embedding of the tokens is the
    head's weight too (Press and Wolf 2017, arXiv 1608.05859). Attention and dropout are those of `transformer`.
    """
    check_language_model(input_shape, num_outputs, width, depth, heads, mlp_ratio, dropout)
    from bigray.models.language_modules import LanguageModel

    hidden = int(mlp_ratio * width)
    return LanguageModel(input_shape[0], num_outputs, width, depth, heads, hidden, dropout, tie_weights)


def check_language_model(
    input_shape: tuple[int, ...],
    num_outputs: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    dropout: float,
) -> None:
    """Raise `SpecError` unless `language_model` takes these. Without torch, so that it can be asked before a start."""
    if len(input_shape) != 1:
        raise SpecError(f"language_model: expected rows of tokens, of shape (T,), got {input_shape}")
    if num_outputs < 2:
        raise SpecError(f"language_model: needs 2 different tokens or more, got {num_outputs}")
    check_blocks("language_model", width, depth, heads, mlp_ratio, dropout)
