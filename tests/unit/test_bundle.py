from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from bigray.bundle import (
    GOLDEN,
    HOLDOUT,
    HOLDOUT_ROWS,
    WEIGHTS,
    BundleManifest,
    FactorySpec,
    Golden,
    ModelBundle,
    check_weights,
    is_outdated,
    load_holdout,
    pack_holdout,
    save_bundle,
)
from bigray.data.features import column_to_numpy
from bigray.data.sources import table_from_arrays
from bigray.errors import CorruptFile, StorageError
from bigray.serve.sample import write_sample_bundle
from bigray.storage import MANIFEST, Storage, open_storage, sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(write_sample_bundle(str(tmp_path), name="digits", params={"hidden": [4]}, onnx=False))


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def test_a_bundle_is_read_back_with_the_hash_of_its_weights_as_version(folder: Path) -> None:
    bundle = ModelBundle.load(folder)

    assert bundle.manifest.name == "digits"
    assert bundle.weights == (folder / WEIGHTS).read_bytes()
    assert bundle.version == sha256(bundle.weights)[:12]
    assert bundle.onnx is None


def test_a_bundle_can_be_loaded_from_an_open_storage(folder: Path) -> None:
    assert ModelBundle.load(open_storage(folder)) == ModelBundle.load(str(folder))


def test_the_manifest_survives_json(folder: Path) -> None:
    manifest = ModelBundle.load(folder).manifest

    assert BundleManifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_changed_weights_are_refused_with_both_hashes(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    expected = sha256(bytes(data))
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)

    with pytest.raises(CorruptFile) as caught:
        ModelBundle.load(folder)

    assert (caught.value.expected, caught.value.actual) == (expected, sha256(bytes(data)))
    assert f"digits/{WEIGHTS}" in str(caught.value)


def test_a_folder_without_a_bundle_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no bundle here \(manifest\.json is missing\)"):
        ModelBundle.load(tmp_path / "nothing")


@pytest.mark.parametrize("more", [{}, {"new_in_version_3": True}], ids=["same fields", "another field"])
def test_a_bundle_of_a_later_schema_version_is_told_as_such(folder: Path, more: dict[str, Any]) -> None:
    _rewrite(folder, lambda document: document.update(schema_version=4, **more))

    with pytest.raises(StorageError, match=r"manifest\.json: schema_version 4, this bigray reads 3; update bigray"):
        ModelBundle.load(folder)
    assert not is_outdated(open_storage(folder))


def test_of_a_bundle_of_an_earlier_schema_version_it_is_told_how_to_get_a_new_one(folder: Path) -> None:
    assert not is_outdated(open_storage(folder))
    _rewrite(folder, lambda document: document.update(schema_version=1))

    with pytest.raises(StorageError, match="schema_version 1, this bigray reads 3; run the same `bigray train` or"):
        ModelBundle.load(folder)
    assert is_outdated(open_storage(folder))


def test_a_manifest_with_a_missing_part_is_told_with_its_place(folder: Path) -> None:
    _rewrite(folder, lambda document: document["origin"].pop("run"))

    with pytest.raises(StorageError, match=r"manifest\.json: origin\.run: Field required"):
        ModelBundle.load(folder)


def test_a_manifest_that_lists_no_weights_is_told(folder: Path) -> None:
    _rewrite(folder, lambda document: document["files"].clear())

    with pytest.raises(StorageError, match=r"lists no weights\.safetensors"):
        ModelBundle.load(folder)


def test_saving_again_leaves_nothing_of_the_bundle_before(folder: Path, storage: Storage) -> None:
    bundle = ModelBundle.load(folder)
    save_bundle(storage, "bundle", bundle.manifest, bundle.weights, b"an onnx file")
    assert ModelBundle.load(storage.child("bundle")).onnx == b"an onnx file"

    save_bundle(storage, "bundle", bundle.manifest, bundle.weights, None)

    assert storage.list_names("bundle") == [MANIFEST, WEIGHTS]
    assert ModelBundle.load(storage.child("bundle")).onnx is None


