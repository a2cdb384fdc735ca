"""From a model of language's probabilities to text, one token after the other."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bigray.data.text import encode, level_of, prompt_window
from bigray.errors import SpecError

FloatArray = NDArray[np.float32]
NextToken = Callable[[FloatArray], Awaitable[FloatArray]]
"""One window (1, context) -> the probabilities of the token after it, (vocabulary,)."""


COLD = 1e-6
"""A temperature below this is 0: scores divided by it are no numbers any more."""


class GenerationRequest(BaseModel):
    """What a caller asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=100_000)
    max_tokens: int = Field(default=200, ge=1, le=10_000)
    temperature: float = Field(default=0.8, ge=0, le=10, allow_inf_nan=False)
    """0: always the likeliest token."""
    top_k: int | None = Field(default=None, ge=1)
    """Only the k likeliest tokens are drawn from (Fan et al. 2018, arXiv 1805.04833); default: all."""
    seed: int | None = Field(default=None, ge=0)
    """The same seed gives the same text; default: another one each time."""
    stop: str | None = Field(default=None, min_length=1, max_length=100)
    """Generation ends before this text."""
    stream: bool = True


def draw(probabilities: FloatArray, temperature: float, top_k: int | None, generator: np.random.Generator) -> int:
    """The number of the next token, from the probabilities (vocabulary,) of the model."""
    if temperature < COLD:
        return int(probabilities.argmax())
    scores = np.log(np.maximum(probabilities.astype(np.float64), 1e-30)) / temperature
    if top_k is not None and top_k < len(scores):
        scores[np.argpartition(scores, -top_k)[:-top_k]] = -np.inf
    weights = np.exp(scores - scores.max())
    return int(generator.choice(len(weights), p=weights / weights.sum()))


async def generate(
    request: GenerationRequest, vocabulary: Sequence[str], context: int, next_token: NextToken
) -> AsyncIterator[str]:
    """The text after the prompt, piece by piece (replica, event loop).

    Each token is one call of `next_token` with one window, so the streams of several callers meet in its batches. What
    is asked for with `stop` is held back until it is sure not to be that.

    Raises:
        SpecError: the prompt holds a character that the model does not know.
    """
    tokens = encode(request.prompt, vocabulary, "prompt")
    if not len(tokens):
        raise SpecError("prompt: is empty")
    generator = np.random.default_rng(request.seed)
    reader = _Reader(vocabulary)
    held = ""
    for _ in range(request.max_tokens):
        probabilities = await next_token(prompt_window(tokens, context)[None])
        token = draw(probabilities, request.temperature, request.top_k, generator)
        tokens = np.append(tokens[1 - context :], token) if context > 1 else np.array([token])
        held += reader.read(token)
        if request.stop is not None and request.stop in held:
            if before := held[: held.index(request.stop)]:
                yield before
            return
        ready = len(held) - _held_back(held, request.stop)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held := held + reader.end():
        yield held


def _held_back(text: str, stop: str | None) -> int:
    """Characters at the end that may be the beginning of `stop`."""
    if stop is None:
        return 0
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)


class _Reader:
    """Tokens -> text, where a character may take several bytes."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        is_bytes = level_of(vocabulary) == "byte"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace") if is_bytes else None

    def read(self, token: int) -> str:
        if self._decoder is None:
            return self._vocabulary[token]
        return self._decoder.decode(bytes([token]))

    def end(self) -> str:
        return "" if self._decoder is None else self._decoder.decode(b"", final=True)
