from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from bigray.bundle import ModelBundle
from bigray.data.features import Column, FeatureSchema
from bigray.errors import SpecError
from bigray.serve.http import Refusal
from bigray.serve.wire import tables
from bigray.serve.wire.bodies import ARROW_FILE, ARROW_STREAM, decode_predict
from bigray.serve.wire.tables import decode_arrow, decode_csv

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
FLAT = [1, 2, 3, 4, 5, 6]
PAIR = FeatureSchema(columns=(Column(name="width"), Column(name="height")))
PICTURE = FeatureSchema(columns=(Column(name="image", shape=(2, 3)),))


def stream(table: pa.Table, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def file(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def pair(width, height) -> pa.Table:
    return pa.table({"width": width, "height": height})


@pytest.mark.parametrize(
    "body",
    [
        b"width,height\n1,2\n3,4.5\n",
        b"\xef\xbb\xbfwidth,height\n1,2\n3,4.5",
        b"height,name,width\r\n2,x,1\r\n4.5,y,3\r\n",
        b'width,height\n"1","2"\n\n3,4.5\n\n',
        b"width,height\n1e0, 2\n3.0,45e-1\n",
    ],
    ids=["plain", "BOM", "another order", "quotes and empty lines", "exponents"],
)
def test_csv_becomes_rows(regression_bundle: ModelBundle, body):
    rows = decode_predict(body, "text/csv; charset=utf-8", regression_bundle.manifest)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[1, 2], [3, 4.5]]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "got: nothing"),
        (b"width,height\n", "wrong shape"),
        (b"width;height\n1;2\n", "width"),
        (b"1,2\n3,4\n", "width"),
        (b"width,height\n1,2\n3\n", "Row #3"),
        (b"width,height\n1,2\n3,4,5\n", "Row #3"),
        (b"width,height\n1,2\n3,tall\n", "Row #3.*tall"),
        (b"width,height\n1,2\n3,NA\n", "Row #3.*NA"),
        (b"width,height\n1,2\n3,\n", "row 2: 'height' is empty"),
        (b"width,height\n1,nan\n", "NaN or infinite"),
        (b"width,height\n1,inf\n", "NaN or infinite"),
        (b"width,height\n1,1e60\n", "NaN or infinite"),
        (b"width,width,height\n1,1,2\n", "one column 'width'"),
        (b'"width\n1,2\n', "width"),
        (b"\xff\xfe\x00,\x00\n1,2\n", "text/csv"),
        (b"\x00\x01\x02", "text/csv"),
    ],
)
def test_csv_that_does_not_fit_is_refused_in_one_line(body, fault):
    with pytest.raises(SpecError, match=fault) as caught:
        decode_csv(body, PAIR)
    assert len(str(caught.value).splitlines()) == 1


def test_a_tensor_is_not_taken_as_csv():
    with pytest.raises(SpecError, match="send JSON, Arrow"):
        decode_csv(b"image\n1\n", PICTURE)


@pytest.mark.parametrize("content_type", [ARROW_STREAM, ARROW_FILE])
@pytest.mark.parametrize("write", [stream, file])
def test_a_stream_and_a_file_are_told_apart_by_their_bytes(regression_bundle: ModelBundle, write, content_type):
    body = write(pair([1, 3], pa.array([2.0, 4.5], pa.float32())))
    assert decode_predict(body, content_type, regression_bundle.manifest).tolist() == [[1, 2], [3, 4.5]]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([IMAGE], pa.list_(pa.list_(pa.float64()))),
        pa.array([IMAGE], pa.list_(pa.list_(pa.float32(), 3), 2)),
        pa.array([FLAT], pa.list_(pa.uint8(), 6)),
        pa.array([FLAT], pa.list_(pa.float16(), 6)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([IMAGE], np.float32)),
    ],
    ids=["lists", "fixed lists", "flat", "half", "tensor"],
)
def test_a_tensor_column_may_be_nested_flat_or_a_tensor(column):
    assert decode_arrow(stream(pa.table({"other": ["x"], "image": column})), PICTURE).tolist() == [IMAGE]


