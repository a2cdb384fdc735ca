from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

from bigray.errors import SpecError, TrainingFailed
from bigray.specs import OPTIMIZERS, ScheduleSpec, TrainingSpec
from bigray.training.checkpoint import pack_optimizer, unpack_optimizer
from bigray.training.optimization import (
    Ema,
    clip_gradients,
    first_non_finite,
    load_scaler,
    lr_factor,
    make_optimizer,
    make_scaler,
    optimizer_faults,
    scaler_state,
    set_lr,
)

CPU = torch.device("cpu")


def _spec(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"task": "classification", "lr": 0.01, **settings})


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def _backward(net: nn.Module, seed: int = 0) -> torch.Tensor:
    net.zero_grad()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = net(x).square().mean()
    loss.backward()
    return loss.detach()


def _weights(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _equal(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _faults(**settings: Any) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        make_optimizer(_spec(**settings), nn.Linear(4, 3))
    return caught.value.faults


# --- optimizers


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_of_the_list_is_made_and_takes_a_step(net: nn.Sequential, name: str) -> None:
    optimizer, before = make_optimizer(_spec(optimizer=name), net), _weights(net)
    _backward(net)
    optimizer.step()

    assert type(optimizer).__name__ == OPTIMIZERS[name]
    assert all(not torch.equal(old, new) for old, new in zip(before[4:], _weights(net)[4:], strict=True))
    assert all(torch.isfinite(weight).all() for weight in _weights(net))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_goes_on_from_its_checkpoint_to_the_last_bit(net: nn.Sequential, name: str) -> None:
    whole = make_optimizer(_spec(optimizer=name), net)
    for seed in range(4):
        _backward(net, seed)
        whole.step()
        if seed == 1:
            middle, saved = _copied(net.state_dict()), _copied(pack_optimizer(whole))
    expected = _weights(net)

    net.load_state_dict(middle)
    resumed = make_optimizer(_spec(optimizer=name), net)
    unpack_optimizer(resumed, saved)
    for seed in (2, 3):
        _backward(net, seed)
        resumed.step()

    assert _equal(_weights(net), expected)


def test_the_rate_and_the_other_settings_reach_the_optimizer(net: nn.Sequential) -> None:
    params = {"nesterov": True}
    sgd = make_optimizer(_spec(optimizer="SGD", momentum=0.9, weight_decay=0.1, optimizer_params=params), net)
    adam = make_optimizer(_spec(optimizer="adam", optimizer_params={"betas": [0.8, 0.9], "amsgrad": True}), net)

    (group,) = sgd.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.01, 0.9, 0.1, True)
    assert (adam.param_groups[0]["betas"], adam.param_groups[0]["amsgrad"]) == ((0.8, 0.9), True)


def test_a_step_is_one_kernel_where_the_optimizer_has_it(net: nn.Sequential) -> None:
    def is_fused(**settings: Any) -> Any:
        return make_optimizer(_spec(**settings), net).param_groups[0].get("fused")

    assert is_fused(optimizer="adamw") is True
    assert is_fused(optimizer="sgd") is True
    assert not is_fused(optimizer="nadam")
    assert not is_fused(optimizer="adamw", optimizer_params={"foreach": True})
    assert not is_fused(optimizer="sgd", strategy="fsdp")


def test_frozen_parameters_are_left_out(net: nn.Sequential) -> None:
    net[0].requires_grad_(False)
    optimizer = make_optimizer(_spec(), net)

    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_a_model_without_anything_to_train_is_told() -> None:
    with pytest.raises(TrainingFailed, match="no parameters to train"):
        make_optimizer(_spec(), nn.ReLU())


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"optimizer_params": {"beta": [0.9, 0.99]}},
            "training.optimizer_params.beta: not an argument of adamw, did you mean 'betas'?",
        ),
        ({"optimizer_params": {"lr": 0.1}}, "training.optimizer_params.lr: set training.lr instead"),
        (
            {"momentum": 0.9},
            "training.momentum: adamw has no momentum; remove it, or use another optimizer",
        ),
        (
            {"optimizer": "rprop", "weight_decay": 0.1},
            "training.weight_decay: rprop has no weight_decay; remove it, or use another optimizer",
        ),
        (
            {"optimizer": "rprop", "param_groups": [{"match": "*", "weight_decay": 0.1}]},
            "training.param_groups.0.weight_decay: rprop has no weight_decay; remove it, or use another optimizer",
        ),
        (
            {"optimizer": "adafactor", "strategy": "fsdp"},
            "training.optimizer: adafactor cannot be used with strategy = 'fsdp'; adamw and sgd can",
        ),
        (
            {"optimizer_params": {"betas": [0.9, 1.5]}},
            "training.optimizer_params: adamw refuses {'betas': [0.9, 1.5]}: Invalid beta parameter at index 1: 1.5",
        ),
        (
            {"param_groups": [{"match": "haed.*"}]},
            "training.param_groups.0.match: 'haed.*' matches no parameter; they are weight, bias",
        ),
    ],
)
def test_a_setting_that_the_optimizer_does_not_take_is_named(settings: dict[str, Any], fault: str) -> None:
    assert _faults(**settings) == (fault,)


