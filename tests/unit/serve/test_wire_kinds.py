"""Categories, dates, missing values and pictures as bodies: the same codes over every wire, and refusals by name."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import random
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from bigray.bundle import BundleManifest, ModelBundle
from bigray.data.features import Column, FeatureSchema
from bigray.data.images import decode
from bigray.errors import SpecError
from bigray.serve.http import Refusal
from bigray.serve.sample import write_sample_bundle
from bigray.serve.wire import images
from bigray.serve.wire.binary import write_numbers, write_strings
from bigray.serve.wire.bodies import ARROW_STREAM, NPY, decode_predict
from bigray.serve.wire.grpc_messages import message_class
from bigray.serve.wire.grpc_service import decode_request
from bigray.serve.wire.openapi import openapi_document
from bigray.serve.wire.protocol import decode_infer, describe_config, describe_model, encode_request
from bigray.serve.wire.tensors import InputTensor, decode_tensors, input_tensors

COLUMNS = (
    Column(name="age", nullable=True),
    Column(name="height"),
    Column(name="colour", kind="category", categories=("red", "blue, dark", "grün"), nullable=True),
    Column(name="level", kind="category", categories=("1", "2", "10"), unknown="refuse"),
    Column(name="member", kind="category", categories=("false", "true")),
    Column(name="born", kind="date", nullable=True),
    Column(name="seen", kind="date"),
)
SCHEMA = FeatureSchema(columns=COLUMNS)
NAMES = [column.name for column in COLUMNS]
SEEN, DAY = "2024-05-31T12:34:56.789012+00:00", "1970-01-01"
ROWS: list[dict[str, Any]] = [
    {"age": 41.5, "height": 0.1, "colour": "red", "level": 2, "member": True, "born": "1999-12-31", "seen": SEEN},
    {"age": None, "height": -3, "colour": "pink", "level": 1, "member": False, "born": None, "seen": "2024-02-29"},
    {"age": 1e-3, "height": 7.7, "colour": None, "level": 10, "member": True, "born": "1960-01-01", "seen": DAY},
    {"age": 16777217, "height": 9, "colour": "blue, dark", "level": 2, "member": False, "born": None, "seen": DAY},
    {"age": 3, "height": 1 / 3, "colour": "grün", "level": 1, "member": True, "born": DAY, "seen": "2000-01-01T00:00"},
]  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A model of every kind of scalar column."""
    location = write_sample_bundle(
        str(tmp_path_factory.mktemp("kinds")), name="people", columns=COLUMNS, class_names=("no", "yes"),
        params={"hidden": [4]}, onnx=False,
    )  # fmt: skip
    return ModelBundle.load(location)


def manifest_of(bundle: ModelBundle, schema: FeatureSchema = SCHEMA) -> BundleManifest:
    return bundle.manifest.model_copy(update={"inputs": schema})


def column(name: str, rows: list[dict[str, Any]] = ROWS) -> list[Any]:
    return [row[name] for row in rows]


def moment(text: str | None) -> datetime | None:
    found = None if text is None else datetime.fromisoformat(text)
    return found if found is None or found.tzinfo else found.replace(tzinfo=UTC)


def table(rows: list[dict[str, Any]] = ROWS) -> pa.Table:
    return pa.table(
        {
            "age": pa.array(column("age", rows), pa.float64()),
            "height": pa.array(column("height", rows), pa.float64()),
            "more": pa.array([[{"a": 1}]] * len(rows)),
            "colour": pa.array(column("colour", rows)).dictionary_encode(),
            "level": pa.array(column("level", rows), pa.int8()),
            "member": pa.array(column("member", rows), pa.bool_()),
            "born": pa.array([text and date.fromisoformat(text) for text in column("born", rows)], pa.date32()),
            "seen": pa.array([moment(text) for text in column("seen", rows)], pa.timestamp("us", tz="UTC")),
        }
    )


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, **options)
    return sink.getvalue().to_pybytes()


def as_csv(rows: list[dict[str, Any]] = ROWS) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, [*NAMES, "more"])
    writer.writeheader()
    writer.writerows([{**row, "more": "x"} for row in rows])
    return sink.getvalue().encode()


def datatype(name: str) -> str:
    """Numbers as doubles, since one of the rows is no float32 before it is rounded."""
    return {"age": "FP64", "height": "FP64", "level": "INT8", "member": "BOOL"}.get(name, "BYTES")


