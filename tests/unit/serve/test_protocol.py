from __future__ import annotations

import json

import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.errors import SpecError
from bigray.inference import Predictor
from bigray.serve.protocol import decode_infer, decode_records, describe_model, encode_infer, encode_records

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def infer_body(**changes):
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 2, 3], "data": [IMAGE]} | changes
    return json.dumps({"inputs": [tensor]}).encode()


def test_records_become_rows_in_order(bundle: ModelBundle):
    body = json.dumps({"records": [{"image": IMAGE}, {"image": np.zeros((2, 3)).tolist()}]}).encode()
    rows = decode_records(body, bundle.manifest.inputs)
    assert rows.dtype == np.float32
    assert rows.tolist() == [IMAGE, [[0, 0, 0], [0, 0, 0]]]


def test_scalar_columns_are_taken_by_name(regression_bundle: ModelBundle):
    rows = decode_records(b'{"records": [{"height": 2, "width": 1}]}', regression_bundle.manifest.inputs)
    assert rows.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"{}", "missing 'records'"),
        (b'{"records": []}', "at least one row"),
        (b'{"records": {"image": 1}}', "at least one row"),
        (b'{"records": [3]}', "expected an object"),
        (b'{"records": [{"picture": 1}]}', "missing 'image'"),
        (b'{"records": [{"image": [[1, 2], [3]]}]}', "ragged"),
        (b'{"records": [{"image": [[1, 2], [3, 4]]}]}', "wrong shape"),
        (b'{"records": [{"image": [["a", 2, 3], [4, 5, 6]]}]}', "expected numbers"),
        (b'{"records": [{"image": [[null, 2, 3], [4, 5, 6]]}]}', "expected numbers"),
        (b'{"records": [{"image": [[NaN, 2, 3], [4, 5, 6]]}]}', "not JSON"),
        (b'{"records": [{"image": [[1e39, 2, 3], [4, 5, 6]]}]}', "NaN or infinite"),
        (b'{"records": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_wrong_record_body_is_refused_with_its_reason(bundle: ModelBundle, body: bytes, fault: str):
    with pytest.raises(SpecError, match=fault):
        decode_records(body, bundle.manifest.inputs)


@pytest.mark.parametrize("data", [[IMAGE], [1, 2, 3, 4, 5, 6]], ids=["nested", "flat"])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_a_tensor_may_be_flat_or_nested(bundle: ModelBundle, data, datatype):
    request = decode_infer(infer_body(data=data, datatype=datatype), bundle.manifest)
    assert request.rows.tolist() == [IMAGE]


def test_integers_are_accepted(bundle: ModelBundle):
    request = decode_infer(infer_body(data=[1, 2, 3, 4, 5, 6], datatype="INT64"), bundle.manifest)
    assert request.rows.tolist() == [IMAGE]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "picture"}, "expected 'image'"),
        ({"datatype": "BYTES"}, "datatype 'BYTES' is not accepted"),
        ({"datatype": None}, "not accepted"),
        ({"datatype": "INT32", "data": [1.5, 2, 3, 4, 5, 6]}, "fractions"),
        ({"shape": [0, 2, 3], "data": []}, "at least one row"),
        ({"shape": [1, 6]}, "wrong shape"),
        ({"shape": "1,2,3"}, "wrong shape"),
        ({"shape": [2, 2, 3]}, "data has shape"),
        ({"data": [1, 2]}, "data has shape"),
        ({"data": [[1], [2, 3]]}, "ragged"),
        ({"data": ["a"] * 6}, "expected numbers"),
        ({"data": None}, "expected numbers"),
        ({"data": [1e39] * 6}, "NaN or infinite"),
    ],
)
def test_a_wrong_tensor_is_refused_with_its_reason(bundle: ModelBundle, changes, fault):
    with pytest.raises(SpecError, match=fault):
        decode_infer(infer_body(**changes), bundle.manifest)


@pytest.mark.parametrize("inputs", [None, [], [1], [{}, {}]])
def test_exactly_one_input_tensor_is_expected(bundle: ModelBundle, inputs):
    with pytest.raises(SpecError, match="inputs"):
        decode_infer(json.dumps({"inputs": inputs}).encode(), bundle.manifest)


def test_predict_answers_carry_label_and_exact_probabilities(bundle: ModelBundle, predictor: Predictor):
    predictions = predictor.run(np.ones((2, 2, 3), np.float32))
    answer = json.loads(encode_records(predictions, "animals", "abc"))
    assert (answer["model"], answer["version"]) == ("animals", "abc")
    received = np.array([row["probabilities"] for row in answer["predictions"]], np.float32)
    assert np.array_equal(received, predictions.probabilities)
    assert [row["label"] for row in answer["predictions"]] == predictions.labels


def test_infer_answers_name_their_tensors(bundle: ModelBundle, predictor: Predictor):
    request = decode_infer(infer_body(), bundle.manifest)
    answer = json.loads(encode_infer(predictor.run(request.rows), request, "animals", "abc"))
    label, probabilities = answer["outputs"]
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "BYTES", [1])
    assert (probabilities["name"], probabilities["datatype"], probabilities["shape"]) == (
        "probabilities",
        "FP32",
        [1, 3],
    )
    assert len(probabilities["data"]) == 3
    assert "id" not in answer


def test_infer_sends_back_the_id_and_only_the_outputs_asked_for(bundle: ModelBundle, predictor: Predictor):
    body = json.loads(infer_body()) | {"id": "7", "outputs": [{"name": "label"}]}
    request = decode_infer(json.dumps(body).encode(), bundle.manifest)
    answer = json.loads(encode_infer(predictor.run(request.rows), request, "animals", "abc"))
    assert answer["id"] == "7"
    assert [tensor["name"] for tensor in answer["outputs"]] == ["label"]


@pytest.mark.parametrize(("key", "value"), [("id", 7), ("outputs", [{"name": "logits"}]), ("outputs", "label")])
def test_wrong_request_fields_are_refused(bundle: ModelBundle, key, value):
    with pytest.raises(SpecError, match=key):
        decode_infer(json.dumps(json.loads(infer_body()) | {key: value}).encode(), bundle.manifest)


def test_a_regression_answers_with_values(regression_bundle: ModelBundle):
    predictions = Predictor(regression_bundle).run(np.ones((2, 2), np.float32))
    assert [set(row) for row in json.loads(encode_records(predictions, "area", "v"))["predictions"]] == [{"value"}] * 2
    request = decode_infer(
        b'{"inputs": [{"name": "features", "datatype": "FP32", "shape": [2, 2], "data": [1, 1, 1, 1]}]}',
        regression_bundle.manifest,
    )
    (tensor,) = json.loads(encode_infer(predictions, request, "area", "v"))["outputs"]
    assert (tensor["name"], tensor["shape"], len(tensor["data"])) == ("prediction", [2], 2)


def test_metadata_names_every_tensor(bundle: ModelBundle):
    document = describe_model(bundle.manifest, "abc", "onnxruntime_onnx")
    assert document["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 2, 3]}]
    assert [(one["name"], one["datatype"], one["shape"]) for one in document["outputs"]] == [
        ("label", "BYTES", [-1]),
        ("probabilities", "FP32", [-1, 3]),
    ]
