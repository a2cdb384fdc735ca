"""A job and its trials checked against the data: the last thing decided before anything starts (driver, no Ray)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bigray.data.dataset import Dataset, prepare_dataset
from bigray.errors import SpecError
from bigray.models import build_model, cnn, load_factory
from bigray.models.cnn import check_images
from bigray.specs import JobSpec, TrialSpec, digest
from bigray.storage import sha256


@dataclass(frozen=True)
class RunRequest:
    """Everything that decides a run."""

    job: JobSpec
    trials: tuple[TrialSpec, ...]
    dataset: Dataset
    search: dict[str, Any] | None
    """The search spec as JSON; None for plain training."""

    @property
    def run_id(self) -> str:
        """The job's name and a hash of everything that decides the result: the same command finds the same run."""
        decided_by = {
            **self.job.fixed_by(),
            "search": self.search,
            "rows": self.dataset.fingerprint,
            "code": {name: _code_hash(model.factory) for name, model in self.job.models.items()},
        }
        return f"{self.job.name}-{digest(decided_by)[:6]}"


def _code_hash(factory: str) -> str | None:
    """Hash of the file a user's factory is in: another model under the same name is another run. None for bigray's."""
    if factory.startswith("bigray."):
        return None
    source = inspect.getsourcefile(load_factory(factory))
    return sha256(Path(source).read_bytes())[:12] if source else None


def make_request(job: JobSpec, trials: Sequence[TrialSpec], search: dict[str, Any] | None = None) -> RunRequest:
    """Prepare the data and check that every trial can use it.

    Raises:
        SpecError: with one line for each fault of the data, the batch sizes and the models.
    """
    dataset = prepare_dataset(job.data, job.training.target_kind)
    faults = [*_batch_faults(trials, dataset), *_model_faults(job, dataset)]
    if faults:
        raise SpecError(faults)
    return RunRequest(job, tuple(trials), dataset, search)


def _batch_faults(trials: Sequence[TrialSpec], dataset: Dataset) -> Iterable[str]:
    rows = dataset.num_rows["train"]
    sizes = {trial.training.global_batch_size for trial in trials} - {"auto"}
    for size in sorted(cast("set[int]", sizes)):
        if size > rows:
            yield f"training.global_batch_size: {size} is more than the {rows} training rows"


def _model_faults(job: JobSpec, dataset: Dataset) -> Iterable[str]:
    shape, num_outputs = dataset.inputs.input_shape, dataset.outputs.num_outputs
    for name, model in job.models.items():
        try:
            if model.factory.startswith("bigray.models:"):
                # ours return modules: checking the parameters alone spares the seconds that importing torch takes
                factory = load_factory(model.factory)
                given = inspect.signature(factory).bind(shape, num_outputs, **model.params)
                given.apply_defaults()
                if factory is cnn:
                    check_images(shape, given.arguments["channels"])
            else:
                build_model(model.factory, model.params, shape, num_outputs)
        except SpecError as error:
            yield f"models.{name}.factory: {error}"
        except TypeError as error:
            yield f"models.{name}.params: '{model.factory}': {error}"