def test_all_faults_of_an_optimizer_are_told_together() -> None:
    faults = _faults(
        momentum=0.9, optimizer_params={"dampening": 1, "nesterov": True}, param_groups=[{"match": "nothing"}]
    )

    assert [fault.split(":")[0] for fault in faults] == [
        "training.optimizer_params.dampening",
        "training.optimizer_params.nesterov",
        "training.momentum",
        "training.param_groups.0.match",
    ]


# --- groups of parameters


def _settings_by_name(net: nn.Module, **settings: Any) -> dict[str, tuple[float, float]]:
    """Rate over the job's, and weight decay, of each parameter."""
    groups = make_optimizer(_spec(**settings), net).param_groups
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {
        names[id(parameter)]: (round(group["lr"] / 0.01, 9), group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def test_the_first_group_that_matches_gives_a_parameter_its_settings(net: nn.Sequential) -> None:
    groups = [{"match": "3.bias", "lr_scale": 2.0}, {"match": "3.*", "lr_scale": 0.1, "weight_decay": 0.0}]
    found = _settings_by_name(net, weight_decay=0.5, param_groups=groups)

    assert found == {
        "0.weight": (1.0, 0.5),
        "0.bias": (1.0, 0.5),
        "1.weight": (1.0, 0.5),
        "1.bias": (1.0, 0.5),
        "3.weight": (0.1, 0.0),
        "3.bias": (2.0, 0.5),
    }


def test_only_matrices_decay_where_so_asked_in_every_group(net: nn.Sequential) -> None:
    found = _settings_by_name(
        net, weight_decay=0.5, weight_decay_on="matrices", param_groups=[{"match": "3.*", "weight_decay": 0.1}]
    )

    assert {name: decay for name, (_, decay) in found.items()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.1,
        "3.bias": 0.0,
    }


def test_a_group_whose_parameters_an_earlier_one_took_is_told(net: nn.Sequential) -> None:
    with pytest.raises(SpecError) as caught:
        make_optimizer(_spec(param_groups=[{"match": "3.*"}, {"match": "3.bias"}]), net)

    assert caught.value.faults == (
        "training.param_groups.1.match: '3.bias' matches only what an earlier group has taken; "
        "put the narrower pattern first",
    )


def test_the_parameters_of_a_large_model_are_not_all_listed() -> None:
    with pytest.raises(SpecError, match=r"they are 0\.weight, .*2\.bias and 14 more$"):
        make_optimizer(_spec(param_groups=[{"match": "x"}]), nn.Sequential(*(nn.Linear(1, 1) for _ in range(10))))


# --- learning rate


def _rates_of_torch(make: Callable[[torch.optim.Optimizer], Any], num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers want a step of the optimizer between theirs
        for _ in range(num_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            if len(rates) < num_steps:
                scheduler.step()
    return rates


def _after_warmup(make: Callable[[torch.optim.Optimizer], Any]) -> Callable[[torch.optim.Optimizer], Any]:
    def combined(optimizer: torch.optim.Optimizer) -> Any:
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, end_factor=1.0, total_iters=4)
        return lr_scheduler.SequentialLR(optimizer, [warmup, make(optimizer)], milestones=[4])

    return combined


def _linear(total: int) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=total)


def _cosine(total: int) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total, eta_min=0.1)


def _one_cycle(rise: float) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=30, pct_start=rise, cycle_momentum=False)


