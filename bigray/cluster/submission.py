"""A job file as something to be sent: its command, its folder, what it needs (driver side, any machine).

All that is wrong with it is told before there is a connection. Reads files alone.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigray.cluster.package import Package, files_of_job, missing_faults, read_pins, relative_to_folder, size_fault
from bigray.cluster.secrets import secrets_in_document, secrets_in_text
from bigray.errors import SpecError
from bigray.specs import JobSpec, digest

CONSTRAINTS = "constraints.txt"


@dataclass(frozen=True)
class EntrypointResources:
    """What the job's own process is given, apart from the workers it starts. With none it runs on the head."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory: int = 0
    """Bytes."""
    custom: Mapping[str, float] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Of Ray's client."""
        return {
            "entrypoint_num_cpus": self.cpus or None,
            "entrypoint_num_gpus": self.gpus or None,
            "entrypoint_memory": self.memory or None,
            "entrypoint_resources": dict(self.custom) or None,
        }


@dataclass(frozen=True)
class Submission:
    """A command and what it needs on the cluster."""

    name: str
    """How its id begins."""
    command: str
    package: Package | None = None
    """The folder it runs in; None where it needs nothing of this machine."""
    pins: tuple[str, ...] = ()
    """What Ray installs for it."""
    resources: EntrypointResources = EntrypointResources()
    id: str | None = None
    """In the place of the one that comes from all this."""

    def key(self, package_hash: str | None) -> str:
        """Equal for equal submissions, whoever makes them."""
        return digest([self.command, package_hash, self.pins, self.resources.arguments()])


@dataclass(frozen=True)
class JobFiles:
    """What a job on a cluster is told to read: paths as on the command line."""

    job: str
    search: str | None
    serve: str
    overrides: tuple[str, ...] = ()

    def named(self) -> Iterator[tuple[str, str]]:
        """Those that are there, by what names them; the others are presets, which a cluster has too."""
        for place, path in (("JOB", self.job), ("--search", self.search), ("--serve", self.serve)):
            if path is not None and Path(path).expanduser().exists():
                yield place, path


@dataclass(frozen=True)
class Wishes:
    """What else a person asks of a submission."""

    install: bool = False
    resources: EntrypointResources = EntrypointResources()
    id: str | None = None
    leave: bool = False
    """The endpoint ends with the job."""


def run_command(job: str, *, search: str | None, serve: str, overrides: Sequence[str], leave: bool) -> str:
    """The shell command of a job that trains, deploys and checks."""
    words = ["python", "-m", "bigray", "run", job, "--serve", serve]
    if search is not None:
        words += ["--search", search]
    for override in overrides:
        words += ["--set", override]
    if leave:
        words.append("--exit")
    return shlex.join(words)


def storage_fault(storage: str) -> str | None:
    """What is wrong with a storage that a job on a cluster is to use."""
    if "://" in storage or os.path.isabs(os.path.expanduser(storage)):
        return None
    return (
        f"storage: '{storage}' is relative, and a job's own folder is deleted with it; "
        f"name one the whole cluster sees: --set storage=/shared/runs, or s3://bucket/prefix"
    )


