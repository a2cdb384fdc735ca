from __future__ import annotations

import gzip
import io
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from bigray.bundle import BundleManifest, ModelBundle
from bigray.errors import SpecError
from bigray.inference import Predictions, Predictor
from bigray.serve.http import Refusal
from bigray.serve.wire.bodies import (
    ARROW_STREAM,
    NPY,
    decode_npy,
    decode_predict,
    decode_records,
    decompress,
    encode_predict,
    encode_records,
)

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
RECORDS = json.dumps({"records": [{"image": IMAGE}]}).encode()
LIMIT = 1 << 20


def npy(array, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npy_with_header(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def test_records_become_rows_in_order(bundle: ModelBundle):
    body = json.dumps({"records": [{"image": IMAGE}, {"image": np.zeros((2, 3)).tolist()}]}).encode()
    rows = decode_records(body, bundle.manifest.inputs)
    assert rows.dtype == np.float32
    assert rows.tolist() == [IMAGE, [[0, 0, 0], [0, 0, 0]]]


def test_scalar_columns_are_taken_by_name_and_others_left_out(regression_bundle: ModelBundle):
    body = b'{"records": [{"height": 2, "width": 1, "colour": "red"}]}'
    assert decode_records(body, regression_bundle.manifest.inputs).tolist() == [[1, 2]]


def test_of_a_key_that_comes_twice_the_last_counts(regression_bundle: ModelBundle):
    body = b'{"records": [{"height": 9, "height": 2, "width": 1}]}'
    assert decode_records(body, regression_bundle.manifest.inputs).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b'"text"', "expected a JSON object, got a string"),
        (b"{}", "missing 'records'"),
        (b'{"records": []}', "at least one row"),
        (b'{"records": null}', "at least one row"),
        (b'{"records": {"image": 1}}', "at least one row"),
        (b'{"records": [3]}', "expected an object"),
        (b'{"records": [{"picture": 1}]}', "missing 'image'"),
        (b'{"records": [{"image": [[1, 2], [3]]}]}', "ragged"),
        (b'{"records": [{"image": [[1, 2], [3, 4]]}]}', "wrong shape"),
        (b'{"records": [{"image": [["a", 2, 3], [4, 5, 6]]}]}', "expected numbers"),
        (b'{"records": [{"image": [["1", 2, 3], [4, 5, 6]]}]}', "expected numbers"),
        (b'{"records": [{"image": [[null, 2, 3], [4, 5, 6]]}]}', "expected numbers"),
        (b'{"records": [{"image": [[NaN, 2, 3], [4, 5, 6]]}]}', "not JSON"),
        (b'{"records": [{"image": [[1e39, 2, 3], [4, 5, 6]]}]}', "NaN or infinite"),
        (b'{"records": [{"image": [[1e400, 2, 3], [4, 5, 6]]}]}', "not JSON"),
        (b'{"records": [{"image": [[1' + b"0" * 50 + b", 2, 3], [4, 5, 6]]}]}", "NaN or infinite"),
        (b'{"records": [{"image": [[1' + b"0" * 5000 + b", 2, 3], [4, 5, 6]]}]}", "not JSON"),
        (b'{"records": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"records": [{"image": ' + b"[" * 1000 + b"]" * 1000 + b"}]}", "ragged|wrong shape|expected numbers"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_record_body_is_refused_in_one_line(bundle: ModelBundle, body: bytes, fault: str):
    with pytest.raises(SpecError, match=fault) as caught:
        decode_records(body, bundle.manifest.inputs)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/x-www-form-urlencoded",
        "text/plain;charset=UTF-8",
    ],
)
def test_json_is_taken_however_clients_name_it(bundle: ModelBundle, content_type):
    assert decode_predict(RECORDS, content_type, bundle.manifest).tolist() == [IMAGE]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("application/xml", RECORDS), ("multipart/form-data; boundary=x", b""), ("text/plain", b"width\n1\n")],
)
def test_another_content_type_is_refused_with_those_that_are_known(bundle: ModelBundle, content_type, body):
    with pytest.raises(Refusal) as caught:
        decode_predict(body, content_type, bundle.manifest)
    assert caught.value.status == 415
    for known in ("application/json", "text/csv", ARROW_STREAM, NPY, "image/png"):
        assert known in caught.value.message
        assert known.encode() in dict(caught.value.headers)[b"accept"]


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "i1", "<u8", ">i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_file_of_any_numbers_becomes_rows(bundle: ModelBundle, dtype, order):
    rows = decode_predict(npy(np.array([IMAGE, IMAGE], dtype, order=order)), NPY, bundle.manifest)
    assert rows.dtype == np.float32
    assert rows.tolist() == [IMAGE, IMAGE]
    assert rows.flags.writeable
    assert rows.flags.c_contiguous


