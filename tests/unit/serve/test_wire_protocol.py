from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.errors import SpecError
from bigray.inference import Predictor
from bigray.serve.wire.binary import DTYPES, read_strings, write_strings
from bigray.serve.wire.protocol import (
    decode_infer,
    describe_config,
    describe_model,
    describe_server,
    encode_infer,
    header_length,
)

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
FLAT = [1, 2, 3, 4, 5, 6]


def infer_body(**changes):
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 2, 3], "data": [IMAGE]} | changes
    return json.dumps({"inputs": [tensor]}).encode()


def raw_body(values, datatype, shape=(1, 2, 3), name="image", size=None, **fields):
    """A JSON header with raw tensor data behind it, and the header's length."""
    raw = values if isinstance(values, bytes) else np.asarray(values, DTYPES[datatype]).tobytes()
    parameters = {"binary_data_size": len(raw) if size is None else size}
    tensor = {"name": name, "datatype": datatype, "shape": list(shape), "parameters": parameters}
    header = json.dumps({"inputs": [tensor], **fields}).encode()
    return header + raw, len(header)


def columns_body(*tensors):
    return json.dumps(
        {"inputs": [{"name": n, "datatype": "FP32", "shape": list(s), "data": d} for n, s, d in tensors]}
    ).encode()


@pytest.mark.parametrize("data", [[IMAGE], FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_a_tensor_may_be_flat_or_nested(bundle: ModelBundle, data, datatype):
    request = decode_infer(infer_body(data=data, datatype=datatype), bundle.manifest)
    assert request.rows.tolist() == [IMAGE]


@pytest.mark.parametrize("datatype", sorted(DTYPES))
def test_every_numeric_datatype_is_taken_as_json_and_raw(bundle: ModelBundle, datatype):
    as_json = decode_infer(infer_body(data=FLAT, datatype=datatype), bundle.manifest)
    as_bytes = decode_infer(*_with_manifest(raw_body(FLAT, datatype), bundle))
    for request in (as_json, as_bytes):
        assert request.rows.dtype == np.float32
        assert request.rows.tolist() == [IMAGE]


def _with_manifest(raw, bundle):
    body, length = raw
    return body, bundle.manifest, length


@pytest.mark.parametrize("padding", range(4))
def test_raw_rows_are_aligned_and_writable_wherever_they_begin(bundle: ModelBundle, padding):
    body, length = raw_body(FLAT, "FP32", id="x" * padding)
    rows = decode_infer(body, bundle.manifest, length).rows
    assert rows.flags.aligned
    assert rows.flags.writeable
    assert rows.flags.c_contiguous


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "picture"}, "exactly one tensor named 'image'"),
        ({"name": None}, "exactly one tensor named 'image'"),
        ({"datatype": "BYTES"}, "datatype 'BYTES' is not accepted"),
        ({"datatype": "BOOL", "data": [True] * 6}, "datatype 'BOOL' is not accepted"),
        ({"datatype": "BF16"}, "datatype 'BF16' is not accepted"),
        ({"datatype": None}, "not accepted"),
        ({"datatype": ["FP32"]}, "not accepted"),
        ({"datatype": "INT32", "data": [1.5, 2, 3, 4, 5, 6]}, "fractions"),
        ({"datatype": "UINT8", "data": [256, 2, 3, 4, 5, 6]}, "not within 0 to 255"),
        ({"datatype": "UINT64", "data": [-1, 2, 3, 4, 5, 6]}, "not within 0"),
        ({"shape": [0, 2, 3], "data": []}, "at least one row"),
        ({"shape": [-1, 2, 3]}, "wrong shape"),
        ({"shape": []}, "wrong shape"),
        ({"shape": [1, 6]}, "wrong shape"),
        ({"shape": "1,2,3"}, "wrong shape"),
        ({"shape": [True, 2, 3]}, "wrong shape"),
        ({"shape": [2, 2, 3]}, "data has shape"),
        ({"shape": [2**62, 2, 3]}, "data has shape"),
        ({"data": [1, 2]}, "data has shape"),
        ({"data": [[1], [2, 3]]}, "ragged"),
        ({"data": ["a"] * 6}, "expected numbers"),
        ({"data": ["1"] * 6}, "expected numbers"),
        ({"data": [True] * 6}, "expected numbers"),
        ({"data": None}, "expected numbers"),
        ({"data": [1e39] * 6}, "NaN or infinite"),
        ({"data": [10**300] * 6}, "NaN or infinite"),
        ({"parameters": 1}, "expected an object"),
        ({"parameters": {"binary_data_size": 24}}, "Inference-Header-Content-Length"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory is not supported"),
    ],
)
def test_a_wrong_tensor_is_refused_with_its_reason(bundle: ModelBundle, changes, fault):
    with pytest.raises(SpecError, match=fault) as caught:
        decode_infer(infer_body(**changes), bundle.manifest)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (raw_body(FLAT[:5], "FP32"), "20 bytes of data, but FP32 of shape .* takes 24"),
        (raw_body(FLAT, "FP32", size=20), "'binary_data_size' comes to 20 bytes, but 24 follow"),
        (raw_body(FLAT, "FP32", size=-24), "binary_data_size"),
        (raw_body(FLAT, "FP32", size=24.0), "binary_data_size"),
        (raw_body(FLAT, "FP32", size=10**12), "'binary_data_size' comes to"),
        (raw_body([np.nan] * 6, "FP32"), "NaN or infinite"),
        (raw_body([np.inf] * 6, "FP16"), "NaN or infinite"),
        (raw_body([1e200] * 6, "FP64"), "NaN or infinite"),
        (raw_body(write_strings(["a"] * 6), "BYTES"), "'BYTES' is not accepted"),
        (raw_body(b"", "FP32", shape=(0, 2, 3)), "at least one row"),
        (raw_body(FLAT, "FP32", shape=(2**62, 2, 3)), "24 bytes of data"),
    ],
)
def test_raw_data_that_does_not_fit_is_refused(bundle: ModelBundle, raw, fault):
    with pytest.raises(SpecError, match=fault):
        decode_infer(*_with_manifest(raw, bundle))


