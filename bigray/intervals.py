"""How far the mean of a few values can be trusted: Student's t. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean; of one value that value, which says nothing of how it varies; NaN of none."""
    if not values:
        return (math.nan, math.nan)
    mean = fmean(values)
    if len(values) == 1:
        return (mean, mean)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return (mean - half, mean + half)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Half the width, in standard errors, of the two-sided interval of Student's t. By bisection, to 1e-9."""
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < confidence:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _t_within(middle, degrees) >= confidence else (middle, high)
    return high


def _t_within(t: float, degrees: int) -> float:
    """Probability of |T| <= t, by the finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0
    for index in range(2 if is_odd else 1, degrees, 2):  # the term's denominator
        total += term
        term *= cosine**2 * index / (index + 1)
    return (2 / math.pi) * (angle + sine * total) if is_odd else sine * total
