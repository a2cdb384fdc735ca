"""Whether the rows of a source fit in memory, by what its footers say, and what cannot be done where they do not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bigray.data import dataset as whole
from bigray.data.features import is_binary
from bigray.data.images import probe_size
from bigray.data.schema import Kind, infer_kinds
from bigray.data.streaming.source import ParquetRows, find_rows
from bigray.errors import SpecError
from bigray.host_memory import host_memory, shown
from bigray.specs import BuiltInTask, DataSpec

SHARE_OF_FREE = 0.5
"""Of the free memory, which rows may take where the job does not say."""
COPIES = 6.0
"""Of all inputs as float32 that are in memory at once, at most, while rows are prepared there; measured."""
BATCH_BYTES = 4 * 2**20
"""Of a batch as the source has it."""
MOST_BATCH_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class StreamedSource:
    """Rows that are to be gone through in batches."""

    rows: ParquetRows
    features: tuple[str, ...]
    kinds: dict[str, Kind]
    """Of each input column, by the first rows."""
    shape: tuple[int, ...]
    """Of the value of a tensor column or picture; `()` of scalar columns."""
    needed_bytes: int
    """About what they would take in memory."""
    batch_rows: int


def to_stream(spec: DataSpec, task: BuiltInTask) -> StreamedSource | None:
    """The source where it is Parquet that needs more memory than it may have; None where it is to be read as a whole.

    What is wrong with a source is left to who reads it as a whole, which tells it best.

    Raises:
        SpecError: it is too large to be read as a whole, and the job asks for what needs all rows; one line each.
    """
    free_bytes = host_memory().free_bytes
    budget = SHARE_OF_FREE * free_bytes if spec.memory_gb is None else spec.memory_gb * 1e9
    try:
        source = _described(spec)
    except SpecError:
        return None
    if source is None or source.needed_bytes <= budget:
        return None
    if faults := list(_against(spec, task, source)):
        # a guess at what may be used is no reason to refuse what still fits
        if spec.memory_gb is None and source.needed_bytes <= free_bytes:
            return None
        raise SpecError(faults)
    return source


def _described(spec: DataSpec) -> StreamedSource | None:
    if (rows := find_rows(spec)) is None:
        return None
    head = rows.head
    features = spec.features or whole._default_features(head, spec)
    if list(whole._column_faults(head, spec, features)):
        return None
    kinds = infer_kinds(head, features, spec)
    shape = _shape(rows, kinds, spec)
    raw_bytes, code_bytes = head.nbytes / head.num_rows, 4 * (math.prod(shape) if shape else len(kinds))
    return StreamedSource(
        rows=rows,
        features=features,
        kinds=kinds,
        shape=shape,
        needed_bytes=int(rows.num_rows * (raw_bytes + COPIES * code_bytes)),
        batch_rows=max(1, min(MOST_BATCH_ROWS, int(BATCH_BYTES / max(raw_bytes, code_bytes)))),
    )


def _shape(rows: ParquetRows, kinds: dict[str, Kind], spec: DataSpec) -> tuple[int, ...]:
    name = next(iter(kinds))
    if kinds[name] == "image" and is_binary(rows.head.schema.field(name).type):
        size, channels = probe_size(rows.head.column(name))
        return (spec.image_channels or channels, *(spec.image_size or size))
    return whole.column_shape(rows.head, name) if kinds[name] in ("image", "tensor") else ()


def _against(spec: DataSpec, task: BuiltInTask, source: StreamedSource) -> Iterable[str]:
    """What needs all rows at once: one line each, with the way out."""
    rest = (
        f"needs all rows in memory, about {shown(source.needed_bytes)}",
        f"raise data.memory_gb to {math.ceil(source.needed_bytes / 1e9)} where there is as much",
    )

    def line(place: str, way_out: str) -> str:
        return f"{place} {rest[0]}; {f'{way_out}, or ' if way_out else ''}{rest[1]}"

    for name, kind in source.kinds.items():
        if kind in ("number", "date") and spec.of_column(name).missing == "median":
            yield line(f"data.missing: 'median' of column '{name}'", "use 'mean'")
    if spec.normalize == "robust":
        yield line("data.normalize: 'robust'", "use 'standard' or 'minmax'")
    if spec.pca is not None:
        yield line("data.pca:", "leave it out")
    if spec.k_folds is not None:
        yield line("data.k_folds:", "leave it out")
    if spec.bad_images == "skip" and "image" in source.kinds.values():
        yield line("data.bad_images: 'skip'", "leave broken pictures out of the source and use 'stop'")
    if task == "language":
        yield line("training.task: 'language'", "")
    if task == "multilabel" and not _is_text(source.rows, spec.target):
        yield line("training.task: 'multilabel' with a target that is no text", "write labels as text such as 'a|b'")


def _is_text(rows: ParquetRows, name: str) -> bool:
    kind = str(rows.schema.field(name).type)
    return kind in ("string", "large_string") or kind.startswith("dictionary<values=string")