def tensor(name: str, data: list[Any] | None = None) -> dict[str, Any]:
    data = column(name) if data is None else data
    return {"name": name, "datatype": datatype(name), "shape": [len(data)], "data": data}


def raw(name: str) -> bytes:
    values = column(name)
    match datatype(name):
        case "BYTES":
            return write_strings("" if value is None else value for value in values)
        case "BOOL":
            return bytes(values)
        case other:
            return write_numbers([math.nan if value is None else value for value in values], other)


def from_json(manifest: BundleManifest) -> np.ndarray:
    body = json.dumps({"records": [{**row, "more": 1} for row in ROWS]}).encode()
    return decode_predict(body, "application/json", manifest)


def from_csv(manifest: BundleManifest) -> np.ndarray:
    return decode_predict(as_csv(), "text/csv", manifest)


def from_arrow(manifest: BundleManifest) -> np.ndarray:
    return decode_predict(stream(table()), ARROW_STREAM, manifest)


def from_arrow_of_texts(manifest: BundleManifest) -> np.ndarray:
    """In batches of two rows, and with everything but numbers as text."""
    texts = {
        name: pa.array([None if value is None else str(value).lower() for value in column(name)], kind)
        for name, kind in (("level", pa.utf8()), ("member", pa.large_utf8()))
    }
    texts["level"] = texts["level"].dictionary_encode()
    dates = {name: pa.array(column(name), pa.utf8()) for name in ("colour", "born", "seen")}
    others = {name: table().column(name) for name in ("age", "height")}
    return decode_predict(stream(pa.table(texts | dates | others), max_chunksize=2), ARROW_STREAM, manifest)


def from_infer(manifest: BundleManifest) -> np.ndarray:
    return decode_infer(json.dumps({"inputs": [tensor(name) for name in NAMES]}).encode(), manifest).rows


def from_binary_infer(manifest: BundleManifest) -> np.ndarray:
    """In another order of columns, and of shape [rows, 1]."""
    parts = {name: raw(name) for name in reversed(NAMES)}
    tensors = [
        tensor(name) | {"shape": [len(ROWS), 1], "data": None, "parameters": {"binary_data_size": len(part)}}
        for name, part in parts.items()
    ]
    header = json.dumps({"inputs": tensors}).encode()
    return decode_infer(header + b"".join(parts.values()), manifest, len(header)).rows


def grpc_request(**fields: Any) -> Any:
    inputs = [{"name": name, "datatype": datatype(name), "shape": [len(ROWS)]} for name in NAMES]
    return message_class("ModelInferRequest")(inputs=inputs, **fields)


def from_grpc(manifest: BundleManifest) -> np.ndarray:
    return decode_request(grpc_request(raw_input_contents=[raw(name) for name in NAMES]), manifest).rows


def from_typed_grpc(manifest: BundleManifest) -> np.ndarray:
    fields = {"FP64": "fp64_contents", "INT8": "int_contents", "BOOL": "bool_contents", "BYTES": "bytes_contents"}
    request = grpc_request()
    for one in request.inputs:
        missing = b"" if one.datatype == "BYTES" else math.nan
        values = [missing if value is None else value for value in column(one.name)]
        encoded = [value.encode() if isinstance(value, str) else value for value in values]
        getattr(one.contents, fields[one.datatype]).extend(encoded)
    return decode_request(type(request).FromString(request.SerializeToString()), manifest).rows


@pytest.mark.parametrize(
    "decoded",
    [
        from_json, from_csv, from_arrow, from_arrow_of_texts, from_infer, from_binary_infer, from_grpc, from_typed_grpc,
    ],
)  # fmt: skip
def test_a_row_has_the_same_codes_over_every_wire_as_in_a_table(
    people: ModelBundle, decoded: Callable[[BundleManifest], np.ndarray]
):
    expected = SCHEMA.from_table(table())
    rows = decoded(manifest_of(people))
    assert (rows.dtype, rows.shape) == (np.float32, (len(ROWS), len(NAMES)))
    assert rows.tobytes() == expected.tobytes()
    assert expected[1, NAMES.index("colour")] == -1
    assert np.isnan(expected[1, NAMES.index("age")])


