from __future__ import annotations

import pytest

from bigray.errors import StorageError
from bigray.journal import Journal
from bigray.paths import RunPaths
from bigray.storage import Storage


@pytest.fixture
def paths(storage: Storage) -> RunPaths:
    return RunPaths(storage, "digits-1a2b3c")


def test_the_newest_attempt_may_write(paths: RunPaths) -> None:
    for _ in range(2):
        journal = Journal.open(paths)

    paths.fence(journal.attempt)


def test_an_attempt_that_another_has_taken_over_from_may_not_write(paths: RunPaths) -> None:
    for _ in range(3):
        Journal.open(paths)

    with pytest.raises(StorageError, match=r"attempt 3 has taken over this run; this process is attempt 2$"):
        paths.fence(2)


def test_a_run_whose_journal_is_gone_fences_nobody(paths: RunPaths) -> None:
    paths.fence(2)
