"""What `POST /predict` takes and gives: records, tables, arrays and pictures, told apart by content type.

Pure functions of bytes and arrays: no network, no Ray.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.data.features import FeatureSchema
from bigray.errors import SpecError
from bigray.inference import Predictions
from bigray.serve.http import JSON, Answer, Refusal
from bigray.serve.wire.images import decode_image, decode_picture_records
from bigray.serve.wire.protocol import parse_json
from bigray.serve.wire.tables import decode_arrow, decode_csv

FloatArray = NDArray[np.float32]
Decode = Callable[[bytes, BundleManifest], FloatArray]

ARROW_STREAM = "application/vnd.apache.arrow.stream"
ARROW_FILE = "application/vnd.apache.arrow.file"
NPY = "application/x-npy"

WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Content encodings, as zlib's own name for the container."""

NPY_MAGIC = b"\x93NUMPY"
NPY_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}
"""Bytes of the header's length, by the version of the format."""
LONGEST_NPY_HEADER = 1024
NPY_HEADER = re.compile(
    rb"\{ ?'descr': ?'(?P<descr>[<>|=]?[A-Za-z][0-9]{0,4})', ?'fortran_order': ?(?P<fortran>True|False), ?"
    rb"'shape': ?\((?P<shape>[0-9, ]{0,200})\),? ?\}\s*"
)
"""The Python literal that every writer makes; it is matched, since evaluating it takes longer than all of the rest.
Nothing in the pattern can be matched in two ways, so that no header makes it slow."""


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """A body without its content encoding; never takes more than `limit` bytes of memory for it.

    Raises:
        Refusal: 413, it is larger than that; 415, an encoding that is not known.
        SpecError: it is damaged or cut off.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in WINDOW_BITS:
        accepted = ((b"accept-encoding", b"gzip, deflate"),)
        raise Refusal(415, f"content-encoding '{name[:40]}' is not known, use gzip, deflate or none", accepted)
    stream = zlib.decompressobj(WINDOW_BITS[name])
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error:
        raise SpecError(f"body: not {name} as its content-encoding says") from None
    if len(plain) > limit:
        raise Refusal(413, f"body: more than the limit of {limit / 2**20:g} MB when decompressed; send fewer rows")
    if not stream.eof or stream.unused_data:
        raise SpecError(f"body: its {name} stream is {'followed by other data' if stream.eof else 'cut off'}")
    return plain


def decode_predict(body: bytes, content_type: str, manifest: BundleManifest) -> FloatArray:
    """The body of `/predict` -> checked float32 array (rows, *input_shape).

    Raises:
        SpecError: it does not fit the model, or is not what its content type says.
        Refusal: 415, a content type that is not known; 413, a picture that is too large.
    """
    if content_type == "application/json":
        return decode_records(body, manifest.inputs)
    media_type = content_type.partition(";")[0].strip().lower()
    decode = _DECODERS.get(media_type)
    if decode is None:
        # what `curl -d` and `fetch` send where nobody has named a type
        is_record = media_type == "text/plain" and body.lstrip()[:1] == b"{"
        if not is_record:
            raise _unknown_type(media_type)
        decode = _decode_json
    return decode(body, manifest)


def is_json(content_type: str) -> bool:
    """Whether `decode_predict` takes a body of this type for records in JSON."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "text/plain" or _DECODERS.get(media_type) is _decode_json


def decode_records(body: bytes, schema: FeatureSchema) -> FloatArray:
    """`{"records": [{column: value}]}` -> float32 array (rows, *input_shape)."""
    document = parse_json(body)
    if "records" not in document:
        raise SpecError("body: missing 'records', a list of objects with one value for each column")
    if schema.columns[0].kind == "image":
        return decode_picture_records(document["records"], schema)
    return schema.from_records(document["records"])


def decode_npy(body: bytes, schema: FeatureSchema) -> FloatArray:
    """A NumPy `.npy` file of numbers -> float32 array (rows, *input_shape). Nothing in it can run."""
    if not schema.is_plain:
        raise SpecError("body: a .npy file cannot name categories, dates or missing values; send JSON, CSV or Arrow")
    dtype, is_fortran, shape, start = _read_npy_header(body)
    if dtype.kind not in "iuf":
        raise SpecError(f"body: a .npy file of {dtype.name} is not accepted, save an array of float32")
    if shape[1:] != schema.input_shape:  # before numpy sees it, which takes 64 axes and no huge ones
        expected = f"({', '.join(('rows', *map(str, schema.input_shape)))})"
        raise SpecError(f"{schema.tensor_name}: wrong shape {shape!s:.80}, expected {expected}")
    data = memoryview(body)[start:]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise SpecError(f"body: a .npy file of shape {shape!s:.80}, but {len(data)} bytes of data")
    values = np.frombuffer(data, dtype)
    ordered = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)
    # a body is read-only, and its floats begin where they like: a copy is what any kernel can take
    return schema.checked(ordered.astype(np.float32) if dtype == np.float32 else ordered)


