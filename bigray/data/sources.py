"""`data.source` -> Arrow table. Runs on the driver."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
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
    if _FUNCTION.fullmatch(source):
        return _call(source)
    paths = sorted(glob.glob(source)) if glob.has_magic(source) else [source]
    if not paths or not Path(paths[0]).exists():
        raise SpecError(f"'{source}': no such file or folder")
    readers = {".csv": _read_csv, ".npz": _read_npz}
    kind = Path(paths[0]).suffix.lower()
    try:
        if kind in readers:
            return pa.concat_tables([readers[kind](path) for path in paths])
        if kind == ".parquet" or Path(paths[0]).is_dir():
            return _read_parquet(source, paths)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SpecError(f"'{source}': cannot be read: {str(error).splitlines()[0]}") from error
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


def _read_parquet(source: str, paths: list[str]) -> pa.Table:
    from pyarrow import dataset

    target = paths[0] if len(paths) == 1 else paths
    table = dataset.dataset(target, format="parquet").to_table()
    if table.num_rows == 0:
        raise SpecError(f"'{source}': holds no rows")
    return table


def _read_csv(path: str) -> pa.Table:
    from pyarrow import csv

    return csv.read_csv(path)


def _read_npz(path: str) -> pa.Table:
    with np.load(path, allow_pickle=False) as archive:
        return table_from_arrays(dict(archive))


def _to_arrow(values: np.ndarray[Any, Any]) -> pa.Array:
    if values.ndim <= 1:
        return pa.array(values)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
