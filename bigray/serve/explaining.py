"""Rows are explained beside the event loop, by a module that is rebuilt when it is first asked for (replica)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import ModelBundle
from bigray.errors import BigrayError
from bigray.explanation.integrated_gradients import Explainer, why_not_supported
from bigray.serve.http import TRY_AGAIN, Refusal
from bigray.serve.loaded import LoadedModel

FloatArray = NDArray[np.float32]

MOST_ROWS = 16
"""Of one request: a row takes some hundred forward and backward passes."""
MOST_WAITING = 8
MOST_KEPT = 2
"""Modules with gradients that stay in memory: of the live version, and of one more."""


class ExplanationDesk:
    """One thread, one request after the other (event loop)."""

    def __init__(self, allow_factories: Sequence[str], timeout_s: float) -> None:
        self._allow_factories, self._timeout_s = allow_factories, timeout_s
        self._explainers: dict[str, Explainer] = {}
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigray-explanations")

    def supports(self, model: LoadedModel) -> bool:
        return why_not_supported(model.manifest, self._allow_factories) is None

    def check_supported(self, model: LoadedModel) -> None:
        """Raise a 501 where rows of this model cannot be explained here."""
        if (reason := why_not_supported(model.manifest, self._allow_factories)) is not None:
            raise Refusal(501, reason)

    async def explain(self, model: LoadedModel, rows: FloatArray) -> dict[str, Any]:
        """Checked rows (rows, *input_shape) -> the JSON document of the answer.

        Raises:
            Refusal: 413, too many rows; 503, too many wait already, or the version's bundle cannot be read any more;
                504, it takes too long.
        """
        self.check_supported(model)
        if len(rows) > MOST_ROWS:
            raise Refusal(413, f"explain: {len(rows)} rows, at most {MOST_ROWS} are explained at once; send fewer")
        if self._num_waiting >= MOST_WAITING:
            raise Refusal(503, f"overloaded: {self._num_waiting} explanations wait; try again later", TRY_AGAIN)
        self._num_waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._work, model, rows)
        # counted until the thread is done with it, whether its caller still waits or not
        work.add_done_callback(self._on_done)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(work)
        except TimeoutError:
            raise Refusal(504, f"explain: not done within {self._timeout_s:g} s; send fewer rows") from None

    def _on_done(self, work: asyncio.Future[dict[str, Any]]) -> None:
        self._num_waiting -= 1
        if not work.cancelled():
            work.exception()  # told to the caller where one waits

    def _work(self, model: LoadedModel, rows: FloatArray) -> dict[str, Any]:
        return self._explainer_of(model).explain(rows).to_json()

    def _explainer_of(self, model: LoadedModel) -> Explainer:
        found = self._explainers.pop(model.version, None) or self._rebuild(model)
        self._explainers[model.version] = found
        while len(self._explainers) > MOST_KEPT:
            del self._explainers[next(iter(self._explainers))]
        return found

    def _rebuild(self, model: LoadedModel) -> Explainer:
        try:
            bundle = ModelBundle.load(model.bundle)
        except BigrayError:
            raise Refusal(503, "explain: the bundle of this version cannot be read any more") from None
        if bundle.version != model.version:
            raise Refusal(503, "explain: the bundle of this version was replaced by another; deploy it")
        return Explainer(bundle, self._allow_factories)
