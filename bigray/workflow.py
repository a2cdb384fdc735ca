"""The steps of the command line as functions: plan, deploy a run, and the whole way from job file to endpoint."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from bigray.bundle import BundleManifest, ModelBundle, OutputSchema
from bigray.cluster.capacity import Capacity, local_capacity
from bigray.cluster.connect import ensure_connected, resolve_address
from bigray.cluster.growth import growing_capacity
from bigray.cluster.plan import Plan
from bigray.cluster.shared_storage import check_shared
from bigray.data.dataset import Dataset
from bigray.errors import DeployError, SpecError, StorageError
from bigray.inference import Predictions, Predictor
from bigray.journal import read_journal
from bigray.loading import load_job, load_search
from bigray.paths import BUNDLE, RunPaths
from bigray.report import find_run
from bigray.results import HoldoutCheck, Leaderboard
from bigray.serve.client import predict_table
from bigray.serve.config import ServeSpec, load_serve
from bigray.serve.instance import start_serve
from bigray.serve.rollout import Mode
from bigray.serve.runner import Deployment
from bigray.serve.runner import deploy as deploy_bundle
from bigray.serve.scaling.simulation import SimulationResult
from bigray.specs import JobSpec, SearchSpec
from bigray.storage import MANIFEST, Storage, open_storage
from bigray.training.commands import Event
from bigray.training.footprint import measure
from bigray.training.request import RunRequest, make_request
from bigray.training.runner import training_trials
from bigray.training.session import Listener, plan_for
from bigray.tuning.space import search_trials

EQUAL_WITHIN = 1e-6
"""Largest difference between an HTTP answer and the offline one that still counts as equal (float32 probabilities)."""


@dataclass(frozen=True)
class Asked:
    """The files of one command, read and checked."""

    job: JobSpec
    search: SearchSpec | None
    serve: ServeSpec | None


def read_files(
    job: str | Path,
    overrides: Sequence[str] = (),
    search: str | Path | None = None,
    serve: str | Path | None = None,
    trials: int | None = None,
) -> Asked:
    """Read the files of a command; the faults of all of them are told together. `trials` overrides the search file's.

    Raises:
        SpecError: with one line for each fault.
    """
    faults: list[str] = []
    job_spec = _collect(faults, lambda: load_job(job, overrides))
    search_spec = _collect(faults, lambda: load_search(search, job_spec, trials)) if search is not None else None
    serve_spec = _collect(faults, lambda: load_serve(serve)) if serve is not None else None
    if faults:
        raise SpecError(faults)
    assert job_spec is not None, "a job that did not load left a fault"
    return Asked(job_spec, search_spec, serve_spec)


def request_of(asked: Asked) -> RunRequest:
    """Check the job against its data."""
    if asked.search is None:
        return make_request(asked.job, training_trials(asked.job))
    return make_request(asked.job, search_trials(asked.job, asked.search), asked.search.model_dump(mode="json"))


def extend_request(
    run: str, trials: int, job: str | None = None, search: str | None = None, overrides: Sequence[str] = ()
) -> tuple[RunRequest, SearchSpec]:
    """A finished sweep with `trials` more. Job and search file are not needed; where given, they must be the run's.

    Where an extension has begun and not ended, that is what goes on, whatever `trials`.

    Raises:
        SpecError: no such run, not a sweep that can be extended, or something that decides the results has changed.
    """
    paths, document = find_run(run)
    if document["search"] is None:
        raise SpecError(f"--extend: {paths.run_id} is a plain training, without a search; use bigray tune")
    job_spec = recorded_job(document)
    search_spec = SearchSpec.model_validate_json(json.dumps(document["search"]))
    if search_spec.search == "grid" or search_spec.scheduler == "pbt" or search_spec.trials is None:
        what = "a grid is whole" if search_spec.search == "grid" else "a population has a fixed size"
        raise SpecError(f"--extend: {paths.run_id}: {what}; begin another sweep with bigray tune")
    if job is None and overrides:
        raise SpecError(f"--set {overrides[0]}: with --extend it needs the job file too, to be changed; give both")
    if job is not None:
        asked_job = load_job(job, overrides)
        _check_same("the job", job_spec.fixed_by(), asked_job.fixed_by(), paths)
        job_spec = asked_job  # the number of workers may be another
    if search is not None:
        asked = load_search(search, job_spec)
        _check_same("the search", search_spec.model_dump(mode="json"), asked.model_dump(mode="json"), paths)
    total = extended_total(search_spec.trials, trials, list(read_journal(paths)))
    extended = search_spec.model_copy(update={"trials": total})
    job_spec = job_spec.model_copy(update={"storage": paths.storage.parent.uri})
    request = make_request(job_spec, search_trials(job_spec, extended), document["search"], extended_to=total)
    if request.dataset.fingerprint != document["data"]["fingerprint"]:
        raise SpecError(f"--extend: the rows of {job_spec.data.source} are not those of {paths.run_id}")
    if not re.fullmatch(rf"{re.escape(request.run_id)}(-\d+)?", paths.run_id):  # with the number that --new puts behind
        raise SpecError(f"--extend: the code of a model or task is not what {paths.run_id} was trained with")
    return replace(request, run_name=paths.run_id), search_spec


def recorded_request(run: str) -> tuple[RunRequest, SearchSpec | None]:
    """What a run was asked to do, from its folder, so that it goes on without its job file.

    Raises:
        SpecError: no such run, its `run.json` is another version's, or its rows or code are not what they were.
    """
    paths, document = find_run(run)
    job = recorded_job(document).model_copy(update={"storage": paths.storage.parent.uri})
    if document["search"] is None:
        request, search = make_request(job, training_trials(job)), None
    else:
        search = SearchSpec.model_validate_json(json.dumps(document["search"]))
        total = None if search.trials is None else extended_total(search.trials, 0, list(read_journal(paths)))
        is_extended = total is not None and total != search.trials
        drawn = search_trials(job, search.model_copy(update={"trials": total}) if is_extended else search)
        request = make_request(job, drawn, document["search"], extended_to=total if is_extended else None)
    if request.dataset.fingerprint != document["data"]["fingerprint"]:
        raise SpecError(f"{run}: the rows of {job.data.source or job.data.train} are not those it was trained on")
    if not (paths.run_id == request.run_id or paths.run_id.startswith(f"{request.run_id}-")):
        raise SpecError(f"{run}: the code of a model or task is not what it was trained with; run it in that folder")
    return replace(request, run_name=paths.run_id), search


def recorded_job(document: dict[str, Any]) -> JobSpec:
    """The job in a `run.json`.

    Raises:
        SpecError: it holds none that this bigray knows.
    """
    try:
        return JobSpec.model_validate_json(json.dumps(document["job"]))
    except (KeyError, ValidationError) as error:
        raise SpecError("RUN: its run.json holds no job that this bigray knows; use the bigray that made it") from error


def extended_total(at_first: int, more: int, events: Sequence[dict[str, Any]]) -> int:
    """Trials in all after an extension: of the one that has not ended, else that many more than there are."""
    begun = max((event["trials"] for event in events if event["kind"] == "extended"), default=at_first)
    done = [event for event in events if event["kind"] == "completed" and event["whole"]]
    is_done = any(event["trials"] >= begun for event in done)
    return begun + more if is_done or begun == at_first else begun


def _check_same(what: str, recorded: dict[str, Any], asked: dict[str, Any], paths: RunPaths) -> None:
    different = sorted(key for key in {*recorded, *asked} if recorded.get(key) != asked.get(key))
    if different:
        raise SpecError(
            f"--extend: {what} is not that of {paths.run_id}: {', '.join(different)} differs; leave the file out, or "
            "begin another sweep with bigray tune"
        )


def plan(
    job: JobSpec, search: SearchSpec | None = None, serve: ServeSpec | None = None, *, address: str | None = None
) -> Plan:
    """What `train` or `tune` would start. Starts nothing; connects only where there is an address to ask.

    Raises:
        SpecError: the data or a batch size does not suit the job.
        CapacityError: it does not fit the cluster; with the numbers and the nearest thing that would.
    """
    return plan_request(request_of(Asked(job, search, serve)), serve, address=address, measured=True)


def plan_request(
    request: RunRequest, serve: ServeSpec | None = None, *, address: str | None = None, measured: bool = False
) -> Plan:
    """`plan` for a request whose data has been prepared already.

    `measured`: with the size of its checkpoints, of the disk under its storage and, where there is a cluster to send
    it to, of this folder; that imports torch, and the user's models. Of a cluster every node is asked for the storage.

    Raises:
        CapacityError, SpecError: as `plan`.
        ClusterError: the storage is a folder that a node does not see.
    """
    is_remote = resolve_address(address) is not None
    with ThreadPoolExecutor(1) as threads:  # importing torch takes as long as to connect
        measuring = threads.submit(measure, request, to_submit=is_remote) if measured else None
        capacity = _capacity(address, serve.application.name if serve is not None else None)
        if measured and is_remote:
            check_shared(open_storage(request.job.storage))
        footprint = measuring.result() if measuring is not None else None
    return plan_for(request, capacity, serve.needs() if serve is not None else None, footprint)


def _capacity(address: str | None, application: str | None) -> Capacity:
    if resolve_address(address) is None:
        return local_capacity()
    ensure_connected(address)
    return growing_capacity(application)


def find_bundle(location: str | Path | Storage) -> str:
    """The bundle of a run folder, or the bundle folder itself.

    Raises:
        StorageError: there is neither; names what is near.
    """
    storage = location if isinstance(location, Storage) else open_storage(location)
    for candidate in (storage.child(BUNDLE), storage):
        if candidate.exists(MANIFEST):
            return candidate.uri
    raise StorageError(f"{storage.uri}: no bundle here{_runs_near(storage)}")


def deploy(
    run: str | Path | Storage | Leaderboard,
    config: ServeSpec | str | Path = "serve/local.yaml",
    *,
    address: str | None = None,
    mode: Mode | None = None,
    force: bool = False,
    is_open: bool = False,
) -> Deployment:
    """Serve the winner of a run; returns when it answers over HTTP.

    `run` is a leaderboard, a run folder or a bundle folder. Without a cluster a local Ray is started, which serves
    until this process ends. Where a version serves already, this one takes its place, by way of a canary or a shadow
    where `mode` says so; `force` lets it past a worse holdout, a slower answer or another schema.

    Raises:
        SpecError: the endpoint would be reachable from other machines without a key, and `is_open` is not given.
        StorageError: there is no bundle, or it is corrupt.
        DeployError: the gate refused it, or the endpoint did not come up.
    """
    spec = config if isinstance(config, ServeSpec) else load_serve(config)
    bundle = find_bundle(run.bundle if isinstance(run, Leaderboard) else run)
    ensure_connected(address)
    return deploy_bundle(bundle, spec, mode=mode, force=force, is_open=is_open)


def replay_trace(
    run: str | Path,
    trace: str,
    config: ServeSpec | str | Path = "serve/autoscale.yaml",
    *,
    rate_per_s: float = 50.0,
    seed: int = 0,
    price_per_hour: float | None = None,
) -> SimulationResult:
    """What a request trace would do to an endpoint: the file's autoscaling, the run's model as it is measured here.

    Raises:
        SpecError: the trace cannot be read, or the file has no autoscaling by bigray's policy.
        StorageError: there is no bundle, or it is corrupt.
    """
    from bigray.serve.scaling.measure import measure_service
    from bigray.serve.scaling.simulation import simulate
    from bigray.serve.scaling.trace import load_trace

    spec = config if isinstance(config, ServeSpec) else load_serve(config)
    settings = spec.scaling_settings(str(config))
    arrivals = load_trace(trace, seed=seed, rate_per_s=rate_per_s)
    args = spec.application.args
    num_threads = args.num_threads or max(1, int(spec.deployment.ray_actor_options.num_cpus))
    service = measure_service(find_bundle(run), num_threads, allow_factories=args.allow_factories)
    return simulate(
        arrivals, replace(service, max_queue_s=args.max_queue_s), settings, price_per_replica_hour=price_per_hour
    )


@contextmanager
def serve_ahead(spec: ServeSpec) -> Iterator[Listener]:
    """A run's listener that starts Serve while the winner is being exported, which leaves cores idle.

    What goes wrong there goes wrong again, and is told, in `deploy`.
    """
    starting: list[threading.Thread] = []

    def start() -> None:
        with contextlib.suppress(DeployError):
            start_serve(spec)

    def on_event(event: Event) -> None:
        if event.kind == "exporting":
            starting.append(threading.Thread(target=start, name="serve-ahead", daemon=True))
            starting[-1].start()

    try:
        yield on_event
    finally:
        for thread in starting:
            thread.join()


def check_holdout(
    bundle: str, dataset: Dataset, url: str, serve: ServeSpec, key: str | None = None
) -> HoldoutCheck | None:
    """Send the sealed holdout to an endpoint over HTTP, and predict the same rows offline from the bundle.

    `key` is needed where the endpoint asks for one. None where the job keeps no holdout.
    """
    if dataset.holdout.num_rows == 0:
        return None
    allowed = serve.application.args.allow_factories
    offline = Predictor(ModelBundle.load(bundle), allow_factories=allowed).run_table(dataset.holdout)
    online = predict_table(url, dataset.holdout, dataset.inputs, key)
    difference = _row_differences(online, offline)
    equal = (difference <= _tolerance(offline)) & _same_labels(online, offline)
    return HoldoutCheck(
        num_rows=dataset.holdout.num_rows,
        metrics=_metrics(online, dataset),
        num_equal=int(equal.sum()),
        largest_difference=float(difference.max()),
    )


def curl_command(url: str, manifest: BundleManifest) -> str:
    """A request to paste into a shell: the bundle's example row."""
    body = json.dumps({"records": [manifest.example]}, separators=(",", ":"))
    return f"curl -s {url}/predict -H 'content-type: application/json' -d {shlex.quote(body)}"


