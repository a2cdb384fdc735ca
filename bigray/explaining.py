"""`bigray explain`: rows of a file in any form that training or an endpoint takes, and why they are answered so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, ModelBundle
from bigray.data.sources import read_table
from bigray.errors import SpecError
from bigray.inference import BUILT_IN_FACTORIES

if TYPE_CHECKING:
    from bigray.explanation.integrated_gradients import Explanation

FloatArray = NDArray[np.float32]

MOST_ROWS = 1000
"""Of a file, when no row is named."""
PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Explained:
    """Rows of a file, explained."""

    rows: tuple[int, ...]
    """Their numbers in the file."""
    features: FloatArray
    """(rows, *input_shape), raw."""
    explanation: Explanation

    def to_json(self) -> dict[str, Any]:
        records = self.explanation.to_records()
        return {"explanations": [{"row": row, **record} for row, record in zip(self.rows, records, strict=True)]}

    def picture(self, index: int = 0) -> bytes:
        """A PNG of one of the rows: its pixels, or the bars of its columns."""
        from bigray.explanation.picture import bars, overlay

        attributions = self.explanation.attributions[index]
        if self.explanation.columns:
            return bars(dict(zip(self.explanation.columns, attributions.tolist(), strict=True)))
        if attributions.ndim != 2:
            raise SpecError(f"--out: rows of shape {attributions.shape} are no picture; use --json")
        return overlay(attributions, self.features[index])


def explain_file(
    location: str,
    file: str,
    *,
    row: int | None = None,
    baseline_row: int | None = None,
    allow_factories: Sequence[str] = BUILT_IN_FACTORIES,
) -> Explained:
    """Explain one row of a file, or all of them (driver; no Ray). `baseline_row` is compared with, instead of zero.

    Raises:
        SpecError: the file cannot be read as rows of this model, it has no such row, or too many.
        StorageError: there is no sound bundle.
        DeployError: the bundle's factory is not allowed.
    """
    bundle = ModelBundle.load(location)
    features = read_features(file, bundle.manifest)
    for option, number in (("--row", row), ("--baseline", baseline_row)):
        if number is not None and not 0 <= number < len(features):
            raise SpecError(f"{option} {number}: {file} has rows 0 to {len(features) - 1}")
    if row is None and len(features) > MOST_ROWS:
        raise SpecError(f"{file}: has {len(features):,} rows, more than {MOST_ROWS:,}; choose one by --row")
    from bigray.explanation.integrated_gradients import Explainer

    rows = tuple(range(len(features))) if row is None else (row,)
    chosen = features[list(rows)]
    baseline = None if baseline_row is None else features[baseline_row]
    return Explained(rows, chosen, Explainer(bundle, allow_factories).explain(chosen, baseline))


def read_features(file: str, manifest: BundleManifest) -> FloatArray:
    """A picture, JSON records, or any source of a job -> raw feature rows (rows, *input_shape).

    Raises:
        SpecError: it is none of them, or its rows are not of this model.
    """
    kind = Path(file).suffix.lower()
    try:
        if kind in PICTURES:
            return _read_picture(file, manifest)
        if kind == ".json":
            from bigray.serve.client import read_records

            return manifest.inputs.from_records(read_records(file))
        return manifest.inputs.from_table(read_table(file))
    except SpecError as error:
        raise SpecError([fault if file in fault else f"{file}: {fault}" for fault in error.faults]) from None


def _read_picture(file: str, manifest: BundleManifest) -> FloatArray:
    from bigray.serve.http import Refusal
    from bigray.serve.wire.images import decode_image

    try:
        return decode_image(Path(file).read_bytes(), manifest)
    except FileNotFoundError:
        raise SpecError("no such file") from None
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}") from None
    except Refusal as refusal:
        raise SpecError(refusal.message) from None
