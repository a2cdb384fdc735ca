"""The endpoint's own description, made from the bundle manifest: OpenAPI 3.1, with a real row as the example."""

from __future__ import annotations

from typing import Any

from bigray.bundle import BundleManifest
from bigray.serve.protocol import describe_model

Schema = dict[str, Any]


def openapi_document(manifest: BundleManifest, version: str) -> Schema:
    """The document served at `/openapi.json`."""
    model = f"/v2/models/{manifest.name}"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": manifest.name,
            "version": version,
            "description": f"Predicts '{manifest.outputs.target}' with the model '{manifest.origin.model}'.",
        },
        "paths": {
            "/predict": {"post": _predict_operation(manifest)},
            f"{model}/infer": {"post": _infer_operation(manifest)},
            model: {"get": _get("The model's input and output tensors.")},
            f"{model}/ready": {"get": _get("Whether this model answers.")},
            "/v2": {"get": _get("The server.")},
            "/v2/health/live": {"get": _get("Whether the server runs.")},
            "/v2/health/ready": {"get": _get("Whether the server answers.")},
            "/openapi.json": {"get": _get("This document.")},
        },
        "components": {"schemas": {"Error": _object({"error": {"type": "string"}})}},
    }


def _predict_operation(manifest: BundleManifest) -> Schema:
    columns = {column.name: _array("number", column.shape) for column in manifest.inputs.columns}
    record = _object(columns)
    body = _object({"records": {"type": "array", "minItems": 1, "items": record}})
    answer = _object(
        {
            "model": {"type": "string"},
            "version": {"type": "string"},
            "predictions": {"type": "array", "items": _prediction_schema(manifest)},
        }
    )
    example = {"records": [manifest.example]}
    return _post("One prediction for each record.", body, example, answer)


def _infer_operation(manifest: BundleManifest) -> Schema:
    tensor = _object(
        {
            "name": {"type": "string", "const": manifest.inputs.tensor_name},
            "datatype": {"type": "string", "examples": ["FP32"]},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array"},
        }
    )
    body = _object({"inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": tensor}})
    body["properties"]["id"] = {"type": "string"}
    answer = _object(
        {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "outputs": {"type": "array", "items": {"type": "object"}},
        }
    )
    return _post("Open Inference Protocol v2.", body, {"inputs": [_example_tensor(manifest)]}, answer)


def _example_tensor(manifest: BundleManifest) -> Schema:
    schema = manifest.inputs
    description = describe_model(manifest, "", "")["inputs"][0]
    rows = schema.from_records([manifest.example])
    return {**description, "shape": list(rows.shape), "data": rows.reshape(-1).tolist()}


def _prediction_schema(manifest: BundleManifest) -> Schema:
    if manifest.outputs.task == "regression":
        return _object({"value": {"type": "number"}})
    probabilities = _array("number", (manifest.outputs.num_outputs,))
    return _object({"label": {"enum": list(manifest.outputs.class_names)}, "probabilities": probabilities})


def _post(summary: str, body: Schema, example: Schema, answer: Schema) -> Schema:
    refusals = {"400": "The body does not fit the model.", "413": "The body is too large."}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body, "example": example}}},
        "responses": {"200": _response("The predictions.", answer)}
        | {status: _response(text, {"$ref": "#/components/schemas/Error"}) for status, text in refusals.items()},
    }


def _get(summary: str) -> Schema:
    return {"summary": summary, "responses": {"200": _response(summary, {"type": "object"})}}


def _response(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _object(properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _array(kind: str, shape: tuple[int, ...]) -> Schema:
    schema: Schema = {"type": kind}
    for size in reversed(shape):
        schema = {"type": "array", "minItems": size, "maxItems": size, "items": schema}
    return schema
