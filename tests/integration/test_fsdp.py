"""Training cut over gloo processes: saved at one world size, loaded at another, equal to one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bigray.paths import RunPaths
from bigray.storage import MANIFEST, open_storage, read_folder
from bigray.training.checkpoint import SnapshotBuffers, load_checkpoint
from tests.integration import fsdp_ranks
from tests.integration.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done all that these tests look at; starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_ranks(fsdp_ranks.run, folder, 2)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.mark.parametrize("name", list(fsdp_ranks.OPTIMIZERS))
def test_training_as_two_then_one_then_two_workers_equals_one_process_that_never_stopped(
    folder: Path, name: str
) -> None:
    module = fsdp_ranks.make_net()
    optimizer = fsdp_ranks.OPTIMIZERS[name](module.parameters())
    differences = []
    for steps in (range(4), range(4, 8), range(8, 12)):
        fsdp_ranks.train(module, optimizer, steps)
        found = safetensors.torch.load_file(folder / f"{name}-{steps.stop}.safetensors")
        assert set(found) == set(module.state_dict())
        differences.append(relative_difference(found, module.state_dict()))
    print(f"\n{name}: relative difference after each stage {differences}")
    assert max(differences) <= 1e-6


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    a, b = (
        torch.cat([weights[name].double().reshape(-1) for name in sorted(expected)]) for weights in (found, expected)
    )
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


def test_a_trial_saved_and_resumed_at_other_world_sizes_equals_one_that_never_stopped(folder: Path) -> None:
    """The loop, the savers of all ranks, loading and the weights an export takes, against one plain process."""
    plain = fsdp_ranks.make_trial("ddp")
    paths = RunPaths(open_storage(folder / "plain"), "plain")
    alone = fsdp_ranks.Worker(0, 1, torch.device("cpu"))
    hooks = fsdp_ranks.Hooks(paths, plain, alone)
    training = fsdp_ranks.TrialTraining(plain, fsdp_ranks.make_data(), 3, alone, hooks)
    training.train_to(3)
    hooks.saver.close()
    expected = training.snapshot(SnapshotBuffers())
    found = load_checkpoint(RunPaths(open_storage(folder / "run"), "run"), fsdp_ranks.make_trial("fsdp"), pytest.fail)

    assert found is not None
    assert (found.progress.step, found.progress.samples_lost, found.progress.samples_repeated) == (9, 0, 0)
    for stem in ("model", "ema"):
        assert relative_difference(found.tensors(stem) or {}, dict(expected.tensors[stem])) <= 1e-6
    assert found.progress.metrics == pytest.approx(expected.progress.metrics, rel=1e-5)
    assert {name for name in found.files if name.startswith("ema")} == {
        f"ema-0000{part}-of-00002.safetensors" for part in (1, 2)
    }


def test_each_rank_writes_its_own_files_and_one_manifest_names_them_all(folder: Path) -> None:
    storage = open_storage(folder / "store")

    assert set(read_folder(storage, "adamw-12").files) == {
        f"{stem}-0000{part}-of-00002.safetensors" for stem in ("model", "optimizer") for part in (1, 2)
    }
    assert set(read_folder(storage, "adamw-8").files) == {
        f"{stem}-00001-of-00001.safetensors" for stem in ("model", "optimizer")
    }
    sizes = [entry["size"] for entry in json.loads(storage.read_bytes(f"adamw-12/{MANIFEST}"))["files"].values()]
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_checkpoint_with_a_missing_shard_is_refused_on_every_rank(results: dict[str, Any]) -> None:
    message = results["refusals"]["missing shard"]

    assert message == ("checkpoint/model-00002-of-00002.safetensors: missing, expected 2 parts of 'model', found 1")


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(results: dict[str, Any]) -> None:
    assert "of another model" in results["refusals"]["other model"]


def test_a_parameter_that_cannot_be_cut_is_named(results: dict[str, Any]) -> None:
    assert results["refusals"]["scalar"].startswith("strategy 'fsdp': cannot cut parameter 'gain'")


def test_bf16_computes_in_bf16_and_keeps_weights_and_gradients_in_fp32(results: dict[str, Any]) -> None:
    assert results["bf16"] == {
        "output": "torch.float32",
        "gradients": ["torch.float32"],
        "weights": ["torch.float32"],
        "rows": True,
    }