def id_fault(job_id: str) -> str | None:
    """What is wrong with an id that was chosen; the number of an attempt is put behind a dot."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", job_id):
        return None
    return f"--id: '{job_id}': use 1 to 80 letters, digits, '_' or '-', starting with a letter or digit"


def parse_resources(texts: Iterable[str]) -> dict[str, float]:
    """`NAME=AMOUNT` for each custom resource.

    Raises:
        SpecError: with one line for each that is not of this form.
    """
    found: dict[str, float] = {}
    faults: list[str] = []
    for text in texts:
        name, separator, amount = text.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            separator = ""
        if not (name and separator and 0 < found[name] < float("inf")):
            faults.append(f"--entrypoint-resource: '{text}': use NAME=AMOUNT with an amount above 0, such as head=1")
    if faults:
        raise SpecError(faults)
    return found


def check_secrets(files: JobFiles) -> None:
    """Raise `SpecError` where a file or an override holds a secret; before anything else of them is told."""
    faults: list[str] = []
    for _, path in files.named():
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # which whoever reads it for what it says will tell
        faults += [*secrets_in_text(path, text), *secrets_in_document(path, _document_of(path, text))]
    for override in files.overrides:
        key, _, value = override.partition("=")
        faults += secrets_in_document("--set", {key: value})
        faults += [fault.replace(":1:", ":", 1) for fault in secrets_in_text(f"--set {key}", value)]
    if faults:
        raise SpecError(faults)


def _document_of(path: str, text: str) -> Any:
    """None where it cannot be read."""
    try:
        return tomllib.loads(text) if path.endswith(".toml") else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def make_submission(job: JobSpec, files: JobFiles, package: Package, wishes: Wishes) -> Submission:
    """What is sent of a job whose files have been read.

    Raises:
        SpecError: with one line for each reason why it would not run there.
    """
    faults = [fault for fault in (storage_fault(job.storage), wishes.id and id_fault(wishes.id)) if fault]
    paths: dict[str, str] = {}
    for place, path in files.named():
        try:
            paths[place] = relative_to_folder(package.folder, place, path)
        except SpecError as error:
            faults += error.faults
    needed = [*paths.items(), *files_of_job(job, package.folder)]
    faults += missing_faults(package, needed)
    if fault := size_fault(package, (path for _, path in needed)):
        faults.append(fault)
    pins = _pins(package, wishes.install, faults)
    if faults:
        raise SpecError(faults)
    command = run_command(
        paths["JOB"],
        search=files.search and paths.get("--search", files.search),
        serve=paths.get("--serve", files.serve),
        overrides=files.overrides,
        leave=wishes.leave,
    )
    return Submission(job.name, command, package, pins, wishes.resources, wishes.id)


def make_resubmission(run: str, run_id: str, job: JobSpec, package: Package | None, wishes: Wishes) -> Submission:
    """What is sent to go on with a run, of whose files only `run.json` is needed.

    `run` is the run's folder, where the cluster finds it; `package` holds the user's own code and data, None where the
    job has none.

    Raises:
        SpecError: as `make_submission`.
    """
    faults = [fault for fault in (_run_fault(run), wishes.id and id_fault(wishes.id)) if fault]
    faults += _lost_weights_faults(job)
    if package is not None:
        needed = files_of_job(job, package.folder)
        faults += missing_faults(package, needed)
        if fault := size_fault(package, (path for _, path in needed)):
            faults.append(fault)
    pins = _pins(package, wishes.install, faults)
    if faults:
        raise SpecError(faults)
    command = shlex.join(["python", "-m", "bigray", "resume", run, "--here"])
    return Submission(run_id, command, package, pins, wishes.resources, wishes.id)


def _lost_weights_faults(job: JobSpec) -> list[str]:
    """`run.json` names a file of weights by where its own process found it: in a job's folder, or in this one."""
    return [
        f"models.{name}.weights: {model.weights}: was in the folder of the run's own job, and the next does not have "
        "it there; keep such a file on storage, or send the job file again with bigray submit"
        for name, model in job.models.items()
        if model.weights and "/_ray_pkg_" in model.weights
    ]


def needs_folder(job: JobSpec) -> bool:
    """Whether a job reads anything that is neither bigray's own nor on storage."""
    sources = [source for source in (job.data.source, job.data.train, job.data.test) if source is not None]
    code = [job.training.task, job.training.loop or "", *(model.factory for model in job.models.values())]
    own = [path for path in (*code, *sources) if re.fullmatch(r"[\w.]+:\w+", path)]
    files = [source for source in sources if source not in own and "://" not in source]
    return any(not path.startswith("bigray.") for path in own) or any(not os.path.isabs(path) for path in files)


def _run_fault(run: str) -> str | None:
    if "://" in run or os.path.isabs(os.path.expanduser(run)):
        return None
    return (
        f"RUN: {run}: is relative, and the cluster looks elsewhere; give {os.path.abspath(run)} where it sees that, or "
        f"--here to go on in this process"
    )


def _pins(package: Package | None, install: bool, faults: list[str]) -> tuple[str, ...]:
    if not install:
        return ()
    try:
        return read_pins((package.folder if package is not None else Path.cwd()) / CONSTRAINTS)
    except SpecError as error:
        faults += error.faults
        return ()
