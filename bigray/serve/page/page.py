"""What an endpoint shows to people: one HTML document that asks for nothing from elsewhere, and the card of its model.

The document is the same for every model, and holds nothing of one: its script reads `card` and `stats` beside it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bigray.bundle import BundleManifest, ModelCard
from bigray.data.codes import UNSEEN_NAME
from bigray.data.features import Column
from bigray.serve.generation.answering import writes_text
from bigray.serve.http import Answer

_FOLDER = Path(__file__).parent
_STYLE, _SCRIPT = "{{ style }}", "{{ script }}"

PICTURE_SIDES = (4, 512)
"""Least and largest side of a tensor that the page takes for a picture to draw."""


@cache
def page_answer() -> Answer:
    """The page, read and put together when it is first asked for."""
    style, script = _read("page.css"), _read("page.js")
    document = _read("page.html").replace(_STYLE, style).replace(_SCRIPT, script)
    return Answer(
        document.encode(),
        b"text/html; charset=utf-8",
        headers=(
            (b"content-security-policy", content_policy(style, script).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-cache"),
            (b"vary", b"accept"),  # the same address answers programs with JSON
        ),
    )


def content_policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which this style and script run, and nothing else does."""
    return "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            "img-src 'self' data: blob:",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def model_card(manifest: BundleManifest, version: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a person should know of a model, as JSON; `extra` adds to it, or replaces what the bundle says."""
    outputs, card = manifest.outputs, manifest.card or ModelCard()
    document = {
        "name": manifest.name,
        "version": version,
        "task": outputs.task,
        "target": outputs.target,
        "classes": list(outputs.class_names),
        "inputs": _inputs(manifest),
        "image": _image(manifest),
        "example": manifest.example,
        "metrics": manifest.origin.metrics,
        "scores": card.scores,
        "per_class": [scores.model_dump(mode="json") for scores in card.per_class],
        "thresholds": list(outputs.decision),
        "confusion": [list(row) for row in card.confusion] or None,
        "data": {"rows": card.rows, "fingerprint": manifest.origin.data_fingerprint},
        "parameters": card.num_parameters or None,
        "lineage": manifest.origin.model_dump(mode="json", exclude={"metrics", "data_fingerprint"}),
        "explains": False,
        "generates": writes_text(manifest),
    }
    return document | dict(extra)


def _inputs(manifest: BundleManifest) -> list[dict[str, Any]]:
    """Each column with its range among the rows the model was trained on, as far as the bundle knows it."""
    columns = []
    for column in manifest.inputs.columns:
        known = manifest.input_range if column.shape else manifest.ranges.get(column.name)
        low, high = known or (None, None)
        columns.append(_column(column) | {"low": low, "high": high})
    return columns


def _column(column: Column) -> dict[str, Any]:
    """What a form has to know of a column; `unseen` stands for the categories that training did not see."""
    is_category = column.kind == "category"
    return {
        "name": column.name,
        "shape": list(column.shape),
        "kind": column.kind,
        "categories": list(column.categories) if is_category else [],
        "unseen": UNSEEN_NAME if is_category and column.unknown == "ignore" else None,
        "nullable": column.nullable,
    }


def _image(manifest: BundleManifest) -> dict[str, Any] | None:
    """How to draw the input where it is a picture: one channel or three, before or after the pixels."""
    found = _picture_of(manifest.inputs.input_shape) if manifest.inputs.is_tensor else None
    if found is None:
        return None
    height, width, channels, layout = found
    if manifest.inputs.columns[0].kind == "image":
        low, high = 0.0, 255.0
    else:
        low, high = manifest.input_range or _guessed_range(manifest.example[manifest.inputs.tensor_name])
    size = {"height": height, "width": width, "channels": channels}
    return {**size, "layout": layout, "low": low, "high": high}


def _picture_of(shape: tuple[int, ...]) -> tuple[int, int, int, str] | None:
    """Height, width, channels and layout of an input shape; None where it is no picture."""
    match shape:
        case (height, width):
            found = (height, width, 1, "HW")
        case (1 | 3 as channels, height, width):
            found = (height, width, channels, "CHW")
        case (height, width, 1 | 3 as channels):
            found = (height, width, channels, "HWC")
        case _:
            return None
    least, largest = PICTURE_SIDES
    return found if all(least <= side <= largest for side in found[:2]) else None


def _guessed_range(example: Any) -> tuple[float, float]:
    """From black to white, by one picture: the usual scales, or its own where it fits none."""
    values = list(_flat(example))
    low, high = min(values), max(values)
    white = next((usual for usual in (1.0, 16.0, 255.0) if high <= usual), high)
    return (0.0, white) if low >= 0 else (low, high)


def _flat(nested: Any) -> list[float]:
    return [value for one in nested for value in _flat(one)] if isinstance(nested, list) else [float(nested)]


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
