"""TOML files -> specs. All faults of a file are found together, one line each, before anything starts."""

from __future__ import annotations

import itertools
import math
import re
import tomllib
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bigray.data.sources import check_source
from bigray.errors import SpecError, StorageError, did_you_mean
from bigray.models.resolve import load_factory
from bigray.presets import find_preset
from bigray.specs import IMPORT_PATH, JobSpec, RangeSpec, SearchSpec, Space, TrainingSpec, unknown_metric
from bigray.storage import open_storage

SpecType = TypeVar("SpecType", bound=BaseModel)

SEARCHABLE = frozenset(TrainingSpec.model_fields) - frozenset(
    {"task", "targets", "positive", "threshold", "loop", "metric", "metric_mode", "checkpoint_every_s"}
)
"""Settings that trials of one run may differ in."""

MOST_COMBINATIONS = 1000
"""Of a space's values that are tried against each other; a tenth of a second."""


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job file, with `key.path=value` overrides applied first.

    Raises:
        SpecError: with one line for each fault.
    """
    document = _read_toml(Path(path))
    faults = [fault for override in overrides if (fault := _apply_override(document, override))]
    try:
        job = validate_document(JobSpec, document, str(path))
    except SpecError as error:
        faults += error.faults
    faults += [f"{path}: {fault}" for fault in _reference_faults(document)]
    if faults:
        raise SpecError(faults)
    return job


def load_search(path: str | Path, job: JobSpec | None = None, trials: int | None = None) -> SearchSpec:
    """Read a search file; with a job, also check its spaces, metric and epochs against the job's settings.

    A path that does not exist here is looked up among the shipped presets, such as `tuning/lr_batch.toml`. `trials`
    takes the place of the file's own number.

    Raises:
        SpecError: with one line for each fault.
    """
    document = _read_toml(find_preset(path))
    if trials is not None:
        document["trials"] = trials
    faults: list[str] = []
    try:
        search = validate_document(SearchSpec, document, str(path))
    except SpecError as error:
        faults += error.faults
    faults += [f"{path}: {fault}" for fault in _search_faults(document, job)]
    if faults:
        raise SpecError(faults)
    return search


def _reference_faults(document: dict[str, Any]) -> Iterable[str]:
    """What the file points to and is not there. Read from the raw document, so that it is told beside other faults."""
    data, models, training = document.get("data"), document.get("models"), document.get("training")
    references: list[tuple[str, Any, Callable[[str], object]]] = []
    if isinstance(data, dict):
        references += [(f"data.{key}", data.get(key), check_source) for key in ("source", "train", "test")]
    if isinstance(models, dict):
        factories = [(name, model.get("factory")) for name, model in models.items() if isinstance(model, dict)]
        references += [(f"models.{name}.factory", path, load_factory) for name, path in factories]
    if isinstance(training, dict):
        # what is not of this form is a name, or a fault of its own
        own = [key for key in ("task", "loop") if re.fullmatch(IMPORT_PATH, str(training.get(key)))]
        references += [(f"training.{key}", training[key], load_factory) for key in own]
    references.append(("storage", document.get("storage", "runs"), lambda uri: open_storage(uri).check_writable()))
    for place, reference, check in references:
        if isinstance(reference, str):
            try:
                check(reference)
            except (SpecError, StorageError) as error:
                yield f"{place}: {error}"


def _search_faults(document: dict[str, Any], job: JobSpec | None) -> Iterable[str]:
    """Where a search does not suit the settings of the job. Read from the raw document, as `_reference_faults`."""
    spaces = dict(_spaces_of(document))
    for place, space in spaces.items():
        for key in space:
            if key not in SEARCHABLE:
                yield f"{place}.{key}: not a training setting{did_you_mean(key, SEARCHABLE)}"
    if job is not None:
        for place in spaces:
            model = place.removeprefix("spaces.")
            if place != "space" and model not in job.models:
                yield f"{place}: not a model of the job{did_you_mean(model, job.models)}"
        yield from _refused_by_training(spaces, job)
        yield from _metric_faults(document.get("metric"), job)
        yield from _epoch_faults(document, spaces, job)
    yield from _finalist_faults(document, spaces, job)


def _spaces_of(document: dict[str, Any]) -> Iterable[tuple[str, Space]]:
    """The spaces by their place in the file; what is no range has a fault of its own and is left out."""
    tables = [("space", document.get("space"))]
    of_models = document.get("spaces")
    if isinstance(of_models, dict):
        tables += [(f"spaces.{name}", table) for name, table in of_models.items()]
    for place, table in tables:
        if isinstance(table, dict):
            yield place, {key: found for key, value in table.items() if (found := _range_of(value)) is not None}


def _range_of(value: Any) -> RangeSpec | None:
    try:
        return RangeSpec.model_validate(value)
    except ValidationError:
        return None


def _refused_by_training(spaces: dict[str, Space], job: JobSpec) -> Iterable[str]:
    """Values that a training setting does not take, and then combinations that do not go together."""
    settings = job.training.model_dump()
    faults = [
        fault
        for place, space in spaces.items()
        for key, values in space.items()
        if key in SEARCHABLE
        for fault in _value_faults(f"{place}.{key}", key, values, settings)
    ]
    yield from faults
    if faults:
        return
    for place, space in _searched_together(spaces, job):
        yield from _combination_faults(place, space, settings)


def _value_faults(place: str, key: str, values: RangeSpec, settings: dict[str, Any]) -> Iterable[str]:
    for value in _examples(values):
        try:
            TrainingSpec.model_validate({**settings, key: value})
        except ValidationError as error:
            of_the_key = [detail for detail in error.errors() if detail["loc"]]  # the others: see combinations
            if not of_the_key:
                continue
            if values.choice is None and _takes(key, int(value), settings):
                low, high = (int(end) for end in _examples(values))
                yield f"{place}: takes whole numbers and a range draws fractions, use choice = [{low}, ..., {high}]"
                return
            yield f"{place}: {_describe(of_the_key[0], TrainingSpec)}"


def _takes(key: str, value: Any, settings: dict[str, Any]) -> bool:
    try:
        TrainingSpec.model_validate({**settings, key: value})
    except ValidationError as error:
        return not any(detail["loc"] for detail in error.errors())
    return True


def _searched_together(spaces: dict[str, Space], job: JobSpec) -> Iterable[tuple[str, Space]]:
    """What one trial can be drawn from: the common space, and for a model with its own, both."""
    common = spaces.get("space", {})
    own = {name: spaces[f"spaces.{name}"] for name in job.models if f"spaces.{name}" in spaces}
    if common and len(own) < len(job.models):
        yield "space", common
    for name, space in own.items():
        yield f"spaces.{name}", {**common, **space}


def _combination_faults(place: str, space: Space, settings: dict[str, Any]) -> Iterable[str]:
    """One line for each way in which values of several keys do not go together, with an example."""
    keys = [key for key in space if key in SEARCHABLE]
    told: set[str] = set()
    combinations = itertools.product(*[_examples(space[key]) for key in keys])
    for values in itertools.islice(combinations, MOST_COMBINATIONS):
        drawn = dict(zip(keys, values, strict=True))
        try:
            TrainingSpec.model_validate({**settings, **drawn})
        except ValidationError as error:
            for detail in error.errors():
                message = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
                if message not in told:
                    told.add(message)
                    example = ", ".join(f"{key} = {value!r}" for key, value in drawn.items())
                    yield f"{place}: {message} (as in {example})"


def _examples(values: RangeSpec) -> tuple[Any, ...]:
    """All choices, or both ends of a range: what lies between is no worse."""
    return values.choice or values.uniform or values.log_uniform or ()


def _metric_faults(metric: Any, job: JobSpec) -> Iterable[str]:
    if not isinstance(metric, str):
        return
    try:
        TrainingSpec.model_validate({**job.training.model_dump(), "metric": metric})
    except ValidationError:
        yield f"metric: {unknown_metric(metric, job.training.task)}"


def _epoch_faults(document: dict[str, Any], spaces: dict[str, Space], job: JobSpec) -> Iterable[str]:
    """A first look at the trials that would come after their last epoch."""
    searched = [value for space in spaces.values() if "epochs" in space for value in _examples(space["epochs"])]
    most = max((value for value in searched if isinstance(value, int)), default=job.training.epochs)
    scheduler = document.get("scheduler", SearchSpec.model_fields["scheduler"].default)
    key = {"asha": "grace_epochs", "median": "grace_epochs", "pbt": "interval_epochs"}.get(str(scheduler))
    table = document.get(str(scheduler), {})
    epochs = table.get(key) if isinstance(table, dict) else None
    if isinstance(epochs, int) and epochs > most:
        yield f"{scheduler}.{key}: {epochs} is more than the job's {most} epochs"


def _finalist_faults(document: dict[str, Any], spaces: dict[str, Space], job: JobSpec | None) -> Iterable[str]:
    finalists, trials = document.get("finalists"), document.get("trials")
    if document.get("search") == "grid" and job is not None:
        trials = sum(_grid_size({**spaces.get("space", {}), **spaces.get(f"spaces.{name}", {})}) for name in job.models)
    if isinstance(finalists, int) and isinstance(trials, int) and finalists > trials > 0:
        yield f"finalists: {finalists} is more than the {trials} trial{'s' if trials > 1 else ''} they are chosen from"


def _grid_size(space: Space) -> int:
    return math.prod(len(values.choice or ()) for values in space.values())


def validate_document(model: type[SpecType], document: dict[str, Any], file: str) -> SpecType:
    """Check a parsed file against a spec; `SpecError` holds `file: key.path: what is wrong` for each fault."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            place = ".".join(str(part) for part in detail["loc"] if part != "[key]")
            lines.append(": ".join(filter(None, (file, place, _describe(detail, model)))))
        raise SpecError(lines) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from None


