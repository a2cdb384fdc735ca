"""Plain text as rows: windows to train on, and the same windows from a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.data.dataset import Dataset, prepare_dataset
from bigray.data.text import PADDING, decode
from bigray.errors import SpecError
from bigray.specs import DataSpec

TEXT = "".join(chr(ord("a") + number % 26) for number in range(1000))


def _prepare(folder: Path, text: str = TEXT, **spec: Any) -> Dataset:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    document = {"source": str(folder / "text.txt"), "target": "next", "context": 20, **spec}
    return prepare_dataset(DataSpec.model_validate(document), "language")


def test_a_text_becomes_windows_and_what_follows_at_each_place(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, split={"validation": 0.2, "holdout": 0.1})
    arrays, outputs = dataset.arrays, dataset.outputs

    assert dataset.num_rows == {"train": 34, "validation": 9, "holdout": 4}
    assert (outputs.num_outputs, outputs.class_names) == (26, tuple("abcdefghijklmnopqrstuvwxyz"))
    assert dataset.model_input_shape == (20,)
    assert decode(arrays.x_train[1].astype(np.int64), outputs.class_names) == TEXT[20:40]
    np.testing.assert_array_equal(arrays.y_train, (arrays.x_train + 1) % 26)
    assert decode(arrays.x_val[0].astype(np.int64), outputs.class_names) == TEXT[700:720]
    assert dataset.holdout_targets()[0] == TEXT[920]


def test_training_windows_may_overlap_and_others_do_not(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, stride=5)

    assert dataset.num_rows == {"train": 136, "validation": 7, "holdout": 7}
    np.testing.assert_array_equal(dataset.arrays.x_train[1, :15], dataset.arrays.x_train[0, 5:])


def test_a_row_is_the_same_as_text_as_tokens_and_in_the_holdout(tmp_path: Path) -> None:
    inputs = (dataset := _prepare(tmp_path)).inputs

    np.testing.assert_array_equal(inputs.from_records([dataset.example]), dataset.arrays.x_train[:1])
    np.testing.assert_array_equal(inputs.from_records([{"text": TEXT[:20]}]), dataset.arrays.x_train[:1])
    assert inputs.from_table(dataset.holdout).shape == (7, 20)
    (short,) = inputs.from_records([{"text": "abc"}])
    np.testing.assert_array_equal(short, [0, 1, 2, *[PADDING] * 17])
    with pytest.raises(SpecError, match="'!' is not one of the 26 characters"):
        inputs.from_records([{"text": "abc!"}])
    with pytest.raises(SpecError, match="text: is empty"):
        inputs.from_records([{"text": ""}])


def test_a_text_for_testing_is_the_holdout(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("zyx" * 20)
    paths = {"source": None, "train": str(tmp_path / "text.txt"), "test": str(tmp_path / "test.txt")}

    dataset = _prepare(tmp_path, **paths, split={"validation": 0.1, "holdout": 0})

    assert dataset.num_rows == {"train": 44, "validation": 4, "holdout": 2}
    assert dataset.holdout_targets() == ["x", "y"]


def test_bytes_have_a_vocabulary_that_never_changes(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, "añ" * 400, tokens="byte")

    assert dataset.outputs.num_outputs == 256
    assert dataset.arrays.x_train[0, :3].tolist() == [97, 0xC3, 0xB1]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"context": 300}, "data.context: a window has 300 tokens, and the validation part of the text not as many"),
        ({"context": 3000}, "data.context: a window has 3000 tokens, and the train part of the text not as many"),
        ({"target": "text"}, "data.target: 'text' is the text itself; give what follows a name of its own"),
        ({"normalize": "standard"}, "data.normalize: tokens are no quantities"),
        ({"pca": 3}, "data.pca: tokens are no quantities"),
        ({"group": "page"}, "data.group: a text is cut by position"),
    ],
)
def test_settings_that_do_not_suit_text_are_told(tmp_path: Path, spec: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        _prepare(tmp_path, **spec)

    assert caught.value.faults[0].startswith(expected)


def test_another_text_is_another_fingerprint(tmp_path: Path) -> None:
    assert _prepare(tmp_path).fingerprint == _prepare(tmp_path).fingerprint != _prepare(tmp_path, TEXT[1:]).fingerprint