def test_a_header_longer_than_the_body_is_refused(bundle: ModelBundle):
    body, _ = raw_body(FLAT, "FP32")
    with pytest.raises(SpecError, match="but the body has"):
        decode_infer(body, bundle.manifest, len(body) + 1)


def test_the_header_length_is_a_plain_number():
    assert header_length("") is None
    assert header_length("12") == 12
    for text in ("-1", "1.5", "x", "1e3", "9" * 5000, "²"):
        with pytest.raises(SpecError, match="expected a number of bytes"):
            header_length(text)


@pytest.mark.parametrize("inputs", [None, [], [1], [{}, {}], {"name": "image"}])
def test_exactly_one_input_tensor_is_expected(bundle: ModelBundle, inputs):
    with pytest.raises(SpecError, match="inputs"):
        decode_infer(json.dumps({"inputs": inputs}).encode(), bundle.manifest)


@pytest.mark.parametrize(
    "body",
    [
        columns_body(("features", [2, 2], [1, 2, 3, 4])),
        columns_body(("width", [2], [1, 3]), ("height", [2], [2, 4])),
        columns_body(("height", [2, 1], [[2], [4]]), ("width", [2], [1, 3])),
    ],
    ids=["together", "each", "in another order"],
)
def test_scalar_columns_come_together_or_each_as_a_tensor(regression_bundle: ModelBundle, body):
    assert decode_infer(body, regression_bundle.manifest).rows.tolist() == [[1, 2], [3, 4]]


def test_raw_columns_follow_one_another(regression_bundle: ModelBundle):
    def tensor(name, dtype, size):
        return {"name": name, "datatype": dtype, "shape": [2], "parameters": {"binary_data_size": size}}

    header = json.dumps({"inputs": [tensor("width", "FP32", 8), tensor("height", "INT16", 4)]}).encode()
    body = header + struct.pack("<2f2h", 1.5, 3, -2, 4)
    assert decode_infer(body, regression_bundle.manifest, len(header)).rows.tolist() == [[1.5, -2], [3, 4]]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (columns_body(("width", [1], [1])), "one for each column"),
        (columns_body(("width", [1], [1]), ("width", [1], [1])), "one for each column"),
        (columns_body(("width", [1], [1]), ("height", [1], [1]), ("depth", [1], [1])), "one for each column"),
        (columns_body(("width", [1], [1]), ("height", [2], [1, 2])), "different numbers of rows, from 1 to 2"),
        (columns_body(("width", [1], [1]), ("height", [1, 2], [1, 2])), "wrong shape"),
        (columns_body(("width", [1], [1]), ("height", [1], ["a"])), "expected numbers"),
        (columns_body(("features", [2], [1, 2])), "wrong shape"),
    ],
)
def test_columns_that_do_not_fit_are_refused(regression_bundle: ModelBundle, body, fault):
    with pytest.raises(SpecError, match=fault):
        decode_infer(body, regression_bundle.manifest)


def answer_of(bundle, predictor, body):
    request = decode_infer(body, bundle.manifest)
    return encode_infer(predictor.run(request.rows), request, "animals", "abc")


