"""Text as tokens: characters or bytes, a vocabulary, windows to learn from, and the way back.

A model of language reads a window of `context` tokens and says at each position what comes next. The same functions
make the windows of training and those of a prompt, on the driver and in the replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigray.errors import SpecError

Level = Literal["character", "byte"]
TokenArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

PADDING = -1
"""Code of a place in a window after the end of a prompt; a causal model does not look there."""
BYTES = tuple(map(chr, range(256)))
"""The vocabulary of the byte level: each byte as the character of that number (Latin-1)."""


def vocabulary_of(text: str, level: Level) -> tuple[str, ...]:
    """The tokens of a text, in order; every byte there is where the level is bytes."""
    return BYTES if level == "byte" else tuple(sorted(set(text)))


def level_of(vocabulary: Sequence[str]) -> Level:
    """Which level a vocabulary is of: that of bytes is always the same."""
    return "byte" if tuple(vocabulary) == BYTES else "character"


def encode(text: str, vocabulary: Sequence[str], place: str = "text") -> TokenArray:
    """A text -> the numbers of its tokens, (tokens,). `place` is where it stands, for people.

    Raises:
        SpecError: a character that is not in the vocabulary.
    """
    if level_of(vocabulary) == "byte":
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    numbers = {token: number for number, token in enumerate(vocabulary)}
    try:
        return np.array([numbers[character] for character in text], dtype=np.int64)
    except KeyError as error:
        character = str(error.args[0])
        raise SpecError(
            f"{place}: {character!r} is not one of the {len(vocabulary)} characters of the training text; "
            f"leave it out, or train with data.tokens = 'byte'"
        ) from None


def decode(tokens: TokenArray, vocabulary: Sequence[str]) -> str:
    """Numbers of tokens -> text; bytes that are no UTF-8, such as half a character, become U+FFFD."""
    if level_of(vocabulary) == "byte":
        return bytes(tokens.astype(np.uint8)).decode("utf-8", "replace")
    return "".join(vocabulary[number] for number in tokens.tolist())


def windows(tokens: TokenArray, context: int, stride: int) -> tuple[FloatArray, TokenArray]:
    """Tokens of a text -> inputs (windows, context) float32 and what follows each of them (windows, context) int64.

    A window starts every `stride` tokens; those at the end that fill none are left out.
    """
    starts = np.arange(0, len(tokens) - context, stride)
    places = starts[:, None] + np.arange(context)
    return tokens[places].astype(np.float32), tokens[places + 1]


def prompt_window(tokens: TokenArray, context: int) -> FloatArray:
    """The last `context` tokens of a prompt as codes (context,), with `PADDING` after a shorter one."""
    window = np.full(context, PADDING, dtype=np.float32)
    last = tokens[-context:]
    window[: len(last)] = last
    return window


def lengths(codes: FloatArray) -> TokenArray:
    """Windows (rows, context) of `prompt_window` -> the tokens in each, (rows,)."""
    found: TokenArray = (codes != PADDING).sum(axis=1)
    return found


def split_text(num_tokens: int, validation: float, holdout: float) -> tuple[slice, slice, slice]:
    """Train, validation and holdout as stretches of the text, in this order.

    By position and not by hash: windows of one page on both sides of a split would share their sentences.
    """
    end_of_train = round(num_tokens * (1 - validation - holdout))
    end_of_validation = round(num_tokens * (1 - holdout))
    return slice(0, end_of_train), slice(end_of_train, end_of_validation), slice(end_of_validation, num_tokens)
