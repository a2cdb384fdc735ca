"""Predictions as columns of a table, and where they come from as its metadata. Pure."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa

from bigray.bundle import ModelBundle, OutputSchema
from bigray.inference import Predictions

METADATA = b"bigray"
"""Key of the lineage in the metadata of a Parquet file's schema; its value is a JSON document."""


def answer_schema(outputs: OutputSchema) -> pa.Schema:
    """`value`, or `label` and `probabilities` in the order of the classes."""
    if outputs.task == "regression":
        return pa.schema([pa.field("value", pa.float32())])
    kind = _label_type(outputs)
    label = pa.list_(kind) if outputs.task == "multilabel" else kind
    return pa.schema([pa.field("label", label), pa.field("probabilities", pa.list_(pa.float32()))])


def answer_table(predictions: Predictions, outputs: OutputSchema) -> pa.Table:
    """One row for each that was asked about, in their order."""
    schema = answer_schema(outputs)
    if predictions.values is not None:
        return pa.table([pa.array(predictions.values, pa.float32())], schema=schema)
    assert predictions.labels is not None, "a prediction has labels or values"
    assert predictions.probabilities is not None, "and with labels, probabilities"
    is_text = pa.types.is_string(_label_type(outputs))
    labels = [_written(label) for label in predictions.labels] if is_text else predictions.labels
    rows, width = predictions.probabilities.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * width)
    flat = pa.array(np.ascontiguousarray(predictions.probabilities, np.float32).reshape(-1))
    return pa.table(
        [pa.array(labels, schema.field("label").type), pa.ListArray.from_arrays(offsets, flat)], schema=schema
    )


def lineage(bundle: ModelBundle, source: str, fingerprint: str, num_rows: int) -> dict[str, Any]:
    """What a reader of the file should know: which model answered, to which rows. Plain JSON."""
    manifest, origin = bundle.manifest, bundle.manifest.origin
    return {
        "model": manifest.name,
        "bundle_version": bundle.version,
        "run": origin.run,
        "trial": origin.trial,
        "step": origin.step,
        "derived_from": None if manifest.derived_from is None else manifest.derived_from.version,
        "class_names": list(manifest.outputs.class_names),
        "source": source,
        "source_fingerprint": fingerprint,
        "rows": num_rows,
        "bigray": _own_version(),
    }


def _own_version() -> str | None:
    try:
        return version("bigray")
    except PackageNotFoundError:  # running from a plain checkout
        return None


def with_lineage(schema: pa.Schema, document: dict[str, Any]) -> pa.Schema:
    return schema.with_metadata({METADATA: json.dumps(document).encode()})


def read_lineage(schema: pa.Schema) -> dict[str, Any] | None:
    """Of a file that `bigray predict` wrote; None for any other."""
    try:
        document = json.loads((schema.metadata or {})[METADATA])
    except (KeyError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _label_type(outputs: OutputSchema) -> pa.DataType:
    return pa.int64() if all(isinstance(name, int) for name in outputs.class_names) else pa.string()


def _written(label: Any) -> Any:
    return [str(one) for one in label] if isinstance(label, list) else str(label)