def changed(**values: Any) -> list[dict[str, Any]]:
    return [ROWS[0], ROWS[0] | values]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"level": 3}, "'level' is not a category that training saw"),
        ({"level": None}, "'level' is empty"),
        ({"member": None}, "'member' is empty"),
        ({"height": None}, "'height' is empty"),
        ({"seen": None}, "'seen' is empty"),
    ],
)
def test_what_has_no_code_is_refused_by_row_and_column(people: ModelBundle, values, fault):
    manifest, rows = manifest_of(people), changed(**values)
    bodies = {
        "application/json": (json.dumps({"records": rows}).encode(), r"records\[1\]: "),
        "text/csv": (as_csv(rows), "text/csv: row 2: "),
        ARROW_STREAM: (stream(table(rows)), "Arrow: row 1: "),
    }
    for kind, (body, place) in bodies.items():
        with pytest.raises(SpecError, match=place + fault) as caught:
            decode_predict(body, kind, manifest)
        assert len(str(caught.value).splitlines()) == 1
    body = json.dumps({"inputs": [tensor(name, column(name, rows)) for name in NAMES]}).encode()
    with pytest.raises(SpecError, match=rf"\[1\]: {fault}"):
        decode_infer(body, manifest)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"age": "old"}, "old"),
        ({"height": "nan"}, "'height' is empty"),
        ({"height": "1e60"}, "'height' is no finite number"),
        ({"born": "yesterday"}, "row 2: 'born': expected a date.*got 'yesterday'"),
        ({"level": "1_"}, "row 2: 'level' is not a category"),
    ],
)
def test_a_cell_of_csv_that_is_of_another_kind_is_refused(values, fault, people: ModelBundle):
    with pytest.raises(SpecError, match=fault):
        decode_predict(as_csv(changed(**values)), "text/csv", manifest_of(people))


def test_cells_of_csv_are_taken_for_what_a_source_takes_them_for(people: ModelBundle):
    """A source would make numbers of 1.0 and 2, booleans of TRUE, and no value of NA where all others are numbers."""
    rows = changed(level="1.0", member="TRUE", age="NA", born="7", colour="NA")
    first, second = decode_predict(as_csv(rows), "text/csv", manifest_of(people))
    assert second[NAMES.index("level")] == 0
    assert second[NAMES.index("member")] == first[NAMES.index("member")] == 1
    assert np.isnan(second[NAMES.index("age")])
    assert second[NAMES.index("born")] == 7
    assert second[NAMES.index("colour")] == -1


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("height", pa.array(["1"]), "'height' is of type string, expected numbers"),
        ("height", pa.array([True]), "'height' is of type bool, expected numbers"),
        ("height", pa.array([date(2024, 1, 1)]), "'height' is of type date32"),
        ("height", pa.nulls(1), "'height' is of type null"),
        ("colour", pa.array([date(2024, 1, 1)]), "'colour' is of type date32.*expected text"),
        ("colour", pa.array([b"red"]), "'colour' is of type binary"),
        ("colour", pa.array(["red"], pa.string_view()), "'colour' is of type string_view"),
        ("colour", pa.array([["red"]]), "'colour' is of type list"),
        ("seen", pa.array([True]), "'seen' is of type bool, expected dates or text"),
        ("seen", pa.array([1], pa.time64("us")), "'seen' is of type time64"),
        ("seen", pa.array([2**62 // 86_400_000 * 86_400_000], pa.date64()), "Arrow: .*dates beyond"),
        ("seen", pa.array([2**62], pa.timestamp("s")), "Arrow: .*dates beyond"),
        ("seen", pa.array(["soon"]), "row 0: 'seen': expected a date"),
    ],
)  # fmt: skip
def test_a_column_of_arrow_of_another_type_is_refused(people: ModelBundle, name, values, fault):
    found = table(ROWS[:1])
    body = stream(found.set_column(found.column_names.index(name), name, values))
    with pytest.raises(SpecError, match=fault):
        decode_predict(body, ARROW_STREAM, manifest_of(people))


def test_a_column_of_nothing_but_nulls_is_missing_where_it_may_be(people: ModelBundle):
    found = table(ROWS[:2])
    for name in ("age", "colour", "born"):
        found = found.set_column(found.column_names.index(name), name, pa.nulls(2))
    rows = decode_predict(stream(found), ARROW_STREAM, manifest_of(people))
    assert np.isnan(rows[:, [0, 2, 5]]).all()
    assert np.isfinite(rows[:, [1, 3, 4, 6]]).all()


@pytest.mark.parametrize("kind", ["text/csv", ARROW_STREAM])
def test_a_table_without_rows_is_refused(people: ModelBundle, kind):
    body = as_csv([]) if kind == "text/csv" else stream(table([]))
    with pytest.raises(SpecError, match="holds no rows"):
        decode_predict(body, kind, manifest_of(people))


def test_a_table_without_a_column_is_refused_by_its_name(people: ModelBundle):
    with pytest.raises(SpecError, match="'born'"):
        decode_predict(stream(table().drop_columns(["born"])), ARROW_STREAM, manifest_of(people))
    with pytest.raises(SpecError, match="'born'"):
        decode_predict(as_csv().replace(b"born", b"died"), "text/csv", manifest_of(people))


COLOUR = FeatureSchema(columns=(Column(name="colour", kind="category", categories=("red",), nullable=True),))


def test_a_long_text_that_every_row_names_is_not_written_out(people: ModelBundle):
    indices = pa.array(np.zeros(60_000, np.int8))
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 1_000_000]))  # 60 GB as text
    rows = decode_predict(stream(pa.table({"colour": column})), ARROW_STREAM, manifest_of(people, COLOUR))
    assert (rows == -1).all()


