"""A job and its trials checked against the data: the last thing decided before anything starts (driver, no Ray)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from bigray.cross_validation import of_fold
from bigray.data.batches import steps_per_epoch
from bigray.data.dataset import Dataset
from bigray.data.folds import Fold, prepare_with_folds
from bigray.data.preprocessing import Preprocessing
from bigray.errors import SpecError
from bigray.models import build_model, cnn, language_model, load_factory, mlp, resnet, transformer
from bigray.models.cnn import check_images
from bigray.models.language_model import check_language_model
from bigray.models.mlp import check_mlp
from bigray.models.resnet import check_resnet
from bigray.models.resolve import code_hash
from bigray.models.transfer import keep_zeros_fault, start_from, weights_sha256
from bigray.models.transformer import check_tokens
from bigray.specs import METRICS, JobSpec, ModelSpec, TrainingSpec, TrialSpec, digest
from bigray.training.augmentation import augment_faults
from bigray.training.tasks import class_weight_faults, load_own_task, metric_collection

if TYPE_CHECKING:
    from torch import nn

_HAVE_MOMENTUM = ("sgd", "rmsprop")
_CHOOSY = ("adafactor", "rprop")
"""Optimizers that lack weight decay, or cannot be sharded."""
_CHECKS: dict[Callable[..., Any], Callable[..., None]] = {
    cnn: check_images,
    language_model: check_language_model,
    mlp: check_mlp,
    resnet: check_resnet,
    transformer: check_tokens,
}
"""What each of bigray's factories would refuse, asked with those of its arguments that the check has too."""


@dataclass(frozen=True)
class RunRequest:
    """Everything that decides a run."""

    job: JobSpec
    trials: tuple[TrialSpec, ...]
    """Of a search that proposes its trials as it goes: some that it might propose, for the checks."""
    dataset: Dataset
    search: dict[str, Any] | None
    """The search spec as JSON; None for plain training."""
    extended_to: int | None = None
    """Trials in all, where a finished sweep is to be extended."""
    run_name: str | None = None
    """The run to go on with, where it is not the one that `run_id` names."""
    folds: tuple[Fold, ...] = ()
    """With `data.k_folds`: what the trials of a fold are trained on, in the place of `dataset`."""
    asked: JobSpec | None = None
    """The job as it was asked for, where `job` tells the models more of the data; what the run's record holds."""

    @property
    def proposes(self) -> bool:
        """Whether the search learns from its trials, so that they are not known before."""
        return self.search is not None and self.search["search"] == "tpe"

    @property
    def drawn_trials(self) -> tuple[TrialSpec, ...]:
        """The trials that are known before the first one runs."""
        return () if self.proposes else self.trials

    @property
    def num_trials(self) -> int:
        """Of the search, without those that come on the way: clones, and finalists with other seeds.

        Of a cross-validation, with the one of the winner on the usual split.
        """
        if self.proposes and self.search is not None:
            return int(self.extended_to or self.search["trials"])
        return len(self.trials) + (self.search is None and bool(self.folds))

    def of_fold(self, trial: TrialSpec, fold: int) -> TrialSpec:
        """A trial of the usual split with the rows of a fold: also its categories to embed are those of the fold."""
        usual, own = (_told(one.preprocessing) for one in (self.dataset, self.folds[fold]))
        params = trial.model.params
        if usual and params.get("embeddings") == usual["embeddings"]:
            model = trial.model.model_copy(update={"params": {**params, **own}})
            trial = trial.model_copy(update={"model": model})
        return of_fold(trial, fold)

    @property
    def data_bytes(self) -> int:
        """What the object store of a node holds."""
        return self.dataset.arrays.nbytes + sum(fold.nbytes for fold in self.folds)

    @property
    def run_id(self) -> str:
        """The job's name and a hash of everything that decides the result: the same command finds the same run."""
        decided_by = {
            **self.job.fixed_by(),
            "search": self.search,
            "rows": self.dataset.fingerprint,
            "code": {name: code_hash(model.factory) for name, model in self.job.models.items()},
            "weights": {name: weights_sha256(model) for name, model in self.job.models.items()},
            "training_code": {path: code_hash(path) for path in _own_code(self.job.training)},
        }
        return f"{self.job.name}-{digest(decided_by)[:6]}"


