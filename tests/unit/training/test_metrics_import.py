"""Each in a process of its own: in this one torchmetrics and scipy are imported already."""

from __future__ import annotations

import pytest

from tests.unit.training.own_process import number_printed_by


def test_the_metrics_are_there_without_scipys_signal_processing_and_statistics() -> None:
    assert (
        number_printed_by("""
import sys
import torch
from bigray.training.metrics_import import import_torchmetrics

import_torchmetrics()
assert not {"scipy.signal", "scipy.stats"} & sys.modules.keys()

from torchmetrics.classification import MulticlassF1Score
f1 = MulticlassF1Score(3)
f1.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
print(int(f1.compute()))
""")
        == 1
    )


@pytest.mark.parametrize("way", ["import scipy.signal as signal", "import scipy; signal = scipy.signal"])
def test_a_users_model_finds_the_whole_of_it_afterwards(way: str) -> None:
    assert (
        number_printed_by(f"""
from bigray.training.metrics_import import import_torchmetrics

import_torchmetrics()
{way}
print(len(signal.butter(2, 0.5)))
""")
        == 2
    )


def test_what_is_imported_already_stays() -> None:
    assert (
        number_printed_by("""
import scipy.signal as before
from bigray.training.metrics_import import import_torchmetrics

import_torchmetrics()
import scipy.signal as after
print(int(before is after))
""")
        == 1
    )
