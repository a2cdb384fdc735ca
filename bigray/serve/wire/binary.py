"""Tensors as raw bytes, the way of the Open Inference Protocol: row-major, little endian, without padding."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.errors import SpecError

Buffer = bytes | bytearray | memoryview

DTYPES: dict[str, np.dtype[Any]] = {
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
"""The numeric datatypes of the protocol, which are those a model's input may come in."""

LENGTH_BYTES = 4
"""Each element of a BYTES tensor is preceded by its length."""


def read_numbers(data: Buffer, datatype: str, shape: Sequence[int], name: str) -> NDArray[Any]:
    """Raw bytes -> array of this datatype and shape.

    FP32 is copied once: behind a JSON header the floats begin at any byte, and kernels want them aligned. The other
    datatypes stay a view of `data`, since they are converted to float32 afterwards, which copies as well.

    Raises:
        SpecError: the number of bytes is not that of the shape.
    """
    dtype = DTYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise SpecError(f"{name}: {len(data)} bytes of data, but {datatype} of shape {list(shape)} takes {expected}")
    values: NDArray[Any] = np.ndarray(shape, dtype, data)
    return values.astype(np.float32) if datatype == "FP32" else values


def read_flags(data: Buffer) -> NDArray[np.bool_]:
    """The raw bytes of a BOOL tensor, one each."""
    flags: NDArray[np.bool_] = np.frombuffer(data, np.uint8) != 0
    return flags


def write_numbers(values: Any, datatype: str) -> bytes:
    """An array or list -> raw bytes."""
    if datatype == "INT64" and type(values) is list:
        return struct.pack(f"<{len(values)}q", *values)  # a few labels, for which numpy takes ten times as long
    return np.ascontiguousarray(values, DTYPES[datatype]).tobytes()


def write_strings(values: Iterable[str]) -> bytes:
    """Text -> the raw bytes of a BYTES tensor, in UTF-8."""
    parts: list[bytes] = []
    for value in values:
        text = value.encode()
        parts += (len(text).to_bytes(LENGTH_BYTES, "little"), text)
    return b"".join(parts)


def read_strings(data: Buffer) -> list[bytes]:
    """The raw bytes of a BYTES tensor -> its elements.

    Raises:
        SpecError: the data ends within an element.
    """
    view, position, elements = memoryview(data), 0, []
    while position < len(view):
        start = position + LENGTH_BYTES
        position = start + int.from_bytes(view[position:start], "little")
        if position > len(view):
            raise SpecError("BYTES tensor: the data ends within an element")
        elements.append(bytes(view[start:position]))
    return elements
