"""Which bodies are decoded beside the event loop: a picture, and JSON with pictures in it (replica)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bigray.bundle import BundleManifest
from bigray.serve.desk import Desk
from bigray.serve.http import Request
from bigray.serve.wire.bodies import is_json

MOST_WAITING = 128
"""However fast they are decoded."""
TEXT_VALUE = re.compile(rb':[ \t\n\r]*"')
"""Where an object of JSON has text for a value. Nothing of it can be written in another way, as letters can."""


def picture_desk(timeout_s: float, max_queue_s: float) -> Desk:
    """`timeout_s` for one picture, its wait included; `max_queue_s` of work may be there before another."""
    return Desk("pictures wait to be decoded", timeout_s, max_queue_s, MOST_WAITING)


def is_picture(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a body is said to be one."""
    return b"image/" in headers.get(b"content-type", b"").lower()


def may_hold_pictures(request: Request, manifest: BundleManifest) -> bool:
    """Whether records in JSON may have some in base64. A body of numbers costs less to decode than to hand over."""
    column = manifest.inputs.columns[0]
    if column.kind != "image" or not is_json(request.header(b"content-type")):
        return False
    return bool(request.header(b"content-encoding")) or TEXT_VALUE.search(request.body) is not None
