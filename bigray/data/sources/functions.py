"""`package.module:function` -> table, of whatever it returns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from bigray.data.sources.columns import table_from_arrays
from bigray.errors import SpecError
from bigray.models.resolve import load_factory


def call(source: str) -> pa.Table:
    """Call it; a table, a dict of arrays or a map-style `torch.utils.data.Dataset` comes back as a table.

    Raises:
        SpecError: it raises, or returns something else.
    """
    function = load_factory(source)
    try:
        result = function()
    except SpecError:
        raise
    except Exception as error:  # user code: whatever it raises is the fault to report
        raise SpecError(f"'{source}': raised {type(error).__name__}: {error}") from error
    try:
        return _table(result)
    except SpecError as error:
        raise SpecError([f"'{source}': {fault}" for fault in error.faults]) from error


def _table(result: Any) -> pa.Table:
    if isinstance(result, pa.Table):
        return result
    if isinstance(result, Mapping):
        return table_from_arrays(result)
    if _is_dataset(result):
        return table_from_arrays(_columns(result))
    raise SpecError(
        f"returned {type(result).__name__}, expected a pyarrow.Table or a dict of arrays, or a torch.utils.data.Dataset"
    )


def _is_dataset(result: Any) -> bool:
    # one can only exist where torch is imported
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(result, torch.utils.data.Dataset)


def _columns(dataset: Any) -> dict[str, Any]:
    if not hasattr(dataset, "__len__") or not hasattr(type(dataset), "__getitem__"):
        raise SpecError("returned an iterable dataset; it must have __len__ and __getitem__, so that rows can be split")
    samples = [_sample(dataset, number) for number in range(len(dataset))]
    if not samples:
        raise SpecError("returned a dataset that holds no rows")
    for number, sample in enumerate(samples):
        if sample.keys() != samples[0].keys():
            raise SpecError(f"sample {number} has {sorted(sample)}, sample 0 has {sorted(samples[0])}")
    return {name: _stacked(name, [sample[name] for sample in samples]) for name in samples[0]}


def _sample(dataset: Any, number: int) -> dict[str, Any]:
    """One sample by name: a dict as it is, a pair as `x` and `y`, anything else as `x`."""
    try:
        sample = dataset[number]
    except Exception as error:  # user code, as above
        raise SpecError(f"sample {number} raised {type(error).__name__}: {error}") from error
    if isinstance(sample, Mapping):
        return {str(name): _value(value) for name, value in sample.items()}
    if not isinstance(sample, tuple | list):
        return {"x": _value(sample)}
    if len(sample) > 2:
        raise SpecError(f"sample {number} has {len(sample)} parts; expected (x, y), or a dict with a name for each")
    return dict(zip("xy", map(_value, sample), strict=False))


def _value(value: Any) -> Any:
    """Tensors and arrays as arrays, a picture of Pillow as its pixels (channels, height, width)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    if hasattr(value, "getbands"):
        pixels = np.asarray(value)
        return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    return value


def _stacked(name: str, values: list[Any]) -> Any:
    if all(isinstance(value, str | bytes) for value in values):
        return np.array(values, dtype=object)
    arrays = [np.asarray(value) for value in values]
    for number, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise SpecError(
                f"sample {number}: '{name}' has shape {array.shape}, in sample 0 {arrays[0].shape}; make them equal"
            )
    return np.stack(arrays)
