from __future__ import annotations

import gc
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the folder it is in: unit, integration, e2e or hosts."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        item.add_marker(getattr(pytest.mark, folder))


def pytest_collection_finish() -> None:
    """Keep what is imported by now (torch, Ray) out of later garbage collections: a tenth of the time here."""
    gc.freeze()
