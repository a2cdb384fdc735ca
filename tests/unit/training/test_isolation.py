"""A trial after another one in the same process is what it is alone."""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode

from bigray.data.dataset import TrainingArrays
from bigray.specs import TrialSpec
from bigray.training.isolation import CleanState
from tests.unit.training.test_loop import _train, _weights

MakeTrial = Callable[..., TrialSpec]
UserModule = Callable[[str], str]
Disturb = Callable[[], object]
Look = Callable[[], Any]


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[CleanState]:
    """The state before the test, put back after it whatever happens."""
    state = CleanState()
    yield state
    state.restore()


def _draws() -> Any:
    """What a process would draw next; it does so on copies of the generators."""
    python, numpy = random.Random(), np.random.RandomState()
    python.setstate(random.getstate())
    numpy.set_state(np.random.get_state())
    generator = torch.Generator()
    generator.set_state(torch.default_generator.get_state())
    return python.random(), numpy.rand(), torch.rand(1, generator=generator).item()


def _seed_all() -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def _hooked() -> None:
    modules.register_module_forward_hook(lambda module, inputs, outputs: outputs * 2)


def _hooked_backward() -> None:
    modules.register_module_full_backward_hook(lambda module, inputs, outputs: None)


def _hooked_optimizer() -> None:
    optimizers.register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: None)


def _forward() -> float:
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return float(layer(torch.ones(1, 2)).detach())


def _num_hooks() -> int:
    return len(modules._global_backward_hooks) + len(optimizers._global_optimizer_pre_hooks)


def _quiet_logging() -> None:
    logging.disable(logging.CRITICAL)
    logging.getLogger().setLevel(logging.CRITICAL)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(logging.NullHandler())


def _logging() -> Any:
    return logging.root.manager.disable, logging.getLogger().level, len(logging.getLogger().handlers)


def _drop_variables() -> None:
    os.environ["A_TRIAL_WAS_HERE"] = "1"
    os.environ["HOME"] = "/elsewhere"
    os.environ.pop("PATH")


def _silence_warnings() -> None:
    warnings.simplefilter("error")
    warnings.showwarning = lambda *_: None  # type: ignore[assignment]


def _precision() -> Any:
    with torch.no_grad():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, torch.is_autocast_enabled("cpu")


def _enter_autocast() -> None:
    torch.autocast("cpu", dtype=torch.bfloat16).__enter__()


def _enter_two_autocasts() -> None:
    _enter_autocast()
    _enter_autocast()


def _nesting() -> int:
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth


def _flushes() -> bool:
    """Whether numbers too small to be normal are taken for 0, also in a comparison with one."""
    return sys.float_info.min / float("4") == 0.0


def _enter_inference_mode() -> None:
    _LEFT.append(torch.inference_mode())
    _LEFT[-1].__enter__()


def _enter_device() -> None:
    torch.device("meta").__enter__()


def _enter_two_devices() -> None:
    torch.set_default_device("meta")
    _enter_device()


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _double_saved_tensors() -> None:
    torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor * 2, lambda tensor: tensor).__enter__()


def _forbid_saved_tensors_hooks() -> None:
    _LEFT.append(torch.autograd.graph.disable_saved_tensors_hooks("not here"))
    _LEFT[-1].__enter__()


def _square_gradient() -> float:
    x = torch.ones(1, requires_grad=True)
    (x * x).backward()
    assert x.grad is not None
    return x.grad.item()


def _can_save_on_cpu() -> bool:
    try:
        with torch.autograd.graph.save_on_cpu():
            return True
    except RuntimeError:
        return False


_LEFT: list[Any] = []
"""Blocks that are entered and held, so that nothing leaves them but what is tested."""

