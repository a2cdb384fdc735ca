"""TOML files -> specs. All faults of a file are found together, one line each, before anything starts."""

from __future__ import annotations

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
from bigray.specs import IMPORT_PATH, JobSpec, SearchSpec, TrainingSpec, unknown_metric
from bigray.storage import open_storage

SpecType = TypeVar("SpecType", bound=BaseModel)


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


def load_search(path: str | Path, job: JobSpec | None = None) -> SearchSpec:
    """Read a search file; with a job, also check its space and metric against the job's training settings.

    A path that does not exist here is looked up among the shipped presets, such as `tuning/lr_batch.toml`.
    """
    found = find_preset(path)
    search = validate_document(SearchSpec, _read_toml(found), str(path))
    faults = list(_search_faults(search, job))
    if faults:
        raise SpecError([f"{path}: {fault}" for fault in faults])
    return search


def _reference_faults(document: dict[str, Any]) -> Iterable[str]:
    """What the file points to and is not there. Read from the raw document, so that it is told beside other faults."""
    data, models, training = document.get("data"), document.get("models"), document.get("training")
    references: list[tuple[str, Any, Callable[[str], object]]] = []
    if isinstance(data, dict):
        references.append(("data.source", data.get("source"), check_source))
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


def _search_faults(search: SearchSpec, job: JobSpec | None) -> Iterable[str]:
    fixed = {"task", "targets", "loop", "metric", "metric_mode", "checkpoint_every_s"}
    allowed = sorted(set(TrainingSpec.model_fields) - fixed)
    for key, values in search.space.items():
        if key not in allowed:
            yield f"space.{key}: not a training setting{did_you_mean(key, allowed)}"
        elif job is not None:
            examples = values.choice or values.uniform or values.log_uniform or ()
            yield from _values_refused_by_training(job.training, key, examples)
    if job is not None and search.metric is not None:
        try:
            job.training.model_validate({**job.training.model_dump(), "metric": search.metric})
        except ValidationError:
            yield f"metric: {unknown_metric(search.metric, job.training.task)}"
    if search.scheduler == "asha" and job is not None and search.asha.grace_epochs > job.training.epochs:
        yield f"asha.grace_epochs: {search.asha.grace_epochs} is more than the job's {job.training.epochs} epochs"


def _values_refused_by_training(training: TrainingSpec, key: str, values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        try:
            TrainingSpec.model_validate({**training.model_dump(), key: value})
        except ValidationError as error:
            yield f"space.{key}: {_describe(error.errors()[0], TrainingSpec)}"


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
