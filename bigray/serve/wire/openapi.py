"""The endpoint's own description, made from the bundle manifest: OpenAPI 3.1, with a real row as the example."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np

from bigray.bundle import BundleManifest
from bigray.data.codes import category_text
from bigray.data.features import Column, FeatureSchema
from bigray.errors import SpecError
from bigray.explanation.integrated_gradients import channel_axis
from bigray.serve.generation.answering import EVENTS, writes_text
from bigray.serve.generation.sampling import GenerationRequest
from bigray.serve.wire.binary import DTYPES
from bigray.serve.wire.bodies import ARROW_FILE, ARROW_STREAM, NPY
from bigray.serve.wire.images import image_layout
from bigray.serve.wire.tensors import describe_outputs, input_tensors

Schema = dict[str, Any]

JSON_TYPE = "application/json"
TEXT: Schema = {"type": "string"}
LARGEST = float(np.finfo(np.float32).max)
NUMBER: Schema = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
"""What the model can take: a float32 that is finite."""
NULL: Schema = {"type": "null"}
ANSWERED: Schema = {"type": ["number", "null"]}
"""Of a model whose numbers are no longer finite, null."""
MOST_LISTED = 50
"""Categories that are written out."""
BINARY: Schema = {}
"""Raw bytes have no schema of JSON."""
DECIMAL = r"-?[0-9]{1,9}(\.[0-9]{1,20})?(e-[0-9]{1,3})?"

REFUSALS = {
    "400": "The request does not fit the model or the protocol.",
    "401": "The endpoint takes API keys, and there was none that is valid.",
    "403": "The API key is not meant for this.",
    "404": "No such model, version or route.",
    "405": "Another method; the header Allow names it.",
    "406": "The answer cannot be a picture.",
    "408": "The body did not come in time.",
    "413": "The body, or the picture, is too large.",
    "415": "A content type or encoding that is not known.",
    "429": "The API key asks too often; the header Retry-After says when to come again.",
    "501": "Rows of this model cannot be explained here.",
    "503": "Too much waits already, or the model is not loaded yet; see the header Retry-After.",
    "504": "The model gave no answer in time.",
}
OPEN_REFUSALS = ("400", "404", "405", "413", "503")
"""Those of a route that takes no key and asks no model."""
KEYED_REFUSALS = ("400", "401", "403", "404", "405", "413", "429", "503")
EXPLAINED_REFUSALS = tuple(REFUSALS)
ASKED_REFUSALS = tuple(code for code in REFUSALS if code not in ("406", "501"))


def openapi_document(manifest: BundleManifest, version: str, *, explains: bool = False) -> Schema:
    """The document served at `/openapi.json`; `explains` where this endpoint can explain rows of the model."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": manifest.name,
            "version": version,
            "description": f"Predicts '{manifest.outputs.target}' with the model '{manifest.origin.model}'.",
        },
        "servers": [{"url": "."}],
        # a key is needed only where the endpoint has keys
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": _own_paths(manifest, explains) | _protocol_paths(manifest, version, explains),
        "components": {
            "schemas": {"Error": _object({"error": TEXT}), "Tensor": _tensor_description()},
            "responses": {code: _error(text) for code, text in REFUSALS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _own_paths(manifest: BundleManifest, explains: bool) -> Schema:
    anything: Schema = {"type": "object"}
    page = {"text/html": {"schema": TEXT}, JSON_TYPE: {"schema": anything}}
    return {
        "/": {"get": _get("The page to try the model on, or for programs the routes.", page, is_open=True)},
        "/predict": {"post": _predict_operation(manifest)},
        **({"/generate": {"post": _generate_operation(manifest)}} if writes_text(manifest) else {}),
        **({"/explain": {"post": _explain_operation(manifest)}} if explains else {}),
        "/card": {"get": _get("The model card: what it is, where it came from, how good it is.", anything)},
        "/stats": {"get": _get("Live numbers of all replicas.", anything)},
        "/metrics": {"get": _get("The numbers for Prometheus.", {"text/plain": {"schema": TEXT}})},
        "/openapi.json": {"get": _get("This document.", anything)},
    }


def _protocol_paths(manifest: BundleManifest, version: str, explains: bool) -> Schema:
    """The routes of the Open Inference Protocol; those of a model come with and without a version."""
    server = _object({"name": TEXT, "version": TEXT, "extensions": _list(TEXT)})
    index = _list({"type": "object", "required": ["name", "state"], "properties": {"name": TEXT, "version": TEXT}})
    paths: Schema = {
        "/v2": {"get": _get("The server.", server, is_open=True)},
        "/v2/health/live": {"get": _get("Whether it runs.", _flag_document("live"), is_open=True)},
        "/v2/health/ready": {"get": _get("Whether it answers.", _flag_document("ready"), is_open=True)},
        "/v2/repository/index": {"post": _get("The models that are served here.", index)},
    }
    model = f"/v2/models/{quote(manifest.name)}"
    named = _model_paths(f"{model}/versions/{{version}}", manifest, [version], explains)
    return paths | _model_paths(model, manifest, [], explains) | named


def _model_paths(root: str, manifest: BundleManifest, versions: list[str], explains: bool) -> Schema:
    ready = _object({"name": TEXT, "ready": {"type": "boolean"}})
    operations: Schema = {
        root: {"get": _get("The model's input and output tensors.", _model_description())},
        f"{root}/ready": {"get": _get("Whether the model answers.", ready, is_open=True)},
        f"{root}/config": {"get": _get("The model, as Triton's clients ask for it.", {"type": "object"})},
        f"{root}/infer": {"post": _infer_operation(manifest)},
    }
    if writes_text(manifest):
        operations[f"{root}/generate"] = {"post": _generate_operation(manifest)}
    if explains:
        operations[f"{root}/explain"] = {"post": _explain_operation(manifest)}
    parameters = [_version_parameter(version) for version in versions]
    return {path: {"parameters": parameters} | item if parameters else item for path, item in operations.items()}


def _version_parameter(version: str) -> Schema:
    return {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "A version in memory: the live one, the one before, or a candidate.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{12}$"},
        "example": version,
    }


def _predict_operation(manifest: BundleManifest) -> Schema:
    answer = _object({"model": TEXT, "version": TEXT, "predictions": _list(_prediction_schema(manifest))})
    answers = {JSON_TYPE: {"schema": answer}} | {kind: {"schema": BINARY} for kind in (ARROW_STREAM, NPY)}
    return _post("One prediction for each row, in order.", _row_bodies(manifest), answers)


def _explain_operation(manifest: BundleManifest) -> Schema:
    """The rows of a prediction; more of them than are explained at once are a 413."""
    answer = _object({"model": TEXT, "version": TEXT, "explanations": _list(_explanation_schema(manifest))})
    answers = {JSON_TYPE: {"schema": answer}, "image/png": {"schema": BINARY}}
    summary = "What each column or pixel adds to the answer, by integrated gradients; as a picture of one row."
    return _post(summary, _row_bodies(manifest), answers, EXPLAINED_REFUSALS)


def _row_bodies(manifest: BundleManifest) -> Schema:
    columns = {column.name: _value_schema(column) for column in manifest.inputs.columns}
    records = {"type": "array", "minItems": 1, "items": _object(columns)}
    json_body = {"schema": _object({"records": records}), "example": {"records": [manifest.example]}}
    raw = [ARROW_STREAM, ARROW_FILE]
    raw += [NPY] if manifest.inputs.is_plain else []
    raw += ["image/png", "image/jpeg"] if _takes_images(manifest) else []
    return {JSON_TYPE: json_body} | _csv_body(manifest) | {kind: {"schema": BINARY} for kind in raw}


def _value_schema(column: Column) -> Schema:
    """A column's value in a record; a missing one is null, and of numbers nothing else is said."""
    if column.kind == "image":
        numbers = _array(NUMBER, column.shape)
        picture = {"type": "string", "contentEncoding": "base64", "description": "A PNG or JPEG."}
        return {"anyOf": [numbers, picture]} if len(column.shape) == 3 else numbers
    if column.kind == "text" and column.categories:
        return {"anyOf": [_array(NUMBER, column.shape), {"type": "string", "minLength": 1}]}
    if column.kind == "category":
        kinds = _category_schemas(column)
    elif column.kind == "date":
        kinds = [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]
    else:
        value = _array(NUMBER, column.shape)
        return value | {"type": ["number", "null"]} if column.nullable else value
    kinds += [NULL] if column.nullable else []
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _category_schemas(column: Column) -> list[Schema]:
    """Those seen in training; and others, where they are taken as unknown."""
    is_short = len(column.categories) <= MOST_LISTED
    known: list[Schema] = [{"enum": list(_spellings(column.categories))}] if is_short and column.categories else []
    if known and column.unknown == "refuse":
        return known
    what = "One that training did not see is taken as unknown." if column.unknown == "ignore" else "As in training."
    return [*known, {"type": ["string", "number", "boolean"], "minLength": 1, "description": what}]


def _spellings(categories: tuple[str, ...]) -> Iterator[Any]:
    """The values of JSON that name a category: of 1 the number as well."""
    for name in categories:
        yield name
        try:
            value = {"true": True, "false": False}[name] if name in ("true", "false") else float(name)
        except ValueError:
            continue
        if isinstance(value, bool) or (math.isfinite(value) and category_text(value) == name):
            yield int(value) if value == int(value) and not isinstance(value, bool) else value


def _csv_body(manifest: BundleManifest) -> Schema:
    """A header and at least one row: columns of numbers can be told as a pattern."""
    schema = manifest.inputs
    names = [column.name for column in schema.columns]
    if schema.is_tensor or not all(name.isidentifier() for name in names):
        return {} if schema.is_tensor else {"text/csv": {"schema": TEXT, "example": _csv(manifest)}}
    if not schema.is_plain:
        return {"text/csv": {"schema": TEXT, "example": _csv(manifest)}}
    row = ",".join(str(float(manifest.example[name])) for name in names)
    pattern = rf"^{','.join(names)}\n({','.join([DECIMAL] * len(names))}\n){{1,4}}$"
    return {"text/csv": {"schema": {"type": "string", "pattern": pattern}, "example": f"{','.join(names)}\n{row}\n"}}


def _csv(manifest: BundleManifest) -> str:
    """The example as a table of one row."""
    names = [column.name for column in manifest.inputs.columns]
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows([names, [manifest.example[name] for name in names]])
    return sink.getvalue()


def _infer_operation(manifest: BundleManifest) -> Schema:
    schema = manifest.inputs
    whole = (schema.tensor_name,) if schema.is_plain else ()
    names = list(dict.fromkeys((*whole, *(column.name for column in schema.columns))))
    datatypes = [*DTYPES] if schema.is_plain else [*DTYPES, "BYTES", "BOOL"]
    kinds = ["number", "array"] if schema.is_plain else ["number", "string", "boolean", "null", "array"]
    shape = _list({"type": "integer", "minimum": 1}, least=1)
    tensor = _object({"name": {"enum": names}, "datatype": {"enum": datatypes}, "shape": shape})
    tensor["properties"] |= {"data": _list({"type": kinds}, least=1), "parameters": {"type": "object"}}
    least = 1 if schema.is_plain else len(schema.columns)
    requested = _object({"name": {"enum": [output["name"] for output in describe_outputs(manifest.outputs)]}})
    body = _object({"inputs": _list(tensor, least=least, most=len(schema.columns))})
    body["properties"] |= {"id": TEXT, "outputs": _list(requested), "parameters": {"type": "object"}}
    output = _object({"name": TEXT, "datatype": TEXT, "shape": _list({"type": "integer"})})
    answer = _object({"model_name": TEXT, "model_version": TEXT, "outputs": _list(output)})
    answer["properties"]["id"] = TEXT
    example = {"inputs": _example_tensors(schema, manifest.example)}
    binary = {"application/octet-stream": {"schema": BINARY}}
    operation = _post(
        "Open Inference Protocol v2: tensors as JSON, or raw behind a JSON header.",
        {JSON_TYPE: {"schema": body, "example": example}} | binary,
        {JSON_TYPE: {"schema": answer}} | binary,
    )
    operation["parameters"] = [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of JSON before the raw tensors.",
            "schema": {"type": "integer", "minimum": 0},
        }
    ]
    return operation


