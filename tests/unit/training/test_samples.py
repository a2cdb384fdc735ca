from __future__ import annotations

import numpy as np
import pytest
import torch

from bigray.training.loop import Worker
from bigray.training.samples import SampleLedger, lost_and_repeated

ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))


def take(ledger: SampleLedger, *loads: list[int]) -> None:
    for rows in loads:
        ledger.load(np.array(rows))
    ledger.commit()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([[0, 1, 2], [3, 4]], (0, 0)),
        ([[0, 1], [3, 4]], (1, 0)),
        ([[0, 1, 2], [2, 3, 4]], (0, 1)),
        ([[0, 1, 1, 1], [3, 4]], (1, 2)),
        ([], (5, 0)),
    ],
)
def test_rows_that_took_part_in_no_step_are_lost_and_others_are_repeated(
    steps: list[list[int]], expected: tuple[int, int]
) -> None:
    ledger = SampleLedger(5)
    for rows in steps:
        take(ledger, rows)

    assert lost_and_repeated(ledger.total(ALONE)) == expected


def test_rows_of_a_step_that_was_not_taken_do_not_count() -> None:
    ledger = SampleLedger(3)
    ledger.load(np.array([0, 1]))
    ledger.discard()
    take(ledger, [0], [1, 2])

    assert lost_and_repeated(ledger.total(ALONE)) == (0, 0)


def test_a_ledger_goes_on_from_counts_and_begins_each_epoch_empty() -> None:
    ledger = SampleLedger(3)
    take(ledger, [0, 1, 2])
    ledger.reset(np.array([1, 0, 0], dtype=np.uint8))
    take(ledger, [1, 2])
    assert ledger.total(ALONE).tolist() == [1, 1, 1]

    ledger.reset()
    assert ledger.total(ALONE).tolist() == [0, 0, 0]


def test_many_small_loads_are_counted_as_they_come() -> None:
    ledger = SampleLedger(1000)
    for row in range(1000):
        take(ledger, [row])

    assert lost_and_repeated(ledger.total(ALONE)) == (0, 0)
