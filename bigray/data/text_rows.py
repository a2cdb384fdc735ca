"""A text as the rows of a model of language: windows of tokens, and at each place what comes next (driver)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.data.features import Column
from bigray.data.text import encode, split_text, vocabulary_of, windows
from bigray.errors import SpecError
from bigray.specs import DataSpec

TEXT = "text"
"""The column that a source of plain text has, with a row for each file."""

Windows = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Tokens (windows, context), and the token behind each of them."""


@dataclass(frozen=True, eq=False)
class TextRows:
    """The parts of a text, by position: the holdout is its end, or the text that was given as such."""

    column: Column
    train: Windows = field(repr=False)
    validation: Windows = field(repr=False)
    holdout: Windows = field(repr=False)
    fingerprint: str


def is_plain_text(table: pa.Table, spec: DataSpec) -> bool:
    """Whether a table holds text and no targets: what follows is all there is to learn."""
    if TEXT not in table.column_names or (spec.target != TEXT and spec.target in table.column_names):
        return False
    kind = table.schema.field(TEXT).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def read_windows(table: pa.Table, num_given: int | None, spec: DataSpec) -> TextRows:
    """Files one after another, as windows; `num_given` are the first of them, that are not holdout.

    The windows to train on begin every `data.stride` tokens, the others do not overlap.

    Raises:
        SpecError: one line for each setting that does not suit text, or part that is too short for a window.
    """
    if faults := list(_setting_faults(spec)):
        raise SpecError(faults)
    texts = [text or "" for text in table.column(TEXT).to_pylist()]
    given = "".join(texts[num_given:]) if num_given is not None else ""
    text = "".join(texts[:num_given])
    # of all parts: a letter that only the end of the text has is no reason to stop, nor tells what comes before it
    vocabulary = vocabulary_of(text + given, spec.tokens)
    tokens = encode(text, vocabulary)
    holdout_share = spec.split.holdout if num_given is None else 0.0
    train, validation, holdout = split_text(len(tokens), spec.split.validation, holdout_share)
    parts = {
        "train": windows(tokens[train], spec.context, spec.stride or spec.context),
        "validation": windows(tokens[validation], spec.context, spec.context),
        "holdout": windows(
            tokens[holdout] if num_given is None else encode(given, vocabulary), spec.context, spec.context
        ),
    }
    if short := [name for name in ("train", "validation") if not len(parts[name][0])]:
        raise SpecError(
            f"data.context: a window has {spec.context} tokens, and the {short[0]} part of the text not as many; "
            f"use a shorter one, or more text"
        )
    fingerprint = hashlib.sha256("\0".join([text, given]).encode()).hexdigest()[:16]
    column = Column(name=TEXT, shape=(spec.context,), kind="text", categories=vocabulary)
    return TextRows(column, parts["train"], parts["validation"], parts["holdout"], fingerprint)


def _setting_faults(spec: DataSpec) -> Iterable[str]:
    if spec.target == TEXT:
        yield f"data.target: '{TEXT}' is the text itself; give what follows a name of its own, such as 'next'"
    if spec.normalize != "none" or spec.pca is not None:
        key = "normalize" if spec.normalize != "none" else "pca"
        yield f"data.{key}: tokens are no quantities; leave it out"
    if spec.group is not None:
        yield "data.group: a text is cut by position; leave it out"
