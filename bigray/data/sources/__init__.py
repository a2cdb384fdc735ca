"""`data.source` -> Arrow table, a file a kind. Runs on the driver."""

from __future__ import annotations

from bigray.data.sources.columns import IMAGE_FIELD, is_image, table_from_arrays
from bigray.data.sources.reading import check_source, given_split, read_split, read_table

__all__ = [
    "IMAGE_FIELD",
    "check_source",
    "given_split",
    "is_image",
    "read_split",
    "read_table",
    "table_from_arrays",
]
