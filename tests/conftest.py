from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_EXIT_CODE = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the folder it is in: unit, integration, e2e or hosts."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(scope="module", autouse=True)
def _without_what_is_there() -> None:
    """Keep what is imported (torch, Ray), and what the modules before have left, out of later garbage collections: at
    the end of a long run each would take half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_EXIT_CODE] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process here, with pytest's exit code, and not by way of Python's and the C++ libraries' own end.

    Threads of Ray's, gRPC's, gloo's and the AWS client's outlive those who started them; `exit` destroys what they use.
    One whole run ended by a segmentation fault after all of its tests had passed.
    """
    if _EXIT_CODE not in config.stash:  # pytest was called wrongly, and nothing has begun
        return
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    config.get_terminal_writer().flush()
    os._exit(config.stash[_EXIT_CODE])