SCHEDULES: list[tuple[dict[str, Any], Callable[[torch.optim.Optimizer], Any]]] = [
    ({"kind": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ({"kind": "constant", "warmup_steps": 4}, _after_warmup(lambda o: lr_scheduler.ConstantLR(o, factor=1.0))),
    ({"kind": "linear", "final_fraction": 0.1}, _linear(29)),
    ({"kind": "linear", "final_fraction": 0.1, "warmup_steps": 4}, _after_warmup(_linear(25))),
    ({"kind": "cosine", "final_fraction": 0.1}, _cosine(29)),
    ({"kind": "cosine", "final_fraction": 0.1, "warmup_steps": 4}, _after_warmup(_cosine(25))),
    ({"kind": "one_cycle"}, _one_cycle(0.3)),
    ({"kind": "one_cycle", "rise_fraction": 0.55}, _one_cycle(0.55)),
]


@pytest.mark.parametrize(
    ("settings", "of_torch"),
    SCHEDULES,
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "torch",
)
def test_the_rate_follows_torchs_own_schedule(
    settings: dict[str, Any], of_torch: Callable[[torch.optim.Optimizer], Any]
) -> None:
    schedule = ScheduleSpec.model_validate(settings)
    rates = [lr_factor(schedule, step, 30) for step in range(30)]

    assert rates == pytest.approx(_rates_of_torch(of_torch, 30), abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "one_cycle"])
def test_the_rate_is_sound_for_any_number_of_steps(kind: str) -> None:
    """Down to a trial of one step, whose only step is not wasted, and beyond the last step."""
    for num_steps, warmup in itertools.product(range(1, 8), range(9)):
        if kind == "one_cycle" and warmup:
            continue
        schedule = ScheduleSpec.model_validate({"kind": kind, "warmup_steps": warmup, "final_fraction": 0.0})
        rates = [lr_factor(schedule, step, num_steps) for step in range(num_steps + 3)]
        assert all(0.0 <= rate <= 1.0 and math.isfinite(rate) for rate in rates), (num_steps, warmup, rates)
        assert rates[0] > 0.0


def test_every_group_keeps_its_rate_relative_to_the_jobs(net: nn.Sequential) -> None:
    optimizer = make_optimizer(_spec(param_groups=[{"match": "3.*", "lr_scale": 0.1}]), net)
    for factor in (0.5, 0.25):
        set_lr(optimizer, factor)

    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.00025, 0.0025])


# --- clipping, and what is not finite


def test_gradients_are_scaled_down_to_the_norm_and_never_up(net: nn.Sequential) -> None:
    _backward(net)
    before = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.ravel() for gradient in before]).norm()

    torch.testing.assert_close(clip_gradients(net.parameters(), 1e6), norm)
    assert _equal((parameter.grad for parameter in net.parameters() if parameter.grad is not None), before)

    clip_gradients(net.parameters(), 0.5 * norm.item())
    for parameter, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, 0.5 * old)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_tensor_that_is_not_finite_is_named(net: nn.Sequential, value: float) -> None:
    loss = _backward(net)
    assert first_non_finite(net, loss) is None
    assert first_non_finite(net, loss * value) == "loss"

    assert net[3].weight.grad is not None
    net[3].weight.grad[1, 2] = value
    assert first_non_finite(net, loss) == "gradient of '3.weight'"


def test_gradients_whose_norm_overflows_are_told_from_good_ones() -> None:
    layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(40))
    for parameter in layers.parameters():
        parameter.grad = torch.full((1, 1), 1e38)

    assert first_non_finite(layers, torch.tensor(1.0)) == "norm of the gradients"


# --- averaged weights


def test_the_average_moves_by_one_minus_the_decay_at_each_step(net: nn.Sequential) -> None:
    average, optimizer = Ema(net, 0.9), make_optimizer(_spec(), net)
    expected = [weight.double() for weight in _weights(net)]
    for seed in range(3):
        _backward(net, seed)
        optimizer.step()
        average.update()
        expected = [0.9 * old + 0.1 * new for old, new in zip(expected, _weights(net), strict=True)]

    state = average.state()
    for (name, _), value in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(state[name].double(), value, rtol=1e-6, atol=1e-7)
    assert list(state) == list(net.state_dict())
    assert torch.equal(state["1.running_mean"], net[1].running_mean)


def test_the_averaged_weights_are_the_modules_inside_the_block_only(net: nn.Sequential) -> None:
    average, optimizer = Ema(net, 0.5), make_optimizer(_spec(), net)
    _backward(net)
    optimizer.step()
    average.update()
    raw, averaged = _weights(net), _copied(average.state())

    def evaluate(then: Callable[[], Any]) -> None:
        with average.applied():
            assert _equal(_weights(net), (averaged[name] for name, _ in net.named_parameters()))
            assert not _equal(_weights(net), raw)
            then()

    evaluate(dict)
    with pytest.raises(ZeroDivisionError):
        evaluate(lambda: 1 / 0)
    assert _equal(_weights(net), raw)
    assert _equal(average.state().values(), averaged.values())


def test_a_loaded_average_goes_on_as_the_saved_one(net: nn.Sequential) -> None:
    average = Ema(net, 0.9)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    average.update()
    saved = _copied(average.state())

    other = Ema(net, 0.9)
    other.load(saved)
    average.update()
    other.update()

    assert _equal(average.state().values(), other.state().values())


