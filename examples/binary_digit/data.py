"""scikit-learn's 1,797 handwritten digits with one question: is it a zero? 178 of them are."""

import numpy as np

from examples.digits.data import load as load_digits


def load() -> dict[str, np.ndarray]:
    """Columns `image` (8, 8) and `digit`: "zero" or "other"."""
    digits = load_digits()
    return {"image": digits["image"], "digit": np.where(digits["label"] == 0, "zero", "other")}
