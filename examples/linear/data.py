"""scikit-learn's diabetes data: 442 patients, ten measurements, disease progression after a year (Efron 2004)."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

COLUMNS = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


def load() -> dict[str, np.ndarray]:
    """Ten feature columns and `progression`. Read from scikit-learn's own files: importing the package takes 2 s."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the linear example needs scikit-learn: pip install 'bigray[examples]'")
    folder = Path(spec.origin).parent / "datasets" / "data"
    with gzip.open(folder / "diabetes_data_raw.csv.gz") as file:
        features = np.loadtxt(file)
    with gzip.open(folder / "diabetes_target.csv.gz") as file:
        target = np.loadtxt(file)
    return {**dict(zip(COLUMNS, features.T, strict=True)), "progression": target}
