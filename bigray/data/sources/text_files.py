"""Plain text: one column `text`, one row a file."""

from __future__ import annotations

import pyarrow as pa

from bigray.data.sources.locations import SourceFile
from bigray.errors import SpecError

LARGEST_BYTES = 2**31 - 1
"""Of one value of a string column."""


def read_text(file: SourceFile) -> pa.Table:
    """One file as one row.

    Raises:
        SpecError: it is not UTF-8, of which the line is told, or larger than 2 GB.
    """
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if len(content) > LARGEST_BYTES:
        raise SpecError(f"'{file.name}': is larger than 2 GB; cut it into several files")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(f"'{file.name}': line {line} is not UTF-8; save the file as UTF-8") from None
    return pa.table({"text": pa.array([content]).cast(pa.string())})
