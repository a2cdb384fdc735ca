"""`gradient_checkpointing = true`: activations of a block are computed again in the backward pass, not kept.

Chen et al. 2016, arXiv 1604.06174; torch.utils.checkpoint in its non-reentrant form.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(module: nn.Module) -> None:
    """Make each block of `module` keep its input alone while training, in place; parameters and names stay.

    Blocks are the children, and the members of lists and of Sequentials of larger parts among them. A Sequential of
    plain layers is cut into about sqrt(n) runs. Random numbers and buffers come out as if each block ran once: the
    second pass draws the same numbers and changes no statistics.
    """
    if _is_plain(module):
        module.forward = _in_runs(list(module.children()))
        return
    for block in dict.fromkeys(_blocks(module)):
        if any(True for _ in block.parameters()):
            block.forward = _recomputed(block.forward, [block])


def _in_runs(layers: Sequence[nn.Module]) -> Callable[[Any], Any]:
    length = math.ceil(math.sqrt(len(layers)))
    runs = [
        _recomputed(_one_after_another(layers[start : start + length]), layers[start : start + length])
        for start in range(0, len(layers), length)
    ]
    return _one_after_another(runs)


def _one_after_another(steps: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def forward(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return forward


def _recomputed(forward: Callable[..., Any], modules: Sequence[nn.Module]) -> Callable[..., Any]:
    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _unchanged_buffers(modules)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler plans the second pass itself, without what changes buffers
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


@contextlib.contextmanager
def _unchanged_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norm would count its batch a second time."""
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # data: autograd may hold the buffer, and would refuse a changed one


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) or (type(child) is nn.Sequential and not _is_plain(child)):
            yield from _blocks(child)
        else:
            yield child


def _is_plain(module: nn.Module) -> bool:
    """Whether this is a Sequential of layers without parts of their own."""
    return type(module) is nn.Sequential and not any(True for child in module for _ in child.children())
