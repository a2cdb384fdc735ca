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
from bigray.compression.fine_tuning import (
    OPTION,
    FineTuning,
    Train,
    check_data,
    share_of_zeros,
    trained_on,
    training_job,
)
from bigray.compression.report import (
    Compression,
    Pruned,
    Score,
    packed_size,
    score_golden,
    score_holdout,
    time_rows,
)
from bigray.errors import DeployError, SpecError, StorageError
from bigray.inference import BUILT_IN_FACTORIES, Predictor
from bigray.specs import JobSpec
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


@dataclass(frozen=True)
class _Made:
    """The new bundle before it is measured."""

    manifest: BundleManifest
    changed: Changed
    run: str | None = None
    """The folder of the run that trained it on."""


def compress(
    location: str,
    method: Method,
    *,
    max_drop: float = MAX_DROP,
    out: str | None = None,
    allow_factories: Sequence[str] = BUILT_IN_FACTORIES,
    fine_tuning: FineTuning | None = None,
) -> Compression:
    """Write the compressed bundle to `out`, by default beside the old one, which is only read.

    With `fine_tuning` what is pruned is trained on before it is measured, and its zeros stay.

    Raises:
        SpecError: the method, or the job that is to train on, does not suit the bundle, or something else is at `out`.
        StorageError: there is no sound bundle at `location`, or `out` cannot be written.
        DeployError: the metric drops by more than `max_drop`, and nothing was written; or the factory is not allowed.
        TrainingFailed, CapacityError, ClusterError: as `train`.
    """
    if faults := [*method.faults(), *_drop_faults(max_drop), *_tuning_faults(method, fine_tuning)]:
        raise SpecError(faults)
    storage = open_storage(location)
    bundle = ModelBundle.load(storage)
    target = _target(storage, bundle, method, out, is_tuned=fine_tuning is not None)
    _check_source(bundle, method, storage)
    assert bundle.golden is not None, "a bundle without golden answers has been refused"
    features, holdout = bundle.golden.inputs, load_holdout(storage)
    job = None
    if fine_tuning is not None:  # before the work of pruning
        job = training_job(bundle.manifest, fine_tuning, _scratch(target).child(WEIGHTS).uri)
    first = _change(bundle, method, allow_factories)
    made = _Made(bundle.manifest, first)
    if fine_tuning is not None and job is not None:
        made = _train_on(bundle, first, holdout, _scratch(target), job, fine_tuning.train)
    old, draft = (
        Predictor(each, allow_factories=allow_factories) for each in (bundle, _bundle(made.manifest, made.changed))
    )
    score = _compare(old, draft, holdout, features)
    if not score.drop <= max_drop:  # so asked, NaN is refused too
        raise DeployError(_refusal(location, method, score, max_drop, is_tuned=fine_tuning is not None))
    new = _bundle(_derived(bundle, made, method, score), made.changed)
    golden = Golden(features, draft.outputs(features))
    packed_holdout = (
        read_files(storage, "", read_manifest(storage), [HOLDOUT])[HOLDOUT] if holdout is not None else None
    )
    parent, name = _parent(target)
    save_bundle(parent, name, new.manifest, new.weights, new.onnx, golden, packed_holdout)
    pruned = None
    if made.run is not None:
        between = Predictor(_bundle(bundle.manifest, first), allow_factories=allow_factories)
        pruned = _measure_pruned(made.run, first, old, between, holdout, features)
    return Compression(
        method=method.kind,
        amount=method.share,
        source=location,
        location=target.uri,
        source_version=bundle.version,
        version=new.version,
        sizes=_sizes(bundle, ModelBundle.load(target)),
        packed=(packed_size(bundle.onnx or bundle.weights), packed_size(new.onnx or new.weights)),
        latency_ms=time_rows(old, draft, features),
        score=score,
        zeros=(share_of_zeros(bundle.weights), share_of_zeros(new.weights)),
        notes=(*made.changed.notes, *(pruned.describe(score) if pruned is not None else ())),
        pruned=pruned,
    )


def _scratch(target: Storage) -> Storage:
    """Beside the new bundle: where workers find the pruned weights while they are trained on."""
    parent, name = _parent(target)
    return parent.child(f"{name}-scratch")


def _train_on(
    bundle: ModelBundle, pruned: Changed, holdout: pa.Table | None, scratch: Storage, job: JobSpec, train: Train
) -> _Made:
    """The pruned weights after the job's training."""
    scratch.write_bytes(WEIGHTS, pruned.weights)
    try:
        location = train(job, lambda found: check_data(bundle.manifest, holdout, found, job.data.split.seed))
    finally:
        scratch.delete_file(WEIGHTS)
        if not scratch.list_names():
            scratch.delete_folder("")
    tuned = ModelBundle.load(location)
    manifest, changed = trained_on(pruned, tuned, bundle.manifest)
    return _Made(manifest, changed, open_storage(location).parent.uri)