def _generate_operation(manifest: BundleManifest) -> Schema:
    """The request is told as `GenerationRequest` tells it; a prompt of other characters is a 400 all the same."""
    example = {"prompt": manifest.inputs.columns[0].categories[0], "max_tokens": 20, "stream": False}
    body = {"schema": GenerationRequest.model_json_schema(), "example": example}
    answer = _object({"model": TEXT, "version": TEXT, "text": TEXT, "tokens": {"type": "integer"}})
    answers = {EVENTS.decode(): {"schema": TEXT}, JSON_TYPE: {"schema": answer}}
    return _post(
        "The text after a prompt: an event for each piece, or without `stream` whole.", {JSON_TYPE: body}, answers
    )


def _example_tensors(schema: FeatureSchema, example: dict[str, Any]) -> list[Schema]:
    codes = schema.from_records([example])
    if schema.is_plain:
        tensors = [(one, one.data.tolist()) for one in input_tensors(schema, codes)]
    else:  # with null for a missing number, which NaN cannot be in JSON
        (record,) = schema.to_records(codes)
        tensors = [(one, [record[one.name]]) for one in input_tensors(schema, codes)]
    return [{"name": one.name, "datatype": one.datatype, "shape": one.shape, "data": data} for one, data in tensors]


def _prediction_schema(manifest: BundleManifest) -> Schema:
    if manifest.outputs.task == "regression":
        return _object({"value": ANSWERED})
    probabilities = _array(ANSWERED, (manifest.outputs.num_probabilities,))
    label = _label_schema(manifest)
    return _object(
        {"label": _list(label) if manifest.outputs.task == "multilabel" else label, "probabilities": probabilities}
    )


