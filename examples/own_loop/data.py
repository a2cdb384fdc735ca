"""Three spirals wound into each other, in the plane: no straight line tells them apart, a small network does."""

import numpy as np


def load(rows: int = 1800, noise: float = 0.15, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns `x`, `y` and `arm` (0-2)."""
    generator = np.random.default_rng(seed)
    arm = np.arange(rows) % 3
    along = generator.uniform(0.3, 1.0, rows)
    angle = 2 * np.pi * (arm / 3 + along) + generator.normal(scale=noise, size=rows)
    return {"x": along * np.cos(angle), "y": along * np.sin(angle), "arm": arm}
