from __future__ import annotations

import asyncio
import json
import shutil
import time
from typing import Any

import pytest
from pydantic import ValidationError

from bigray.errors import CorruptFile, DeployError, StorageError
from bigray.serve import assembly
from bigray.serve.assembly import Endpoint, assemble
from bigray.serve.config import BundleArgs
from bigray.serve.release.record import Comparison, ReplicaReport, VersionStats
from bigray.serve.standalone import standalone_app

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
ALLOWED = ("bigray.models:*",)


def ask(app: Any, method: str, path: str, document: Any = None) -> tuple[int, Any]:
    body = b"" if document is None else json.dumps(document).encode()
    sent: list[dict] = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "method": method, "path": path, "headers": []}, receive, send))
    content = sent[1]["body"]
    return sent[0]["status"], json.loads(content) if content.startswith((b"{", b"[")) else content.decode()


# ----- one bundle in one process


def test_a_bundle_is_served_without_ray(release):
    app = standalone_app(release.bundle, allow_factories=ALLOWED)
    status, document = ask(app, "POST", "/predict", {"records": [{"image": IMAGE}]})
    assert (status, document["version"]) == (200, release.version)


def test_a_regression_is_served_too(regression_location):
    app = standalone_app(regression_location, allow_factories=ALLOWED)
    status, document = ask(app, "POST", "/predict", {"records": [{"width": 1.0, "height": 2.0}]})
    assert status == 200
    assert isinstance(document["predictions"][0]["value"], float)


def test_further_arguments_are_those_of_a_serve_file(release):
    app = standalone_app(release.bundle, allow_factories=ALLOWED, max_body_mb=1e-6)
    assert ask(app, "POST", "/predict", {"records": [{"image": IMAGE}]})[0] == 413
    with pytest.raises(ValidationError):
        standalone_app(release.bundle, allow_factories=ALLOWED, max_body_kb=1)


def test_a_factory_that_is_not_allowed_does_not_run(release):
    with pytest.raises(DeployError, match="is not allowed"):
        standalone_app(release.bundle, allow_factories=("my_project.*",))


def test_a_damaged_bundle_is_not_served(release, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(release.bundle, damaged)
    with (damaged / "weights.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptFile):
        standalone_app(str(damaged), allow_factories=ALLOWED)


def test_where_there_is_no_bundle_there_is_nothing_to_serve(tmp_path):
    with pytest.raises(StorageError, match="no bundle here"):
        standalone_app(str(tmp_path), allow_factories=ALLOWED)


# ----- the same in a replica: other models, and the numbers of all replicas


def make_endpoint(bundle: str, reports: Any = None, **args: Any) -> Endpoint:
    settings = BundleArgs.model_validate({"bundle": bundle, **args})
    return assemble(bundle, settings, num_threads=1, replica="r1", reports=reports)


def test_further_models_of_the_file_are_served_when_they_are_asked_for(release, regression_location):
    endpoint = make_endpoint(release.bundle, models=[{"name": "area", "bundle": regression_location}])
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}
    assert not endpoint.store.is_loaded("area")
    status, document = ask(endpoint.app, "POST", "/v2/models/area/infer", {"inputs": [tensor]})
    assert (status, document["model_name"]) == (200, "area")
    assert endpoint.store.is_loaded("area")


def test_the_live_version_is_told_from_the_start(release):
    endpoint = make_endpoint(release.bundle)
    assert ask(endpoint.app, "GET", "/stats")[1]["versions"]["live"] == release.version
    assert endpoint.load(release.bundle).version == release.version


def report(name: str, endpoint: Endpoint, comparison: Comparison | None = None, age_s: float = 0.0) -> ReplicaReport:
    return ReplicaReport(
        replica=name,
        node="n",
        pid=1,
        sequence=1,
        at=time.time() - age_s,
        revision=1,
        live="a" * 12,
        telemetry=endpoint.telemetry.snapshot(),
        comparison=comparison,
    )


def test_stats_and_metrics_tell_of_all_replicas_that_report(release):
    other = make_endpoint(release.bundle)
    ask(other.app, "POST", "/predict", {"records": [{"image": IMAGE}]})
    given = [report("r2", other), report("gone", other, age_s=3600.0)]
    endpoint = make_endpoint(release.bundle, lambda: given)
    ask(endpoint.app, "POST", "/predict", {"records": [{"image": IMAGE}]})

    stats = ask(endpoint.app, "GET", "/stats")[1]
    assert [one["id"] for one in stats["replicas"]] == ["r1", "r2"]
    assert stats["total"]["requests"] == 2
    metrics = ask(endpoint.app, "GET", "/metrics")[1]
    assert 'replica="r1"' in metrics
    assert 'replica="r2"' in metrics
    assert "gone" not in metrics


def test_of_itself_a_replica_tells_what_is_now_and_not_what_it_reported(release):
    given: list[ReplicaReport] = []
    endpoint = make_endpoint(release.bundle, lambda: given)
    given.append(report("r1", endpoint))
    ask(endpoint.app, "POST", "/predict", {"records": [{"image": IMAGE}]})
    stats = ask(endpoint.app, "GET", "/stats")[1]
    assert [(one["id"], one["requests"]) for one in stats["replicas"]] == [("r1", 1)]


def test_reports_are_read_once_however_many_ask(release, monkeypatch):
    monkeypatch.setattr(assembly, "REUSED_S", 3600.0)
    reads: list[int] = []

    def reports() -> list[ReplicaReport]:
        reads.append(1)
        return []

    endpoint = make_endpoint(release.bundle, reports)
    for path in ("/stats", "/metrics", "/stats"):
        assert ask(endpoint.app, "GET", path)[0] == 200
    assert len(reads) == 1


def test_while_a_candidate_is_tried_stats_tell_what_all_replicas_have_seen_of_it(release):
    seen = Comparison(
        live=VersionStats(requests=10, errors=1),
        candidate=VersionStats(requests=5, errors=2),
        compared_rows=7,
        disagreeing_rows=3,
    )
    given: list[ReplicaReport] = []
    endpoint = make_endpoint(release.bundle, lambda: given)
    given += [report("r1", endpoint, seen), report("r2", endpoint, seen), report("r3", endpoint)]
    given.append(report("gone", endpoint, seen, age_s=3600.0))

    assert ask(endpoint.app, "GET", "/stats")[1]["comparison"] == {
        "compared_rows": 14,
        "disagreeing_rows": 6,
        "live": {"requests": 20, "errors": 2},
        "candidate": {"requests": 10, "errors": 4},
    }


@pytest.mark.parametrize("has_reports", [False, True])
def test_without_a_candidate_there_is_no_comparison(release, has_reports):
    given: list[ReplicaReport] = []
    endpoint = make_endpoint(release.bundle, (lambda: given) if has_reports else None)
    given.append(report("r1", endpoint))
    assert ask(endpoint.app, "GET", "/stats")[1]["comparison"] is None
