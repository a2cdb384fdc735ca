"""The modules that `transformer` is made of; apart from it, since they need torch to be defined."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention: (rows, T, width) -> the same."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self._heads, self._causal = heads, causal
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.outputs = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (rows, T, 3 x width) -> three of (rows, heads, T, width / heads)
        split = self.queries_keys_values(x).unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind(0)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self._causal)
        attended: torch.Tensor = self.outputs(mixed.transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalising its input and adding to it (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, causal), nn.Dropout(dropout))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        outputs: torch.Tensor = x + self.perceptron(x)
        return outputs


class Transformer(nn.Module):
    """Tokens of (rows, T), (rows, T, F) or (rows, C, T, W) -> (rows, num_outputs)."""

    def __init__(
        self,
        num_tokens: int,
        num_features: int,
        num_outputs: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float,
        causal: bool,
    ) -> None:
        super().__init__()
        self._causal = causal
        self.embedding = nn.Linear(num_features, width)
        self.positions = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout, causal) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:
            x = x.unsqueeze(-1)
        elif x.dim() == 4:
            x = x.transpose(1, 2).flatten(2)
        tokens = self.norm(self.blocks(self.embedding(x) + self.positions))
        outputs: torch.Tensor = self.head(tokens[:, -1] if self._causal else tokens.mean(dim=1))
        return outputs
