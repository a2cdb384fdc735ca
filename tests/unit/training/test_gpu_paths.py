"""What is decided before a GPU is touched: which device, which backend, where a group is placed. No GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed.distributed_c10d import Backend, BackendConfig

from bigray.specs import JobSpec, ScalingSpec
from bigray.training.devices import backend_of, device_fault
from bigray.training.groups import _scaling_config
from bigray.training.loop import Worker
from bigray.training.membership import Member
from bigray.training.process_group import backends_by_device
from bigray.training.worker import is_about_a_peer, recoverable_step


def _member(slot: int, node: str, gpu: str) -> Member:
    return Member(node, "10.0.0.1", 100 + slot, slot, 2, gpu)


def _job(scaling: dict[str, Any], **training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "rows.csv", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification", **training},
            "scaling": scaling,
        }
    )


@pytest.mark.parametrize(
    ("gpu_ids", "visible", "num_devices"),
    [
        ([], None, 0),
        ([], "", 0),
        (["3"], "3", 1),
        (["3"], "2,3", 2),  # Ray Train shows a group's workers all GPUs that the group has on their node
        (["GPU-8f2e"], "GPU-8f2e", 1),
        (["0", "1"], "0,1", 2),
    ],
)
def test_a_gpu_among_the_visible_ones_that_torch_sees_is_used(
    gpu_ids: list[str], visible: str | None, num_devices: int
) -> None:
    assert device_fault(gpu_ids, visible, num_devices) is None


@pytest.mark.parametrize(
    ("gpu_ids", "visible", "num_devices", "fault"),
    [
        (["0"], "0", 0, "Ray has assigned GPU 0, but torch.cuda sees 0 of the GPUs '0' here: install the driver"),
        (["3"], "2,3", 1, "Ray has assigned GPU 3, but torch.cuda sees 1 of the GPUs '2,3' here"),
        (["1"], "0", 1, "Ray has assigned GPU 1, but CUDA_VISIBLE_DEVICES is '0' here: do not set it"),
        (["1"], None, 2, "Ray has assigned GPU 1, but CUDA_VISIBLE_DEVICES is '' here"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_in_one_line(
    gpu_ids: list[str], visible: str | None, num_devices: int, fault: str
) -> None:
    told = device_fault(gpu_ids, visible, num_devices)

    assert told is not None and told.startswith(fault) and "\n" not in told


@pytest.mark.parametrize(
    ("places", "device", "backend"),
    [
        ([("a", "0")], "cuda", "nccl"),
        ([("a", "0"), ("a", "1")], "cuda", "nccl"),
        ([("a", "0"), ("b", "0")], "cuda", "nccl"),
        ([("a", "0"), ("a", "0")], "cuda", "gloo"),
        ([("a", "0"), ("a", "1"), ("a", "0")], "cuda", "gloo"),
        ([("a", ""), ("a", "")], "cpu", "gloo"),
    ],
)
def test_ranks_on_gpus_of_their_own_use_nccl_and_those_that_share_one_gloo(
    places: list[tuple[str, str]], device: str, backend: str
) -> None:
    assert backend_of([_member(slot, *place) for slot, place in enumerate(places)], device) == backend


def test_control_messages_have_gloo_beside_nccl() -> None:
    by_device = BackendConfig(Backend(backends_by_device("nccl"))).get_device_backend_map()

    assert (by_device["cpu"], by_device["cuda"]) == ("gloo", "nccl")
    assert backends_by_device("gloo") == "gloo"


def test_a_collective_after_nccl_was_broken_off_is_about_a_peer() -> None:
    """What torch says where there is no process group any more: breaking NCCL off removes it."""
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="process group") as caught:
        dist.all_reduce(torch.zeros(1))

    assert is_about_a_peer(caught.value)
    assert not is_about_a_peer(ValueError("expected 3 classes"))


@pytest.mark.parametrize(("device", "step"), [("cpu", 7), ("cuda", None)])
def test_a_step_that_was_broken_off_leaves_sound_memory_on_cpus_alone(device: str, step: int | None) -> None:
    progress = SimpleNamespace(step=7, best_metrics={})
    worker = Worker(0, 2, torch.device(device))
    training = SimpleNamespace(has_buffers=False, best_weights=None, progress=progress, worker=worker)

    assert recoverable_step(training) == step  # type: ignore[arg-type]


def test_a_group_of_gpus_is_packed_and_asks_for_one_each() -> None:
    config = _scaling_config(ScalingSpec(num_workers=2, gpus_per_worker=1))

    assert (config.use_gpu, config.placement_strategy, config.label_selector) == (True, "PACK", None)
    assert config.resources_per_worker == {"CPU": 1.0, "GPU": 1.0}


def test_a_share_of_a_gpu_is_asked_for_as_it_is() -> None:
    assert _scaling_config(ScalingSpec(gpus_per_worker=0.25)).resources_per_worker == {"CPU": 1.0, "GPU": 0.25}


def test_an_accelerator_is_asked_for_by_the_nodes_label() -> None:
    config = _scaling_config(ScalingSpec(num_workers=2, gpus_per_worker=1, accelerator="A100"))

    assert config.label_selector == {"ray.io/accelerator-type": "A100"}


def test_a_group_without_gpus_asks_for_none() -> None:
    config = _scaling_config(ScalingSpec(num_workers=2))

    assert (config.use_gpu, config.resources_per_worker, config.label_selector) == (False, {"CPU": 1.0}, None)


@pytest.mark.parametrize(
    ("scaling", "fault"),
    [
        ({"accelerator": "A100"}, "accelerator: 'A100' needs GPUs; set gpus_per_worker, or remove it"),
        ({"accelerator": "A100", "gpus_per_worker": 1, "num_workers": [1, 4]}, "use num_workers = 4"),
        ({"accelerator": "in(A100)", "gpus_per_worker": 1}, "pattern"),
    ],
)
def test_an_accelerator_that_cannot_be_placed_is_refused(scaling: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _job(scaling)

    assert fault in str(caught.value)


def test_fsdp_is_refused_where_two_workers_may_share_a_gpu() -> None:
    with pytest.raises(ValidationError, match=r"0\.5: fsdp cannot have two workers on one GPU; use 1"):
        _job({"num_workers": 2, "gpus_per_worker": 0.5}, strategy="fsdp")
    _job({"num_workers": 2, "gpus_per_worker": 1}, strategy="fsdp")


@pytest.mark.parametrize(
    ("workers", "gpus", "may"), [(1, 0.5, False), (2, 0.5, True), (2, 0.6, False), (2, 0, False), ((1, 2), 0.25, True)]
)
def test_workers_of_a_group_may_share_a_gpu_where_two_shares_fit(workers: Any, gpus: float, may: bool) -> None:
    assert ScalingSpec(num_workers=workers, gpus_per_worker=gpus).may_share_gpus is may
