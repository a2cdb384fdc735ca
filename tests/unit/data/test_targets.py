from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigray.data.sources import table_from_arrays
from bigray.data.splitting import row_hashes
from bigray.data.targets import encode_targets, true_answers, untrained_classes
from bigray.errors import SpecError
from bigray.specs import BuiltInTask


def _table(values: Any) -> pa.Table:
    return pa.table({"y": values})


@pytest.mark.parametrize(
    ("values", "positive", "names", "numbers"),
    [
        (["ill", "well", "ill"], None, ("ill", "well"), [0, 1, 0]),
        (["ill", "well", "ill"], "ill", ("well", "ill"), [1, 0, 1]),
        ([0.0, 1.0, 1.0], None, (0, 1), [0, 1, 1]),
        ([True, False, True], 0, (1, 0), [0, 1, 0]),
    ],
)
def test_the_positive_class_is_the_second_or_the_one_that_is_named(
    values: list[Any], positive: str | int | None, names: tuple[str | int, ...], numbers: list[int]
) -> None:
    targets, outputs = encode_targets(_table(values), "y", "binary", positive)

    assert (outputs.class_names, outputs.num_outputs, outputs.num_probabilities) == (names, 1, 2)
    assert targets.tolist() == numbers
    assert true_answers(_table(values), outputs) == [names[number] for number in numbers]


LABELS: dict[str, Any] = {
    "lists": [["sea", "sun"], [], ["sun"]],
    "lists of one length": [["sea", "sun"], ["sun", "tree"], ["sun", "sea"]],
    "text cells": ["sea|sun", "", " sun | sun"],
    "a dictionary of text cells": pa.array(["sea|sun", "", "sun"]).dictionary_encode(),
    "numbers": [[3, 7], [3], []],
}


@pytest.mark.parametrize("values", LABELS.values(), ids=LABELS)
def test_the_labels_of_a_row_come_back_as_they_were_given(values: Any) -> None:
    targets, outputs = encode_targets(_table(values), "y", "multilabel")
    answers = true_answers(_table(values), outputs)

    assert targets.dtype == np.int8
    assert outputs.num_outputs == len(outputs.class_names) == targets.shape[1]
    assert list(outputs.class_names) == sorted(outputs.class_names, key=str)
    assert answers == [[outputs.class_names[i] for i in np.flatnonzero(row)] for row in targets]
    assert len(np.unique(row_hashes(_table(values)))) == len({tuple(row) for row in _table(values)["y"].to_pylist()})


def test_a_table_of_marks_names_its_labels_by_their_number() -> None:
    marks = np.array([[1, 0, 1], [0, 1, 0]])
    targets, outputs = encode_targets(table_from_arrays({"y": marks}), "y", "multilabel")

    np.testing.assert_array_equal(targets, marks)
    assert true_answers(table_from_arrays({"y": marks}), outputs) == [[0, 2], [1]]


def test_the_tokens_of_a_language_are_answered_by_the_last_one() -> None:
    table = table_from_arrays({"y": np.array([[0, 4, 2], [1, 1, 3]])})
    targets, outputs = encode_targets(table, "y", "language")

    assert (targets.shape, outputs.num_outputs) == ((2, 3), 5)
    assert true_answers(table, outputs) == [2, 3]
    assert true_answers(table, outputs.model_copy(update={"class_names": tuple("abcde")})) == ["c", "d"]


def test_what_no_training_row_has_is_named() -> None:
    targets, outputs = encode_targets(_table(["a", "b", "c"]), "y", "classification")
    marks, labels = encode_targets(_table(["a", "b|c", "c"]), "y", "multilabel")

    assert untrained_classes(targets[:2], outputs) == ["c"]
    assert untrained_classes(marks[:2], labels) == []
    assert untrained_classes(marks[:1], labels) == ["b", "c"]


BAD: list[tuple[BuiltInTask, Any, str | None, str]] = [
    ("binary", ["a", "b", "c"], None, "has 3 classes .a, b, c.; binary needs exactly two"),
    ("binary", ["a", "a"], None, "single class"),
    ("binary", ["a", "b"], "yes", "training.positive: 'y' has no class 'yes', only 'a' and 'b'"),
    ("binary", [0.0, float("nan"), 1.0], None, "NaN or infinite values, first in row 1 of 1"),
    ("regression", [0.5, float("inf")], None, "NaN or infinite values, first in row 1 of 1"),
    ("multilabel", ["a", "a"], None, "has 1 labels in all"),
    ("multilabel", [1.5, 2.5], None, "multilabel needs lists, or text such as"),
    ("multilabel", [[1.5], [2.5]], None, "lists of text or of whole numbers"),
    ("multilabel", [["a|b"], ["c"]], None, "has the label 'a|b'; use text without"),
    ("language", [["a"], ["b"]], None, "no rows of tokens"),
]


@pytest.mark.parametrize(
    ("task", "values", "positive", "expected"), BAD, ids=[f"{bad[0]} {bad[3][:20]}" for bad in BAD]
)
def test_a_target_that_does_not_suit_its_task_is_refused(
    task: BuiltInTask, values: Any, positive: str | None, expected: str
) -> None:
    with pytest.raises(SpecError, match=expected.replace("|", r"\|")):
        encode_targets(_table(values), "y", task, positive)