def test_tied_weights_have_one_average_under_both_names() -> None:
    net = nn.ModuleDict({"embed": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    net["head"].weight = net["embed"].weight
    average = Ema(net, 0.9)
    average.load({name: torch.ones(2, 2) for name in ("embed.weight", "head.weight")})

    assert average.state()["embed.weight"] is average.state()["head.weight"]
    assert torch.equal(average.state()["head.weight"], torch.ones(2, 2))


# --- loss scaling


def test_only_fp16_scales_the_loss(net: nn.Sequential) -> None:
    assert make_scaler("fp16", CPU).is_enabled()
    for precision in ("fp32", "bf16"):
        scaler = make_scaler(precision, CPU)
        assert not scaler.is_enabled()
        assert scaler_state(scaler) == {}
        load_scaler(scaler, {})


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadam"])
def test_a_scaled_step_is_that_of_the_plain_loss(net: nn.Sequential, name: str) -> None:
    start = _weights(net)
    optimizer = make_optimizer(_spec(optimizer=name), net)
    _backward(net)
    optimizer.step()
    plain = _weights(net)

    with torch.no_grad():
        for parameter, value in zip(net.parameters(), start, strict=True):
            parameter.copy_(value)
    scaler, optimizer = make_scaler("fp16", CPU), make_optimizer(_spec(optimizer=name), net)
    net.zero_grad()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    scaler.scale(net(x).square().mean()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()

    for one, other in zip(_weights(net), plain, strict=True):
        torch.testing.assert_close(one, other)


def test_a_scaler_goes_on_from_its_checkpoint(net: nn.Sequential) -> None:
    scaler, optimizer = make_scaler("fp16", CPU), make_optimizer(_spec(), net)
    for factor in (1.0, math.inf, 1.0, 1.0):
        net.zero_grad()
        scaler.scale(net(torch.ones(2, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    other = make_scaler("fp16", CPU)
    load_scaler(other, scaler_state(scaler))

    assert scaler_state(scaler)["scale"].item() == 2.0**15
    assert other.state_dict() == scaler.state_dict()


# --- sharded parameters


@pytest.fixture
def sharded() -> Iterator[nn.Module]:
    """A module cut over a group of one process: its parameters and gradients are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        yield fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_sharded_parameters_are_optimized_clipped_averaged_and_checked(sharded: nn.Module) -> None:
    def whole() -> torch.Tensor:
        weight: Any = sharded.get_parameter("0.weight")
        return weight.full_tensor().detach().clone()

    for name in sorted(set(OPTIMIZERS) - {"adafactor", "rprop"}):
        optimizer = make_optimizer(_spec(optimizer=name, strategy="fsdp", weight_decay_on="matrices"), sharded)
        average, loss, first = Ema(sharded, 0.5), _backward(sharded), whole()
        norm = clip_gradients(sharded.parameters(), 1e-3)
        assert (norm.ndim, norm.item() > 1e-3) == (0, True)
        assert clip_gradients(sharded.parameters(), 1.0).item() == pytest.approx(1e-3, rel=1e-2)
        assert first_non_finite(sharded, loss) is None
        optimizer.step()
        average.update()
        last = whole()
        with average.applied():
            torch.testing.assert_close(whole(), (first + last) / 2, msg=name)
        assert torch.equal(whole(), last)
        assert not torch.equal(first, last)

    gradient: Any = sharded.get_parameter("2.bias").grad
    gradient.to_local()[0] = math.nan
    assert first_non_finite(sharded, loss) == "gradient of '2.bias'"


# --- the rate and the batch


@pytest.mark.parametrize(
    ("scaling", "batch_size", "rate"),
    [("none", 64, 0.1), ("linear", 64, 0.2), ("sqrt", 64, 0.1 * 2**0.5), ("linear", 8, 0.025), ("sqrt", 8, 0.05)],
)
def test_the_rate_of_each_group_follows_the_batch(
    net: nn.Sequential, scaling: str, batch_size: int, rate: float
) -> None:
    settings: dict[str, Any] = {} if scaling == "none" else {"lr_scaling": scaling, "lr_batch_size": 32}
    groups = [{"match": "*bias", "lr_scale": 0.5}]
    spec = TrainingSpec.model_validate(
        {"task": "regression", "lr": 0.1, "global_batch_size": batch_size, "param_groups": groups, **settings}
    )
    optimizer = make_optimizer(spec, net)
    set_lr(optimizer, 0.5)

    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * 0.25, rate * 0.5], rel=1e-15)
    assert optimizer.defaults["lr"] == pytest.approx(rate, rel=1e-15)


def test_a_scaled_rate_is_no_fault_where_the_batch_is_not_known_yet() -> None:
    spec = TrainingSpec.model_validate(
        {"task": "regression", "global_batch_size": "auto", "lr_scaling": "linear", "lr_batch_size": 32}
    )
    assert optimizer_faults(spec) == []
