"""`data.source` -> Arrow table. Runs on the driver."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigray.errors import SpecError
from bigray.models.resolve import load_factory

_FUNCTION = re.compile(r"[\w.]+:\w+")


def read_table(source: str) -> pa.Table:
    """Read Parquet (file, folder or glob), CSV, NPZ, or call `package.module:function`.

    Paths are relative to the folder the command runs in. A function returns a table or a dict of arrays.

    Raises:
        SpecError: nothing is there, the kind is unknown, or it cannot be read.
    """
    check_source(source)
    if _FUNCTION.fullmatch(source):
        return _call(source)
    paths = _paths(source)
    reader = _READERS.get(Path(paths[0]).suffix.lower(), _read_parquet)
    try:
        table = reader(paths)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SpecError(f"'{source}': cannot be read: {str(error).splitlines()[0]}") from error
    if table.num_rows == 0:
        raise SpecError(f"'{source}': holds no rows")
    return table


def check_source(source: str) -> None:
    """Raise `SpecError` unless the source is there and of a kind `read_table` knows; reads nothing."""
    if _FUNCTION.fullmatch(source):
        load_factory(source)
        return
    paths = _paths(source)
    if not paths or not Path(paths[0]).exists():
        raise SpecError(f"'{source}': no such file or folder (looked in {Path.cwd()})")
    kind = Path(paths[0]).suffix.lower()
    if kind not in _READERS and not Path(paths[0]).is_dir():
        raise SpecError(f"'{source}': unknown kind '{kind}'; use .parquet, .csv, .npz, or 'package.module:function'")


def table_from_arrays(arrays: Mapping[str, Any]) -> pa.Table:
    """Columns of equal length -> table; arrays with more than one axis become fixed-shape tensor columns."""
    columns = {name: np.asarray(values) for name, values in arrays.items()}
    lengths = {name: len(values) if values.ndim else 0 for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SpecError(f"columns have different numbers of rows: {lengths}")
    return pa.table({name: _to_arrow(values) for name, values in columns.items()})


def _call(source: str) -> pa.Table:
    function = load_factory(source)
    try:
        result = function()
    except Exception as error:  # user code: whatever it raises is the fault to report
        raise SpecError(f"'{source}': raised {type(error).__name__}: {error}") from error
    if isinstance(result, pa.Table):
        return result
    if isinstance(result, Mapping):
        return table_from_arrays(result)
    raise SpecError(f"'{source}': returned {type(result).__name__}, expected a pyarrow.Table or a dict of arrays")


def _paths(source: str) -> list[str]:
    return sorted(glob.glob(source)) if glob.has_magic(source) else [source]


def _read_parquet(paths: list[str]) -> pa.Table:
    from pyarrow import dataset

    return dataset.dataset(paths[0] if len(paths) == 1 else paths, format="parquet").to_table()


def _read_csv(paths: list[str]) -> pa.Table:
    from pyarrow import csv

    return pa.concat_tables([csv.read_csv(path) for path in paths])


def _read_npz(paths: list[str]) -> pa.Table:
    def read(path: str) -> pa.Table:
        with np.load(path, allow_pickle=False) as archive:
            return table_from_arrays(dict(archive))

    return pa.concat_tables([read(path) for path in paths])


_READERS: dict[str, Callable[[list[str]], pa.Table]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".npz": _read_npz,
}


def _to_arrow(values: np.ndarray[Any, Any]) -> pa.Array:
    if values.ndim <= 1:
        return pa.array(values)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
