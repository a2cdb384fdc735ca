"""The example loops in two processes over gloo, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigray.training.loop import Worker
from tests.integration.own_loop_ranks import EPOCHS, EXAMPLES, NUM_PROCESSES, run, train
from tests.integration.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The processes start once, for all tests."""
    folder = tmp_path_factory.mktemp("results")
    run_ranks(run, folder, NUM_PROCESSES)
    return folder


def _document(results: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return document


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_reports_every_epoch_and_learns(results: Path, example: str) -> None:
    document = _document(results, f"{example}-whole-0")

    assert document["epochs"] == list(range(1, EPOCHS + 1))
    assert document["progress"]["ended"] == "finished"
    values = [value for _, value in document["progress"]["improvements"]]
    assert abs(values[-1] - values[0]) > 0.1


@pytest.mark.parametrize("example", EXAMPLES)
def test_rank_0_reports_and_all_ranks_agree_on_the_progress(results: Path, example: str) -> None:
    first, second = (_document(results, f"{example}-whole-{rank}") for rank in range(NUM_PROCESSES))

    assert second["progress"] == first["progress"]
    assert second["epochs"] == []
    assert not (results / f"{example}-whole-1.safetensors").exists(), "rank 0 alone keeps the weights"


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_that_was_asked_to_stop_ends_with_the_weights_of_one_that_was_not(
    results: Path, example: str
) -> None:
    whole, broken = (load_file(results / f"{example}-{kind}-0.safetensors") for kind in ("whole", "broken"))

    assert _document(results, f"{example}-broken-0")["epochs"] == list(range(1, EPOCHS + 1))
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


def test_one_worker_takes_the_same_steps_as_two(results: Path) -> None:
    alone, _ = train("own_loop", Worker(0, 1, torch.device("cpu")))
    together = load_file(results / "own_loop-whole-0.safetensors")

    assert alone.best_weights is not None
    for name, tensor in alone.best_weights.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_loop_without_reports_fails_on_every_rank_with_the_same_line(results: Path) -> None:
    faults = {(results / f"fault-{rank}").read_text() for rank in range(NUM_PROCESSES)}

    assert faults == {
        "loop 'tests.integration.own_loop_ranks:say_nothing' returned without a report; "
        "call context.report(...) with 'val_error'"
    }
