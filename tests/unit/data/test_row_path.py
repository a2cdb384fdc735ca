"""One row, one input of the model: as an Arrow table, as JSON, in training and behind a bundle, to the last bit."""

from __future__ import annotations

import base64
import datetime
import io
import json
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from bigray.bundle import (
    BundleManifest,
    FactorySpec,
    Golden,
    ModelBundle,
    Origin,
    load_holdout,
    pack_holdout,
    save_bundle,
)
from bigray.data.dataset import Dataset, prepare_dataset
from bigray.data.features import Column, table_to_records
from bigray.inference import Predictor
from bigray.serve.release.golden import check_golden
from bigray.serve.sample import write_sample_bundle
from bigray.specs import DataSpec
from bigray.storage import open_storage
from bigray.training.tensor_files import pack_tensors

NUM_ROWS = 90
DAY = datetime.datetime(2019, 12, 30, 23, 59, 59, 123456, tzinfo=datetime.UTC)


def _maybe(values: list[Any], every: int, gap: Any = None) -> list[Any]:
    return [gap if row % every == 0 else value for row, value in enumerate(values)]


def messy_table() -> pa.Table:
    """Every kind of column that a table may have, most with gaps."""
    generator = np.random.default_rng(0)
    numbers, rows = generator.normal(1e3, 5.0, NUM_ROWS), range(NUM_ROWS)
    moments = [DAY + datetime.timedelta(hours=7.77 * row) for row in rows]
    return pa.table(
        {
            "id": pa.array(rows, pa.int64()),
            "double": pa.array(_maybe(numbers.tolist(), 7), pa.float64()),
            "float": pa.array(_maybe(numbers.tolist(), 8, float("nan")), pa.float32()),
            "whole": pa.array(_maybe(list(rows), 9), pa.int16()),
            "exact": pa.array([Decimal(f"{row}.1") for row in rows]),
            "flag": pa.array([row % 3 == 0 for row in rows]),
            "colour": pa.array(_maybe([("red", "blue", "grün")[row % 3] for row in rows], 10, "")),
            "zip": pa.array([("01234", "98765")[row % 2] for row in rows]).dictionary_encode(),
            "level": pa.array([row % 4 for row in rows], pa.int8()),
            "half": pa.array([(row % 5) / 2 for row in rows], pa.float32()),
            "born": pa.array(_maybe([moment.date() for moment in moments], 11), pa.date32()),
            "seen": pa.array(moments, pa.timestamp("ns", tz="Europe/Berlin")),
            "noted": pa.array(_maybe([moment.replace(tzinfo=None).isoformat() for moment in moments], 12)),
            "label": pa.array([("no", "yes")[row % 2] for row in rows]),
        }
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {"missing": "mean"},
    "standardised": {"missing": "median", "missing_indicator": True, "normalize": "standard"},
    "robust, one constant": {
        "missing": "mean",
        "normalize": "robust",
        "columns": {"colour": {"missing": "constant", "missing_value": "?"}, "level": {"kind": "category"}},
    },
    "projected": {"missing": "mean", "missing_indicator": True, "normalize": "minmax", "pca": 5},
    "embedded": {
        "missing": "mean",
        "categories": "embedding",
        "normalize": "standard",
        "columns": {"half": {"kind": "category", "categories": "one_hot"}, "flag": {"kind": "category"}},
    },
    "incomplete rows left out": {"missing": "drop", "normalize": "standard"},
}


@pytest.fixture
def identity(user_module: Callable[[str], str]) -> str:
    """A model that answers with its inputs."""
    return user_module("from torch import nn\n\ndef make(shape, outputs):\n    return nn.Flatten()\n") + ":make"


def _prepare(folder: Path, table: pa.Table, **spec: Any) -> Dataset:
    parquet.write_table(table, folder / "rows.parquet")
    document = {"source": str(folder / "rows.parquet"), "target": "label", **spec}
    return prepare_dataset(DataSpec.model_validate(document), "classification")


def _predictor(folder: Path, dataset: Dataset, factory: str) -> Predictor:
    """From a bundle that was written and read again."""
    origin = Origin(
        run="r", trial="0", model="m", step=0, epoch=0, metrics={}, config={}, seeds={}, data_fingerprint="", git=None,
        versions={},
    )  # fmt: skip
    manifest = BundleManifest(
        name="m",
        origin=origin,
        inputs=dataset.inputs,
        preprocessing=dataset.preprocessing,
        outputs=dataset.outputs,
        factory=FactorySpec(factory=factory, params={}),
        example=dataset.example,
    )
    outputs = np.zeros((len(dataset.golden_rows), dataset.outputs.num_outputs), np.float32)
    golden = Golden(dataset.golden_rows, outputs)
    storage = open_storage(folder)
    save_bundle(storage, "bundle", manifest, pack_tensors({}), None, golden, pack_holdout(dataset.holdout))
    return Predictor(ModelBundle.load(storage.child("bundle")), allow_factories=[factory])