def _collect(faults: list[str], load: Any) -> Any:
    try:
        return load()
    except SpecError as error:
        faults.extend(error.faults)
        return None


def _runs_near(storage: Storage) -> str:
    siblings, name = storage.parent, storage.root.rpartition("/")[2]
    near = [found for found in siblings.list_names() if found.startswith(f"{name}-")] if name else []
    return f"; did you mean {' or '.join(storage.uri_beside(found) for found in near)}?" if near else ""


def _row_differences(online: Predictions, offline: Predictions) -> np.ndarray[Any, Any]:
    if offline.values is not None and online.values is not None:
        return np.asarray(np.abs(online.values - offline.values))
    assert offline.probabilities is not None, "a prediction has values or probabilities"
    assert online.probabilities is not None, "the endpoint serves the same task"
    differences = np.abs(online.probabilities - offline.probabilities)
    return np.asarray(differences.max(axis=1))


def _same_labels(online: Predictions, offline: Predictions) -> np.ndarray[Any, Any]:
    if online.labels is None or offline.labels is None:
        return np.ones(1, dtype=bool)  # regression has none to differ
    return np.array([a == b for a, b in zip(online.labels, offline.labels, strict=True)])


def _tolerance(offline: Predictions) -> np.ndarray[Any, Any] | float:
    """Probabilities are at most 1; a value's tolerance grows with its size."""
    if offline.values is None:
        return EQUAL_WITHIN
    return EQUAL_WITHIN * np.maximum(1.0, np.abs(offline.values))


