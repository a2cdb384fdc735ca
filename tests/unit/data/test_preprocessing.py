from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from bigray.data.preprocessing import ColumnStep, Kind, Preprocessing, _circle, fit_preprocessing


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

    assert len(fitted.center) == len(fitted.scale) == constants
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


# ----- other kinds of scaling

OUTLIER = np.array([[1, 5], [2, 5], [3, 5], [4, 5], [100, 5]], np.float32)


def test_minmax_puts_training_rows_between_0_and_1() -> None:
    x = _rows(200, 4)
    fitted = fit_preprocessing("minmax", x)

    assert (fitted.apply(x).min(axis=0).tolist(), fitted.apply(x).max(axis=0).tolist()) == ([0] * 4, [1] * 4)
    assert fitted.apply(2 * x).max() > 1


def test_robust_scaling_goes_by_the_quartiles_which_an_outlier_does_not_move() -> None:
    np.testing.assert_allclose(fit_preprocessing("robust", OUTLIER).apply(OUTLIER)[:, 0], [-1, -0.5, 0, 0.5, 48.5])


@pytest.mark.parametrize("kind", ["standard", "minmax", "robust"])
def test_a_constant_feature_becomes_0_by_every_scaling(kind: Kind) -> None:
    assert fit_preprocessing(kind, OUTLIER).apply(OUTLIER)[:, 1].tolist() == [0] * 5


