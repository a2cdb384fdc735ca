"""Groups of processes over gloo, without Ray: exact gradients at 1 to 4 workers, synchronised batch norm at 2."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.integration.exact_steps import (
    MODULES,
    NUM_PROCESSES,
    SHARD_COUNTS,
    StateDict,
    run,
    squared_loss,
    state_after,
    sync_batchnorm_cases,
)
from tests.integration.ranks import run_ranks

WORLD_SIZES = range(1, NUM_PROCESSES + 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four processes start once, for all tests."""
    folder = tmp_path_factory.mktemp("results")
    run_ranks(run, folder, NUM_PROCESSES)
    return folder


@pytest.mark.parametrize(("name", "num_shards"), [*itertools.product(MODULES, SHARD_COUNTS)])
def test_weights_buffers_and_losses_are_bit_equal_on_all_ranks_at_any_world_size(
    results: Path, name: str, num_shards: int
) -> None:
    alone = load_file(results / f"{name}-{num_shards}-1-0.safetensors")

    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            state = load_file(results / f"{name}-{num_shards}-{world_size}-{rank}.safetensors")
            different = [key for key in alone if not torch.equal(state[key], alone[key])]
            assert different == [], f"rank {rank} of {world_size}"
            assert state.keys() == alone.keys()


def test_other_shards_give_other_bits(results: Path) -> None:
    """So that the test above can fail: the number of shards decides the bits, the number of workers does not."""
    few, many = (load_file(results / f"cnn-{shards}-1-0.safetensors") for shards in SHARD_COUNTS)

    assert not torch.equal(few["5.weight"], many["5.weight"])


@pytest.mark.parametrize("name", list(sync_batchnorm_cases()))
def test_synchronised_batch_norm_is_that_of_one_process_with_all_rows(results: Path, name: str) -> None:
    module, rows = sync_batchnorm_cases()[name]
    expected = one_step(module, torch.cat(rows))

    for rank in range(2):
        torch.testing.assert_close(load_file(results / f"{name}-2-{rank}.safetensors"), expected)


def one_step(module: nn.Module, rows: torch.Tensor) -> StateDict:
    (squared_loss(module, rows) / len(rows)).backward()
    return state_after(module)
