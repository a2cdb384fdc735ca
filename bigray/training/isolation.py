"""What a trial may have left behind in its process, put back before the next trial begins (worker).

A process is clean when its imports are done and it has trained nothing. Here is a list, in the code, of what is put
back: whatever torch, numpy and Python keep for a whole process or thread and user code can set. What no list can hold,
such as a function of torch that user code has replaced, `scaling.isolate` is for.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as torch_modules
from torch.optim import optimizer as torch_optimizer
from torch.utils import _device as torch_device

from bigray.errors import last_line

OF_THE_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that each generation of the group sets for itself."""
_OUR_THREADS = ("heartbeat", "reporter", "checkpoint-saver")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_buffer_registration_hooks",
    "_global_module_registration_hooks",
    "_global_parameter_registration_hooks",
)
_SEED = 0
_FOUR = float("4")
"""Not a literal: a quotient of those is worked out when this is compiled."""

Restore = Callable[[], object]
_HELD: list[object] = []
"""Blocks that were entered to undo one that a trial never left; the end of such an object would leave them."""


class CleanState:
    """The state of this process now; `restore` brings it back, in the thread that trains."""

    def __init__(self) -> None:
        self._restores: list[Restore] = [
            *_modes(),
            *_random_numbers(),
            *_autograd(),
            *_torch_settings(),
            *_torch_hooks(),
            *_messages(),
            *_python(),
        ]
        self._environment = dict(os.environ)
        self._threads = set(threading.enumerate())
        self._told: set[threading.Thread] = set()

    def restore(self) -> str | None:
        """Put everything back. Takes well under a millisecond.

        Returns what could not be put back, in one line: no other trial should be trained in this process then.
        """
        failures: list[str] = []
        for restore in (*self._restores, self._restore_environment):
            try:
                restore()
            except Exception as error:  # whatever user code has put in the way; the rest is still put back
                failures.append(f"{type(error).__name__}: {last_line(error)}")
        return f"a trial before left what cannot be put back: {failures[0]}" if failures else None

    def _restore_environment(self) -> None:
        for name in set(os.environ) - set(self._environment):
            del os.environ[name]
        for name, value in self._environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    def note_group(self) -> None:
        """A generation has begun: its environment variables are part of the clean state, and so are its threads."""
        for name in OF_THE_GROUP:
            if name in os.environ:
                self._environment[name] = os.environ[name]
        self._threads |= set(threading.enumerate())

    def note_threads(self) -> None:
        """A trial is about to begin: the threads that run now are none of its own."""
        self._threads |= set(threading.enumerate())

    def threads_left(self) -> list[str]:
        """Names of threads that the trial has left running; each thread is told once."""
        running = {t for t in threading.enumerate() if t not in self._threads and not _is_ours(t)}
        fresh = running - self._told
        self._told |= fresh
        return sorted(thread.name for thread in fresh)


def seed_everything() -> None:
    """What a process draws from before anybody seeds: the same in every process, so that a trial is, too."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _is_ours(thread: threading.Thread) -> bool:
    return not thread.is_alive() or thread.name in _OUR_THREADS or thread.name.lower().startswith("ray")


def _random_numbers() -> Iterable[Restore]:
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    yield lambda: random.setstate(python)
    yield lambda: np.random.set_state(numpy)
    yield lambda: torch.default_generator.set_state(torchs)
    if torch.cuda.is_available():
        cuda = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(cuda)


def _autograd() -> Iterable[Restore]:
    """Kept for each thread: the training thread's are what counts."""
    yield _leave_inference_mode  # before the gradients: it switches them on
    yield _kept(torch.is_grad_enabled, torch._C._set_grad_enabled)
    yield _kept(torch._C._is_fwd_grad_enabled, torch._C._set_fwd_grad_enabled)
    yield _kept(torch._C._is_multithreading_enabled, torch._C._set_multithreading_enabled)
    yield _kept(torch._C._is_view_replay_enabled, torch._C._set_view_replay_enabled)
    yield _kept(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly)
    yield _leave_saved_tensors_hooks
    yield _leave_autocast
    for device in ("cpu", "cuda"):
        yield _kept(partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device))
        yield _kept(partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device))
    yield _kept(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)


def _leave_inference_mode() -> None:
    """One that was entered can be left by its own object alone; another block turns it off around all that follows."""
    if torch.is_inference_mode_enabled():
        off = torch.inference_mode(False)
        off.__enter__()
        _HELD.append(off)