def test_a_dictionary_that_many_batches_name_is_refused(people: ModelBundle):
    words = pa.DictionaryArray.from_arrays([0] * 40, pa.array(["x" * 100_000]))
    body = stream(pa.table({"colour": words}), max_chunksize=2)
    with pytest.raises(SpecError, match="write fewer, larger batches"):
        decode_predict(body, ARROW_STREAM, manifest_of(people, COLOUR))


def test_nulls_that_take_no_bytes_are_not_taken_without_end(people: ModelBundle):
    body = stream(pa.table({"colour": pa.nulls(10_000_000)}))
    with pytest.raises(SpecError, match="rows take more than the body"):
        decode_predict(body, ARROW_STREAM, manifest_of(people, COLOUR))


@pytest.mark.parametrize("kind", ["text/csv", ARROW_STREAM])
def test_a_damaged_body_is_refused_or_read_but_never_harms(people: ModelBundle, kind):
    manifest, source, outcomes = manifest_of(people), random.Random(0), {"read": 0, "refused": 0}
    body = as_csv() if kind == "text/csv" else stream(table(), max_chunksize=2)
    for _ in range(400):
        damaged = bytearray(body)
        for _ in range(source.choice([1, 2, 8])):
            damaged[source.randrange(len(damaged))] = source.choice([0, 1, 127, 255, source.randrange(256)])
        try:
            rows = decode_predict(bytes(damaged), kind, manifest)
        except SpecError:
            outcomes["refused"] += 1
        else:
            assert not np.isinf(rows).any()
            outcomes["read"] += 1
    assert min(outcomes.values()) > 0


def test_an_array_of_numbers_is_refused_where_numbers_are_not_all(people: ModelBundle):
    sink = io.BytesIO()
    np.save(sink, np.zeros((1, len(NAMES)), np.float32))
    with pytest.raises(SpecError, match="npy file cannot name categories"):
        decode_predict(sink.getvalue(), NPY, manifest_of(people))


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("age", {"datatype": "BYTES"}, "age: datatype 'BYTES' is not accepted"),
        ("age", {"data": ["3"]}, "age: datatype FP64, but row 0 is '3'"),
        ("age", {"data": [True]}, "age: datatype FP64, but row 0 is True"),
        ("age", {"data": [10**400]}, "too large|not JSON"),
        ("age", {"data": [1.0, 2.0]}, "age: data has 2 values"),
        ("age", {"data": None}, "age: expected data"),
        ("age", {"shape": [1, 2]}, "age: wrong shape"),
        ("level", {"data": [300]}, "not within -128 to 127"),
        ("level", {"data": [1.5]}, "fractions"),
        ("level", {"datatype": "FP64", "data": [1.5]}, "'level' is not a category"),
        ("level", {"data": [None]}, "'level' is empty"),
        ("member", {"data": [1]}, "member: datatype BOOL, but row 0 is 1"),
        ("colour", {"data": [3]}, "colour: datatype BYTES, but row 0 is 3"),
        ("colour", {"data": [["red"]]}, "colour: datatype BYTES, but row 0 is"),
        ("colour", {"name": "color"}, "a tensor for each column.*got"),
        ("seen", {"datatype": "BOOL", "data": [True]}, "seen: datatype 'BOOL' is not accepted"),
        ("seen", {"data": ["x"]}, "'seen': expected a date"),
        ("seen", {"shape": [2], "data": ["1999-01-01"] * 2}, "different numbers of rows, from 1 to 2"),
    ],
)
def test_a_tensor_that_does_not_fit_its_column_is_refused(people: ModelBundle, name, changes, fault):
    tensors = [tensor(one, [ROWS[0][one]]) | (changes if one == name else {}) for one in NAMES]
    with pytest.raises(SpecError, match=fault):
        decode_infer(json.dumps({"inputs": tensors}).encode(), manifest_of(people))


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("colour", b"\x01\0\0\0\xff", "row 0 is not UTF-8"),
        ("colour", b"\x09\0\0\0red", "ends within an element"),
        ("member", b"", "has 0 values"),
        ("height", b"\0" * 7, "7 bytes of data"),
    ],
)
def test_raw_bytes_that_do_not_fit_are_refused(name, data, fault):
    tensors = [
        InputTensor(one, datatype(one), [1], memoryview(data) if one == name else [ROWS[0][one]]) for one in NAMES
    ]
    with pytest.raises(SpecError, match=fault):
        decode_tensors(tensors, SCHEMA)