KINDS: dict[str, tuple[Disturb, Look]] = {
    "random numbers": (_seed_all, _draws),
    "torch threads": (lambda: torch.set_num_threads(2), torch.get_num_threads),
    "gradients off": (lambda: torch._C._set_grad_enabled(False), torch.is_grad_enabled),
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), lambda: torch.ones(1).dtype),
    "default device": (lambda: torch.set_default_device("meta"), lambda: torch.empty(1).device),
    "inference mode": (
        _enter_inference_mode,
        lambda: (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.ones(1).is_inference()),
    ),
    "an entered device": (_enter_device, lambda: (torch.empty(1).device, torch.get_default_device())),
    "a device entered in another": (_enter_two_devices, lambda: (torch.empty(1).device, torch.get_default_device())),
    "a dispatch mode": (lambda: _Nothing().__enter__(), torch._C._len_torch_dispatch_stack),
    "hooks of saved tensors": (_double_saved_tensors, _square_gradient),
    "hooks of saved tensors forbidden": (_forbid_saved_tensors_hooks, _can_save_on_cpu),
    "backward threads": (
        lambda: torch._C._set_multithreading_enabled(False),
        torch._C._is_multithreading_enabled,
    ),
    "tf32": (
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.backends.cuda.matmul.allow_tf32,
    ),
    "deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "cudnn flags": (
        lambda: setattr(torch.backends.cudnn, "deterministic", True),
        lambda: torch.backends.cudnn.deterministic,
    ),
    "matmul precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "denormal numbers": (lambda: torch.set_flush_denormal(not _flushes()), _flushes),
    "anomaly detection": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "autocast": (_enter_autocast, _precision),
    "nested autocast": (_enter_two_autocasts, lambda: (_precision(), _nesting())),
    "autocast type": (
        lambda: torch.set_autocast_dtype("cpu", torch.float16),
        lambda: torch.get_autocast_dtype("cpu"),
    ),
    "forward hooks of all modules": (_hooked, _forward),
    "backward and optimizer hooks": (lambda: (_hooked_backward(), _hooked_optimizer()), _num_hooks),
    "warnings": (_silence_warnings, lambda: (warnings.filters[0], warnings.showwarning)),
    "logging": (_quiet_logging, _logging),
    "environment": (_drop_variables, lambda: {**os.environ, "PYTEST_CURRENT_TEST": ""}),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "import path": (lambda: sys.path.insert(0, "/elsewhere"), lambda: list(sys.path)),
    "standard output": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    "recursion limit": (lambda: sys.setrecursionlimit(9999), sys.getrecursionlimit),
    "socket timeout": (lambda: socket.setdefaulttimeout(3.0), socket.getdefaulttimeout),
    "garbage collection": (lambda: (gc.disable(), gc.set_threshold(1)), lambda: (gc.isenabled(), gc.get_threshold())),
    "numpy's floating point errors": (lambda: np.seterr(all="raise"), np.geterr),
    "file mode": (lambda: os.umask(0o777), lambda: _umask()),
}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trial_leaves_behind_is_put_back(clean: CleanState, kind: str) -> None:
    disturb, look = KINDS[kind]
    before = look()
    disturb()
    assert look() != before, "the disturbance must be seen for this test to tell something"

    assert clean.restore() is None

    assert look() == before


def test_what_cannot_be_put_back_is_told_and_the_rest_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    clean = CleanState()
    folder.rmdir()
    os.chdir(tmp_path)
    os.environ["A_TRIAL_WAS_HERE"] = "1"

    reason = clean.restore()

    assert reason is not None
    assert "FileNotFoundError" in reason
    assert "A_TRIAL_WAS_HERE" not in os.environ


def test_inference_mode_stays_off_when_the_block_that_was_not_left_ends(clean: CleanState) -> None:
    _enter_inference_mode()
    clean.restore()
    _LEFT.clear()
    gc.collect()

    assert not torch.is_inference_mode_enabled()
    assert _square_gradient() == 2.0


def test_a_trial_after_one_that_misbehaves_in_every_way_ends_in_the_same_bits(
    make_trial: MakeTrial, blobs: TrainingArrays, clean: CleanState, user_module: UserModule
) -> None:
    """Both are trained for real, and the second draws its weights from generators that nobody seeds."""
    name = user_module(
        """
        import random
        import numpy as np
        import torch
        from torch import nn

        def make(shape, outputs):
            layer = nn.Linear(shape[0], outputs)
            with torch.no_grad():
                layer.weight += random.random() + torch.from_numpy(np.random.rand(outputs, shape[0]))
            return nn.Sequential(layer, nn.Dropout(0.2))
        """
    )
    second = make_trial(f"{name}:make", {}, optimizer="adamw")
    alone = _weights(_train(second, blobs)[0])
    clean.restore()

    _train(make_trial(seed=3), blobs)
    for kind, (disturb, _) in KINDS.items():
        if "device" not in kind and "forbidden" not in kind:  # nothing else could be trained or disturbed
            disturb()
    disturbed = torch.is_grad_enabled()
    clean.restore()

    assert not disturbed
    assert _weights(_train(second, blobs)[0]) == alone


def test_without_putting_back_it_would_not(make_trial: MakeTrial, blobs: TrainingArrays, clean: CleanState) -> None:
    trial = make_trial()
    alone = _weights(_train(trial, blobs)[0])
    _hooked()

    assert _weights(_train(trial, blobs)[0]) != alone


def test_the_variables_of_the_group_are_those_of_its_newest_generation(
    clean: CleanState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    clean.note_group()
    monkeypatch.setenv("RANK", "7")
    clean.restore()
    assert os.environ["RANK"] == "1"


def test_threads_that_a_trial_leaves_running_are_named_once(clean: CleanState) -> None:
    is_over = threading.Event()
    before = threading.Thread(target=is_over.wait, name="was-here")
    before.start()
    clean.note_threads()
    ended, left = threading.Thread(target=lambda: None), threading.Thread(target=is_over.wait, name="left-running")
    ours = threading.Thread(target=is_over.wait, name="checkpoint-saver")
    for thread in (ended, left, ours):
        thread.start()
    ended.join()
    try:
        assert clean.threads_left() == ["left-running"]
        assert clean.threads_left() == []
    finally:
        is_over.set()
