"""torchmetrics, without what it imports for nothing (worker)."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

UNUSED = "scipy.signal"


def import_torchmetrics() -> None:
    """Import the metrics of bigray's tasks, without scipy's signal processing and statistics: two thirds of a second.

    Where scipy is installed, torchmetrics (1.9) imports scipy.signal to put back a name that scipy has taken out. No
    metric uses it. An empty module stands in for it meanwhile, unless somebody has imported it before.
    """
    with _unused_stood_in_for():
        for module in ("torchmetrics.classification", "torchmetrics.regression"):
            importlib.import_module(module)


@contextlib.contextmanager
def _unused_stood_in_for() -> Iterator[None]:
    if UNUSED in sys.modules:
        yield
        return
    sys.modules[UNUSED] = stand_in = ModuleType(UNUSED)
    vars(stand_in)["hamming"] = None  # the only name of it that torchmetrics looks for
    try:
        yield
    finally:
        del sys.modules[UNUSED]