def _read_npy_header(body: bytes) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """Datatype, whether columns come first, shape, and where the data begins."""
    length_bytes = NPY_LENGTH_BYTES.get(body[6], 0) if body.startswith(NPY_MAGIC) and len(body) > 12 else 0
    start = 8 + length_bytes
    end = start + int.from_bytes(body[8:start], "little")
    found = NPY_HEADER.fullmatch(body, start, end) if start < end <= min(len(body), LONGEST_NPY_HEADER) else None
    try:
        if found is None:
            raise TypeError
        dtype = np.dtype(found["descr"].decode())
    except TypeError:
        raise SpecError("body: not a .npy file of an array of numbers") from None
    shape = tuple(int(size) for size in found["shape"].replace(b",", b" ").split())
    return dtype, found["fortran"] == b"True", shape, end


def encode_predict(predictions: Predictions, accept: str, model: str, version: str) -> Answer:
    """The answer of `/predict`, in the type that the `accept` header prefers; JSON where it names none of ours."""
    encode = _ENCODERS.get(accept) or _ENCODERS[preferred(accept, _ENCODERS)]
    return encode(predictions, model, version)


def encode_records(predictions: Predictions, model: str, version: str) -> bytes:
    """`{"model", "version", "predictions": [{"label", "probabilities"} or {"value"}]}`.

    The label of a multilabel task is the list of the row's labels.
    """
    records: list[dict[str, Any]]
    if predictions.values is not None:
        records = [{"value": value} for value in predictions.values]
    else:
        labels, probabilities = predictions.labels, predictions.probabilities
        assert labels is not None and probabilities is not None, "all but a regression have both"
        pairs = zip(labels, probabilities, strict=True)
        records = [{"label": label, "probabilities": row} for label, row in pairs]
    document = {"model": model, "version": version, "predictions": records}
    # rows stay numpy float32: orjson writes their shortest exact form, half as long as the doubles of tolist()
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_arrow(predictions: Predictions, model: str, version: str) -> bytes:
    """An Arrow stream: columns `label` and `probabilities`, or `value`; model and version are in its metadata."""
    batch = pa.record_batch(_columns(predictions))
    batch = batch.replace_schema_metadata({"model": model, "version": version})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def encode_npy(predictions: Predictions) -> bytes:
    """Probabilities (rows, classes) or values (rows,) as a `.npy` file of float32."""
    values = predictions.values if predictions.values is not None else predictions.probabilities
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(values, np.float32), allow_pickle=False)
    return sink.getvalue()


def _columns(predictions: Predictions) -> dict[str, pa.Array]:
    if predictions.values is not None:
        return {"value": pa.array(predictions.values, pa.float32())}
    labels, probabilities = predictions.labels, predictions.probabilities
    assert labels is not None and probabilities is not None, "all but a regression have both"
    flat = pa.array(np.ascontiguousarray(probabilities).reshape(-1), pa.float32())
    return {
        "label": _label_column(labels),
        "probabilities": pa.FixedSizeListArray.from_arrays(flat, probabilities.shape[1]),
    }


def _label_column(labels: list[Any]) -> pa.Array:
    """Text or whole numbers, or of a multilabel task lists of text."""
    if labels and isinstance(labels[0], list):
        return pa.array([[str(label) for label in row] for row in labels], pa.list_(pa.utf8()))
    is_text = any(isinstance(label, str) for label in labels)
    return pa.array([str(label) for label in labels], pa.utf8()) if is_text else pa.array(labels, pa.int64())


def _decode_json(body: bytes, manifest: BundleManifest) -> FloatArray:
    return decode_records(body, manifest.inputs)


def _unknown_type(media_type: str) -> Refusal:
    known = (JSON.decode(), "text/csv", ARROW_STREAM, ARROW_FILE, NPY, "image/png", "image/jpeg")
    listed = ", ".join(known)
    return Refusal(
        415, f"content-type '{media_type[:60]}' is not known; send {listed}", ((b"accept", listed.encode()),)
    )


def preferred(accept: str, known: Collection[str]) -> str:
    """The one of the known types with the highest q; the first of equals, and JSON where none is asked for."""
    best, best_quality = JSON.decode(), 0.0
    for item in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        quality = _quality(parameters)
        if media_type in known and quality > best_quality:
            best, best_quality = media_type, quality
    return best


def _quality(parameters: list[str]) -> float:
    text = next((value[2:] for value in parameters if value.startswith("q=")), "1")
    try:
        return float(text)
    except ValueError:
        return 0.0


_DECODERS: dict[str, Decode] = {
    "": _decode_json,
    "application/json": _decode_json,
    "application/x-www-form-urlencoded": _decode_json,
    "text/csv": lambda body, manifest: decode_csv(body, manifest.inputs),
    ARROW_STREAM: lambda body, manifest: decode_arrow(body, manifest.inputs),
    ARROW_FILE: lambda body, manifest: decode_arrow(body, manifest.inputs),
    NPY: lambda body, manifest: decode_npy(body, manifest.inputs),
    "image/png": decode_image,
    "image/jpeg": decode_image,
}

_ENCODERS: dict[str, Callable[[Predictions, str, str], Answer]] = {
    "": lambda predictions, model, version: Answer(encode_records(predictions, model, version)),
    "*/*": lambda predictions, model, version: Answer(encode_records(predictions, model, version)),
    "application/json": lambda predictions, model, version: Answer(encode_records(predictions, model, version)),
    ARROW_STREAM: lambda predictions, model, version: Answer(
        encode_arrow(predictions, model, version), ARROW_STREAM.encode()
    ),
    NPY: lambda predictions, model, version: Answer(encode_npy(predictions), NPY.encode()),
}
