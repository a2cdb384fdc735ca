"""Which samples make which optimizer step: a function of (seed, epoch) alone, whatever the number of workers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

IndexArray = NDArray[np.int64]
_WORD = 2**64 - 1


def epoch_order(seed: int, epoch: int, num_rows: int) -> IndexArray:
    """The permutation of the training rows that epoch `epoch` (from 0) goes through."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def steps_per_epoch(num_rows: int, global_batch_size: int) -> int:
    """Optimizer steps of an epoch; the last one may be smaller."""
    return math.ceil(num_rows / global_batch_size)


def global_batch(order: IndexArray, batch: int, global_batch_size: int) -> IndexArray:
    """Rows of step `batch` of an epoch, over all workers."""
    return order[batch * global_batch_size : (batch + 1) * global_batch_size]


def worker_share(rows: IndexArray, rank: int, world_size: int) -> IndexArray:
    """The part of a global batch that one worker computes; empty for the last ones where the batch is small.

    No part is a single row where that can be helped: batch norm cannot normalise one.
    """
    num_parts = max(1, min(world_size, len(rows) // 2))
    return rows[rank::num_parts] if rank < num_parts else rows[:0]


def rows_of_shard(rows: IndexArray, shard: int, logical_shards: int) -> IndexArray:
    """The part of a global batch in one logical shard, whichever worker computes it; cut as for workers."""
    return worker_share(rows, shard, logical_shards)


def step_seed(seed: int, *place: int) -> int:
    """Seed of the random numbers (dropout) drawn at one place: epoch, batch, rank or logical shard, micro-batch.

    Seeding every place makes the generator's state a function of the cursor, so a checkpoint need not hold it.
    """
    state = 0
    for part in (seed, *place):
        state = _mix(state ^ part)
    return state >> 1  # torch takes 63 bits


def _mix(value: int) -> int:
    """The SplitMix64 finaliser (Steele, Lea and Flood 2014) on one number: a microsecond, on the path of every step."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)
