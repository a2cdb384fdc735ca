"""The gate with real bundles on disk and real candidate processes: what is bad is refused, for what it is. No Ray."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from onnx import TensorProto, helper, numpy_helper

from bigray.bundle import GOLDEN, HOLDOUT, ONNX, WEIGHTS
from bigray.data.features import Column
from bigray.errors import BigrayError, CorruptFile, DeployError, StorageError
from bigray.serve.release.gate import CHECKS, GateSettings, run_gate
from bigray.serve.sample import write_sample_bundle
from bigray.storage import MANIFEST, sha256
from tests.processes import descendants

COLUMNS = (Column(name="width"), Column(name="height"), Column(name="depth"))
ALLOWED = ("bigray.models:*", "tests.serve_factories:*")
SETTINGS = GateSettings(allow_factories=ALLOWED, load_timeout_s=90)


def _write(folder: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "name": "parcels",
        "columns": COLUMNS,
        "class_names": ("small", "large", "huge"),
        "params": {"hidden": [4]},
        "onnx": False,
        "scale": 3.0,
    }
    return Path(write_sample_bundle(str(folder), **{**settings, **changes}))


def _write_with_graph(folder: Path, **changes: Any) -> Path:
    """The same with a `model.onnx`, written by hand: the exporter takes seconds, and so does torch in each process."""
    bundle = _write(folder, **changes)
    tensors = safetensors.numpy.load((bundle / WEIGHTS).read_bytes())
    weights = [numpy_helper.from_array(tensors[name], name) for name in sorted(tensors)]
    first_bias, first, second_bias, second = (weight.name for weight in weights)
    nodes = [
        helper.make_node("Gemm", ["features", first, first_bias], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", second, second_bias], ["outputs"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 3]) for name in ("features", "outputs")]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    _rewrite(bundle, lambda document: document["files"].update({ONNX: {"size": 0, "sha256": ""}}))
    _replace(bundle, ONNX, model.SerializeToString())
    return bundle


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_with_graph(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def winner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_with_graph(tmp_path_factory.mktemp("winner"), seed=1)


@pytest.fixture
def candidate(winner: Path, tmp_path: Path) -> Path:
    """A good bundle of the same model, to be spoilt; without a graph, so that its factory is what is loaded."""
    folder = Path(shutil.copytree(winner, tmp_path / "candidate"))
    _rewrite(folder, lambda document: document["files"].pop(ONNX))
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_left_or_changed(live: Path) -> Iterator[None]:
    before = {path.name: path.read_bytes() for path in live.iterdir()}
    yield
    assert {path.name: path.read_bytes() for path in live.iterdir()} == before
    assert [line for _, line in descendants() if b"release.candidate" in line] == []


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Another content, with the hash that goes with it: as an exporter that went wrong would leave it."""
    (folder / name).write_bytes(data)
    _rewrite(folder, lambda document: document["files"][name].update(size=len(data), sha256=sha256(data)))


def _with_factory(folder: Path, name: str) -> None:
    _rewrite(
        folder, lambda document: document.update(factory={"factory": f"tests.serve_factories:{name}", "params": {}})
    )


def _refusal(candidate: Path, live: Path | None, settings: GateSettings = SETTINGS) -> BigrayError:
    with pytest.raises(BigrayError) as caught:
        run_gate(str(candidate), None if live is None else str(live), settings)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_good_winner_passes_every_check_beside_the_live_version(winner: Path, live: Path) -> None:
    seen: list[tuple[str, str]] = []
    report = run_gate(str(winner), str(live), SETTINGS, lambda name, state: seen.append((name, state)))

    assert [check.name for check in report.checks] == list(CHECKS)
    assert all(check.passed for check in report.checks)
    assert seen == [(name, state) for name in CHECKS for state in ("running", "passed")]
    assert (report.model, report.version, report.forced) == (
        "parcels",
        sha256((winner / WEIGHTS).read_bytes())[:12],
        (),
    )
    assert report.paired is not None
    assert report.paired.rows == 200
    assert report.paired.candidate < report.paired.live
    assert report.latency is not None
    assert report.live_latency is not None