def test_several_batches_and_dictionaries_are_read():
    table = pair(pa.chunked_array([[1.0], [3.0]]), pa.chunked_array([pa.array([2.0, 2.0]).dictionary_encode()]))
    assert decode_arrow(stream(table), PAIR).tolist() == [[1, 2], [3, 2]]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (pa.table({"width": [1.0]}), "expected one column 'height', got 0"),
        (pa.Table.from_arrays([pa.array([1.0])] * 3, ["width", "height", "width"]), "one column 'width', got 2"),
        (pair(pa.array([], pa.float32()), pa.array([], pa.float32())), "wrong shape"),
        (pair([1.0, None], [1.0, 2.0]), "'width' holds nulls"),
        (pair(["a"], [1.0]), "'width' is of type string, expected numbers"),
        (pair([True], [1.0]), "'width' is of type bool"),
        (pair([None], [1.0]), "'width' is of type null"),
        (pair([[1.0]], [1.0]), "'width' is of type list"),
        (pair(pa.array(["a"]).dictionary_encode(), [1.0]), "'width' is of type dictionary"),
        (pair([float("nan")], [1.0]), "NaN or infinite"),
        (pair([1e300], [1.0]), "NaN or infinite"),
    ],
)
def test_columns_that_do_not_fit_are_refused(table, fault):
    with pytest.raises(SpecError, match=fault):
        decode_arrow(stream(table), PAIR)


@pytest.mark.parametrize(
    ("column", "fault"),
    [
        (pa.array([[[1.0, 2], [3, 4]]]), r"has shape \(2, 2\), expected \(2, 3\)"),
        (pa.array([[[1.0, 2], [3]]]), "different lengths"),
        (pa.array([[[1.0, 2, None], [3, 4, 5]]]), "holds nulls"),
        (pa.array([[[1.0, 2, 3], None]]), "holds nulls"),
        (pa.array([1.0]), "has shape"),
        (pa.array([[["a"] * 3] * 2]), "expected lists of numbers"),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((1, 3, 2))), "is a tensor of shape"),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((1, 3, 2)).transpose(0, 2, 1)), "is a tensor of shape"),
    ],
)
def test_a_tensor_column_that_does_not_fit_is_refused(column, fault):
    with pytest.raises(SpecError, match=fault):
        decode_arrow(stream(pa.table({"image": column})), PICTURE)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_buffers_are_refused_since_they_name_their_own_size(compression):
    numbers = pa.array([1.0] * 5000)
    with pytest.raises(SpecError, match="compressed buffers are not accepted"):
        decode_arrow(stream(pair(numbers, numbers), compression), PAIR)
    with pytest.raises(SpecError, match="compressed buffers are not accepted"):
        decode_arrow(stream(pair(numbers.dictionary_encode(), numbers), compression), PAIR)


def test_columns_that_share_their_bytes_do_not_multiply_them():
    column = Column(name="width")
    body = stream(pa.table({"width": [1.0] * 500}))
    with pytest.raises(SpecError, match="rows take more than the body"):
        decode_arrow(body, FeatureSchema(columns=(column,) * 20))


@contextmanager
def registered(kind: type[pa.ExtensionType], one: pa.ExtensionType) -> Iterator[None]:
    pa.register_extension_type(one)
    try:
        yield
    finally:
        pa.unregister_extension_type(one.extension_name)


@pytest.mark.parametrize("write", [stream, file])
def test_the_code_of_an_extension_type_does_not_run(write):
    calls: list[bytes] = []

    class Hostile(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.float64(), "tests.hostile")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"run me"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Hostile:
            calls.append(serialized)
            return cls()

    with registered(Hostile, Hostile()):
        column = pa.ExtensionArray.from_storage(Hostile(), pa.array([1.0]))
        body = write(pair(column, [2.0]))
        pa.ipc.open_file(body).read_all() if write is file else pa.ipc.open_stream(body).read_all()
        assert calls, "pyarrow itself would have run it"
        calls.clear()
        assert decode_arrow(body, PAIR).tolist() == [[1, 2]]
    assert not calls