@pytest.mark.parametrize("shape", [(1500, 3, 4, 4), (50, 8, 6)], ids=["colour", "grey"])
@pytest.mark.parametrize("kind", ["standard", "minmax", "robust"])
def test_pictures_as_bytes_are_fitted_as_numbers_are(kind: Kind, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    as_bytes, as_numbers = fit_preprocessing(kind, pixels), fit_preprocessing(kind, pixels.astype(np.float32))

    np.testing.assert_allclose(as_bytes.center, as_numbers.center, rtol=1e-9)
    np.testing.assert_allclose(as_bytes.scale, as_numbers.scale, rtol=1e-9)


# ----- columns

NAN = float("nan")
STEPS = (
    ColumnStep(name="size", fill=2.0, indicator=True),
    ColumnStep(name="colour", kind="category", fill=1.0, indicator=True, num_categories=3),
    ColumnStep(name="shop", kind="category", num_categories=4, encode="embedding"),
    ColumnStep(name="day", kind="date"),
)
CODES = np.array([[1, 0, 3, 0], [NAN, NAN, -1, 365.2425], [3, -1, 0, 7 / 4]], np.float32)


def test_each_column_becomes_its_outputs_in_order() -> None:
    prepared = Preprocessing(steps=STEPS).apply(CODES)

    assert Preprocessing(steps=STEPS).output_shape((4,)) == (12,) == prepared.shape[1:]
    np.testing.assert_array_equal(prepared[:, :2], [[1, 0], [2, 1], [3, 0]])  # size, and whether it was missing
    np.testing.assert_array_equal(prepared[:, 2:6], [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])  # colour
    np.testing.assert_array_equal(prepared[:, 6], [3, -1, 0])  # shop
    np.testing.assert_array_equal(prepared[:, 7], CODES[:, 3])  # day, in the year, in the week
    np.testing.assert_allclose(prepared[:2, 8:10], [[0, 1], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(prepared[[0, 2], 10:], [[0, 1], [1, 0]], atol=1e-6)
    assert Preprocessing(steps=STEPS).embeddings == ((6, 4),)


def test_a_category_that_is_missing_and_has_no_fill_counts_as_unseen() -> None:
    for encode, expected in (("one_hot", [0, 0]), ("embedding", [-1])):
        step = ColumnStep(name="a", kind="category", num_categories=2, encode=encode)  # type: ignore[arg-type]
        assert Preprocessing(steps=(step,)).apply(np.array([[NAN]], np.float32)).tolist() == [expected]


@pytest.mark.parametrize("kind", ["standard", "minmax", "robust"])
def test_only_numbers_and_days_are_scaled(kind: Kind) -> None:
    generator = np.random.default_rng(0)
    codes = np.stack(
        [generator.normal(9, 4, 300), *generator.integers(-1, 3, (2, 300)), generator.integers(19_000, 20_000, 300)]
    ).T.astype(np.float32)
    codes[::7, 0] = NAN
    fitted, plain = fit_preprocessing(kind, codes, STEPS), Preprocessing(steps=STEPS)

    changed = np.flatnonzero((fitted.apply(codes) != plain.apply(codes)).any(axis=0))

    assert changed.tolist() == [0, 7]


def test_sines_and_cosines_are_right_far_beyond_float32() -> None:
    turns = np.random.default_rng(0).uniform(-3, 3, 10_000)

    sine, cosine = _circle(turns)

    np.testing.assert_allclose(sine, np.sin(2 * np.pi * turns), atol=1e-11)
    np.testing.assert_allclose(cosine, np.cos(2 * np.pi * turns), atol=1e-11)


# ----- principal components


def _correlated(rows: int, features: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    spread = np.geomspace(10, 0.1, features)
    return (generator.normal(size=(rows, features)) * spread @ generator.normal(size=(features, features))).astype("f4")


def test_components_are_those_of_largest_variance_and_not_correlated() -> None:
    x = _correlated(400, 12)
    fitted = fit_preprocessing("none", x, num_components=5)
    projected = fitted.apply(x).astype(np.float64)

    variances = np.linalg.eigvalsh(np.cov(x.astype(np.float64).T))[::-1]
    assert fitted.output_shape((12,)) == projected.shape[1:] == (5,)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(projected.T), np.diag(variances[:5]), atol=1e-3 * variances[0], rtol=1e-4)


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_the_rows() -> None:
    x = _correlated(100, 6)

    there, back = fit_preprocessing("none", x, num_components=6), fit_preprocessing("none", x[::-1], num_components=6)

    np.testing.assert_allclose(there.apply(x), back.apply(x), atol=1e-3)


def test_pictures_can_be_projected() -> None:
    x = _rows(50, 2, 4, 4)

    assert fit_preprocessing("standard", x, num_components=3).apply(x).shape == (50, 3)


FITTED = {
    "standard": lambda: (fit_preprocessing("standard", _rows(128, 300)), _rows(128, 300)),
    "components": lambda: (fit_preprocessing("minmax", _rows(128, 300), num_components=32), _rows(128, 300)),
    "few components": lambda: (fit_preprocessing("none", _rows(128, 7), num_components=1), _rows(128, 7)),
    "columns": lambda: (fit_preprocessing("robust", _many_codes(), STEPS), _many_codes()),
    "columns, components": lambda: (fit_preprocessing("standard", _many_codes(), STEPS, 6), _many_codes()),
}


def _many_codes() -> np.ndarray:
    codes = (
        np.tile(CODES, (43, 1))[:128] + np.array([0, 0, 0, 1], np.float32) * np.arange(128, dtype=np.float32)[:, None]
    )
    return codes.astype(np.float32)


@pytest.mark.parametrize("name", FITTED)
def test_the_bits_of_a_row_do_not_depend_on_its_batch_or_on_how_it_lies_in_memory(name: str) -> None:
    fitted, x = FITTED[name]()
    expected = fitted.apply(x).tobytes()
    function = Preprocessing.model_validate_json(fitted.model_dump_json()).function()

    for size in (1, 3, 64):
        parts = [function(x[start : start + size]) for start in range(0, len(x), size)]
        assert b"".join(part.tobytes() for part in parts) == expected, size
    strided = np.asfortranarray(np.repeat(x, 2, axis=0))[::2]
    assert np.ascontiguousarray(function(strided)).tobytes() == expected


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "standard", "center": [0.0], "scale": []},
        {"kind": "standard", "center": [0.0], "scale": [0.0]},
        {"kind": "standard", "center": [0.0, 0.0], "scale": [1.0, 1.0], "steps": [{"name": "a"}]},
        {"components": "AAAA"},
        {"components": "AAAAAAAA", "num_components": 3, "offset": [0.0, 0.0, 0.0]},
        {"components": "not base64", "num_components": 1, "offset": [0.0]},
        {"num_components": 1, "offset": [0.0]},
        {"mean": [0.0], "std": [1.0]},
    ],
)
def test_constants_that_do_not_fit_together_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing.model_validate(document)