def _bits(rows: np.ndarray) -> Counter[bytes]:
    assert rows.dtype == np.float32
    return Counter(row.tobytes() for row in rows.reshape(len(rows), -1))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_raw_row_is_the_same_model_input_in_training_offline_and_in_an_endpoint(
    tmp_path: Path, identity: str, name: str
) -> None:
    table = messy_table()
    dataset = _prepare(tmp_path, table, **SETTINGS[name])
    predictor = _predictor(tmp_path, dataset, identity)
    inputs = predictor.manifest.inputs
    if "left out" in name:
        table = table.filter(pa.array([all(row % every for every in range(7, 13)) for row in range(NUM_ROWS)]))
    raw = dataset.holdout.append_column("unknown", pa.array([1] * dataset.holdout.num_rows))
    body = json.dumps(table_to_records(raw))  # what a client sends of the rows

    by_table, by_json = inputs.from_table(table), inputs.from_records(json.loads(body))
    offline, served = predictor.outputs(by_table), predictor.outputs(by_json)
    alone = np.concatenate([predictor.outputs(by_table[row : row + 1]) for row in range(len(by_table))])

    assert np.isfinite(offline).all()
    assert offline.shape[1:] == dataset.model_input_shape == predictor.manifest.model_input_shape
    assert _bits(alone) == _bits(offline)
    assert _bits(offline) == _bits(dataset.arrays.x_train) + _bits(dataset.arrays.x_val) + _bits(served)
    again = inputs.from_records(json.loads(json.dumps(inputs.to_records(by_table))))
    np.testing.assert_array_equal(again, by_table)


def test_a_picture_is_the_same_model_input_as_bytes_in_base64_and_in_training(tmp_path: Path, identity: str) -> None:
    files = []
    for seed in range(NUM_ROWS):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG" if seed % 2 else "JPEG")
        files.append(buffer.getvalue())
    table = pa.table({"photo": pa.array(files, pa.binary()), "label": [seed % 2 for seed in range(NUM_ROWS)]})
    dataset = _prepare(tmp_path, table, normalize="standard", image_size=[8, 8])
    predictor = _predictor(tmp_path, dataset, identity)
    inputs = predictor.manifest.inputs
    records = [{"photo": base64.b64encode(content).decode()} for content in files]

    offline = predictor.outputs(inputs.from_table(table))
    sealed = predictor.outputs(inputs.from_table(dataset.holdout))

    assert inputs.columns[0].kind == "image"
    assert (inputs.input_shape, dataset.ranges) == ((3, 8, 8), {"photo": (0.0, 255.0)})
    np.testing.assert_array_equal(predictor.outputs(inputs.from_records(records)), offline)
    assert _bits(offline) == _bits(dataset.arrays.x_train) + _bits(dataset.arrays.x_val) + _bits(sealed)
    np.testing.assert_array_equal(
        predictor.outputs(inputs.from_records([dataset.example])).reshape(-1), dataset.arrays.x_train[0].reshape(-1)
    )
    assert abs(float(dataset.arrays.x_train.mean())) < 1e-3


def test_a_sample_bundle_may_have_columns_of_every_kind(tmp_path: Path) -> None:
    columns = (
        Column(name="size", nullable=True),
        Column(name="colour", kind="category", categories=("blue", "red"), nullable=True),
        Column(name="day", kind="date"),
    )

    uri = write_sample_bundle(str(tmp_path), columns=columns, params={"hidden": [4]}, onnx=False)
    bundle = ModelBundle.load(uri)
    holdout, inputs = load_holdout(uri), bundle.manifest.inputs
    golden = bundle.golden

    assert holdout is not None and golden is not None
    assert check_golden(bundle, Predictor(bundle)) is None
    assert inputs.from_records([bundle.manifest.example]).shape == (1, 3)
    assert bundle.manifest.model_input_shape == (2 + 3 + 5,)
    np.testing.assert_array_equal(inputs.from_table(holdout)[: len(golden.inputs)], golden.inputs)
    assert np.isnan(golden.inputs).any()