@pytest.mark.parametrize(
    "body", [b"", b"x" * 100, b"ARROW1\0\0", b"\xff\xff\xff\xff" + b"\xff" * 60, json.dumps({}).encode()]
)
def test_what_is_not_arrow_is_refused(body):
    with pytest.raises(SpecError, match="Arrow"):
        decode_arrow(body, PAIR)


def test_a_damaged_stream_is_refused_or_read_but_never_harms():
    dictionary = pa.array([2.0, 4.0, 2.0]).dictionary_encode()
    bodies = [
        (stream(pair([1.0, 2.0, 3.0], dictionary)), PAIR),
        (stream(pa.table({"image": pa.array([IMAGE, IMAGE])})), PICTURE),
    ]
    source = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        body, schema = source.choice(bodies)
        damaged = bytearray(body[: source.choice([len(body), len(body), source.randrange(len(body))])])
        for _ in range(source.choice([1, 2, 8])):
            if damaged:
                damaged[source.randrange(len(damaged))] = source.choice([0, 1, 127, 255, source.randrange(256)])
        try:
            rows = decode_arrow(bytes(damaged), schema)
        except (SpecError, Refusal):
            outcomes["refused"] += 1
        else:
            assert np.isfinite(rows).all()
            outcomes["read"] += 1
    assert min(outcomes.values()) > 0


def test_of_columns_that_the_model_does_not_know_nothing_is_looked_at():
    text = pa.Array.from_buffers(pa.utf8(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 1)), pa.py_buffer(b"\xff")])
    with pytest.raises(pa.ArrowInvalid):
        text.validate(full=True)
    others = {
        "text": text,
        "view": pa.array(["a text that is too long for its view"], pa.string_view()),
        "tags": pa.array(["x"]).dictionary_encode(),
        "nested": pa.array([[{"a": [1]}]]),
    }
    table = pa.table({**others, "height": [2.0], "more": others["nested"], "width": [1]})
    assert decode_arrow(stream(table), PAIR).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["1"], pa.string_view()),
        pa.array([[1.0] * 6], pa.list_view(pa.float64())),
        pa.array([[[FLAT]]]),
        pa.RunEndEncodedArray.from_arrays([1], [1.0]),
        pa.array([], pa.list_(pa.list_(pa.float32(), 0), 10**9)),
        pa.array([], pa.list_(pa.list_(pa.float32(), 3), 3)),
        pa.array([], pa.list_(pa.float32(), 7)),
    ],
    ids=["text", "list views", "too deep", "run ends", "nothing, often", "other sizes", "another size"],
)
def test_a_column_of_another_type_is_refused_by_its_type(column):
    with pytest.raises(SpecError, match=r"column 'image' (is of type|has)"):
        decode_arrow(stream(pa.table({"image": column})), PICTURE)


def test_dictionaries_that_grow_are_refused():
    words = [pa.DictionaryArray.from_arrays([0], pa.array([1.0, 2.0][:size])) for size in (1, 2)]
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.ipc.new_stream(
        sink, pa.schema({"width": words[0].type, "height": pa.float64()}), options=options
    ) as writer:
        for one in words:
            writer.write_batch(pa.record_batch({"width": one, "height": pa.array([2.0])}))
    with pytest.raises(SpecError, match="dictionaries that come in parts"):
        decode_arrow(sink.getvalue().to_pybytes(), PAIR)


def test_a_dictionary_that_is_replaced_is_the_one_of_what_follows():
    columns = [
        pa.chunked_array([pa.array(part).dictionary_encode() for part in parts]) for parts in ([[1], [3]], [[2], [4]])
    ]
    assert decode_arrow(stream(pair(*columns)), PAIR).tolist() == [[1, 2], [3, 4]]


def test_a_body_of_more_batches_than_anybody_writes_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "MOST_BATCHES", 3)
    three, four = (pa.chunked_array([[1.0]] * size) for size in (3, 4))
    assert len(decode_arrow(stream(pair(three, three)), PAIR)) == 3
    with pytest.raises(SpecError, match="more than 3 batches; write larger ones"):
        decode_arrow(stream(pair(four, four)), PAIR)
