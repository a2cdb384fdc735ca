from __future__ import annotations

import math

import pytest

from bigray.intervals import mean_interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2, column 0.975
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (100, 1.984)],
)
def test_the_quantiles_are_those_of_the_table(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-4)


def test_the_interval_of_one_value_is_the_value_and_of_none_nothing() -> None:
    assert mean_interval([0.5]) == (0.5, 0.5)
    assert all(math.isnan(end) for end in mean_interval([]))


def test_the_interval_widens_with_the_standard_error_of_the_mean() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])  # standard deviation 1, t(2) = 4.302653

    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