def _leave_saved_tensors_hooks() -> None:
    saved: Any = torch._C._autograd
    if not saved._saved_tensors_hooks_is_enabled():
        saved._saved_tensors_hooks_enable()
    while saved._top_saved_tensors_default_hooks(True) is not None:
        saved._pop_saved_tensors_default_hooks()


def _modes() -> Iterable[Restore]:
    """What looks at each call of torch while its block is entered: a default device, and modes of the user's."""
    native: Any = torch._C
    yield partial(_empty, native._len_torch_function_stack, native._pop_torch_function_stack)
    yield partial(_empty, native._len_torch_dispatch_stack, partial(native._pop_torch_dispatch_stack, None))
    yield _attribute(torch_device, "CURRENT_DEVICE")
    default: Any = torch._GLOBAL_DEVICE_CONTEXT
    yield lambda: setattr(default, "device_context", None)  # its mode is gone with the others


def _empty(depth: Callable[[], int], pop: Callable[[], object]) -> None:
    while depth():  # bigray itself stays in none of them
        pop()


def _leave_autocast() -> None:
    """Blocks that were entered and not left."""
    for _ in range(1000):
        torch.autocast_increment_nesting()
        if torch.autocast_decrement_nesting() == 0:
            break
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _torch_settings() -> Iterable[Restore]:
    yield _kept(torch.get_num_threads, torch.set_num_threads)
    yield _kept(torch.get_default_dtype, torch.set_default_dtype)
    yield _kept(_deterministic, lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]))
    yield _kept(_flushes_denormal, torch.set_flush_denormal)
    yield _kept(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    deterministic: Any = torch.utils.deterministic
    for owner, names in (
        (deterministic, ("fill_uninitialized_memory",)),
        (torch.backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32")),
        (torch.backends.mkldnn, ("enabled",)),
        (torch.backends.cuda.matmul, ("allow_tf32",)),
    ):
        for name in names:
            yield _attribute(owner, name)


def _flushes_denormal() -> bool:
    """Whether results too small to be normal become 0; there is no getter."""
    return sys.float_info.min / _FOUR == 0.0


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _torch_hooks() -> Iterable[Restore]:
    """Hooks for every module and optimizer of the process."""
    for name in _GLOBAL_HOOKS:
        yield _contents(getattr(torch_modules, name))
    yield _attribute(torch_modules, "_global_is_full_backward_hook")
    yield _contents(torch_optimizer._global_optimizer_pre_hooks)
    yield _contents(torch_optimizer._global_optimizer_post_hooks)


def _messages() -> Iterable[Restore]:
    yield _contents(warnings.filters, warnings._filters_mutated)  # type: ignore[attr-defined]
    yield _attribute(warnings, "showwarning")
    yield _attribute(logging.root.manager, "disable")
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            yield _kept(partial(getattr, logger, "level"), logger.setLevel)
            yield _contents(logger.handlers)
            for name in ("disabled", "propagate"):
                yield _attribute(logger, name)


def _python() -> Iterable[Restore]:
    folder = os.getcwd()
    yield lambda: os.chdir(folder)
    yield _contents(sys.path)
    for name in ("stdout", "stderr", "excepthook"):
        yield _attribute(sys, name)
    yield _attribute(threading, "excepthook")
    yield _kept(sys.getrecursionlimit, sys.setrecursionlimit)
    yield _kept(socket.getdefaulttimeout, socket.setdefaulttimeout)
    yield _kept(gc.get_threshold, lambda values: gc.set_threshold(*values))
    yield _kept(gc.isenabled, _set_gc)
    errors = np.geterr()
    yield lambda: np.seterr(**errors)
    mask = os.umask(0)
    os.umask(mask)
    yield lambda: os.umask(mask)


def _set_gc(on: bool) -> None:
    (gc.enable if on else gc.disable)()


def _kept(read: Callable[[], Any], write: Callable[[Any], object]) -> Restore:
    value = read()

    def restore() -> None:
        if read() != value:  # some writers cost more than a look, or warn
            write(value)

    return restore


def _attribute(owner: Any, name: str) -> Restore:
    value = getattr(owner, name)

    def restore() -> None:
        if getattr(owner, name) is not value:
            setattr(owner, name, value)

    return restore


def _contents(held: Any, changed: Callable[[], object] | None = None) -> Restore:
    """Of a list or a dict that others hold on to: it is filled again, in place."""
    copy = held.copy()

    def restore() -> None:
        if held == copy:
            return
        held.clear()
        (held.extend if isinstance(held, list) else held.update)(copy)
        if changed is not None:
            changed()

    return restore
