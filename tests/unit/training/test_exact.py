from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from bigray.training.exact import ExactGradients, additions_after, shards_of_rank, tree_sum, whole_subtrees

CPU = torch.device("cpu")
ROWS = torch.randn(11, 6, generator=torch.Generator().manual_seed(1))


def _exact(module: nn.Module, logical_shards: int) -> ExactGradients:
    return ExactGradients(module, logical_shards, 0, 1, CPU)


def _step(module: nn.Module, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """One step of one worker on the mean of squared outputs; returns the summed loss."""
    num_rows = sum(map(len, shards))

    def compute(shard: int) -> torch.Tensor:
        loss = module(shards[shard]).square().sum()
        (loss / num_rows).backward()
        return loss.detach().double().reshape(1)

    return _exact(module, len(shards)).step(compute, [len(shard) for shard in shards])


def _gradients(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7, 8, 13])
def test_any_number_of_workers_adds_the_shards_in_the_same_order(num_shards: int) -> None:
    def added_by(world_size: int) -> str:
        gathered = []
        for rank in range(world_size):
            shards = shards_of_rank(num_shards, rank, world_size)
            single = [range(shard, shard + 1) for shard in shards]
            gathered += _tree_text([str(shard) for shard in shards], additions_after(single, num_shards))
        subtrees = [
            subtree
            for rank in range(world_size)
            for subtree in whole_subtrees(shards_of_rank(num_shards, rank, world_size), num_shards)
        ]
        (total,) = _tree_text(gathered, additions_after(subtrees, num_shards))
        return total

    assert len({added_by(world_size) for world_size in range(1, num_shards + 2)}) == 1


def _tree_text(leaves: list[str], additions: Sequence[int]) -> list[str]:
    """`tree_sum` on expressions in the place of tensors."""

    class Text:
        def __init__(self, text: str) -> None:
            self.text = text

        def add_(self, other: Text) -> None:
            self.text = f"({self.text}+{other.text})"

    return [left.text for left in tree_sum([Text(leaf) for leaf in leaves], additions)]  # type: ignore[misc]


def test_the_tree_halves_the_shards() -> None:
    single = [range(shard, shard + 1) for shard in range(5)]

    assert _tree_text(list("abcde"), additions_after(single, 5)) == ["(((a+b)+c)+(d+e))"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_workers_take_consecutive_shards_and_differ_by_one_at_most(world_size: int) -> None:
    shards = [shards_of_rank(4, rank, world_size) for rank in range(world_size)]

    assert [*itertools.chain(*shards)] == [0, 1, 2, 3]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("logical_shards", [1, 2, 3, 4, 8])
def test_gradients_and_loss_are_those_of_the_whole_batch(logical_shards: int) -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    rows = ROWS.double()
    loss = module(rows).square().sum()
    (loss / len(rows)).backward()
    expected = _gradients(module)

    loss_sum = _step(module, [rows[shard::logical_shards] for shard in range(logical_shards)])

    torch.testing.assert_close(_gradients(module), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss_sum, loss.detach().reshape(1))


def test_gradients_have_the_type_and_layout_of_their_parameters() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3 * 4, 2).to(torch.bfloat16))
    module[0].to(memory_format=torch.channels_last)
    module.insert(2, _Call(lambda x: x.to(torch.bfloat16)))

    _step(module, [torch.randn(2, 2, 3, 3), torch.randn(1, 2, 3, 3)])

    for parameter in module.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.dtype, parameter.grad.stride()) == (parameter.dtype, parameter.stride())


def test_a_shard_without_rows_counts_as_zero() -> None:
    module = nn.Linear(6, 2)

    with_empty = _step(module, [ROWS[:4], ROWS[4:6], ROWS[:0], ROWS[:0]])
    gradients = _gradients(module)
    without = _step(module, [ROWS[:4], ROWS[4:6]])

    assert torch.equal(with_empty, without)
    assert all(map(torch.equal, gradients, _gradients(module)))


def test_nothing_of_a_step_stays_for_the_next() -> None:
    module = nn.Linear(6, 2)
    exact = _exact(module, 3)

    def step(shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        def compute(shard: int) -> torch.Tensor:
            loss = module(shards[shard]).sum()
            loss.backward()
            return loss.detach().reshape(1)

        exact.step(compute, [len(shard) for shard in shards])
        return _gradients(module)

    first = step([ROWS[:4], ROWS[4:8], ROWS[8:]])
    step([ROWS[:1], ROWS[:0], ROWS[:0]])

    assert all(map(torch.equal, step([ROWS[:4], ROWS[4:8], ROWS[8:]]), first))


def test_an_unused_parameter_gets_zeros_and_a_frozen_one_nothing() -> None:
    module = nn.ModuleList([nn.Linear(6, 1, bias=False) for _ in range(3)])
    module[2].requires_grad_(False)
    exact = _exact(module, 2)

    def compute(shard: int) -> torch.Tensor:
        (loss := module[0](ROWS[shard::2]).sum()).backward()
        return loss.detach().reshape(1)

    exact.step(compute, [6, 5])

    assert module[0].weight.grad.abs().sum() > 0
    assert torch.equal(module[1].weight.grad, torch.zeros(1, 6))
    assert module[2].weight.grad is None


def test_running_statistics_are_weighted_by_rows_and_counted_once() -> None:
    module = nn.BatchNorm1d(6, momentum=0.5).double()
    shards = [ROWS[:6].double(), ROWS[6:8].double(), ROWS[8:].double(), ROWS[:0].double()]

    for _ in range(2):
        before = module.running_mean.clone(), module.running_var.clone()
        _step(module, shards)
        mean = sum(len(shard) / 11 * shard.mean(0) for shard in shards[:3])
        var = sum(len(shard) / 11 * shard.var(0) for shard in shards[:3])

        torch.testing.assert_close(module.running_mean, 0.5 * before[0] + 0.5 * mean)
        torch.testing.assert_close(module.running_var, 0.5 * before[1] + 0.5 * var)
    assert module.num_batches_tracked == 2


class _Buffers(nn.Module):
    """Buffers of every sort: infinite and never changed, put in place of the old one, not of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("used", torch.tensor(False))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5 * (x * self.weight).mean(0)
        self.used.fill_(True)
        return x * self.weight


def test_buffers_of_every_sort_are_combined() -> None:
    module = _Buffers()
    mean = module.mean

    _step(module, [ROWS[:2], ROWS[2:]])

    assert module.mask.tolist() == [0.0, -torch.inf]
    assert module.mean is mean
    assert not mean.requires_grad
    torch.testing.assert_close(mean, 0.5 * ROWS.mean(0))
    assert module.used


def test_a_module_with_nothing_to_train_takes_steps() -> None:
    module = nn.BatchNorm1d(6, affine=False)

    def compute(shard: int) -> torch.Tensor:
        return module(ROWS[shard::2]).double().sum().reshape(1)

    _exact(module, 2).step(compute, [6, 5])

    assert module.running_mean.abs().sum() > 0


class _Call(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x)
