"""The whole loop in groups of processes over gloo, without Ray: the same trials at 1 to 4 workers, and resized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.loop_ranks import CLOSE, DIVERGING, EPOCHS, EXACT, NUM_PROCESSES, RESIZED, STEPS, run
from tests.integration.ranks import run_ranks

OTHER_WORLD_SIZES = range(2, NUM_PROCESSES + 1)
TOLERANCE = {"sgd": 1e-5, "large": 1e-5, "class weights and micro-batches": 1e-5, "synchronised batch norm": 1e-4}
"""Relative difference of all weights; AdamW divides by small numbers, so its steps differ more."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four processes start once, for all tests."""
    folder = tmp_path_factory.mktemp("results")
    run_ranks(run, folder, NUM_PROCESSES)
    return folder


def weights(results: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(results / f"{name}.safetensors")


def told(results: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return document


def assert_bit_equal(results: Path, name: str, expected: str) -> None:
    found, alone = weights(results, name), weights(results, expected)
    assert found.keys() == alone.keys()
    assert [key for key in alone if not torch.equal(found[key], alone[key])] == []
    assert told(results, name) == told(results, expected)


def relative_difference(results: Path, name: str, expected: str) -> float:
    found, alone = weights(results, name), weights(results, expected)
    assert found.keys() == alone.keys()
    flat, flat_alone = (torch.cat([state[key].double().ravel() for key in alone]) for state in (found, alone))
    return float((flat - flat_alone).norm() / flat_alone.norm())


@pytest.mark.parametrize("name", EXACT)
def test_exact_weights_losses_and_metrics_have_the_same_bits_at_any_number_of_workers(results: Path, name: str) -> None:
    for world_size in OTHER_WORLD_SIZES:
        assert_bit_equal(results, f"{name}-{world_size}", f"{name}-1")


def test_without_exact_the_bits_differ(results: Path) -> None:
    """So that the test above can fail."""
    assert any(relative_difference(results, f"sgd-{world_size}", "sgd-1") > 0 for world_size in OTHER_WORLD_SIZES)


@pytest.mark.parametrize("name", CLOSE)
def test_without_exact_any_number_of_workers_takes_the_same_steps(results: Path, name: str) -> None:
    alone = told(results, f"{name}-1")["reports"]
    for world_size in OTHER_WORLD_SIZES:
        assert relative_difference(results, f"{name}-{world_size}", f"{name}-1") <= TOLERANCE.get(name, 1e-3)
        for report, expected in zip(told(results, f"{name}-{world_size}")["reports"], alone, strict=True):
            assert report["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
            assert report["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-3)


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_no_sample_is_lost_or_repeated(results: Path, name: str) -> None:
    for world_size in range(1, NUM_PROCESSES + 1):
        reports = told(results, f"{name}-{world_size}")["reports"]
        assert [(report["samples_lost"], report["samples_repeated"]) for report in reports] == [(0, 0)] * EPOCHS


@pytest.mark.parametrize("name", RESIZED)
def test_a_resize_inside_an_epoch_changes_nothing(results: Path, name: str) -> None:
    """From four workers to two to three, by a checkpoint each time; the loss of an epoch is that of all its batches."""
    if name in EXACT:
        assert_bit_equal(results, f"{name}-resized", f"{name}-1")
        return
    assert relative_difference(results, f"{name}-resized", f"{name}-1") <= TOLERANCE.get(name, 1e-3)
    for report, expected in zip(
        told(results, f"{name}-resized")["reports"], told(results, f"{name}-1")["reports"], strict=True
    ):
        assert report["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
        assert (report["samples_lost"], report["samples_repeated"]) == (0, 0)


def test_survivors_go_on_from_memory(results: Path) -> None:
    assert_bit_equal(results, "mlp-survivors", "mlp-1")
    for name in ("sgd", "large"):
        assert relative_difference(results, f"{name}-survivors", f"{name}-1") <= 1e-5
        last, expected = (told(results, f"{name}-{how}")["reports"][-1] for how in ("survivors", "1"))
        assert last["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert (last["samples_lost"], last["samples_repeated"]) == (0, 0)


@pytest.mark.parametrize("name", DIVERGING)
def test_a_nan_in_one_workers_rows_stops_all_of_them_before_the_same_step(results: Path, name: str) -> None:
    alone = told(results, f"{name}-1-0")
    (last,) = alone["reports"]
    assert last["ended"] == "diverged"
    assert last["reason"] == f"step {alone['step'] + 1}: loss is not finite"
    assert alone["step"] < STEPS / EPOCHS

    for world_size in OTHER_WORLD_SIZES:
        for rank in range(world_size):
            found = told(results, f"{name}-{world_size}-{rank}")
            assert (found["step"], found["rollbacks"]) == (alone["step"], alone["rollbacks"])
            assert all(torch.isfinite(t).all() for t in weights(results, f"{name}-{world_size}-{rank}").values())
        assert told(results, f"{name}-{world_size}-0")["reports"][-1]["reason"] == last["reason"]
