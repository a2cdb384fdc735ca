"""A multi-layer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bigray.errors import SpecError
from bigray.models.sizes import is_widths

if TYPE_CHECKING:
    from torch import nn


def mlp(
    input_shape: tuple[int, ...],
    num_outputs: int,
    hidden: Sequence[int] = (128,),
    dropout: float = 0.0,
    embeddings: Sequence[Sequence[int]] = (),
    embedding_dim: int | None = None,
) -> nn.Module:
    """Flattened input through ReLU layers of `hidden` widths: (rows, *input_shape) -> (rows, num_outputs).

    `embeddings` holds (column, num_categories) of the columns that are category codes: each goes through a table of
    its own, and what comes out is put behind the other columns (Guo and Berkhahn 2016, arXiv 1604.06737). A code that
    is no category of the column (-1, NaN, too large) is a row of zeros, which is not trained. `embedding_dim` is the
    width of every table; default: 1.6 x num_categories^0.56, at most 50.
    """
    check_mlp(input_shape, hidden, dropout, embeddings, embedding_dim)
    from torch import nn

    layers: list[nn.Module] = [nn.Flatten()]
    fan_in = math.prod(input_shape)
    if embeddings:
        from bigray.models.embedded_columns import EmbeddedColumns

        tables = [(column, size, embedding_dim or usual_dim(size)) for column, size in embeddings]
        layers.append(EmbeddedColumns(fan_in, tables))
        fan_in += sum(dim - 1 for _, _, dim in tables)
    widths = [fan_in, *hidden]
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))


def usual_dim(num_categories: int) -> int:
    """Width of an embedding by fastai's rule of thumb, but never more than 50."""
    return max(1, min(50, int(1.6 * float(num_categories) ** 0.56 + 0.5)))


def check_mlp(
    input_shape: tuple[int, ...],
    hidden: Sequence[int],
    dropout: float,
    embeddings: Sequence[Sequence[int]],
    embedding_dim: int | None,
) -> None:
    """Raise `SpecError` unless `mlp` takes these. Without torch, so that it can be asked before a start."""
    if not is_widths(hidden):
        raise SpecError(f"mlp: hidden must be a list of whole numbers from 1, got {hidden}")
    if not 0 <= dropout < 1:
        raise SpecError(f"mlp: dropout must be at least 0 and less than 1, got {dropout}")
    check_embeddings(input_shape, embeddings, embedding_dim)


def check_embeddings(
    input_shape: tuple[int, ...], embeddings: Sequence[Sequence[int]], embedding_dim: int | None
) -> None:
    """The part of `check_mlp` that is about columns of categories."""
    if not embeddings:
        return
    if len(input_shape) != 1:
        raise SpecError(f"mlp: embeddings are of columns, and the rows have shape {input_shape}; remove them")
    if any(len(pair) != 2 for pair in embeddings):
        raise SpecError(f"mlp: embeddings must be pairs of column and number of categories, got {list(embeddings)}")
    columns = [column for column, _ in embeddings]
    if not all(0 <= column < input_shape[0] for column in columns) or len(set(columns)) < len(columns):
        raise SpecError(f"mlp: embeddings name columns {columns}; use different ones from 0 to {input_shape[0] - 1}")
    if min(size for _, size in embeddings) < 1:
        raise SpecError(f"mlp: embeddings need 1 category or more in each column, got {list(embeddings)}")
    if embedding_dim is not None and embedding_dim < 1:
        raise SpecError(f"mlp: embedding_dim must be 1 or more, got {embedding_dim}")
