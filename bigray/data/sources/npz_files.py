"""Arrays of numpy, one a column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.data.sources.columns import table_from_arrays
from bigray.data.sources.locations import SourceFile
from bigray.errors import SpecError


def read_npz(file: SourceFile) -> pa.Table:
    """One file's arrays as columns.

    Raises:
        SpecError: naming an array of Python objects, which only unpickling would read, or one of another length.
        ValueError, OSError, BadZipFile: it is no such file, or cut.
    """
    with file.open() as handle, np.load(handle, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array; use numpy.savez, which gives each a name")
        arrays = {name: _array(archive, name, file.name) for name in archive.files}
    if not arrays:
        raise SpecError(f"'{file.name}': holds no rows")
    try:
        return table_from_arrays(arrays)
    except SpecError as error:
        raise SpecError([f"'{file.name}': {fault}" for fault in error.faults]) from error


def _array(archive: np.lib.npyio.NpzFile, name: str, place: str) -> NDArray[Any]:
    try:
        return archive[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise SpecError(
            f"'{place}': array '{name}' holds Python objects, which are not unpickled; save numbers or text"
        ) from None
