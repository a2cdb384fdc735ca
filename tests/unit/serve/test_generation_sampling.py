"""A model of language's probabilities become text."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from pydantic import ValidationError

from bigray.data.text import BYTES, lengths
from bigray.errors import SpecError
from bigray.serve.generation.sampling import GenerationRequest, draw, generate

ABC = ("a", "b", "c")


async def after_each_the_next(window):
    """Knows the alphabet: after a comes b, after b c, after c a."""
    assert window.shape[0] == 1
    last = int(window[0, lengths(window)[0] - 1])
    probabilities = np.full(3, 0.01, dtype=np.float32)
    probabilities[(last + 1) % 3] = 0.98
    return probabilities


def text_of(next_token=after_each_the_next, vocabulary=ABC, context=4, **settings):
    return "".join(pieces_of(next_token, vocabulary, context, **settings))


def pieces_of(next_token=after_each_the_next, vocabulary=ABC, context=4, **settings):
    request = GenerationRequest(**{"temperature": 0.0, "prompt": "a", **settings})

    async def gather():
        return [piece async for piece in generate(request, vocabulary, context, next_token)]

    return asyncio.run(gather())


@pytest.mark.parametrize("context", [1, 2, 4, 100])
def test_it_goes_on_from_the_prompt_beyond_the_context(context):
    assert text_of(context=context, prompt="abcab", max_tokens=9) == "cabcabcab"


def test_each_token_is_told_at_once():
    assert pieces_of(max_tokens=3) == ["b", "c", "a"]


def test_it_ends_before_the_stop_and_holds_back_what_may_become_one():
    assert pieces_of(max_tokens=9, stop="ab") == ["b", "c"]
    assert pieces_of(max_tokens=4, stop="bb") == ["bc", "a", "b"]


def test_a_seed_decides_the_text():
    one, same, other = (text_of(temperature=5.0, max_tokens=40, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_of_top_k_only_the_likeliest_are_drawn():
    probabilities = np.array([0.4, 0.35, 0.15, 0.1], dtype=np.float32)
    generator = np.random.default_rng(0)
    assert {draw(probabilities, 1.0, 2, generator) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-6, 1e-3])
def test_without_temperature_it_is_the_likeliest(temperature):
    probabilities = np.array([0.0, 0.3, 0.4, 0.3], dtype=np.float32)
    generator = np.random.default_rng(0)
    assert {draw(probabilities, temperature, None, generator) for _ in range(20)} == {2}


def test_temperature_sharpens_and_flattens():
    probabilities = np.array([0.6, 0.4], dtype=np.float32)
    cold, warm = (
        np.mean([draw(probabilities, temperature, None, np.random.default_rng(seed)) == 0 for seed in range(400)])
        for temperature in (0.1, 10.0)
    )
    assert cold > 0.95
    assert 0.4 < warm < 0.6


def test_a_character_of_several_bytes_is_told_whole():
    sharp_s = "ß".encode()
    following = iter(sharp_s + b"!")

    async def next_byte(_):
        probabilities = np.zeros(256, dtype=np.float32)
        probabilities[next(following)] = 1
        return probabilities

    assert pieces_of(next_byte, BYTES, max_tokens=3) == ["ß", "!"]


def test_a_prompt_of_unknown_characters_is_refused():
    with pytest.raises(SpecError, match="'z' is not one of"):
        text_of(prompt="z")


@pytest.mark.parametrize(
    "bad",
    [{"prompt": ""}, {"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"n": 1}],
)
def test_a_request_of_nonsense_is_refused(bad):
    with pytest.raises(ValidationError):
        GenerationRequest(**{"prompt": "a", **bad})