def test_codes_become_the_tensors_of_a_request_that_has_them(people: ModelBundle):
    codes = SCHEMA.from_table(table())
    tensors = input_tensors(SCHEMA, codes)
    again = decode_tensors([InputTensor(*one[:3], memoryview(one.raw())) for one in tensors], SCHEMA)
    assert again.tobytes() == codes.tobytes()
    body, length = encode_request(SCHEMA, codes, ("label",))
    asked = decode_infer(body, manifest_of(people), length)
    assert asked.rows.tobytes() == codes.tobytes()
    assert (asked.outputs, asked.is_binary("label")) == (("label",), True)


def test_the_models_inputs_are_listed_one_a_column(people: ModelBundle):
    described = describe_model(people.manifest, ["1"], "torch")["inputs"]
    assert [one["name"] for one in described] == NAMES
    assert [one["datatype"] for one in described] == ["FP32", "FP32", *["BYTES"] * 5]
    assert {tuple(one["shape"]) for one in described} == {(-1,)}
    kinds = [one["data_type"] for one in describe_config(people.manifest, "torch")["input"]]
    assert kinds == ["TYPE_FP32"] * 2 + ["TYPE_STRING"] * 5


# ---- the description ----


def request_body(document: dict[str, Any], path: str, kind: str = "application/json") -> dict[str, Any]:
    return document["paths"][path]["post"]["requestBody"]["content"][kind]


def test_the_examples_of_the_description_are_requests_that_work(people: ModelBundle):
    document = openapi_document(people.manifest, "abc")
    predict, infer = (request_body(document, path) for path in ("/predict", "/v2/models/people/infer"))
    for body in (predict, infer):
        jsonschema.validate(body["example"], body["schema"])
    rows = decode_predict(json.dumps(predict["example"]).encode(), "application/json", people.manifest)
    assert decode_infer(json.dumps(infer["example"]).encode(), people.manifest).rows.tobytes() == rows.tobytes()
    text = request_body(document, "/predict", "text/csv")["example"]
    assert decode_predict(text.encode(), "text/csv", people.manifest).tobytes() == rows.tobytes()
    assert NPY not in document["paths"]["/predict"]["post"]["requestBody"]["content"]


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({}, True),
        ({"age": None, "colour": None, "born": None}, True),
        ({"colour": "never seen", "level": "2"}, True),
        ({"level": 2.0, "member": "true"}, True),
        ({"level": 3}, False),
        ({"level": True}, False),
        ({"height": None}, False),
        ({"seen": None}, False),
        ({"member": ""}, False),
        ({"colour": []}, False),
        ({"born": {}}, False),
        ({"age": "old"}, False),
    ],
)
def test_the_description_has_what_each_column_takes(people: ModelBundle, values, fits):
    schema = request_body(openapi_document(manifest_of(people), "abc"), "/predict")["schema"]
    record = ROWS[0] | values
    assert jsonschema.Draft202012Validator(schema).is_valid({"records": [record]}) is fits
    body = json.dumps({"records": [record]}).encode()
    if fits:
        decode_predict(body, "application/json", manifest_of(people))
    else:
        with pytest.raises(SpecError):
            decode_predict(body, "application/json", manifest_of(people))


