"""Integrated gradients: what each column or pixel adds to a row's answer, from a baseline to the row.

After Sundararajan et al. 2017 (arXiv 1703.01365), computed by captum. The attributions of a row add up to the
difference between the model's output for the row and for the baseline; how far they are from it is told. An ONNX graph
has no gradients, so the module is rebuilt from its factory, which has to be allowed.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, ModelBundle
from bigray.data.codes import UNSEEN
from bigray.data.preprocessing import Preprocessing
from bigray.errors import SpecError
from bigray.inference import BUILT_IN_FACTORIES, interpret
from bigray.rebuilding import is_allowed, rebuild_module

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float32]

STEPS = (32, 128, 512)
"""Points of the path at which gradients are taken; more where the sum is not near enough with fewer."""
TOLERANCE = 0.01
"""How far from the difference of outputs the attributions may add up to, relative to the sum of their sizes."""
LEAST_SCALE = 1e-3
"""Of attributions smaller than that in all, rounding is a large part."""
ROWS_AT_ONCE = 16
POINTS_AT_ONCE, NUMBERS_AT_ONCE = 1024, 2**22
"""Rows of one forward and backward pass, and numbers in them: bounds memory."""
INSTALL = "pip install 'bigray[explain]'"


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attributions for a batch of rows, in the units of the model's output: a logit, or the value of a regression."""

    labels: list[Any] | None
    """The class that is explained: the predicted one, of a multilabel task the likeliest label; None for regression."""
    outputs: FloatArray
    """(rows,) of that class; of a binary task's negative class the logit with its sign turned."""
    base: FloatArray
    """(rows,) the same output at the baseline."""
    attributions: FloatArray
    """(rows, columns); of a picture (rows, H, W), summed over the channels; of another tensor (rows, *shape)."""
    columns: tuple[str, ...]
    """Names of the columns; empty for a tensor."""

    @property
    def errors(self) -> FloatArray:
        """(rows,) what the attributions lack to add up to `outputs - base`."""
        sums = self.attributions.reshape(len(self.attributions), -1).sum(axis=1, dtype=np.float64)
        return np.asarray(np.abs(self.outputs - self.base - sums), np.float32)

    @property
    def is_complete(self) -> NDArray[np.bool_]:
        """(rows,) whether the error is within the tolerance."""
        return np.asarray(self.errors <= _tolerated(self.attributions))

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON object a row; `attributions` is an object by column, or nested lists in the shape of the tensor."""
        labels = self.labels if self.labels is not None else [None] * len(self.outputs)
        numbers = zip(self.outputs.tolist(), self.base.tolist(), self.errors.tolist(), strict=True)
        return [
            {
                **({} if self.labels is None else {"label": label}),
                "output": output,
                "base": base,
                "error": error,
                "attributions": dict(zip(self.columns, row, strict=True)) if self.columns else row,
            }
            for label, (output, base, error), row in zip(labels, numbers, self.attributions.tolist(), strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """`{"explanations": [...]}`, the body of an answer."""
        return {"explanations": self.to_records()}


def why_not_supported(manifest: BundleManifest, allow_factories: Sequence[str] = BUILT_IN_FACTORIES) -> str | None:
    """Why rows of this bundle cannot be explained here, in one line; None where they can. Imports nothing heavy."""
    if manifest.outputs.task == "language":
        return "explanations are for tables and pictures, not for text"
    if not is_allowed(manifest, allow_factories):
        return "the model would have to be rebuilt by a factory that is not allowed"
    if importlib.util.find_spec("captum") is None:
        return f"explanations need captum: {INSTALL}"
    return None


def explain_rows(
    bundle: ModelBundle, rows: FloatArray, allow_factories: Sequence[str] = BUILT_IN_FACTORIES
) -> Explanation:
    """Raw feature rows (rows, *input_shape) -> their attributions, from a baseline of preprocessed zeros.

    Raises:
        SpecError: this model cannot be explained, or captum is not installed.
        DeployError: the factory is not allowed.
    """
    return Explainer(bundle, allow_factories).explain(rows)


class Explainer:
    """A module with gradients. Thread-safe: holds no state between calls (driver or replica; imports torch)."""

    def __init__(self, bundle: ModelBundle, allow_factories: Sequence[str] = BUILT_IN_FACTORIES) -> None:
        manifest = bundle.manifest
        reason = why_not_supported(manifest, allow_factories)
        if reason is not None and is_allowed(manifest, allow_factories):
            raise SpecError(reason)
        module = rebuild_module(bundle, allow_factories)  # which names a factory that is not allowed
        self.manifest = manifest
        self._module = module.requires_grad_(False)
        self._layout = _Layout(manifest)

    def explain(self, rows: FloatArray, baseline: FloatArray | None = None) -> Explanation:
        """Raw feature rows (rows, *input_shape) -> attributions.

        `baseline` is one raw row (*input_shape). Without one it is what preprocessing makes zero: with
        `normalize = "standard"` the mean of the training rows.
        """
        parts = [
            self._explain_some(rows[start : start + ROWS_AT_ONCE], baseline)
            for start in range(0, len(rows), ROWS_AT_ONCE)
        ]
        return Explanation(
            labels=None if parts[0].labels is None else [label for part in parts for label in part.labels or []],
            outputs=np.concatenate([part.outputs for part in parts]),
            base=np.concatenate([part.base for part in parts]),
            attributions=np.concatenate([part.attributions for part in parts]),
            columns=self._layout.columns,
        )

    def _explain_some(self, rows: FloatArray, baseline: FloatArray | None) -> Explanation:
        layout = self._layout
        points = layout.points(rows)
        start = layout.start(baseline, len(rows))
        outputs = self._ask(points)
        chosen, labels, signs = self._choose(outputs)
        path = list(_category_steps(start, points, layout.embedded))
        answers = [self._ask(point)[np.arange(len(rows)), chosen] for point in path]
        end = outputs[np.arange(len(rows)), chosen]
        gradients = self._average_gradients(points, path[-1], chosen, end - answers[-1])
        found = layout.attribute(rows, baseline, gradients, points - path[-1])
        for column, before, after in zip(layout.embedded_columns, answers, answers[1:], strict=False):
            found[:, column] += after - before
        turned = found * signs.reshape(-1, *(1,) * (found.ndim - 1))
        return Explanation(labels, end * signs, answers[0] * signs, turned.astype(np.float32), layout.columns)

    def _ask(self, points: FloatArray) -> FloatArray:
        import torch

        with torch.inference_mode():
            return self._forward(torch.from_numpy(points)).numpy()

    def _forward(self, points: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._module(points)
        return found.reshape(len(points), -1)

    def _choose(self, outputs: FloatArray) -> tuple[NDArray[np.int64], list[Any] | None, FloatArray]:
        """Which output of each row is explained, what it stands for, and whether its sign is turned."""
        schema = self.manifest.outputs
        labels = interpret(outputs, schema).labels
        signs = np.ones(len(outputs), np.float32)
        chosen = outputs.argmax(axis=1)
        if schema.task == "binary":
            assert labels is not None, "a binary task answers with a label"
            signs[[label == schema.class_names[0] for label in labels]] = -1
        elif schema.task == "multilabel":
            labels = [schema.class_names[index] for index in chosen]
        return chosen, labels, signs

    def _average_gradients(
        self, points: FloatArray, start: FloatArray, chosen: NDArray[np.int64], difference: FloatArray
    ) -> FloatArray:
        """(rows, *shape) of the chosen outputs along the straight line from `start` to `points`."""
        import torch
        from captum.attr import IntegratedGradients

        method = IntegratedGradients(self._forward, multiply_by_inputs=False)
        gradients = np.zeros_like(points)
        left = np.arange(len(points))  # each row by itself, so that it does not depend on the rows beside it
        for steps in STEPS:
            ends, target = (
                [torch.from_numpy(values[left]) for values in (points, start)],
                torch.from_numpy(chosen[left]),
            )
            at_once = max(len(left), min(POINTS_AT_ONCE, NUMBERS_AT_ONCE // points[0].size))
            found = method.attribute(
                *ends, target=target, n_steps=steps, method="riemann_middle", internal_batch_size=at_once
            )
            gradients[left] = found.numpy()
            products = gradients * (points - start)
            errors = np.abs(products.reshape(len(points), -1).sum(axis=1) - difference)
            # twice as near as is asked for: parts that cancel each other are still to be added up
            left = left[(errors > _tolerated(products) / 2)[left]]
            if not len(left):
                break
        return gradients


class _Layout:
    """How columns, what preprocessing makes of them, and attributions belong together."""

    def __init__(self, manifest: BundleManifest) -> None:
        inputs, preprocessing = manifest.inputs, manifest.preprocessing
        self.columns = () if inputs.is_tensor else tuple(column.name for column in inputs.columns)
        self.embedded = tuple(index for index, _ in preprocessing.embeddings)
        self._input_shape, self._output_shape = inputs.input_shape, preprocessing.output_shape(inputs.input_shape)
        self._channels = channel_axis(inputs.input_shape) if inputs.is_tensor else None
        self._widths = [step.width for step in preprocessing.steps]
        self._ends = np.cumsum(self._widths)
        self.embedded_columns = tuple(int((self._ends <= index).sum()) for index in self.embedded)
        self.points = preprocessing.function()
        plain = preprocessing.model_copy(update={"components": None, "num_components": 0, "offset": ()})
        self._unprojected = plain.function()
        self._axes = _axes(preprocessing)
        self._offset = np.asarray(preprocessing.offset, np.float32)

    def start(self, baseline: FloatArray | None, num_rows: int) -> FloatArray:
        """The baseline as the model sees it, for each row."""
        if baseline is not None:
            return np.repeat(self.points(baseline[None]), num_rows, axis=0)
        found = np.zeros((num_rows, *self._output_shape), np.float32)
        if self.embedded:  # zero may be a category: none is the one that training did not see
            unseen = self.points(np.full((1, *self._input_shape), UNSEEN, np.float32))
            found[:, list(self.embedded)] = unseen[:, list(self.embedded)]
        return found

    def attribute(
        self, rows: FloatArray, baseline: FloatArray | None, gradients: FloatArray, moved: FloatArray
    ) -> FloatArray:
        """Average gradients and the way of each input -> attributions as `Explanation` has them."""
        found = gradients * moved
        if self._axes is not None:
            found = self._undo_projection(rows, baseline, gradients)
        if self._channels is not None:
            return np.asarray(found.reshape(len(rows), *self._input_shape).sum(axis=1 + self._channels))
        if not self._widths:
            return found.reshape(len(rows), *self._input_shape)
        cut = np.split(found, self._ends[:-1], axis=1)
        return np.stack([part.sum(axis=1) for part in cut], axis=1)

    def _undo_projection(self, rows: FloatArray, baseline: FloatArray | None, gradients: FloatArray) -> FloatArray:
        """By the chain rule: a projection is linear, so that the way is straight before it as well."""
        assert self._axes is not None, "asked for with components only"
        before = self._unprojected(rows).reshape(len(rows), -1)
        # of all rows that the projection makes zero, the one nearest to zero
        nearest = self._offset @ self._axes
        start = nearest if baseline is None else self._unprojected(baseline[None]).reshape(-1)
        return np.asarray((gradients @ self._axes) * (before - start))


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of the colours of a picture, (C, H, W) or (H, W, C); None where the shape is no picture of several."""
    if len(shape) != 3:
        return None
    return next((axis for axis in (0, 2) if shape[axis] in (1, 3)), None)


def _axes(preprocessing: Preprocessing) -> FloatArray | None:
    """(components, values) of the projection; None where there is none."""
    if preprocessing.components is None:
        return None
    packed = np.frombuffer(base64.b64decode(preprocessing.components), "<f4")
    return packed.reshape(preprocessing.num_components, -1)


def _category_steps(start: FloatArray, points: FloatArray, embedded: Sequence[int]) -> Iterator[FloatArray]:
    """The baseline, and then with one embedded category after the other as the row has it.

    Between two rows of a table of vectors there is no straight line of inputs: each category is a step of its own, with
    which the whole is still a path, whose attributions add up.
    """
    point = start.copy()
    yield point
    for index in embedded:
        point = point.copy()
        point[:, index] = points[:, index]
        yield point


def _tolerated(attributions: FloatArray) -> FloatArray:
    """(rows,) the error that counts as none."""
    sizes = np.abs(attributions).reshape(len(attributions), -1).sum(axis=1)
    return np.asarray(TOLERANCE * np.maximum(sizes, LEAST_SCALE), np.float32)
