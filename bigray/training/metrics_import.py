"""torchmetrics, without what it imports for nothing (worker)."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

UNUSED = "scipy.signal"
STANDS_IN_FOR = "hamming"
"""The only name of it that torchmetrics looks for."""


def import_torchmetrics() -> None:
    """Import the metrics of bigray's tasks, without scipy's signal processing and statistics: two thirds of a second.

    Where scipy is installed, torchmetrics (1.9) imports scipy.signal to put back a name that scipy has taken out. No
    metric uses it. An empty module stands in for it meanwhile, unless somebody has imported it before.
    """
    with _stood_in_for(UNUSED):
        for module in ("torchmetrics.classification", "torchmetrics.regression"):
            importlib.import_module(module)


@contextlib.contextmanager
def _stood_in_for(name: str) -> Iterator[None]:
    if name in sys.modules or "torchmetrics" in sys.modules:
        yield
        return
    stand_in = ModuleType(name)
    setattr(stand_in, STANDS_IN_FOR, None)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