def _own_code(training: TrainingSpec) -> list[str]:
    """Import paths of the user's task and loop, where the job has them."""
    task = None if training.task in METRICS else training.task
    return [path for path in (task, training.loop) if path is not None]


def make_request(
    job: JobSpec,
    trials: Sequence[TrialSpec],
    search: dict[str, Any] | None = None,
    extended_to: int | None = None,
) -> RunRequest:
    """Prepare the data and check that every trial can use it.

    Raises:
        SpecError: with one line for each fault of the data, the models, the task, the loop and the other settings.
    """
    dataset, folds = prepare_with_folds(job.data, job.training.target_kind, job.training.positive)
    asked = job
    job, trials = _with_embeddings(job, trials, dataset, folds)
    fewest_rows = min(dataset.num_rows["train"], *(len(fold.train) for fold in folds), sys.maxsize)
    faults = [
        *_worker_faults(job, fewest_rows),
        *_batch_faults(trials, fewest_rows),
        *_model_faults(job, trials, dataset),
        *_code_faults(trials, dataset.outputs.num_outputs),
        *_setting_faults(trials, dataset),
        *_fold_faults(folds, search),
    ]
    if faults:
        raise SpecError(list(dict.fromkeys(faults)))  # trials that share a setting share its fault
    return RunRequest(job, tuple(trials), dataset, search, extended_to, folds=folds, asked=asked)


def _with_embeddings(
    job: JobSpec, trials: Sequence[TrialSpec], dataset: Dataset, folds: Sequence[Fold]
) -> tuple[JobSpec, Sequence[TrialSpec]]:
    """Each model is told which of its inputs are categories to embed, where the data has some.

    Raises:
        SpecError: a factory that cannot be told.
    """
    if not dataset.preprocessing.embeddings:
        return job, trials
    for name, model in job.models.items():
        if not _takes_embeddings(model.factory):
            raise SpecError(
                f"models.{name}.factory: '{model.factory}' takes no embeddings, which data.categories = 'embedding' "
                f"needs; use 'one_hot'"
            )

    def tell(model: ModelSpec, fold: int | None) -> ModelSpec:
        told = _told((dataset if fold is None else folds[fold]).preprocessing)
        return model.model_copy(update={"params": {**told, **model.params}})

    models = {name: tell(model, None) for name, model in job.models.items()}
    return (
        job.model_copy(update={"models": models}),
        [trial.model_copy(update={"model": tell(trial.model, trial.fold)}) for trial in trials],
    )


def _told(preprocessing: Preprocessing) -> dict[str, list[list[int]]]:
    """The parameter of a factory that says which of its inputs are categories; empty where none is embedded."""
    pairs = preprocessing.embeddings
    return {"embeddings": [list(pair) for pair in pairs]} if pairs else {}


def _takes_embeddings(factory: str) -> bool:
    parameters = inspect.signature(load_factory(factory)).parameters
    return "embeddings" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _worker_faults(job: JobSpec, rows: int) -> Iterable[str]:
    workers = job.scaling.max_workers
    if rows < workers:
        yield f"scaling.num_workers: {workers} workers, but only {rows} training rows; use {rows} or fewer"


def _batch_faults(trials: Sequence[TrialSpec], rows: int) -> Iterable[str]:
    sizes = sorted(cast("set[int]", {trial.training.global_batch_size for trial in trials} - {"auto"}))
    for size in sizes:
        if size > rows:
            yield f"training.global_batch_size: {size} is more than the {rows} training rows"
    for trial in trials:
        micro = trial.training.micro_batch_size
        if micro is not None and sizes and micro > sizes[-1]:
            yield f"training.micro_batch_size: {micro} is more than the {sizes[-1]} rows of a global batch"


