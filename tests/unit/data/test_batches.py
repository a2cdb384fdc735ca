from __future__ import annotations

import itertools

import numpy as np
import pytest

from bigray.data.batches import epoch_order, global_batch, rows_of_shard, step_seed, steps_per_epoch, worker_share


def test_an_epoch_goes_through_every_row_once() -> None:
    assert sorted(epoch_order(seed=3, epoch=5, num_rows=101)) == list(range(101))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    np.random.seed(99)
    first = epoch_order(1, 2, 50)
    np.random.random(10)

    np.testing.assert_array_equal(epoch_order(1, 2, 50), first)
    assert not np.array_equal(epoch_order(1, 3, 50), first)
    assert not np.array_equal(epoch_order(2, 2, 50), first)


@pytest.mark.parametrize(("num_rows", "steps"), [(64, 2), (65, 3), (31, 1), (1, 1)])
def test_the_last_step_of_an_epoch_may_be_smaller(num_rows: int, steps: int) -> None:
    assert steps_per_epoch(num_rows, 32) == steps


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_workers_share_every_global_batch_without_loss_or_repetition(world_size: int) -> None:
    num_rows, batch_size = 69, 16  # the last batch holds 5 rows: two of four workers get none
    order = epoch_order(0, 0, num_rows)
    seen = []
    for batch in range(steps_per_epoch(num_rows, batch_size)):
        rows = global_batch(order, batch, batch_size)
        shares = [worker_share(rows, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(shares)) == sorted(rows)
        sizes = [len(share) for share in shares if len(share)]
        assert max(sizes) - min(sizes) <= 1
        seen.extend(rows)

    assert seen == list(order)


@pytest.mark.parametrize("num_rows", [2, 3, 5, 7, 8, 9])
def test_no_share_of_a_small_batch_is_a_single_row(num_rows: int) -> None:
    """Batch norm cannot normalise one row."""
    rows = np.arange(num_rows)
    for parts in (1, 2, 3, 4, 8):
        sizes = {len(worker_share(rows, rank, parts)) for rank in range(parts)}
        assert 1 not in sizes, f"{parts} workers"


@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_the_logical_shards_hold_every_row_of_a_batch_once(num_rows: int) -> None:
    rows = epoch_order(0, 0, num_rows)

    assert sorted(np.concatenate([rows_of_shard(rows, shard, 4) for shard in range(4)])) == sorted(rows)


def test_every_step_of_every_rank_draws_other_random_numbers() -> None:
    places = itertools.product(range(2), range(5), range(10), range(4), range(2))
    seeds = [step_seed(*place) for place in places]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
