"""The module of `language_model`; apart from it, since it needs torch to be defined."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from bigray.models.transformer_modules import Block

_INITIAL_SCALE = 0.02


class LanguageModel(nn.Module):
    """Codes of tokens (rows, T) -> (rows, T, num_tokens)."""

    reads_codes = True
    """Its inputs are numbers of tokens, which no lower precision may round."""

    def __init__(
        self,
        context: int,
        num_tokens: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float,
        tie_weights: bool,
    ) -> None:
        super().__init__()
        # parameters of the root itself: one that is tied has one name, and stays whole through a pass of fsdp
        self.tokens = nn.Parameter(torch.randn(num_tokens, width) * _INITIAL_SCALE)
        self.places = nn.Parameter(torch.randn(context, width) * _INITIAL_SCALE)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = None if tie_weights else nn.Linear(width, num_tokens, bias=False)
        self._initialise(depth)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        codes = codes.long().clamp(0, len(self.tokens) - 1)
        x = functional.embedding(codes, self.tokens) + self.places[: codes.shape[1]]
        x = self.norm(self.blocks(self.dropout(x)))
        return functional.linear(x, self.tokens if self.head is None else self.head.weight)

    def _initialise(self, depth: int) -> None:
        """As GPT-2: small weights, smaller still where a block adds to the stream, which grows with the depth."""
        for name, parameter in self.named_parameters():
            if name.endswith(("outputs.weight", "perceptron.3.weight")):
                nn.init.normal_(parameter, std=_INITIAL_SCALE / math.sqrt(2 * depth))
            elif name.endswith("weight") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=_INITIAL_SCALE)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
