from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.bundle import WEIGHTS, BundleManifest, FactorySpec, ModelBundle, save_bundle
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


@pytest.mark.parametrize("more", [{}, {"new_in_version_2": True}], ids=["same fields", "another field"])
def test_a_bundle_of_another_schema_version_is_told_as_such(folder: Path, more: dict[str, Any]) -> None:
    _rewrite(folder, lambda document: document.update(schema_version=2, **more))

    with pytest.raises(StorageError, match=r"manifest\.json: schema_version 2, this bigray reads 1"):
        ModelBundle.load(folder)


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
