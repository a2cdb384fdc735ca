"""What `bigray data` says of a job's rows before anything is trained on them: pure functions of tables (driver)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.data.features import column_to_numpy
from bigray.data.splitting import row_hashes

FENCE = 3.0
"""Outliers are beyond this many interquartile ranges from the quartiles (Tukey 1977: "far out")."""
SHOWN_VALUES = 5
SHEET_COLUMNS, SHEET_ROWS, CELL = 10, 6, 64
"""Pictures of the sheet, and their edge in pixels."""


@dataclass(frozen=True)
class ColumnReport:
    """One column over all parts."""

    name: str
    kind: str
    """number, category, date, image, text or tensor; "target" has its own line."""
    type: str
    """Of Arrow."""
    missing: int
    """Nulls, NaN and empty strings."""
    distinct: int | None = None
    """None for tensors and pictures."""
    low: float | None = None
    mean: float | None = None
    high: float | None = None
    outliers: int = 0
    most_common: tuple[tuple[str, int], ...] = ()
    """Of categories: value and rows."""


@dataclass(frozen=True)
class DataReport:
    """A job's data at a glance."""

    rows: dict[str, int]
    """By part: train, validation, holdout."""
    columns: tuple[ColumnReport, ...]
    target: str
    classes: dict[str, dict[str, int]]
    """By class, its rows in each part; empty where the target is a number."""
    duplicates: int
    """Rows that are there before, target and all."""
    contradictions: int
    """Groups of rows with equal features and unequal targets."""
    leaks: dict[str, int]
    """By pair of parts ("train, holdout"), rows of the second whose features are in the first too."""
    examples: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should look at before training, one line each."""
        return tuple(_warnings(self))


def inspect(parts: Mapping[str, pa.Table], target: str, kinds: Mapping[str, str], *, is_classes: bool) -> DataReport:
    """Look at each part of a split; `kinds` has the feature columns, in order, each with its kind."""
    whole = pa.concat_tables([table.select([*kinds, target]) for table in parts.values()])
    features = {name: row_hashes(table.select(list(kinds))) for name, table in parts.items()}
    rows = row_hashes(whole)
    return DataReport(
        rows={name: table.num_rows for name, table in parts.items()},
        columns=tuple(_inspect_column(whole, name, kind) for name, kind in kinds.items()),
        target=target,
        classes=_classes(parts, target) if is_classes else {},
        duplicates=len(rows) - len(np.unique(rows)),
        contradictions=_contradictions(np.concatenate(list(features.values())), rows),
        leaks=_leaks(features),
        examples=tuple(_examples(next(iter(parts.values())), kinds, target)),
    )


def image_sheet(images: NDArray[np.uint8], labels: Sequence[str]) -> bytes:
    """Some pictures (rows, C, H, W), one of each class after the other, with their classes, as the bytes of a PNG."""
    from PIL import Image, ImageDraw

    chosen = _one_of_each(labels)
    height = CELL + 12
    lines = -(-len(chosen) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * (CELL + 4), lines * (height + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        left, top = place % SHEET_COLUMNS * (CELL + 4) + 2, place // SHEET_COLUMNS * (height + 4) + 2
        pixels = images[index].transpose(1, 2, 0)
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
        pen.text((left, top + CELL), labels[index][:10], fill="black")
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _inspect_column(table: pa.Table, name: str, kind: str) -> ColumnReport:
    column = table.column(name)
    found = ColumnReport(name=name, kind=kind, type=str(column.type), missing=column.null_count)
    if kind == "number":
        return _inspect_numbers(found, column_to_numpy(table, name).astype(np.float64))
    if kind in ("category", "date"):
        return _inspect_values(found, ["" if value is None else str(value) for value in column.to_pylist()])
    return found


def _inspect_numbers(found: ColumnReport, values: NDArray[np.float64]) -> ColumnReport:
    known = values[np.isfinite(values)]
    described = asdict(found) | {"missing": len(values) - len(known), "distinct": len(np.unique(known))}
    if len(known):
        first, third = np.percentile(known, [25, 75])
        reach = FENCE * (third - first)
        # of a column that is nearly always the same, everything else would be far out
        outliers = int(((known < first - reach) | (known > third + reach)).sum()) if reach > 0 else 0
        described |= {"low": known.min().item(), "mean": known.mean().item(), "high": known.max().item()}
        described |= {"outliers": outliers}
    return ColumnReport(**described)


def _inspect_values(found: ColumnReport, values: Sequence[str]) -> ColumnReport:
    counts = Counter(value for value in values if value)
    most_common = tuple(counts.most_common(SHOWN_VALUES))
    missing = sum(not value for value in values)
    return ColumnReport(**(asdict(found) | {"missing": missing, "distinct": len(counts), "most_common": most_common}))


def _classes(parts: Mapping[str, pa.Table], target: str) -> dict[str, dict[str, int]]:
    counts = {name: Counter(map(str, table.column(target).to_pylist())) for name, table in parts.items()}
    names = sorted(set().union(*counts.values()))
    return {name: {part: counts[part][name] for part in parts} for name in names}


def _contradictions(features: NDArray[np.uint64], rows: NDArray[np.uint64]) -> int:
    different = np.unique(np.stack([features, rows], axis=1), axis=0)
    _, counts = np.unique(different[:, 0], return_counts=True)
    return int((counts > 1).sum())


def _leaks(features: Mapping[str, NDArray[np.uint64]]) -> dict[str, int]:
    names = list(features)
    pairs = [(one, other) for place, one in enumerate(names) for other in names[place + 1 :]]
    found = {f"{one}, {other}": int(np.isin(features[other], features[one]).sum()) for one, other in pairs}
    return {pair: count for pair, count in found.items() if count}


def _examples(table: pa.Table, kinds: Mapping[str, str], target: str) -> list[dict[str, Any]]:
    readable = [name for name, kind in kinds.items() if kind in ("number", "category", "date", "text")]
    rows: list[dict[str, Any]] = table.select([*readable, target]).slice(0, 3).to_pylist()
    return rows


def _one_of_each(labels: Sequence[str]) -> list[int]:
    """Rows such that the classes take turns."""
    seen: Counter[str] = Counter()
    turns = []
    for index, label in enumerate(labels):
        turns.append((seen[label], label, index))
        seen[label] += 1
    return [index for _, _, index in sorted(turns)[: SHEET_COLUMNS * SHEET_ROWS]]


def _warnings(report: DataReport) -> list[str]:
    found = []
    for pair, count in report.leaks.items():
        one, other = pair.split(", ")
        found.append(f"{count:,} rows of {other} have the same features as rows of {one}: its figures will be too good")
    if report.contradictions:
        found.append(f"{report.contradictions:,} groups of rows have equal features and different targets")
    if report.duplicates:
        found.append(f"{report.duplicates:,} rows are there more than once")
    for column in report.columns:
        if column.distinct == 1:
            found.append(f"column '{column.name}' has one value in all rows, which teaches nothing")
        if column.missing == sum(report.rows.values()):
            found.append(f"column '{column.name}' is empty")
    sizes = {name: sum(rows.values()) for name, rows in report.classes.items()}
    if sizes and max(sizes.values()) > 10 * min(sizes.values()):
        least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        found.append(
            f"class '{most}' has {sizes[most]:,} rows and class '{least}' {sizes[least]:,}: "
            f"accuracy says little, consider training.class_weights = 'balanced'"
        )
    for name, rows in report.classes.items():
        if absent := [part for part, count in rows.items() if not count and report.rows[part]]:
            found.append(f"class '{name}' has no rows in {' and '.join(absent)}")
    return found
