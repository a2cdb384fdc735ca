"""A training row of every example is the same input of the model, to the last bit, however it is asked about later.

The model here only keeps what it is given: by `bigray predict`, and by an endpoint from each kind of body.
"""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from bigray.bundle import BundleManifest, FactorySpec, Golden, ModelBundle, Origin, pack_holdout, save_bundle
from bigray.data.dataset import Dataset, dataset_of, prepare_dataset, read_clean
from bigray.data.features import table_to_records
from bigray.data.sources import read_split, read_table
from bigray.inference import Predictor
from bigray.prediction.predicting import answer_here, predict_source
from bigray.serve.wire.bodies import decode_predict
from bigray.specs import DataSpec, JobSpec
from bigray.storage import open_storage
from bigray.training.tensor_files import pack_tensors
from tests.unit.test_examples import HERE_ALREADY, ROOT, STAND_INS, load_example

MOST_SENT = 48
"""Rows of a body."""
KEEPS_ITS_INPUTS = """
    import torch
    from torch import nn

    seen = []

    class Keep(nn.Module):
        def __init__(self, outputs, is_language):
            super().__init__()
            self.outputs, self.is_language = outputs, is_language

        def forward(self, x):
            seen.append(x.numpy().copy())
            return torch.zeros((*x.shape, self.outputs) if self.is_language else (len(x), self.outputs))

    def make(shape, outputs, is_language=False, **_):
        return Keep(outputs, is_language)
"""


@dataclass(frozen=True, eq=False)
class Example:
    """An example, prepared as the driver does it, behind a bundle whose model keeps its inputs."""

    dataset: Dataset
    raw: pa.Table
    """The training rows as the source has them."""
    source: str
    """Has them, among others, at `numbers`."""
    numbers: np.ndarray
    location: str
    factory: str
    folder: Path

    def kept(self) -> np.ndarray:
        """What the model was given since the last call."""
        seen = importlib.import_module(self.factory.partition(":")[0]).seen
        rows = np.concatenate(seen)
        seen.clear()
        return rows

    def ask(self, body: bytes, content_type: str) -> np.ndarray:
        """What the model of an endpoint is given for this body."""
        bundle = ModelBundle.load(self.location)
        codes = decode_predict(body, content_type, bundle.manifest)
        Predictor(bundle, allow_factories=[self.factory]).run(codes)
        return self.kept()


@pytest.fixture(params=[*HERE_ALREADY, *STAND_INS])
def example(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    user_module: Callable[[str], str],
) -> Example:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    job = load_example(request.param, tmp_path)
    dataset, raw, source, numbers = _language(job, tmp_path) if job.training.task == "language" else _rows(job)
    factory = f"{user_module(KEEPS_ITS_INPUTS)}:make"
    location = _write_bundle(tmp_path, dataset, factory)
    return Example(dataset, raw, source, numbers, location, factory, tmp_path)


def _rows(job: JobSpec) -> tuple[Dataset, pa.Table, str, np.ndarray]:
    rows = read_clean(job.data, job.training.target_kind, job.training.positive)
    numbers = rows.numbers[rows.split.train]
    source = job.data.source or job.data.train
    assert source is not None
    return dataset_of(rows), _source_rows(job.data).take(pa.array(numbers)), source, numbers


def _source_rows(spec: DataSpec) -> pa.Table:
    if spec.source is not None:
        return read_table(spec.source)
    assert spec.train is not None and spec.test is not None
    return read_split(spec.train, spec.test)[0]


def _language(job: JobSpec, folder: Path) -> tuple[Dataset, pa.Table, str, np.ndarray]:
    """Of a text, a row is a window; to be predicted it is sent as the text that it is."""
    dataset = prepare_dataset(job.data, "language")
    column, windows = dataset.inputs.columns[0], dataset.arrays.x_train[:].astype(int)
    texts = ["".join(column.categories[token] for token in window) for window in windows]
    parquet.write_table(pa.table({column.name: texts}), folder / "windows.parquet")
    return dataset, pa.table({column.name: texts}), str(folder / "windows.parquet"), np.arange(len(texts))


def _write_bundle(folder: Path, dataset: Dataset, factory: str) -> str:
    origin = Origin(
        run="r", trial="0", model="m", step=0, epoch=0, metrics={}, config={}, seeds={}, data_fingerprint="", git=None,
        versions={},
    )  # fmt: skip
    is_tensor = dataset.inputs.is_tensor
    manifest = BundleManifest(
        name="m",
        origin=origin,
        inputs=dataset.inputs,
        preprocessing=dataset.preprocessing,
        outputs=dataset.outputs,
        factory=FactorySpec(factory=factory, params={"is_language": dataset.outputs.task == "language"}),
        example=dataset.example,
        input_range=dataset.ranges.get(dataset.inputs.tensor_name) if is_tensor else None,
        ranges={} if is_tensor else dataset.ranges,
    )
    golden = Golden(dataset.golden_rows, np.zeros((len(dataset.golden_rows), dataset.outputs.num_outputs), np.float32))
    storage = open_storage(folder)
    save_bundle(storage, "bundle", manifest, pack_tensors({}), None, golden, pack_holdout(dataset.holdout))
    return storage.child("bundle").uri


def _assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_every_training_row_reaches_the_model_as_in_training(example: Example) -> None:
    inputs, x_train = example.dataset.inputs, np.asarray(example.dataset.arrays.x_train)
    out = str(example.folder / "answers.parquet")
    predict_source(example.location, example.source, out, allow_factories=[example.factory], spread=answer_here)

    _assert_same_bits(example.kept()[example.numbers], x_train)
    sent = example.raw.select([column.name for column in inputs.columns]).slice(0, MOST_SENT)
    for kind, body in _bodies(sent, example.dataset).items():
        _assert_same_bits(example.ask(body, kind), x_train[: sent.num_rows])
    if inputs.columns[0].kind == "image":
        for row, picture in enumerate(sent.column(0).to_pylist()[:8]):
            kind = "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
            _assert_same_bits(example.ask(picture, kind), x_train[row : row + 1])


def _bodies(rows: pa.Table, dataset: Dataset) -> dict[str, bytes]:
    """Raw rows as a client sends them, by content type."""
    numbers = rows
    if rows.column_names == [dataset.inputs.columns[0].name] and dataset.inputs.columns[0].kind in ("image", "text"):
        # in Arrow an endpoint takes pixels and numbers of tokens, not files and text
        numbers = pa.table({rows.column_names[0]: pa.array(dataset.inputs.from_table(rows).tolist())})
    bodies = {"application/json": _json(rows), "application/vnd.apache.arrow.stream": _arrow(numbers)}
    if not dataset.inputs.is_tensor:
        sink = pa.BufferOutputStream()
        csv.write_csv(rows, sink)
        bodies["text/csv"] = sink.getvalue().to_pybytes()
    return bodies


def _json(rows: pa.Table) -> bytes:
    def plain(value: Any) -> Any:
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value

    if pa.types.is_binary(rows.schema.field(0).type):
        records = [{name: plain(value) for name, value in row.items()} for row in rows.to_pylist()]
    else:
        records = table_to_records(rows)
    return json.dumps({"records": records}).encode()


def _arrow(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]
