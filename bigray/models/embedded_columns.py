"""Columns of category codes as learned vectors; apart from `mlp`, since it needs torch to be defined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class EmbeddedColumns(nn.Module):
    """(rows, columns) -> (rows, the columns that are numbers, then the vectors of the others in the order given)."""

    def __init__(self, num_columns: int, tables: Sequence[tuple[int, int, int]]) -> None:
        """`tables` holds (column, num_categories, width)."""
        super().__init__()
        self._codes = [(column, size) for column, size, _ in tables]
        self._numbers = sorted(set(range(num_columns)) - {column for column, _ in self._codes})
        # row 0 is for a code that is no category: zeros, without a gradient
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width, padding_idx=0) for _, size, width in tables)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[:, self._numbers]] if self._numbers else []
        for (column, size), table in zip(self._codes, self.tables, strict=True):
            codes = x[:, column]
            is_known = (codes >= 0) & (codes < size)  # NaN compares as false, and is as unknown as -1
            parts.append(table(torch.where(is_known, codes + 1, 0.0).long()))
        return torch.cat(parts, dim=1)
