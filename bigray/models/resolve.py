"""From `"package.module:callable"` in a job file to a `torch.nn.Module`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigray.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from torch import nn


def load_factory(path: str) -> Callable[..., Any]:
    """Import the callable named `package.module:callable`; also used for data functions.

    Raises:
        SpecError: the form is wrong, the module does not import, or it has no such callable.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise SpecError(f"'{path}': expected the form 'package.module:callable'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code: whatever its import raises is the fault to report
        raise SpecError(f"'{path}': cannot import '{module_name}': {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        callables = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise SpecError(f"'{path}': '{module_name}' has no callable '{name}'{did_you_mean(name, callables)}")
    return found  # type: ignore[no-any-return]


def code_hash(path: str) -> str | None:
    """Hash of the file a user's callable is in: changed code is another run. None for bigray's own."""
    if path.startswith("bigray."):
        return None
    source = inspect.getsourcefile(load_factory(path))
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12] if source else None


def build_model(factory: str, params: Mapping[str, Any], input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Call a factory as `factory(input_shape, num_outputs, **params)`.

    Raises:
        SpecError: the factory cannot be found, refuses its parameters, or returns something else than a module.
    """
    function = load_factory(factory)
    try:
        module = function(input_shape, num_outputs, **params)
    except SpecError:
        raise
    except Exception as error:  # user code, as above
        raise SpecError(
            f"'{factory}': failed for input_shape={input_shape}, num_outputs={num_outputs}, "
            f"params={dict(params)}: {type(error).__name__}: {error}"
        ) from error
    # a module can only exist where torch is imported: a factory that never imported it is told apart without it
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        raise SpecError(f"'{factory}': returned {type(module).__name__}, expected a torch.nn.Module")
    return module  # type: ignore[no-any-return]