def test_the_first_version_of_a_model_is_compared_with_nothing(tmp_path: Path) -> None:
    folder = _write(tmp_path, class_names=(), holdout_rows=0)
    seen: list[tuple[str, str]] = []
    report = run_gate(str(folder), None, SETTINGS, lambda name, state: seen.append((name, state)))

    assert [name for name, state in seen if state == "skipped"] == ["schema", "holdout"]
    assert (report.paired, report.live_latency) == (None, None)


def test_a_corrupt_byte_is_refused_with_both_hashes(candidate: Path, live: Path) -> None:
    data = bytearray((candidate / HOLDOUT).read_bytes())
    data[len(data) // 2] ^= 1
    (candidate / HOLDOUT).write_bytes(data)

    error = _refusal(candidate, live)

    assert isinstance(error, CorruptFile)
    assert error.actual == sha256(bytes(data))
    assert HOLDOUT in str(error)


def test_a_missing_file_is_refused(candidate: Path, live: Path) -> None:
    (candidate / GOLDEN).unlink()

    error = _refusal(candidate, live)

    assert isinstance(error, CorruptFile)
    assert f"{GOLDEN}: corrupt, expected size" in str(error)


def test_a_bundle_without_golden_answers_is_refused(candidate: Path, live: Path) -> None:
    _rewrite(candidate, lambda document: document["files"].pop(GOLDEN))

    error = _refusal(candidate, live)

    assert isinstance(error, DeployError)
    assert f"check 'files': it has no {GOLDEN}" in str(error)


def test_weights_that_are_not_numbers_are_refused_with_the_tensors_name(candidate: Path, live: Path) -> None:
    tensors = dict(safetensors.numpy.load((candidate / WEIGHTS).read_bytes()))
    name = sorted(tensors)[0]
    tensors[name].flat[0] = np.nan
    _replace(candidate, WEIGHTS, safetensors.numpy.save(tensors))

    error = _refusal(candidate, live)

    assert isinstance(error, StorageError)
    assert f"{WEIGHTS}: tensor '{name}' holds NaN or infinite values" in str(error)


class _Canary:
    """Code in a pickle: whoever opens it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["torch file", "plain pickle"])
def test_a_pickle_that_carries_code_is_refused_and_its_code_does_not_run(
    candidate: Path, live: Path, tmp_path: Path, is_zip: bool
) -> None:
    canary = tmp_path / "canary"
    torch.save({"weight": _Canary(str(canary))}, tmp_path / "model.pt", _use_new_zipfile_serialization=is_zip)
    _replace(candidate, WEIGHTS, (tmp_path / "model.pt").read_bytes())

    error = _refusal(candidate, live)

    assert isinstance(error, StorageError)
    assert "not a safetensors file: it begins like a pickle or a torch file, which may carry code" in str(error)
    assert not canary.exists()


def test_a_file_that_no_bundle_holds_is_refused(candidate: Path, live: Path) -> None:
    (candidate / "model.pkl").write_bytes(b"x")
    entry = {"size": 1, "sha256": sha256(b"x")}
    _rewrite(candidate, lambda document: document["files"].update({"model.pkl": entry}))

    assert "lists 'model.pkl'; a bundle holds plain data only" in str(_refusal(candidate, live))


def test_a_bundle_of_an_older_schema_is_refused_and_the_way_out_is_told(candidate: Path, live: Path) -> None:
    _rewrite(candidate, lambda document: document.update(schema_version=1))

    error = _refusal(candidate, live)

    assert "schema_version 1, this bigray reads 3; run the same `bigray train` or `bigray tune` again" in str(error)


def test_a_factory_that_is_not_allowed_is_refused(candidate: Path, live: Path) -> None:
    _with_factory(candidate, "good")

    error = _refusal(candidate, live, GateSettings())

    assert "check 'factory'" in str(error)
    assert "'tests.serve_factories:good' is not allowed; add it to 'allow_factories'" in str(error)


def test_another_models_schema_is_refused(tmp_path: Path, live: Path) -> None:
    other = _write(tmp_path, columns=COLUMNS[:2])

    error = _refusal(other, live)

    assert "check 'schema': callers of the live version would be refused: input 'depth' is absent" in str(error)


def test_weights_of_another_shape_are_refused(candidate: Path, tmp_path: Path) -> None:
    _replace(candidate, WEIGHTS, (_write(tmp_path / "other", params={"hidden": [5]}) / WEIGHTS).read_bytes())

    error = _refusal(candidate, None)

    assert "check 'load'" in str(error)
    assert "size mismatch" in str(error)


@pytest.mark.parametrize(
    ("factory", "settings", "why"),
    [
        ("calls_exit", {}, "crashed: its code ended the process (SystemExit: 3)"),
        ("aborts", {}, "crashed: its process was ended by SIGABRT"),
        ("hangs", {"load_timeout_s": 4}, "hangs: not loaded within 4 s"),
        ("eats_memory", {"memory_mb": 1500}, "out of memory; it may have 1,500 MB"),
    ],
)
def test_a_model_that_does_not_load_is_refused_for_what_it_does(
    candidate: Path, factory: str, settings: dict[str, Any], why: str
) -> None:
    _with_factory(candidate, factory)

    error = _refusal(candidate, None, GateSettings(**{"allow_factories": ALLOWED, "load_timeout_s": 90, **settings}))

    assert isinstance(error, DeployError)
    assert f"check 'load': {why}" in str(error)


def test_weights_of_another_seed_beside_the_old_golden_answers_are_refused(candidate: Path, tmp_path: Path) -> None:
    _replace(candidate, WEIGHTS, (_write(tmp_path / "other", seed=7) / WEIGHTS).read_bytes())

    assert "golden answers: row" in str(_refusal(candidate, None))


def test_a_model_that_only_checks_itself_right_is_caught_over_http_and_no_force_lets_it_through(
    candidate: Path,
) -> None:
    _with_factory(candidate, "right_once")

    error = str(_refusal(candidate, None, GateSettings(allow_factories=ALLOWED, force=True)))

    assert "check 'golden': over JSON: golden answers: row" in error


def test_a_model_that_dies_when_it_is_asked_is_refused(candidate: Path) -> None:
    _with_factory(candidate, "dies_when_asked")

    error = str(_refusal(candidate, None))

    assert "check 'golden': POST /predict: crashed: its process ended with exit code 9" in error


def test_a_model_many_times_slower_is_refused(candidate: Path, live: Path) -> None:
    _with_factory(candidate, "slow")

    error = str(_refusal(candidate, live))

    assert "check 'latency': p50" in error
    assert "times the live version's; deploy it with --force" in error


def test_a_model_that_is_worse_on_sealed_rows_is_refused_unless_forced(tmp_path: Path, live: Path) -> None:
    worse = _write_with_graph(tmp_path, seed=5, teacher_seed=0)

    error = str(_refusal(worse, live))
    assert "check 'holdout': worse than the live version on sealed rows: " in error

    forced = GateSettings(allow_factories=ALLOWED, force=True)
    report = run_gate(str(worse), str(live), forced)
    assert report.forced == ("holdout",)
    assert [check.name for check in report.checks if not check.passed] == ["holdout"]


def test_a_live_version_that_is_gone_can_be_forced_past(winner: Path, live: Path, tmp_path: Path) -> None:
    error = str(_refusal(winner, tmp_path / "gone"))
    assert "check 'schema': the live version is nothing to compare with" in error

    report = run_gate(str(winner), str(tmp_path / "gone"), GateSettings(force=True))
    assert report.forced == ("schema",)


def test_ctrl_c_leaves_no_process(winner: Path, live: Path) -> None:
    def interrupt(name: str, state: str) -> None:
        if (name, state) == ("golden", "running"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_gate(str(winner), str(live), SETTINGS, interrupt)
