"""Networks of real hosts, for tests that say so; skipped, with the reason, where they cannot be made."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.full_size import IS_FULL
from tests.hosts.hosts import Network, why_there_can_be_none

HERE = Path(__file__).parent
SMALL = ("test_hosts.py", "test_submit_two_hosts.py")
"""What runs without BIGRAY_FULL=1, too: minutes rather than half an hour."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is for another machine, or for the full size."""
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        if (reason := why_there_can_be_none()) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.path.name not in SMALL and not IS_FULL:
            item.add_marker(pytest.mark.skip(reason="takes minutes; with BIGRAY_FULL=1"))


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path / "network") as network:
        yield network
