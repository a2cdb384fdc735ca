"""Rows are explained beside the event loop, by a module that is rebuilt when it is first asked for (replica).

`bigray explain` does the same with a file. Here anybody may ask, so rows, time and what waits have their limits.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, ModelBundle
from bigray.errors import BigrayError, last_line
from bigray.explanation.integrated_gradients import Explainer, Explanation, channel_axis, why_not_supported
from bigray.explanation.picture import bars, overlay
from bigray.serve.desk import Desk
from bigray.serve.http import JSON, Answer, Refusal
from bigray.serve.loaded import LoadedModel
from bigray.serve.wire.bodies import preferred

FloatArray = NDArray[np.float32]

MOST_ROWS = 16
"""Of one request: a row takes some hundred forward and backward passes."""
MOST_WAITING = 8
WAITS_SHARE = 0.5
"""Of the time for a request that may be spent in the queue: one that would wait longer is refused at once."""
MOST_KEPT = 2
"""Modules with gradients that stay in memory: of the live version, and of one more."""
PNG = "image/png"
LONGEST_TO_SHORTEST = 64
"""Sides of a picture that is drawn: a thin one is enlarged until its shorter side can be seen."""

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")


class GivenUp(Exception):
    """Nobody waits for these rows any more."""


class ExplanationDesk:
    """One thread, one request after the other (event loop)."""

    def __init__(self, allow_factories: Sequence[str], timeout_s: float, num_threads: int = 1) -> None:
        """`timeout_s` for one request, its wait included; `num_threads` are torch's, as of the model that predicts."""
        self._allow_factories, self._num_threads = allow_factories, num_threads
        self._explainers: dict[tuple[str, str], Explainer] = {}
        self._desk = Desk("explanations wait", timeout_s, WAITS_SHARE * timeout_s, MOST_WAITING)

    def supports(self, model: LoadedModel) -> bool:
        return why_not_supported(model.manifest, self._allow_factories) is None

    def check_supported(self, model: LoadedModel) -> None:
        """Raise a 501 where rows of this model cannot be explained here."""
        if (reason := why_not_supported(model.manifest, self._allow_factories)) is not None:
            raise Refusal(501, f"model '{model.name}': {reason}")

    def check_room(self) -> None:
        """Raise a 503 where a request would wait too long; asked before its body is read."""
        self._desk.check_room()

    async def answer(self, model: LoadedModel, rows: FloatArray, accept: str) -> Answer:
        """Checked rows (rows, *input_shape) -> numbers as JSON, or by `accept` the PNG of one row.

        Raises:
            Refusal: 400, a PNG of several rows; 406, of rows that are no picture; 413, too many rows; 503, too many
                wait already, or the version's bundle cannot be read any more; 504, it takes too long.
        """
        if len(rows) > MOST_ROWS:
            raise Refusal(413, f"explain: {len(rows)} rows, at most {MOST_ROWS} are explained at once; send fewer")
        is_drawn = preferred(accept, (JSON.decode(), PNG)) == PNG
        if is_drawn:
            _check_drawn(len(rows), model.manifest)
        given_up = threading.Event()
        try:
            return await self._desk.run(self._work, model, rows, is_drawn, given_up)
        finally:
            given_up.set()

    def _work(self, model: LoadedModel, rows: FloatArray, is_drawn: bool, given_up: threading.Event) -> Answer:
        explainer = self._explainer_of(model)
        parts = []
        for start in range(len(rows)):  # each by itself: what is given up ends after a row, and memory holds one
            if given_up.is_set():
                raise GivenUp
            parts.append(explainer.explain(rows[start : start + 1]))
        if is_drawn:
            return Answer(_picture(parts[0], rows[0]), PNG.encode())
        return Answer(_document(model, parts))

    def _explainer_of(self, model: LoadedModel) -> Explainer:
        key = (model.bundle, model.version)
        found = self._explainers.pop(key, None) or self._rebuild(model)
        self._explainers[key] = found  # now the most recently used
        while len(self._explainers) > MOST_KEPT:
            del self._explainers[next(iter(self._explainers))]
        return found

    def _rebuild(self, model: LoadedModel) -> Explainer:
        import torch

        torch.set_num_threads(self._num_threads)
        try:
            bundle = ModelBundle.load(model.bundle)
        except BigrayError:
            raise Refusal(503, "explain: the bundle of this version cannot be read any more") from None
        if bundle.version != model.version:
            raise Refusal(503, "explain: the bundle of this version was replaced by another; deploy it")
        try:
            return Explainer(bundle, self._allow_factories)
        except BigrayError as error:  # its message may name modules
            _logger.warning("bigray: model '%s' could not be rebuilt: %s", model.name, last_line(error))
            raise Refusal(500, "explain: the model cannot be rebuilt; the replica's log has the reason") from None


def _check_drawn(num_rows: int, manifest: BundleManifest) -> None:
    if num_rows != 1:
        raise Refusal(400, f"explain: a picture is of one row, {num_rows} came; send one, or accept {JSON.decode()}")
    if importlib.util.find_spec("PIL") is None:
        raise Refusal(406, f"explain: pictures need Pillow where the endpoint runs; accept {JSON.decode()}")
    shape = manifest.inputs.input_shape
    if manifest.inputs.is_tensor and not _is_picture(shape):
        raise Refusal(406, f"explain: rows of shape {shape} are no picture; accept {JSON.decode()}")


def _is_picture(shape: tuple[int, ...]) -> bool:
    axis = channel_axis(shape)
    sides = shape if axis is None else shape[:axis] + shape[axis + 1 :]
    return len(sides) == 2 and max(sides) <= LONGEST_TO_SHORTEST * min(sides)


def _picture(explanation: Explanation, row: FloatArray) -> bytes:
    (attributions,) = explanation.attributions
    if explanation.columns:
        return bars(dict(zip(explanation.columns, attributions.tolist(), strict=True)))
    return overlay(attributions, row)


def _document(model: LoadedModel, parts: Sequence[Explanation]) -> bytes:
    records: list[dict[str, Any]] = [record for part in parts for record in part.to_records()]
    return orjson.dumps({"model": model.name, "version": model.version, "explanations": records})
