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


def pytest_collection_finish() -> None:
    """Keep what is imported by now (torch, Ray) out of later garbage collections: a tenth of the time here."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _without_what_is_there() -> None:
    """As above, of what the modules before have left: half a second for each collection at the end of a long run."""
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
    if config.option.collectonly or _EXIT_CODE not in config.stash:
        return
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    config.get_terminal_writer().flush()
    os._exit(config.stash[_EXIT_CODE])
