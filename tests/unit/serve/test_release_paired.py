from __future__ import annotations

import numpy as np
import pytest

from bigray.bundle import OutputSchema
from bigray.inference import Predictions
from bigray.serve.release.paired import compare_paired, row_losses


def _flips(size: int, share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(size) < share).astype(np.float64)


def test_a_clearly_worse_candidate_is_found_out() -> None:
    result = compare_paired(_flips(1000, 0.2, 0), _flips(1000, 0.1, 1))

    assert result.rows == 1000
    assert result.difference == pytest.approx(result.candidate - result.live)
    assert result.p_value < 0.001
    assert result.is_worse()


def test_a_better_candidate_is_never_worse() -> None:
    result = compare_paired(_flips(1000, 0.1, 1), _flips(1000, 0.2, 0))

    assert result.p_value > 0.99
    assert not result.is_worse(alpha=1.0)


def test_versions_that_err_on_the_same_rows_are_equal() -> None:
    losses = _flips(100, 0.3, 0)

    assert compare_paired(losses, losses).p_value == 1.0


def test_the_p_value_is_the_share_of_signs_that_look_as_bad() -> None:
    """Of six rows that differ, five are worse: 7 of the 64 ways to choose their signs are as bad."""
    candidate, live = np.array([1.0, 1, 1, 1, 1, 0, 0]), np.array([0.0, 0, 0, 0, 0, 1, 0])

    assert compare_paired(candidate, live).p_value == pytest.approx(7 / 64, abs=0.01)


def test_chance_alone_seldom_refuses() -> None:
    results = [compare_paired(_flips(200, 0.1, 2 * i), _flips(200, 0.1, 2 * i + 1), draws=500) for i in range(200)]

    assert sum(result.is_worse(0.05) for result in results) <= 20


def test_values_are_compared_by_squared_error() -> None:
    truth = np.random.default_rng(0).normal(size=300)
    good = Predictions(None, None, (truth + 0.1).astype(np.float32))
    bad = Predictions(None, None, (truth + 0.2).astype(np.float32))

    result = compare_paired(row_losses(bad, truth), row_losses(good, truth))

    assert (result.candidate, result.live) == (pytest.approx(0.04, rel=1e-3), pytest.approx(0.01, rel=1e-3))
    assert result.is_worse()


def test_labels_are_right_or_wrong() -> None:
    answers = Predictions(["cat", "dog", "cat"], np.zeros((3, 2), np.float32), None)

    assert row_losses(answers, ["cat", "cat", "cat"]).tolist() == [0, 1, 0]


def test_the_same_rows_give_the_same_p_value() -> None:
    candidate, live = _flips(500, 0.12, 0), _flips(500, 0.1, 1)

    assert compare_paired(candidate, live) == compare_paired(candidate, live)
    assert compare_paired(candidate, live, draws=10**9).p_value == compare_paired(candidate, live).p_value


def test_losses_of_other_rows_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(2,\)"):
        compare_paired(np.zeros(3), np.zeros(2))


def test_the_loss_of_a_row_of_labels_is_the_share_that_is_wrong() -> None:
    given = Predictions([["a", "b"], [], ["c"]], np.zeros((3, 4), np.float32), None)

    np.testing.assert_array_equal(row_losses(given, [["a"], [], ["a", "b"]]), [0.25, 0.0, 0.75])


def test_the_loss_of_a_token_is_how_little_it_was_expected() -> None:
    outputs = OutputSchema(task="language", num_outputs=2, target="next", class_names=("a", "b"))
    probabilities = np.array([[0.25, 0.75], [1.0, 0.0], [np.nan, 0.5], [0.5, 0.5]], np.float32)
    losses = row_losses(Predictions(["b", "a", "a", "a"], probabilities, None), ["a", "a", "a", "c"], outputs)

    np.testing.assert_allclose(losses[:2], [np.log(4), 0.0])
    assert np.isnan(losses[2])
    assert np.isfinite(losses[3]) and losses[3] > 15