def _apply_override(document: dict[str, Any], override: str) -> str | None:
    """Set one `key.path=value` in place; returns the fault, if any. The value is read as TOML, else as a string."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        return f"--set {override}: expected key.path=value, such as training.lr=1e-3"
    target = document
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            return f"--set {override}: '{part}' is a value, not a table"
    try:
        target[parts[-1]] = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        target[parts[-1]] = text.strip()
    return None


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(detail['loc'][-1]), _keys_at(model, detail['loc'][:-1]))}"
    if kind == "missing":
        return "required, but missing"
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{message}, got {value!r}" if isinstance(value, str | int | float) else message
    if kind == "too_short":
        return "is empty, give at least one value"
    if kind == "finite_number":
        return f"must be a finite number, got {value}"
    if isinstance(value, float) and math.isnan(value):
        return "must be a number, got nan"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{message.removeprefix('input ')}, got {value!r}"


def _keys_at(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """Field names allowed at a place inside a spec, for near matches."""
    current: Any = model
    for part in place:
        current = _strip(current)
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        elif get_origin(current) in (dict, list, tuple):
            current = get_args(current)[1 if get_origin(current) is dict else 0]
    current = _strip(current)
    is_spec = isinstance(current, type) and issubclass(current, BaseModel)
    return list(current.model_fields) if is_spec else []


def _strip(annotation: Any) -> Any:
    """`Annotated[X, ...]` and `X | None` -> X."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            annotation = next(a for a in get_args(annotation) if a is not type(None))
        else:
            return annotation
