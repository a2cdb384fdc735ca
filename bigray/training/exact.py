"""Gradients whose bits do not depend on the number of workers: logical shards, added up in a fixed order.

A sum of floats depends on its order, and DDP's order on the number of workers. Here a global batch is cut into logical
shards, however many workers there are. Each shard is computed by itself, and the shards' gradients are added along a
binary tree that is a function of their indices alone: a worker adds up the subtrees within its own shards, one
all_gather brings all subtrees to all workers, and each finishes the same tree in the same order. Keeping logical
workers apart from physical ones is the method of EasyScale (Li et al. 2022, arXiv 2208.14228).

Bits are equal as long as those of a shard are: the same kind of device, the same libraries, and the same number of
threads a worker (`torch.set_num_threads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn

ALIGNMENT_BYTES = 64
"""Every tensor in a vector starts at a multiple of it, as one of its own would: some kernels look at the address."""


def shards_of_rank(num_shards: int, rank: int, world_size: int) -> range:
    """The consecutive logical shards that a rank computes; the first ranks take the ones left over."""
    base, left_over = divmod(num_shards, world_size)
    start = rank * base + min(rank, left_over)
    return range(start, start + base + (rank < left_over))


def whole_subtrees(shards: range, num_shards: int) -> list[range]:
    """The fewest subtrees that hold exactly `shards`, in order."""

    def within(node: range) -> Iterator[range]:
        if shards.start <= node.start and node.stop <= shards.stop:
            yield node
        elif node.start < shards.stop and shards.start < node.stop:
            for half in _halves(node):
                yield from within(half)

    return list(within(range(num_shards))) if shards else []


def additions_after(subtrees: Sequence[range], num_shards: int) -> tuple[int, ...]:
    """How many additions are due after each of the consecutive `subtrees`, for `tree_sum`.

    An addition is due as soon as both halves of a node are there.
    """
    halves = _all_halves(range(num_shards))
    waiting: list[range] = []
    counts = []
    for subtree in subtrees:
        waiting.append(subtree)
        before = len(waiting)
        while len(waiting) > 1 and (waiting[-2], waiting[-1]) in halves:
            right, left = waiting.pop(), waiting.pop()
            waiting.append(range(left.start, right.stop))
        counts.append(before - len(waiting))
    return tuple(counts)


def tree_sum(subtrees: Iterable[torch.Tensor], additions: Iterable[int]) -> list[torch.Tensor]:
    """Add up consecutive subtrees of the tree, in place, as `additions_after` says; returns what is left, in order.

    A tensor is asked for only when the additions before it are done, so its memory may be that of a right half.
    """
    waiting: list[torch.Tensor] = []
    for subtree, count in zip(subtrees, additions, strict=True):
        waiting.append(subtree)
        for _ in range(count):
            right = waiting.pop()
            waiting[-1].add_(right)
    return waiting


def _halves(node: range) -> tuple[range, range]:
    middle = node.start + (len(node) + 1) // 2
    return range(node.start, middle), range(middle, node.stop)


def _all_halves(node: range) -> set[tuple[range, range]]:
    if len(node) < 2:
        return set()
    left, right = _halves(node)
    return {(left, right)} | _all_halves(left) | _all_halves(right)


class ExactGradients:
    """Gradients of a global batch as a fixed sum over logical shards; in place of DDP (every worker of a group).

    Takes any number of shards, and of workers; with more workers than shards the last ones compute nothing. A worker
    computes its shards one after another. Beside the module it holds vectors of the size of the gradients: log2(shards)
    while computing at most, and with several workers those that the all_gather brings.

    Parameters that have no gradient in any shard get zeros, frozen ones are left alone. Buffers, such as BatchNorm's
    running statistics, start each shard as they were before the step, which must be equal on all workers. Those of
    floats end as `before + sum(share of the rows x change)` over the shards, in the same tree; all others, such as
    counters, as the first shard with rows left them. Each shard's BatchNorm normalises with the rows of that shard.
    """

    def __init__(
        self,
        module: nn.Module,
        logical_shards: int,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        num_sums: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._shards = [shards_of_rank(logical_shards, r, world_size) for r in range(world_size)]
        self._rank, self._world_size, self._group = rank, world_size, group
        self._state = _ModuleState(module, device)
        subtrees = [whole_subtrees(shards, logical_shards) for shards in self._shards]
        single = [range(shard, shard + 1) for shard in self._shards[rank]]
        self._additions = additions_after(single, logical_shards)
        self._last_additions = additions_after([node for nodes in subtrees for node in nodes], logical_shards)

        message = [
            torch.empty((max(map(len, subtrees)), self._state.row_length), dtype=self._state.dtype, device="meta"),
            torch.empty((len(self._shards[0]), num_sums), dtype=torch.float64, device="meta"),
            *self._state.other_templates,
        ]

        def make_parts(memory: torch.Tensor) -> _Parts:
            rows, sums, *others = _carve(memory, message)
            return _Parts([self._state.views(row) for row in rows], sums, others)

        self._sent = torch.zeros(_num_bytes(message), dtype=torch.uint8, device=device)
        self._own = make_parts(self._sent)
        # a shard is put where it waits for its other half; what waits in the end lies in front, where it is sent from
        self._places = [0, *accumulate(1 - count for count in self._additions)][:-1]
        num_more = max(self._places, default=0) + 1 - len(self._own.rows)
        more = torch.zeros((max(0, num_more), self._state.row_length), dtype=self._state.dtype, device=device)
        self._rows = self._own.rows + [self._state.views(row) for row in more]

        self._received, self._parts = self._sent, [self._own]  # alone, what is sent is what is received
        if world_size > 1:
            self._received = torch.zeros(world_size * len(self._sent), dtype=torch.uint8, device=device)
            self._parts = [make_parts(memory) for memory in self._received.view(world_size, -1)]
        self._subtrees = [
            row for parts, nodes in zip(self._parts, subtrees, strict=True) for row in parts.rows[: len(nodes)]
        ]

    def shards_of_rank(self) -> range:
        """The logical shards that this worker computes."""
        return self._shards[self._rank]

    def step(self, compute: Callable[[int], torch.Tensor], rows_of_shards: Sequence[int]) -> torch.Tensor:
        """Leave the gradient of the global batch in `.grad` of every parameter; bit-equal on all workers.

        `rows_of_shards` holds the number of rows of each logical shard of this global batch, over all workers.
        `compute(shard)` runs forward and backward of one shard that has rows, in one go or in micro-batches, on a loss
        already divided by what the whole global batch is divided by; it must be a function of the shard alone, so it
        seeds what it draws. It returns sums over the shard's rows, such as of the loss: (num_sums,).

        Returns these sums over all shards, (num_sums,) float64 on the device. `.grad` lies in memory that the next step
        uses again.
        """
        own, shards = self._own, self.shards_of_rank()
        num_rows = sum(rows_of_shards)
        first_shard = next(shard for shard, rows in enumerate(rows_of_shards) if rows)
        self._state.hold()

        def compute_shards() -> Iterator[torch.Tensor]:
            for shard, place, sums in zip(shards, self._places, own.sums, strict=False):
                row = self._rows[place]
                if rows_of_shards[shard]:
                    self._state.reset()
                    sums.copy_(compute(shard))
                    self._state.take(row, rows_of_shards[shard] / num_rows)
                    if shard == first_shard:
                        self._state.take_others(own.others)
                else:
                    row.flat.zero_()
                    sums.zero_()
                yield row.flat

        tree_sum(compute_shards(), self._additions)
        if self._world_size > 1:
            _all_gather(self._received, self._sent, self._group)
            tree_sum((row.flat for row in self._subtrees), self._last_additions)
        first_rank = next(rank for rank, shards in enumerate(self._shards) if first_shard in shards)
        self._state.give(self._subtrees[0], self._parts[first_rank].others)
        return torch.cat(
            [parts.sums[: len(shards)] for parts, shards in zip(self._parts, self._shards, strict=True)]
        ).sum(dim=0)


@dataclass(frozen=True)
class _Row:
    """One vector of the tree: gradients, then changes of the float buffers, and the views into it."""

    flat: torch.Tensor
    gradients: list[torch.Tensor]
    buffers: list[torch.Tensor]
    flat_buffers: torch.Tensor


@dataclass(frozen=True)
class _Parts:
    """What one worker sends: its subtrees, the sums of each of its shards, buffers that are not of floats."""

    rows: list[_Row]
    sums: torch.Tensor
    others: list[torch.Tensor]


class _ModuleState:
    """What a forward and backward pass changes in a module: gradients and buffers."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        buffers = _buffer_slots(module)
        self._floats = [slot for slot in buffers if slot.tensor.is_floating_point()]
        self._others = [slot for slot in buffers if not slot.tensor.is_floating_point()]
        floats = [*self._parameters, *(slot.tensor for slot in self._floats)]
        self.dtype = reduce(torch.promote_types, (tensor.dtype for tensor in floats), torch.float32)
        self._templates = [torch.empty_like(tensor, dtype=self.dtype, device="meta") for tensor in floats]
        self.other_templates = [torch.empty_like(slot.tensor, device="meta") for slot in self._others]
        self.row_length = _num_bytes(self._templates) // self.dtype.itemsize
        self._before = self.views(torch.zeros(self.row_length, dtype=self.dtype, device=device))
        self._others_before = [torch.empty_like(slot.tensor) for slot in self._others]

    def views(self, flat: torch.Tensor) -> _Row:
        """Views into a vector of `row_length` elements of `dtype`."""
        tensors = _carve(flat.view(torch.uint8), self._templates)
        num_gradients = len(self._parameters)
        start = _num_bytes(self._templates[:num_gradients]) // self.dtype.itemsize
        return _Row(flat, tensors[:num_gradients], tensors[num_gradients:], flat[start:])

    def hold(self) -> None:
        """Remember the buffers as they are before the step."""
        _copy(self._before.buffers, [slot.tensor for slot in self._floats])
        _copy(self._others_before, [slot.tensor for slot in self._others])

    def reset(self) -> None:
        """Make ready for a shard: no gradients, the buffers of before the step."""
        for parameter in self._parameters:
            parameter.grad = None
        self._set_buffers(self._before.buffers, self._others_before)

    @torch.no_grad()
    def take(self, row: _Row, share: float) -> None:
        """Copy a shard's gradients, and the changes of its float buffers times its share of the rows."""
        found, places = [], []
        for parameter, place in zip(self._parameters, row.gradients, strict=True):
            if parameter.grad is None:
                place.zero_()
            else:
                found.append(parameter.grad)
                places.append(place)
        _copy(places, found)
        if self._floats:
            _copy(row.buffers, [slot.now for slot in self._floats])
            unchanged = row.flat_buffers == self._before.flat_buffers  # infinity less itself, as in a mask, is NaN
            row.flat_buffers.sub_(self._before.flat_buffers).mul_(share).masked_fill_(unchanged, 0.0)

    @torch.no_grad()
    def take_others(self, others: list[torch.Tensor]) -> None:
        _copy(others, [slot.now for slot in self._others])

    def give(self, total: _Row, others: list[torch.Tensor]) -> None:
        """Set gradients and buffers to what the whole group has found; gradients are views where the types agree."""
        total.flat_buffers.add_(self._before.flat_buffers)
        self._set_buffers(total.buffers, others)
        for parameter, gradient in zip(self._parameters, total.gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)

    def _set_buffers(self, floats: list[torch.Tensor], others: list[torch.Tensor]) -> None:
        for slot in (*self._floats, *self._others):
            slot.put_back()
        _copy([slot.tensor for slot in self._floats], floats)
        _copy([slot.tensor for slot in self._others], others)