def test_a_text_may_be_sent_where_the_model_reads_tokens(bundle: ModelBundle):
    column = Column(name="prompt", kind="text", shape=(4,), categories=("a", "b", "c"))
    manifest = manifest_of(bundle, FeatureSchema(columns=(column,)))
    manifest = manifest.model_copy(update={"example": {"prompt": [0, 1, 2, 0]}})
    schema = request_body(openapi_document(manifest, "abc"), "/predict")["schema"]
    for prompt in ("abca", [0, 1, 2, 0]):
        jsonschema.validate({"records": [{"prompt": prompt}]}, schema)
        body = json.dumps({"records": [{"prompt": prompt}]}).encode()
        assert decode_predict(body, "application/json", manifest).tolist() == [[0, 1, 2, 0]]


def test_long_lists_of_categories_are_not_written_out(people: ModelBundle):
    def described(count: int) -> str:
        names = tuple(f"category {i}" for i in range(count))
        columns = (*COLUMNS[:2], COLUMNS[2].model_copy(update={"categories": names}), *COLUMNS[3:])
        return json.dumps(openapi_document(manifest_of(people, FeatureSchema(columns=columns)), "abc"))

    assert "category 49" in described(50)
    assert "category 49" not in described(51)


# ---- pictures ----

PICTURE = FeatureSchema(columns=(Column(name="picture", kind="image", shape=(3, 4, 5)),))


def picture(size: tuple[int, int] = (50, 40), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


PNG = picture()


def picture_records(*values: Any) -> bytes:
    return json.dumps({"records": [{"picture": value} for value in values]}).encode()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_picture_is_the_same_numbers_as_a_body_in_json_and_in_a_table(bundle: ModelBundle):
    manifest, data = manifest_of(bundle, PICTURE), picture()
    pixels = decode(data, (4, 5), 3)
    bodies = {
        "image/png": data,
        "application/json": picture_records(text_of(data)),
        " application/json": picture_records(pixels.tolist()),
    }
    expected = PICTURE.from_table(pa.table({"picture": [data]}))
    for kind, body in bodies.items():
        assert decode_predict(body, kind, manifest).tobytes() == expected.tobytes()
    assert expected.tobytes() == pixels[None].astype(np.float32).tobytes()


def test_the_brightness_of_a_column_of_pictures_is_not_scaled_to_a_range(bundle: ModelBundle):
    manifest = manifest_of(bundle, PICTURE).model_copy(update={"input_range": (3.0, 240.0)})
    rows = decode_predict(picture(), "image/png", manifest)
    assert rows[0].tolist() == decode(picture(), (4, 5), 3).tolist()


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("not base64!", "picture: expected numbers, or a PNG or JPEG in base64"),
        (text_of(b"no picture"), "picture: not a PNG or JPEG"),
        (text_of(picture()[:60]), "picture: not a PNG or JPEG"),
        ([[1.0]], "picture: wrong shape"),
        (None, "picture: expected numbers"),
    ],
)
def test_what_is_no_picture_in_json_is_refused(bundle: ModelBundle, value, fault):
    with pytest.raises(SpecError, match=fault):
        decode_predict(picture_records(value), "application/json", manifest_of(bundle, PICTURE))


def test_pictures_in_json_are_decoded_up_to_a_number_of_pixels_together(bundle: ModelBundle, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS_IN_JSON", 4000)
    manifest, text = manifest_of(bundle, PICTURE), text_of(picture())
    assert len(decode_predict(picture_records(text, text), "application/json", manifest)) == 2
    with pytest.raises(Refusal, match="records: pictures of more than") as caught:
        decode_predict(picture_records(text, text, text), "application/json", manifest)
    assert caught.value.status == 413


def test_a_jpeg_of_too_many_scans_is_too_large_wherever_it_comes(bundle: ModelBundle):
    data = picture(kind="JPEG") + b"\xff\xda" * 200
    for kind, body in (("image/jpeg", data), ("application/json", picture_records(text_of(data)))):
        with pytest.raises(Refusal, match="more than 100 scans") as caught:
            decode_predict(body, kind, manifest_of(bundle, PICTURE))
        assert caught.value.status == 413


def test_without_pillow_pictures_are_refused_as_a_type_that_is_not_known_here(bundle: ModelBundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for kind, body in (("image/png", PNG), ("application/json", picture_records(text_of(PNG)))):
        with pytest.raises(Refusal, match="need Pillow") as caught:
            decode_predict(body, kind, manifest_of(bundle, PICTURE))
        assert caught.value.status == 415
