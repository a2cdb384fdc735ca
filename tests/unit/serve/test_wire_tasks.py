"""Answers of yes and no: one class of two, or any number of labels, the same in every format and offline."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest

from bigray.bundle import ModelBundle, load_holdout
from bigray.data.features import Column
from bigray.data.targets import true_answers
from bigray.inference import Predictions, Predictor
from bigray.serve.batching import answer_batch
from bigray.serve.compare import count_disagreements
from bigray.serve.release.gate import schema_difference
from bigray.serve.release.paired import row_losses
from bigray.serve.release.process import to_predictions
from bigray.serve.sample import write_sample_bundle
from bigray.serve.wire.bodies import encode_arrow, encode_npy, encode_records
from bigray.serve.wire.openapi import openapi_document
from bigray.serve.wire.protocol import decode_infer, describe_model, encode_infer

NAMES = ("sea", "sun")
THRESHOLDS = {"binary": (0.6,), "multilabel": (0.6, 0.4)}
Answered = tuple[ModelBundle, Predictions, np.ndarray[Any, Any]]


@pytest.fixture(params=THRESHOLDS)
def answered(request: pytest.FixtureRequest, tmp_path: Path) -> Answered:
    location = write_sample_bundle(
        str(tmp_path),
        columns=(Column(name="width"), Column(name="height")),
        class_names=NAMES,
        params={"hidden": [4]},
        scale=3.0,
        task=request.param,
        thresholds=THRESHOLDS[request.param],
        label_noise=0.0,
        onnx=False,
    )
    bundle = ModelBundle.load(location)
    table = load_holdout(location)
    assert table is not None
    rows = bundle.manifest.inputs.from_table(table)
    predictions = Predictor(bundle).run(rows)
    assert predictions.labels is not None
    assert len({str(label) for label in predictions.labels}) > 1, "the settings of this test are of no use"
    assert true_answers(table, bundle.manifest.outputs) == predictions.labels
    return bundle, predictions, rows


def _infer(bundle: ModelBundle, predictions: Predictions) -> dict[str, Any]:
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 0.0]}
    request = decode_infer(json.dumps({"inputs": [tensor]}).encode(), bundle.manifest)
    return {one["name"]: one for one in json.loads(encode_infer(predictions, request, "m", "v").body)["outputs"]}


def test_the_records_are_those_of_the_offline_answer_and_of_the_description(answered: Answered) -> None:
    bundle, predictions, _ = answered
    document = openapi_document(bundle.manifest, bundle.version)
    answer = document["paths"]["/predict"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    records = json.loads(encode_records(predictions, "m", "v"))

    jsonschema.validate(records, answer | {"components": document["components"]})
    assert [record["label"] for record in records["predictions"]] == predictions.labels
    found = np.array([record["probabilities"] for record in records["predictions"]], np.float32)
    np.testing.assert_array_equal(found, predictions.probabilities)


def test_an_arrow_stream_and_a_npy_file_say_the_same(answered: Answered) -> None:
    bundle, predictions, _ = answered
    table = pa.ipc.open_stream(encode_arrow(predictions, "m", "v")).read_all()
    numbers = np.load(io.BytesIO(encode_npy(predictions)), allow_pickle=False)

    assert table["label"].to_pylist() == predictions.labels
    np.testing.assert_array_equal(numbers, predictions.probabilities)
    assert to_predictions(numbers, bundle.manifest).labels == predictions.labels


def test_the_inference_protocol_has_the_labels_of_a_row_in_one_text(answered: Answered) -> None:
    bundle, predictions, _ = answered
    assert predictions.labels is not None
    outputs, described = _infer(bundle, predictions), describe_model(bundle.manifest, ["1"], "torch")["outputs"]

    texts = ["|".join(label) if isinstance(label, list) else label for label in predictions.labels]
    assert outputs["label"]["data"] == texts
    for tensor in described:
        given = outputs[tensor["name"]]
        assert given["datatype"] == tensor["datatype"]
        assert given["shape"][1:] == tensor["shape"][1:]


def test_requests_that_share_a_batch_get_their_own_answers(answered: Answered) -> None:
    bundle, predictions, rows = answered
    first, second = answer_batch(Predictor(bundle).run, [rows[:3], rows[3:5]])
    assert isinstance(first, Predictions) and isinstance(second, Predictions)
    assert first.labels is not None and second.labels is not None and predictions.labels is not None

    assert first.labels + second.labels == predictions.labels[:5]


def test_versions_are_compared_by_their_labels(answered: Answered) -> None:
    _, predictions, _ = answered
    assert predictions.labels is not None
    flipped = {"sea": "sun", "sun": "sea"}
    others = [flipped[one] if isinstance(one, str) else [*NAMES[len(one) :]] for one in predictions.labels]
    other = Predictions(others, predictions.probabilities, None)
    differing = sum(a != b for a, b in zip(others, predictions.labels, strict=True))

    assert count_disagreements(predictions, predictions) == 0
    assert count_disagreements(predictions, other) == differing > 0
    assert not row_losses(predictions, predictions.labels).any()
    wrong = [
        len({*np.atleast_1d(a)} ^ {*np.atleast_1d(b)}) / 2 for a, b in zip(others, predictions.labels, strict=True)
    ]
    np.testing.assert_array_equal(row_losses(predictions, others), wrong)


def test_another_threshold_is_no_other_schema(answered: Answered) -> None:
    manifest = answered[0].manifest
    moved = {"threshold": 0.1} if manifest.outputs.task == "binary" else {"thresholds": (0.1, 0.2)}
    other = manifest.model_copy(update={"outputs": manifest.outputs.model_copy(update=moved)})

    assert schema_difference(other, manifest) is None