def test_an_npy_file_of_the_second_version_is_read(bundle: ModelBundle):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([IMAGE], np.float32), version=(2, 0))
    assert decode_npy(stream.getvalue(), bundle.manifest.inputs).tolist() == [IMAGE]


class Loud:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle ran",))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "not a .npy file"),
        (b"\x93NUMPY\x09\x00", "not a .npy file"),
        (npy(np.array([IMAGE]))[:60], "not a .npy file"),
        (npy(np.array([IMAGE]))[:-1], "bytes of data"),
        (npy(np.array([IMAGE])) + b"more", "bytes of data"),
        (npy(np.array([Loud()], object), allow_pickle=True), "of object is not accepted"),
        (npy(np.array(["a"])), "not accepted"),
        (npy(np.array([[[True] * 3] * 2])), "not accepted"),
        (npy(np.array([IMAGE], complex)), "not accepted"),
        (npy(np.zeros(3, [("a", "f4")])), "not a .npy file"),
        (npy(np.array(IMAGE)), "wrong shape"),
        (npy(np.zeros((0, 2, 3), np.float32)), "wrong shape"),
        (npy(np.array([[[np.nan] * 3] * 2])), "NaN or infinite"),
        (npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**12, 2, 3)}"), "not a .npy file"),
        (npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 2, 3)}"), "bytes of data"),
        (
            npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2, 3)}", b"0" * 24),
            "not a .npy file",
        ),
        (npy_with_header("{'descr': '<i3', 'fortran_order': False, 'shape': (9, 2, 3)}"), "not a .npy file"),
        (npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 400 + ",)}"), "not a .npy file"),
        (npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 150 + ",!"), "not a .npy file"),
        (npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9, " * 300 + "!"), "not a .npy file"),
        (npy_with_header("{'descr': '|V0', 'fortran_order': False, 'shape': (9, 2, 3)}"), "not accepted"),
        (npy_with_header("(" * 5000), "not a .npy file"),
        (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "1," * 90 + ")}", b"0"),
            "wrong shape",
        ),
        (npy_with_header("{'descr': '<f4', 'fortran_order': True, 'shape': (0, " + "9" * 30 + ", 3)}"), "wrong shape"),
        (npy_with_header("-" * 9000 + "1"), "not a .npy file"),
        (npy_with_header("__import__('os').getpid()"), "not a .npy file"),
    ],
)
def test_an_npy_file_that_is_wrong_or_hostile_is_refused(bundle: ModelBundle, body, fault):
    with pytest.raises(SpecError, match=fault):
        decode_predict(body, NPY, bundle.manifest)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("", RECORDS),
        ("identity", RECORDS),
        ("gzip", gzip.compress(RECORDS)),
        ("GZIP ", gzip.compress(RECORDS)),
        ("deflate", zlib.compress(RECORDS)),
    ],
)
def test_a_compressed_body_is_unpacked(encoding, packed):
    assert decompress(packed, encoding, LIMIT) == RECORDS


def test_a_body_that_unpacks_to_exactly_the_limit_is_taken():
    assert len(decompress(gzip.compress(bytes(LIMIT)), "gzip", LIMIT)) == LIMIT


def test_a_bomb_is_too_large_and_is_not_unpacked():
    bomb = gzip.compress(bytes(300 << 20), 1)
    with pytest.raises(Refusal, match="1 MB") as caught:
        decompress(bomb, "gzip", LIMIT)
    assert caught.value.status == 413


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 200])
def test_another_content_encoding_is_refused_with_those_that_are_known(encoding):
    with pytest.raises(Refusal) as caught:
        decompress(RECORDS, encoding, LIMIT)
    assert caught.value.status == 415
    assert dict(caught.value.headers)[b"accept-encoding"] == b"gzip, deflate"