def _model_faults(job: JobSpec, trials: Sequence[TrialSpec], dataset: Dataset) -> Iterable[str]:
    shape, num_outputs = dataset.model_input_shape, dataset.outputs.num_outputs
    for name, model in job.models.items():
        grouped = [t.training for t in trials if t.model_name == name and t.training.param_groups]
        is_ours = model.factory.startswith("bigray.models:")
        try:
            if is_ours:
                _check_ours(model, shape, num_outputs)
            # ours return modules: checking the parameters alone spares the seconds that importing torch takes
            if grouped or not is_ours or model.weights is not None or model.freeze:
                module = build_model(model.factory, model.params, shape, num_outputs)
                if fault := _transfer_fault(module, model):
                    yield f"models.{name}.{fault}"
                    continue
                for training in grouped:
                    yield from (f"{fault} (model '{name}')" for fault in _group_faults(training, module))
        except SpecError as error:
            yield f"models.{name}.factory: {error}"
        except TypeError as error:
            yield f"models.{name}.params: '{model.factory}': {error}"


def _check_ours(model: ModelSpec, shape: tuple[int, ...], num_outputs: int) -> None:
    factory = load_factory(model.factory)
    given = inspect.signature(factory).bind(shape, num_outputs, **model.params)
    given.apply_defaults()
    if (check := _CHECKS.get(factory)) is not None:
        check(**{name: given.arguments[name] for name in inspect.signature(check).parameters})


def _transfer_fault(module: nn.Module, model: ModelSpec) -> str | None:
    try:
        start_from(module, model)
    except SpecError as error:
        return str(error)
    return None


def _group_faults(training: TrainingSpec, module: nn.Module) -> list[str]:
    from bigray.training.optimization import group_faults

    return group_faults(training.param_groups, module)


def _code_faults(trials: Sequence[TrialSpec], num_outputs: int) -> Iterable[str]:
    """What is wrong with a task or a loop of one's own. A search cannot vary them, so the first trial's are all."""
    training = trials[0].training
    if training.loop is not None:
        try:
            load_factory(training.loop)
        except SpecError as error:
            yield f"training.loop: {error}"
    if training.task in METRICS:
        return
    try:
        metrics = metric_collection(load_own_task(training.task, num_outputs), num_outputs)
    except SpecError as error:
        yield from error.faults
        return
    reported = sorted({*metrics.keys(), "val_loss"})
    if training.loop is None and training.selection_metric not in reported:
        metric = training.selection_metric
        yield f"training.metric: '{metric}' is not one that '{training.task}' reports: {', '.join(reported)}"


def _setting_faults(trials: Sequence[TrialSpec], dataset: Dataset) -> Iterable[str]:
    for trial in trials:
        training = trial.training
        if fault := keep_zeros_fault(trial.model, training):
            yield f"models.{trial.model_name}.{fault}"
        yield from class_weight_faults(training, dataset.outputs.num_outputs)
        yield from augment_faults(training.augment, dataset.model_input_shape)
        if _only_torch_can_tell(training):
            from bigray.training.optimization import optimizer_faults

            yield from optimizer_faults(training)
        warmup = training.schedule.warmup_steps
        if warmup and training.global_batch_size != "auto":
            steps = training.epochs * steps_per_epoch(dataset.num_rows["train"], training.batch_size)
            if warmup >= steps:
                yield f"training.schedule.warmup_steps: {warmup} steps, but the whole trial has {steps}"


def _fold_faults(folds: Sequence[Fold], search: dict[str, Any] | None) -> Iterable[str]:
    if folds and search is not None and not search.get("finalists"):
        yield (
            "data.k_folds: a sweep validates its finalists alone on the folds; set finalists = 3 in the search file, "
            "use bigray train, or leave k_folds out"
        )


def _only_torch_can_tell(training: TrainingSpec) -> bool:
    """Whether the optimizer might refuse its settings. The usual ones are known, which spares importing torch here."""
    return (
        bool(training.optimizer_params)
        or training.optimizer in _CHOOSY
        or (training.momentum > 0 and training.optimizer not in _HAVE_MOMENTUM)
    )
