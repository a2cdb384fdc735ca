from __future__ import annotations

import numpy as np
import pytest

from bigray.data.preprocessing import Preprocessing, fit_preprocessing


def _rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 5.0, size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "constants", "axes"),
    [((200, 4), 4, (0,)), ((50, 8, 6), 1, (0, 1, 2)), ((50, 3, 8, 6), 3, (0, 2, 3))],
    ids=["per feature", "one for a grey image", "per channel"],
)
def test_standardised_training_rows_have_mean_0_and_deviation_1(
    shape: tuple[int, ...], constants: int, axes: tuple[int, ...]
) -> None:
    x = _rows(*shape)
    fitted = fit_preprocessing("standard", x)
    result = fitted.apply(x)

    assert len(fitted.mean) == len(fitted.std) == constants
    assert result.dtype == np.float32
    assert result.shape == x.shape
    np.testing.assert_allclose(result.mean(axis=axes), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=axes), 1, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 123456.789, -1e30])
def test_a_constant_feature_becomes_0(value: float) -> None:
    x = np.column_stack([np.full(997, value), np.arange(997)]).astype(np.float32)

    result = fit_preprocessing("standard", x).apply(x)

    assert np.all(result[:, 0] == 0.0)
    assert np.isfinite(result).all()


def test_none_changes_nothing() -> None:
    x = _rows(5, 3)

    np.testing.assert_array_equal(fit_preprocessing("none", x).apply(x), x)


def test_one_row_is_standardised_as_it_is_among_others() -> None:
    x = _rows(20, 3, 4, 4)
    fitted = fit_preprocessing("standard", x)

    np.testing.assert_array_equal(fitted.apply(x[7:8])[0], fitted.apply(x)[7])


def test_the_fitted_constants_survive_json_to_the_last_bit() -> None:
    x = _rows(100, 3)
    fitted = fit_preprocessing("standard", x)

    read_back = Preprocessing.model_validate_json(fitted.model_dump_json())

    np.testing.assert_array_equal(read_back.apply(x), fitted.apply(x))