@dataclass(frozen=True)
class _BufferSlot:
    """The place of a buffer in its module. A forward pass may change the tensor, or put another one in its place."""

    tensor: torch.Tensor
    places: dict[str, torch.Tensor | None]
    name: str

    @property
    def now(self) -> torch.Tensor:
        found = self.places[self.name]
        assert found is not None, f"buffer {self.name} was there before the step"
        return found

    def put_back(self) -> None:
        if self.places[self.name] is not self.tensor:
            self.places[self.name] = self.tensor


def _buffer_slots(module: nn.Module) -> list[_BufferSlot]:
    """Each buffer once, also one that several modules share."""
    slots = {
        id(tensor): _BufferSlot(tensor, owner._buffers, name)
        for owner in module.modules()
        for name, tensor in owner._buffers.items()
        if tensor is not None
    }
    return list(slots.values())


def _all_gather(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(received, sent, group=group)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:  # torch refuses empty lists
        torch._foreach_copy_(targets, sources)


def _num_bytes(templates: Sequence[torch.Tensor]) -> int:
    return sum(_padded(template) for template in templates)


def _carve(memory: torch.Tensor, templates: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors like the templates, one after another in a vector of bytes."""
    tensors, start = [], 0
    for template in templates:
        piece = memory[start : start + template.nbytes].view(template.dtype)
        tensors.append(piece.as_strided(template.shape, template.stride()))
        start += _padded(template)
    return tensors


def _padded(template: torch.Tensor) -> int:
    return -(-template.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
