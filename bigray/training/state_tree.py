"""State of somebody else's making <-> named tensors, so that any `state_dict()` fits in a safetensors file.

A state dict is a tree: dicts, also with numbers for keys, lists and tuples, down to tensors and JSON scalars. Its
tensors are taken out and numbered; the rest is JSON, kept beside them as bytes. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from bigray.training.checkpoint import StateDict

TREE = "tree"
"""Name of the tensor that holds the JSON."""


def pack_tree(values: Mapping[str, Any]) -> StateDict:
    """Tensors "0", "1", ... in the order met, not copied, and the tree (uint8) under `TREE`.

    Raises:
        TypeError: something is neither a tensor, a JSON scalar, a dict, a list nor a tuple; says where.
    """
    tensors: StateDict = {}
    tree = {name: _without_tensors(value, name, tensors) for name, value in values.items()}
    return {**tensors, TREE: torch.frombuffer(bytearray(json.dumps(tree).encode()), dtype=torch.uint8)}


def unpack_tree(packed: StateDict) -> dict[str, Any]:
    """What `pack_tree` was given: the same values, keys and containers."""
    tree = json.loads(packed[TREE].numpy().tobytes())
    return {name: _with_tensors(value, packed) for name, value in tree.items()}


def _without_tensors(value: Any, place: str, tensors: StateDict) -> Any:
    """JSON as it is, and everything else as an object with one key that says what it was."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [
            [_key(key, place), _without_tensors(item, f"{place}[{key!r}]", tensors)] for key, item in value.items()
        ]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_without_tensors(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy number
        return _without_tensors(value.item(), place, tensors)
    raise TypeError(
        f"{place} is a {type(value).__name__}; only tensors, numbers, strings, None, dicts, lists and tuples are kept"
    )


def _key(key: Any, place: str) -> Any:
    if type(key) in (bool, int, float, str):
        return key
    raise TypeError(f"{place} has a {type(key).__name__} for a key; only strings and numbers are kept")


def _with_tensors(value: Any, tensors: StateDict) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    match kind:
        case "tensor":
            return tensors[held]
        case "dict":
            return {key: _with_tensors(item, tensors) for key, item in held}
        case "list":
            return [_with_tensors(item, tensors) for item in held]
        case _:
            return tuple(_with_tensors(item, tensors) for item in held)
