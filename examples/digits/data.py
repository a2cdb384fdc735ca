"""scikit-learn's 1,797 real handwritten digits, 8x8 grey levels of 0 to 16 (UCI optical digits, test part)."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np


def load() -> dict[str, np.ndarray]:
    """Columns `image` (8, 8) and `label` (0-9). Read from scikit-learn's own file: importing the package takes 2 s."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the digits example needs scikit-learn: pip install 'bigray[examples]'")
    rows = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return {"image": rows[:, :-1].reshape(-1, 8, 8).astype(np.float32), "label": rows[:, -1].astype(np.int64)}
