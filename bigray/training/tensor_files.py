"""State dict <-> safetensors file, written tensor by tensor so that no second copy of the state is in memory.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header, a JSON header with
the dtype, shape and place of each tensor, the raw data. Reading is left to the safetensors library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigray.errors import StorageError

if TYPE_CHECKING:
    import torch

StateDict = dict[str, "torch.Tensor"]

_LENGTH_BYTES = 8
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Name of a torch dtype -> its name in the format."""
_ITEM_BYTES = {name: 1 if name == "BOOL" else int(name.split("_")[0].lstrip("BFIUC")) // 8 for name in _DTYPES.values()}


def tensor_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterable[bytes | memoryview]:
    """The file's bytes in order, as views of the tensors' own memory where they are on the CPU and contiguous.

    Tied weights are written once for each of their names. The chunks can be walked again, as an upload that broke off
    has to: the tensors stay as they are until the file is written.

    Raises:
        StorageError: where they are walked, a tensor's dtype is not one of the format.
    """
    return _Chunks(tensors)


@dataclass(frozen=True)
class _Chunks:
    tensors: Mapping[str, torch.Tensor]

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return _walk(self.tensors)


def _walk(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    # larger items first: each tensor then starts at a multiple of its own item size, as in the library's files
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype_name(name, tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
    for name in names:
        if tensors[name].numel():
            yield _memory(tensors[name])


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A whole safetensors file in memory."""
    return b"".join(tensor_chunks(tensors))


def unpack_tensors(data: bytes) -> StateDict:
    """A safetensors file -> tensors on the CPU, with memory of their own."""
    import safetensors.torch

    tensors: StateDict = safetensors.torch.load(data)
    return tensors


def check_tensor_file(data: bytes, place: str) -> None:
    """Refuse what is no whole safetensors file before any of it is used. Copies nothing, allocates nothing.

    Raises:
        StorageError: names `place`, what was expected and what was found.
    """
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    most = len(data) - _LENGTH_BYTES
    if most < 0 or length > most:
        raise StorageError(
            f"{place}: not a safetensors file: expected a header of at most {most} bytes, found {length}"
        )
    try:
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
        spans = sorted(_span(entry) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{place}: not a safetensors file: unreadable header: {error}") from error
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != most - length:
        raise StorageError(
            f"{place}: not a safetensors file: expected {most - length} bytes of tensors side by side, found others"
        )


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    start, end = entry["data_offsets"]
    size = math.prod(entry["shape"]) * _ITEM_BYTES[entry["dtype"]]
    if start < 0 or end - start != size:
        raise ValueError(f"a tensor of {size} bytes lies at {start} to {end}")
    return start, end


def dtype_of(name: str) -> torch.dtype:
    """The dtype that has this name in the format, of a file that `check_tensor_file` has passed."""
    import torch

    dtype: torch.dtype = getattr(torch, next(key for key, value in _DTYPES.items() if value == name))
    return dtype


def _dtype_name(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise StorageError(f"tensor '{name}': dtype {dtype} cannot be saved; use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _memory(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
