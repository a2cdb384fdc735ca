"""A job's data as `bigray data` shows it: read, cleaned and split as for training, with nothing fitted or trained.

Rows that training would refuse for a gap are shown with it: to find it is what the command is for. Driver, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.data.dataset import CleanRows, Dataset, prepare_dataset, read_clean
from bigray.data.inspection import DataReport, image_sheet, inspect
from bigray.data.splitting import Split
from bigray.data.targets import Targets
from bigray.data.text import decode, level_of
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, DataSpec

SHOWN_TOKENS = 80
MOST_PICTURES = 2000
"""Rows of which a sheet's pictures are chosen."""
PARTS = ("train", "validation", "holdout")


@dataclass(frozen=True)
class TextReport:
    """A text at a glance: its parts are stretches of it, one after the other."""

    rows: dict[str, int]
    """By part, windows."""
    tokens: dict[str, int]
    """By part; what fills no window is left out."""
    context: int
    level: str
    """character or byte."""
    vocabulary: tuple[str, ...]
    example: str

    @property
    def warnings(self) -> tuple[str, ...]:
        absent = [part for part, count in self.rows.items() if not count]
        return (f"no window of the text is in {' and '.join(absent)}",) if absent else ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TableReport:
    """What the rows hold, and what of the job's settings they meet."""

    task: BuiltInTask
    report: DataReport
    shape: tuple[int, ...] = ()
    """Of one value of a tensor column, such as a picture's (3, 32, 32)."""
    target_range: tuple[float, float, float] | None = None
    """Least, mean and largest value of a regression's target."""
    notes: tuple[str, ...] = ()
    """What was left out, one line each."""
    refusals: tuple[str, ...] = ()
    """What training stops at."""
    _rows: CleanRows | None = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> dict[str, int]:
        return self.report.rows

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.refusals, *self.notes, *self.report.warnings)

    def to_json(self) -> dict[str, Any]:
        found = self.report.to_json()
        return {**found, "task": self.task, "shape": self.shape, "target_range": self.target_range}

    def sheet(self) -> bytes:
        """Pictures of the training rows, the classes taking turns, as the bytes of a PNG.

        Raises:
            SpecError: the inputs are no pictures.
        """
        assert self._rows is not None, "is there unless it was made by hand"
        if self._rows.tensor is None or not is_picture(self.shape):
            raise SpecError(f"--sheet: is for images, and the inputs are {_inputs(self)}")
        chosen = self._rows.split.train[:MOST_PICTURES]
        labels = self._rows.table.column(self.report.target).take(pa.array(chosen)).to_pylist()
        return image_sheet(to_pixels(self._rows.tensor[chosen]), [str(label) for label in labels])


def look_at(spec: DataSpec, task: BuiltInTask, positive: str | int | None = None) -> TableReport | TextReport:
    """Read a job's data and describe it.

    Raises:
        SpecError: it cannot be read, or holds what is neither to be trained on nor to be described; a line each.
    """
    if task == "language":
        dataset = prepare_dataset(spec, task)
        if dataset.inputs.columns[0].kind == "text":
            return _describe_text(dataset, spec)
    rows = read_clean(_tolerant(spec), task, positive)
    parts = {name: rows.content.take(pa.array(numbers)) for name, numbers in _parts(rows.split).items()}
    report = inspect(parts, spec.target, rows.kinds, is_classes=False)
    report = replace(
        report,
        classes=_classes(rows),
        columns=tuple(replace(column, type=_type_name(rows.table, column.name)) for column in report.columns),
    )
    return TableReport(
        task=task,
        report=report,
        shape=() if rows.tensor is None else rows.tensor.shape[1:],
        target_range=_range(rows.targets) if task == "regression" else None,
        notes=rows.notes,
        refusals=tuple(_refusals(report, spec)),
        _rows=rows,
    )


def is_picture(shape: Sequence[int]) -> bool:
    """Whether a tensor (H, W) or (C, H, W) can be drawn."""
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def to_pixels(tensor: NDArray[Any]) -> NDArray[np.uint8]:
    """(rows, H, W) or (rows, C, H, W) -> (rows, C, H, W) from 0 to 255: bytes as they are, else by range."""
    images = tensor[:, None] if tensor.ndim == 3 else tensor
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())
    return np.round((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _tolerant(spec: DataSpec) -> DataSpec:
    """The same, but that gaps stop nothing. What fills them is of no account: nothing is fitted."""
    columns = {
        name: column.model_copy(update={"missing": "median"}) if column.missing == "stop" else column
        for name, column in spec.columns.items()
    }
    return spec.model_copy(update={"columns": columns, **({"missing": "median"} if spec.missing == "stop" else {})})


def _refusals(report: DataReport, spec: DataSpec) -> Iterable[str]:
    scalars = [column for column in report.columns if column.kind in ("number", "category", "date")]
    for column in scalars:
        if column.missing and spec.of_column(column.name).missing == "stop":
            yield (
                f"column '{column.name}' has {column.missing:,} empty values, which training refuses: "
                f"fill them in the source, or say what to do in data.missing"
            )


def _parts(split: Split) -> dict[str, NDArray[np.int64]]:
    return dict(zip(PARTS, (split.train, split.validation, split.holdout), strict=True))


def _classes(rows: CleanRows) -> dict[str, dict[str, int]]:
    """Rows of each class (of each label) in each part; none where targets are values or tokens."""
    if rows.outputs.task not in ("classification", "binary", "multilabel"):
        return {}
    names, targets = rows.outputs.class_names, rows.targets
    has_it = targets.astype(bool) if targets.ndim == 2 else targets[:, None] == np.arange(len(names))
    counts = {part: has_it[numbers].sum(axis=0) for part, numbers in _parts(rows.split).items()}
    return {str(name): {part: int(counts[part][number]) for part in counts} for number, name in enumerate(names)}


def _type_name(table: pa.Table, name: str) -> str:
    """Of a tensor or a dictionary, the type of its values: a tensor's shape is told beside it."""
    kind = table.schema.field(name).type
    has_values = isinstance(kind, pa.FixedShapeTensorType) or pa.types.is_dictionary(kind)
    return str(kind.value_type if has_values else kind)


def _range(targets: Targets) -> tuple[float, float, float]:
    return float(targets.min()), float(targets.mean(dtype=np.float64)), float(targets.max())


def _describe_text(dataset: Dataset, spec: DataSpec) -> TextReport:
    vocabulary = dataset.inputs.columns[0].categories
    strides = {"train": spec.stride or spec.context}
    tokens = {
        part: (count - 1) * strides.get(part, spec.context) + spec.context if count else 0
        for part, count in dataset.num_rows.items()
    }
    first = dataset.arrays.x_train[0][:SHOWN_TOKENS].astype(np.int64)
    return TextReport(
        rows=dataset.num_rows,
        tokens=tokens,
        context=spec.context,
        level=level_of(vocabulary),
        vocabulary=vocabulary,
        example=decode(first, vocabulary),
    )


def _inputs(found: TableReport) -> str:
    columns = found.report.columns
    return f"of shape {found.shape}" if found.shape else f"{len(columns)} column{'s' if len(columns) > 1 else ''}"
