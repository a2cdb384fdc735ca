"""The peak of memory that the tensors made by a piece of work take, by torch's own account of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors that operations in its `with` block make, forward and backward (one thread).

    Less than what the work takes, since operations use memory of their own meanwhile, and more only by pages that are
    never written: a floor under a measure that other users of the process's memory can disturb. As torch's own tracker
    of a model's memory does (torch.distributed._tools.mem_tracker), by a weak reference to each storage.
    """

    supports_higher_order_operators = True  # torch.cond and the like come as what they do

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A model may compile parts of itself; without this torch would refuse."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = tree_leaves((args, dict(kwargs or {})))
        if any(isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value) for value in inputs):
            return NotImplemented  # DTensor and the like come again with the tensors they are made of
        outputs = func(*args, **(kwargs or {}))
        before = [value.untyped_storage() for value in inputs if _has_storage(value)]
        for storage in (value.untyped_storage() for value in tree_leaves(outputs) if _has_storage(value)):
            if not any(storage is known for known in before):  # else it is a view, or was changed in place
                self._count(storage)
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = storage.nbytes()
        self._bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._forget, num_bytes)

    def _forget(self, num_bytes: int) -> None:
        self._bytes -= num_bytes


def _has_storage(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
        return False
    return value.layout == torch.strided and value.device.type == "cpu"