def label_metrics(labels: Sequence[Any], truth: Sequence[Any], outputs: OutputSchema) -> dict[str, float]:
    """How right labels are: of a multilabel task lists of them, whose F1 is over all rows and labels together."""
    if outputs.task == "multilabel":
        pairs = [({*map(str, a)}, {*map(str, b)}) for a, b in zip(labels, truth, strict=True)]
        hits, both = sum(len(a & b) for a, b in pairs), sum(len(a) + len(b) for a, b in pairs)
        return {"exact_match": float(np.mean([a == b for a, b in pairs])), "micro_f1": 2 * hits / both if both else 0.0}
    given, true = (np.array([str(label) for label in each]) for each in (labels, truth))
    metrics = {"accuracy": float(np.mean(given == true))}
    if outputs.task == "binary":
        positive = str(outputs.class_names[1])
        hits, found, there = (
            int(each.sum()) for each in ((given == positive) & (true == positive), given == positive, true == positive)
        )
        metrics |= {"precision": hits / found if found else 0.0, "recall": hits / there if there else 0.0}
    return metrics


def _metrics(online: Predictions, dataset: Dataset) -> dict[str, float]:
    truth = dataset.holdout_targets()
    if online.labels is not None:
        return label_metrics(online.labels, truth, dataset.outputs)
    assert online.values is not None, "a prediction has labels or values"
    expected = np.asarray(truth, dtype=np.float64)
    squared = (online.values - expected) ** 2
    spread = float(((expected - expected.mean()) ** 2).sum())
    r2 = {"r2": 1.0 - float(squared.sum()) / spread} if spread > 0 else {}  # undefined where all targets are equal
    return {"mse": float(squared.mean()), **r2}