def test_infer_answers_name_their_tensors(bundle: ModelBundle, predictor: Predictor):
    answer = answer_of(bundle, predictor, infer_body())
    document = json.loads(answer.body)
    label, probabilities = document["outputs"]
    assert (document["model_name"], document["model_version"]) == ("animals", "abc")
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "BYTES", [1])
    assert label["data"][0] in ("cat", "dog", "fox")
    assert (probabilities["name"], probabilities["datatype"], probabilities["shape"]) == (
        "probabilities",
        "FP32",
        [1, 3],
    )
    assert len(probabilities["data"]) == 3
    assert "id" not in document
    assert (answer.content_type, answer.headers) == (b"application/json", ())


def test_infer_sends_back_the_id_and_only_the_outputs_asked_for(bundle: ModelBundle, predictor: Predictor):
    body = json.loads(infer_body()) | {"id": "7", "outputs": [{"name": "label"}]}
    document = json.loads(answer_of(bundle, predictor, json.dumps(body).encode()).body)
    assert document["id"] == "7"
    assert [tensor["name"] for tensor in document["outputs"]] == ["label"]


def test_outputs_go_back_raw_where_the_request_says_so(bundle: ModelBundle, predictor: Predictor):
    body = json.loads(infer_body()) | {"parameters": {"binary_data_output": True}}
    answer = answer_of(bundle, predictor, json.dumps(body).encode())
    offline = predictor.run(np.array([IMAGE], np.float32))
    length = int(dict(answer.headers)[b"inference-header-content-length"])
    label, probabilities = json.loads(answer.body[:length])["outputs"]
    raw = answer.body[length:]
    size = label["parameters"]["binary_data_size"]
    assert read_strings(raw[:size]) == [offline.labels[0].encode()]
    assert probabilities["parameters"]["binary_data_size"] == len(raw) - size == 12
    assert np.frombuffer(raw[size:], "<f4").tolist() == offline.probabilities[0].tolist()
    assert "data" not in label
    assert answer.content_type == b"application/octet-stream"


def test_each_output_may_differ_from_the_request(bundle: ModelBundle, predictor: Predictor):
    outputs = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "probabilities"}]
    body = json.loads(infer_body()) | {"parameters": {"binary_data_output": True}, "outputs": outputs}
    answer = answer_of(bundle, predictor, json.dumps(body).encode())
    label, probabilities = json.loads(answer.body[: int(dict(answer.headers)[b"inference-header-content-length"])])[
        "outputs"
    ]
    assert len(label["data"]) == 1
    assert probabilities["parameters"] == {"binary_data_size": 12}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", 7),
        ("outputs", [{"name": "logits"}]),
        ("outputs", "label"),
        ("outputs", [{"name": ["label"]}]),
        ("outputs", [{"name": "label", "parameters": {"classification": 3}}]),
        ("parameters", []),
        ("parameters", {"binary_data_output": 1}),
    ],
)
def test_wrong_request_fields_are_refused(bundle: ModelBundle, key, value):
    with pytest.raises(SpecError, match=key):
        decode_infer(json.dumps(json.loads(infer_body()) | {key: value}).encode(), bundle.manifest)


def test_a_regression_answers_with_values(regression_bundle: ModelBundle):
    predictions = Predictor(regression_bundle).run(np.ones((2, 2), np.float32))
    request = decode_infer(columns_body(("features", [2, 2], [1, 1, 1, 1])), regression_bundle.manifest)
    (tensor,) = json.loads(encode_infer(predictions, request, "area", "v").body)["outputs"]
    assert (tensor["name"], tensor["shape"], len(tensor["data"])) == ("prediction", [2], 2)


def test_metadata_names_every_tensor_and_version(bundle: ModelBundle):
    document = describe_model(bundle.manifest, ["abc", "def"], "onnxruntime")
    assert (document["name"], document["versions"], document["platform"]) == (
        "animals",
        ["abc", "def"],
        "onnxruntime_onnx",
    )
    assert document["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 2, 3]}]
    assert [(one["name"], one["datatype"], one["shape"]) for one in document["outputs"]] == [
        ("label", "BYTES", [-1]),
        ("probabilities", "FP32", [-1, 3]),
    ]


def test_the_configuration_tells_the_same_as_the_metadata(regression_bundle: ModelBundle):
    config = describe_config(regression_bundle.manifest, "torch", "houses")
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("houses", "torch", 0)
    assert config["input"] == [{"name": "features", "data_type": "TYPE_FP32", "dims": [-1, 2]}]
    assert config["output"] == [{"name": "prediction", "data_type": "TYPE_FP32", "dims": [-1]}]


def test_the_server_names_the_extensions_it_speaks():
    document = describe_server()
    assert document["name"] == "bigray"
    assert "binary_tensor_data" in document["extensions"]


def test_strings_survive_the_raw_form():
    words = ["", "cat", "Füchse", "日本"]
    assert [word.decode() for word in read_strings(write_strings(words))] == words
    with pytest.raises(SpecError, match="within an element"):
        read_strings(write_strings(words)[:-1])
