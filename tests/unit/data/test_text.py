"""Text becomes windows of tokens, and tokens become text again."""

from __future__ import annotations

import numpy as np
import pytest

from bigray.data.text import BYTES, decode, encode, lengths, prompt_window, split_text, vocabulary_of, windows
from bigray.errors import SpecError

TEXT = "to be, or not to be: daß ist die Frage."


@pytest.mark.parametrize("level", ["character", "byte"])
def test_what_is_encoded_is_decoded(level):
    vocabulary = vocabulary_of(TEXT, level)
    assert decode(encode(TEXT, vocabulary), vocabulary) == TEXT


def test_a_vocabulary_of_characters_is_that_of_the_text_in_order():
    assert vocabulary_of("banana", "character") == ("a", "b", "n")
    assert encode("nab", ("a", "b", "n")).tolist() == [2, 0, 1]


def test_bytes_know_every_text():
    assert decode(encode("日本", BYTES), BYTES) == "日本"


def test_half_a_character_is_replaced():
    assert decode(encode("ß", BYTES)[:1], BYTES) == "�"


def test_a_character_that_was_never_seen_is_named():
    with pytest.raises(SpecError, match=r"text: 'é' is not one of the 3 characters"):
        encode("nabé", ("a", "b", "n"))


def test_each_position_of_a_window_is_followed_by_the_next_token():
    inputs, targets = windows(np.arange(10), context=4, stride=3)
    assert inputs.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert targets.tolist() == [[1, 2, 3, 4], [4, 5, 6, 7]]
    assert inputs.dtype == np.float32
    assert targets.dtype == np.int64


def test_a_text_of_one_window_less_than_its_follower_has_none():
    assert windows(np.arange(4), context=4, stride=1)[0].shape == (0, 4)
    assert windows(np.arange(5), context=4, stride=1)[0].shape == (1, 4)


def test_a_prompt_keeps_its_end_and_is_padded_after_it():
    assert prompt_window(np.arange(6), 4).tolist() == [2, 3, 4, 5]
    assert prompt_window(np.arange(2), 4).tolist() == [0, 1, -1, -1]
    assert lengths(np.stack([prompt_window(np.arange(6), 4), prompt_window(np.arange(2), 4)])).tolist() == [4, 2]


def test_a_split_cuts_the_text_in_three_stretches_that_are_all_of_it():
    train, validation, holdout = split_text(1000, 0.1, 0.05)
    assert [part.stop - part.start for part in (train, validation, holdout)] == [850, 100, 50]
    assert [*range(1000)[train], *range(1000)[validation], *range(1000)[holdout]] == list(range(1000))
