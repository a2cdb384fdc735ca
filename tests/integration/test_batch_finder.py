"""Two gloo processes with different budgets agree on one micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration import batch_finder_ranks
from tests.integration.batch_finder_ranks import BUDGETS_BYTES, ROW_BYTES, SETTINGS
from tests.integration.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found; starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("finder")
    run_ranks(batch_finder_ranks.run, folder, 2)
    return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_ranks_agree_on_what_the_smaller_budget_holds(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = ranks
    rows_by_input_alone = min(BUDGETS_BYTES) // ROW_BYTES

    assert first[name] == second[name]
    assert rows_by_input_alone // 8 < first[name] < rows_by_input_alone


def test_every_rank_refuses_where_one_has_no_room(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        assert f"on rank {rank}, whose budget is" in results["refused"]


def test_the_global_batch_is_the_micro_batch_of_all_workers(ranks: list[dict[str, Any]]) -> None:
    assert [results["resolved"] for results in ranks] == [{"global_batch_size": 16, "micro_batch_size": 8}] * 2