def _explanation_schema(manifest: BundleManifest) -> Schema:
    label = {} if manifest.outputs.task == "regression" else {"label": _label_schema(manifest)}
    numbers = dict.fromkeys(("output", "base", "error"), ANSWERED)
    inputs = manifest.inputs
    if inputs.is_tensor:
        axis = channel_axis(inputs.input_shape)
        attributions = _array(ANSWERED, tuple(size for i, size in enumerate(inputs.input_shape) if i != axis))
    else:
        attributions = _object({column.name: ANSWERED for column in inputs.columns})
    return _object({**label, **numbers, "attributions": attributions})


def _label_schema(manifest: BundleManifest) -> Schema:
    names = list(manifest.outputs.class_names)
    return {"enum": names} if names else {"type": "integer"}


def _tensor_description() -> Schema:
    return _object({"name": TEXT, "datatype": TEXT, "shape": _list({"type": "integer"})})


def _model_description() -> Schema:
    tensors = _list({"$ref": "#/components/schemas/Tensor"})
    return _object({"name": TEXT, "versions": _list(TEXT), "platform": TEXT, "inputs": tensors, "outputs": tensors})


def _takes_images(manifest: BundleManifest) -> bool:
    try:
        image_layout(manifest)
    except SpecError:
        return False
    return True