@pytest.mark.parametrize(
    ("packed", "fault"),
    [
        (RECORDS, "not gzip"),
        (b"", "cut off"),
        (gzip.compress(RECORDS)[:-4], "cut off"),
        (gzip.compress(RECORDS) + b"more", "followed by other data"),
        (gzip.compress(RECORDS)[:-8] + b"\0" * 8, "not gzip"),
    ],
)
def test_a_damaged_compressed_body_is_refused(packed, fault):
    with pytest.raises(SpecError, match=fault):
        decompress(packed, "gzip", LIMIT)


def test_answers_carry_label_and_exact_probabilities(bundle: ModelBundle, predictor: Predictor):
    predictions = predictor.run(np.ones((2, 2, 3), np.float32))
    answer = json.loads(encode_records(predictions, "animals", "abc"))
    assert (answer["model"], answer["version"]) == ("animals", "abc")
    received = np.array([row["probabilities"] for row in answer["predictions"]], np.float32)
    assert np.array_equal(received, predictions.probabilities)
    assert [row["label"] for row in answer["predictions"]] == predictions.labels


def test_answers_of_a_regression_carry_exact_values(regression_bundle: ModelBundle):
    predictions = Predictor(regression_bundle).run(np.ones((2, 2), np.float32))
    rows = json.loads(encode_records(predictions, "area", "v"))["predictions"]
    assert [set(row) for row in rows] == [{"value"}] * 2
    assert np.array_equal(np.array([row["value"] for row in rows], np.float32), predictions.values)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html,*/*;q=0.8", "application/json"),
        ("application/json;q=0.5, application/x-npy", NPY),
        ("application/x-npy;q=0.5, application/json", "application/json"),
        ("application/x-npy;q=0, application/json;q=0.1", "application/json"),
        ("application/x-npy;q=broken", "application/json"),
        ("APPLICATION/VND.APACHE.ARROW.STREAM", ARROW_STREAM),
        (";;,,;q=", "application/json"),
    ],
)
def test_the_answer_comes_in_the_type_that_is_preferred(predictor: Predictor, accept, content_type):
    predictions = predictor.run(np.ones((1, 2, 3), np.float32))
    answer = encode_predict(predictions, accept, "m", "v")
    assert (answer.status, answer.content_type.decode()) == (200, content_type)


def test_an_arrow_answer_holds_everything(predictor: Predictor):
    predictions = predictor.run(np.ones((2, 2, 3), np.float32))
    table = pa.ipc.open_stream(encode_predict(predictions, ARROW_STREAM, "animals", "abc").body).read_all()
    assert table.schema.metadata == {b"model": b"animals", b"version": b"abc"}
    assert table.schema.field("probabilities").type == pa.list_(pa.float32(), 3)
    assert table["label"].to_pylist() == predictions.labels
    assert table["probabilities"].to_pylist() == predictions.probabilities.tolist()


def test_labels_that_are_numbers_stay_numbers():
    predictions = Predictions([3, 7], np.array([[0.25, 0.75], [1, 0]], np.float32), None)
    table = pa.ipc.open_stream(encode_predict(predictions, ARROW_STREAM, "m", "v").body).read_all()
    assert table["label"].to_pylist() == [3, 7]


def test_an_npy_answer_holds_the_probabilities_or_the_values(predictor: Predictor, regression_bundle: ModelBundle):
    for predictions, expected in (
        (one := predictor.run(np.ones((2, 2, 3), np.float32)), one.probabilities),
        (other := Predictor(regression_bundle).run(np.ones((2, 2), np.float32)), other.values),
    ):
        found = np.load(io.BytesIO(encode_predict(predictions, NPY, "m", "v").body), allow_pickle=False)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)


def test_an_empty_body_is_no_rows_in_every_type(bundle: ModelBundle):
    manifest: BundleManifest = bundle.manifest
    for content_type in ("", "application/json", ARROW_STREAM, NPY, "text/csv", "image/png"):
        with pytest.raises(SpecError):
            decode_predict(b"", content_type, manifest)