def _measure_pruned(
    run: str, first: Changed, old: Predictor, between: Predictor, holdout: pa.Table | None, features: FloatArray
) -> Pruned:
    sizes = {WEIGHTS: len(first.weights)} | ({} if first.onnx is None else {ONNX: len(first.onnx)})
    return Pruned(
        run=run,
        sizes=sizes,
        packed=packed_size(first.onnx or first.weights),
        latency_ms={batch: times[1] for batch, times in time_rows(old, between, features).items()},
        metric=_compare(old, between, holdout, features).after,
        zeros=share_of_zeros(first.weights),
    )


def _drop_faults(max_drop: float) -> list[str]:
    return [] if max_drop >= 0 else [f"--max-drop: use a number from 0, got {max_drop:g}"]


def _tuning_faults(method: Method, fine_tuning: FineTuning | None) -> list[str]:
    if fine_tuning is None or method.kind == "prune":
        return []
    return [f"{OPTION}: is for --prune SHARE, whose zeros it keeps; leave it out with {method.option}"]


def _target(source: Storage, bundle: ModelBundle, method: Method, out: str | None, *, is_tuned: bool) -> Storage:
    """Where the new bundle goes: a place that is free, or has what the same command made before."""
    if out is None:
        parent, name = _parent(source)
        target = parent.child(f"{name}-{method.suffix}{'-fine-tuned' if is_tuned else ''}")
    else:
        target = open_storage(out)
    if target.root == source.root:
        raise SpecError(f"--out: {out} is the bundle itself, which stays as it is; choose another place")
    _parent(target)[0].check_writable()
    if not target.exists():
        return target
    if target.exists(MANIFEST):
        found = ModelBundle.load(target).manifest
        before, was_tuned = found.derived_from, found.origin.run != bundle.manifest.origin.run
        same = (bundle.version, method.kind, method.share)
        if before is not None and (before.version, before.method, before.amount) == same and was_tuned == is_tuned:
            return target
    raise SpecError(f"--out: there is something else at {target.uri}; choose another place, or remove it")


def _parent(storage: Storage) -> tuple[Storage, str]:
    """The folder that a storage is in, and its name there."""
    return storage.parent, storage.root.rpartition("/")[2]


def _check_source(bundle: ModelBundle, method: Method, storage: Storage) -> None:
    if bundle.golden is None:
        raise StorageError(
            f"{storage.uri}: has no {GOLDEN}, without which a new bundle cannot be checked; export it anew"
        )
    before = bundle.manifest.derived_from
    if before is not None and before.method == "int8":
        raise SpecError(f"{method.option}: the bundle is of eight bits already; compress the one it was made from")
    if before is not None and before.method == "low_rank" and method.kind == "prune":
        # its weights file has whole matrices, and so would the new graph
        raise SpecError(
            f"{method.option}: the bundle's layers are factored already, which pruning would undo; prune first"
        )


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


def _derived(bundle: ModelBundle, made: _Made, method: Method, score: Score) -> BundleManifest:
    """The manifest of the new bundle. Where it was not trained on, without what was measured of the old weights."""
    manifest = made.manifest
    derivation = Derivation(
        version=bundle.version,
        method=method.kind,
        amount=method.share,
        metric=score.metric,
        before=score.before,
        after=score.after,
        rows=score.rows,
    )
    if made.run is not None:
        return manifest.model_copy(update={"derived_from": derivation})
    card = manifest.card and manifest.card.model_copy(update={"confusion": (), "scores": {}, "per_class": ()})
    origin = manifest.origin.model_copy(update={"metrics": {}})
    return manifest.model_copy(update={"derived_from": derivation, "card": card, "origin": origin})


def _refusal(location: str, method: Method, score: Score, max_drop: float, *, is_tuned: bool) -> str:
    takes, left = (f"{method.option}, fine-tuned,", "no bundle") if is_tuned else (method.option, "nothing")
    return (
        f"{location}: {takes} takes {score.metric} on {score.rows:,} rows from {score.before:.4f} to "
        f"{score.after:.4f}, a drop of {score.drop:.4f} > --max-drop {max_drop:g}; {left} was written"
    )


def _sizes(before: ModelBundle, after: ModelBundle) -> dict[str, tuple[int, int]]:
    names = [name for name in (ONNX, WEIGHTS, GOLDEN, HOLDOUT) if name in before.sizes or name in after.sizes]
    return {name: (before.sizes.get(name, 0), after.sizes.get(name, 0)) for name in names}