def _post(summary: str, bodies: Schema, answers: Schema, refusals: tuple[str, ...] = ASKED_REFUSALS) -> Schema:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": bodies},
        "responses": {"200": {"description": summary, "content": answers}} | _refusals(refusals),
    }


def _get(summary: str, answer: Schema, *, is_open: bool = False) -> Schema:
    """An operation without a body; `answer` is a schema of JSON, or the content by its types."""
    content = answer if any("/" in key for key in answer) else {JSON_TYPE: {"schema": answer}}
    responses = {"200": {"description": summary, "content": content}}
    operation: Schema = {"summary": summary, "security": []} if is_open else {"summary": summary}
    return operation | {"responses": responses | _refusals(OPEN_REFUSALS if is_open else KEYED_REFUSALS)}


def _refusals(codes: tuple[str, ...]) -> Schema:
    return {code: {"$ref": f"#/components/responses/{code}"} for code in codes}


def _error(description: str) -> Schema:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": description, "content": {JSON_TYPE: {"schema": schema}}}


def _object(properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _flag_document(name: str) -> Schema:
    return _object({name: {"type": "boolean"}})


def _list(items: Schema, *, least: int | None = None, most: int | None = None) -> Schema:
    limits = {"minItems": least, "maxItems": most}
    return {"type": "array", "items": items} | {word: limit for word, limit in limits.items() if limit is not None}


def _array(item: Schema, shape: tuple[int, ...]) -> Schema:
    schema = item
    for size in reversed(shape):
        schema = {"type": "array", "minItems": size, "maxItems": size, "items": schema}
    return schema