def test_parameters_of_the_factory_keep_their_types() -> None:
    spec = FactorySpec(factory="bigray.models:mlp", params={"hidden": [4, 4], "dropout": 0.5, "bias": True})

    read_back = FactorySpec.model_validate_json(spec.model_dump_json())

    assert read_back == spec
    assert np.asarray(read_back.params["hidden"]).dtype.kind == "i"


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Another content, with the hash that goes with it."""
    (folder / name).write_bytes(data)
    entry = {"size": len(data), "sha256": sha256(data)}
    _rewrite(folder, lambda document: document["files"].update({name: entry}))


def test_the_golden_answers_come_with_the_bundle(folder: Path) -> None:
    golden = ModelBundle.load(folder).golden

    assert golden is not None
    assert (golden.inputs.shape, golden.outputs.shape) == ((32, 784), (32, 10))
    assert golden.inputs.dtype == golden.outputs.dtype == np.float32


@pytest.mark.parametrize(
    "golden",
    [
        Golden(np.zeros((2, 784), np.float32), np.zeros((3, 10), np.float32)),
        Golden(np.zeros((2, 783), np.float32), np.zeros((2, 10), np.float32)),
        Golden(np.zeros((2, 784), np.float64), np.zeros((2, 10), np.float64)),
        Golden(np.zeros((0, 784), np.float32), np.zeros((0, 10), np.float32)),
    ],
    ids=["rows", "width", "dtype", "none"],
)
def test_golden_answers_of_another_form_are_refused(folder: Path, golden: Golden) -> None:
    _replace(folder, GOLDEN, golden.pack())

    with pytest.raises(StorageError, match=rf"{GOLDEN}: expected .*, found inputs F"):
        ModelBundle.load(folder)


def test_the_holdout_is_read_when_it_is_asked_for_and_then_verified(folder: Path) -> None:
    data = bytearray((folder / HOLDOUT).read_bytes())
    (table, sizes) = load_holdout(folder), ModelBundle.load(folder).sizes
    assert table is not None
    assert table.column_names == ["image", "label"]
    assert (table.num_rows, sizes[HOLDOUT]) == (200, len(data))

    data[-1] ^= 1
    (folder / HOLDOUT).write_bytes(data)

    ModelBundle.load(folder)
    with pytest.raises(CorruptFile, match=HOLDOUT):
        load_holdout(folder)


def test_a_bundle_without_a_holdout_has_none(tmp_path: Path) -> None:
    folder = write_sample_bundle(str(tmp_path), params={"hidden": [4]}, onnx=False, holdout_rows=0)

    assert load_holdout(folder) is None


def test_a_holdout_keeps_its_values_as_plain_columns() -> None:
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    table = table_from_arrays({"image": images, "label": np.array(["cat", "dog"])})

    packed = pack_holdout(table)
    assert packed is not None
    read = pa.ipc.open_file(packed).read_all()

    np.testing.assert_array_equal(column_to_numpy(read, "image"), images)
    assert read.column("label").to_pylist() == ["cat", "dog"]
    assert b"ARROW:extension:name" not in packed


def test_of_a_large_holdout_a_sample_is_kept_the_same_each_time() -> None:
    table = pa.table({"x": np.arange(3 * HOLDOUT_ROWS), "y": np.arange(3 * HOLDOUT_ROWS)})

    first, again, other = pack_holdout(table, 0), pack_holdout(table, 0), pack_holdout(table, 1)

    assert first is not None
    assert first == again != other
    rows = pa.ipc.open_file(first).read_all().column("x").to_pylist()
    assert len(set(rows)) == HOLDOUT_ROWS
    assert rows == sorted(rows)
    assert pack_holdout(table.slice(0, 0)) is None


def test_a_holdout_that_names_an_extension_type_is_not_opened(folder: Path) -> None:
    storage_type = pa.list_(pa.float32(), 784)
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": b"code"}
    schema = pa.schema([pa.field("image", storage_type, metadata=metadata), pa.field("label", pa.int64())])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([pa.array([], storage_type), pa.array([], pa.int64())], schema=schema))
    _replace(folder, HOLDOUT, sink.getvalue().to_pybytes())

    with pytest.raises(StorageError, match=rf"{HOLDOUT}: holds Arrow extension types"):
        load_holdout(folder)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"not arrow", "not an Arrow file"), (pack_holdout(pa.table({"image": [1.0]})), "lacks the column 'label'")],
    ids=["bytes", "columns"],
)
def test_a_holdout_that_is_none_is_told(folder: Path, data: bytes, why: str) -> None:
    _replace(folder, HOLDOUT, data)

    with pytest.raises(StorageError, match=f"{HOLDOUT}: {why}"):
        load_holdout(folder)


@pytest.mark.parametrize("name", ["weights.pt", "model.pkl", "setup.py", "WEIGHTS.safetensors"])
def test_a_bundle_holds_no_file_but_its_own(folder: Path, name: str) -> None:
    _replace(folder, name, b"x")

    with pytest.raises(StorageError, match=f"lists '{name}'; a bundle holds plain data only"):
        ModelBundle.load(folder)


GOOD = safetensors.numpy.save({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        (2**63).to_bytes(8, "little") + GOOD[8:],
        GOOD.replace(b"[12,20]", b"[11,19]"),
        GOOD.replace(b"[12,20]", b"[12,21]"),
        GOOD.replace(b'"b"', b'"a"'),
    ],
    ids=["empty", "cut", "length", "overlap", "beyond", "a name twice"],
)
def test_weights_of_a_wrong_form_are_refused(data: bytes) -> None:
    check_weights(GOOD, "here")
    assert data != GOOD

    with pytest.raises(StorageError, match="here: not a safetensors file: "):
        check_weights(data, "here")


@pytest.mark.parametrize("begins", [b"\x80\x04", b"PK\x03\x04"], ids=["pickle", "zip"])
def test_weights_that_look_like_code_are_told_as_such(begins: bytes) -> None:
    with pytest.raises(StorageError, match="begins like a pickle or a torch file"):
        check_weights(begins + bytes(1000), "here")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_none_is_found_in_every_floating_type(dtype: str, value: str) -> None:
    import safetensors.torch
    import torch

    tensor = torch.tensor([-1.5, 0.0, 448.0]).to(getattr(torch, dtype))
    check_weights(safetensors.torch.save({"fine": tensor, "whole": torch.tensor([-1, 2**31 - 1])}), "here")
    if value != "nan" and dtype == "float8_e4m3fn":
        return  # has no infinity

    tensor[1] = float(value)
    with pytest.raises(StorageError, match="here: tensor 'bad' holds NaN or infinite values"):
        check_weights(safetensors.torch.save({"fine": torch.ones(2), "bad": tensor}), "here")
