"""A bundle -> a smaller one beside it, where it is good enough. Runs on the driver, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.bundle import (
    GOLDEN,
    HOLDOUT,
    ONNX,
    WEIGHTS,
    BundleManifest,
    Derivation,
    Golden,
    ModelBundle,
    load_holdout,
    save_bundle,
)
from bigray.compression.change import Changed
from bigray.compression.report import Compression, Score, packed_size, score_golden, score_holdout, time_rows
from bigray.errors import DeployError, SpecError, StorageError
from bigray.inference import BUILT_IN_FACTORIES, Predictor
from bigray.storage import MANIFEST, Storage, open_storage, read_files, read_manifest, sha256

FloatArray = NDArray[np.float32]

MAX_DROP = 0.005
"""Of the metric: half a point of accuracy."""


@dataclass(frozen=True)
class Method:
    """How to make it smaller."""

    kind: Literal["int8", "prune", "low_rank"]
    share: float | None = None
    """Of the weights to set to zero, or of the numbers to keep; None for int8."""

    @property
    def option(self) -> str:
        """As the command line has it."""
        return f"--{self.kind.replace('_', '-')}"

    @property
    def suffix(self) -> str:
        """Of the new bundle's folder."""
        return f"{self.option[2:]}" + ("" if self.share is None else f"-{self.share:g}")

    def faults(self) -> list[str]:
        if self.share is not None and not 0 < self.share < 1:  # nor NaN
            return [f"{self.option}: use a share between 0 and 1, got {self.share:g}"]
        return []


def compress(
    location: str,
    method: Method,
    *,
    max_drop: float = MAX_DROP,
    out: str | None = None,
    allow_factories: Sequence[str] = BUILT_IN_FACTORIES,
) -> Compression:
    """Write the compressed bundle to `out`, by default beside the old one, which is only read.

    Raises:
        SpecError: the method does not suit the bundle, or something else is at `out`.
        StorageError: there is no sound bundle at `location`, or `out` cannot be written.
        DeployError: the metric drops by more than `max_drop`, and nothing was written; or the factory is not allowed.
    """
    if faults := [*method.faults(), *_drop_faults(max_drop)]:
        raise SpecError(faults)
    storage = open_storage(location)
    bundle = ModelBundle.load(storage)
    target = _target(storage, bundle, method, out)
    _check_source(bundle, method, storage)
    assert bundle.golden is not None, "a bundle without golden answers has been refused"
    features = bundle.golden.inputs
    changed = _change(bundle, method, allow_factories)
    old, draft = (
        Predictor(each, allow_factories=allow_factories) for each in (bundle, _bundle(bundle.manifest, changed))
    )
    holdout = load_holdout(storage)
    score = _compare(old, draft, holdout, features)
    if not score.drop <= max_drop:  # so asked, NaN is refused too
        raise DeployError(_refusal(location, method, score, max_drop))
    made = _bundle(_derived(bundle, method, score), changed)
    golden = Golden(features, draft.outputs(features))
    packed_holdout = (
        read_files(storage, "", read_manifest(storage), [HOLDOUT])[HOLDOUT] if holdout is not None else None
    )
    parent, name = _parent(target)
    save_bundle(parent, name, made.manifest, made.weights, made.onnx, golden, packed_holdout)
    return Compression(
        method=method.kind,
        amount=method.share,
        source=location,
        location=target.uri,
        source_version=bundle.version,
        version=made.version,
        sizes=_sizes(bundle, ModelBundle.load(target)),
        packed=(packed_size(bundle.onnx or bundle.weights), packed_size(made.onnx or made.weights)),
        latency_ms=time_rows(old, draft, features),
        score=score,
        notes=changed.notes,
    )


def _drop_faults(max_drop: float) -> list[str]:
    return [] if max_drop >= 0 else [f"--max-drop: use a number from 0, got {max_drop:g}"]


def _target(source: Storage, bundle: ModelBundle, method: Method, out: str | None) -> Storage:
    """Where the new bundle goes: a place that is free, or has what the same command made before."""
    if out is None:
        parent, name = _parent(source)
        target = parent.child(f"{name}-{method.suffix}")
    else:
        target = open_storage(out)
    if target.root == source.root:
        raise SpecError(f"--out: {out} is the bundle itself, which stays as it is; choose another place")
    if not target.exists():
        return target
    if target.exists(MANIFEST):
        before = ModelBundle.load(target).manifest.derived_from
        if before is not None and (before.version, before.method) == (bundle.version, method.kind):
            return target
    raise SpecError(f"--out: there is something else at {target.uri}; choose another place, or remove it")


def _parent(storage: Storage) -> tuple[Storage, str]:
    """The folder that a storage is in, and its name there."""
    root, _, name = storage.root.rpartition("/")
    uri = storage.uri.rpartition("/")[0] or ("/" if storage.uri.startswith("/") else ".")
    return Storage(storage.filesystem, root, uri), name


def _check_source(bundle: ModelBundle, method: Method, storage: Storage) -> None:
    if bundle.golden is None:
        raise StorageError(
            f"{storage.uri}: has no {GOLDEN}, without which a new bundle cannot be checked; export it anew"
        )
    before = bundle.manifest.derived_from
    if before is not None and before.method == "int8":
        raise SpecError(f"{method.option}: the bundle is of eight bits already; compress the one it was made from")


def _change(bundle: ModelBundle, method: Method, allow_factories: Sequence[str]) -> Changed:
    assert bundle.golden is not None, "a bundle without golden answers has been refused"
    rows = bundle.manifest.preprocessing.apply(bundle.golden.inputs)
    if method.kind == "int8":
        from bigray.compression.int8 import quantize

        return quantize(bundle, rows)
    assert method.share is not None, "`faults` asks for it"
    if method.kind == "prune":
        from bigray.compression.prune import prune

        return prune(bundle, method.share, rows, allow_factories)
    from bigray.compression.low_rank import factor

    return factor(bundle, method.share, rows, allow_factories)


def _bundle(manifest: BundleManifest, changed: Changed) -> ModelBundle:
    return ModelBundle(manifest, changed.weights, changed.onnx, sha256(changed.weights)[:12])


def _compare(old: Predictor, new: Predictor, holdout: pa.Table | None, features: FloatArray) -> Score:
    return score_golden(old, new, features) if holdout is None else score_holdout(old, new, holdout)


def _derived(bundle: ModelBundle, method: Method, score: Score) -> BundleManifest:
    """The old manifest, but for what was measured of the old weights."""
    manifest = bundle.manifest
    derivation = Derivation(
        version=bundle.version,
        method=method.kind,
        amount=method.share,
        metric=score.metric,
        before=score.before,
        after=score.after,
        rows=score.rows,
    )
    card = manifest.card and manifest.card.model_copy(update={"confusion": (), "scores": {}, "per_class": ()})
    origin = manifest.origin.model_copy(update={"metrics": {}})
    return manifest.model_copy(update={"derived_from": derivation, "card": card, "origin": origin})


def _refusal(location: str, method: Method, score: Score, max_drop: float) -> str:
    return (
        f"{location}: {method.option} takes {score.metric} on {score.rows:,} rows from {score.before:.4f} to "
        f"{score.after:.4f}, a drop of {score.drop:.4f} > --max-drop {max_drop:g}; nothing was written"
    )


def _sizes(before: ModelBundle, after: ModelBundle) -> dict[str, tuple[int, int]]:
    names = [name for name in (ONNX, WEIGHTS, GOLDEN, HOLDOUT) if name in before.sizes or name in after.sizes]
    return {name: (before.sizes.get(name, 0), after.sizes.get(name, 0)) for name in names}
