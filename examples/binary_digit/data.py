"""scikit-learn's 1,797 handwritten digits with one question: is it an eight? 174 of them are."""

import numpy as np

from examples.digits.data import load as load_digits


def load() -> dict[str, np.ndarray]:
    """Columns `image` (8, 8) and `digit`: "eight" or "other"."""
    digits = load_digits()
    return {"image": digits["image"], "digit": np.where(digits["label"] == 8, "eight", "other")}
