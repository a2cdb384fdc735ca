from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from bigray.cluster.checking import serve_config
from bigray.cluster.checking.serve_config import serve_config_mistakes
from bigray.cluster.checking.shapes import Each, Fields
from bigray.serve.config import BundleArgs, ServeSpec, load_serve
from bigray.serve.scaling.settings import ScalingSettings

ROOT = Path(__file__).parents[4]
MANIFEST = next(
    document
    for document in yaml.safe_load_all((ROOT / "cluster/kuberay/rayservice.yaml").read_text(encoding="utf-8"))
    if document["kind"] == "RayService"
)
OURS: dict[str, Any] = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])
THEIRS: dict[str, Any] = {
    "applications": [
        {
            "name": "text",
            "import_path": "summarise.app:build",
            "route_prefix": "/text",
            "args": {"anything": [1]},
            "deployments": [{"name": "Translate", "num_replicas": "auto", "max_ongoing_requests": 5}, {"name": "Sum"}],
        }
    ]
}


def test_the_endpoint_on_pods_is_the_one_of_the_serve_file() -> None:
    spec, file = ServeSpec.model_validate(OURS), load_serve(ROOT / "serve/autoscale.yaml")

    assert spec.application.import_path == file.application.import_path
    assert spec.application.name == file.application.name
    assert spec.deployment.autoscaling_config is not None
    assert file.deployment.autoscaling_config is not None
    assert spec.deployment.autoscaling_config.policy == file.deployment.autoscaling_config.policy
    assert spec.deployment.ray_actor_options == file.deployment.ray_actor_options


@pytest.mark.parametrize("document", [OURS, THEIRS], ids=["ours", "theirs"])
def test_a_good_configuration_has_no_fault(document: dict[str, Any]) -> None:
    assert list(serve_config_mistakes(document)) == []


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(document)
    part: Any = copied
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in steps:
        part = part[step] if isinstance(part, list) else part.setdefault(step, {})
    part[last] = value
    return copied


MODEL = "applications/0/deployments/0"
# (whose, the path that is set, the value, how the message begins, the path of the fault where it is another)
PLANTED: list[tuple[dict[str, Any], str, Any, str, str | None]] = [
    (OURS, "application", [], "is not a key here, did you mean 'applications'?", None),
    (OURS, "http_option", {}, "is not a key here, did you mean 'http_options'?", None),
    (OURS, "http_options/hots", "a", "is not a key here, did you mean 'host'?", None),
    (OURS, "http_options/port", "8000", "expected a whole number, got the text '8000'", None),
    (OURS, "http_options/port", 0, "the Service needs a port that stays the same", None),
    (OURS, "http_options/host", "localhost", "'localhost' can only be reached from inside its pod", None),
    (OURS, "http_options/ssl_keyfile", "/k", "'ssl_keyfile' needs 'ssl_certfile'", None),
    (OURS, "grpc_options", {"ports": 9000}, "is not a key here, did you mean 'port'?", "grpc_options/ports"),
    (OURS, "target_capacity", 120, "must be at most 100, got 120", None),
    (OURS, "logging_config", {"encoding": "json"}, "'json' is not a choice here", "logging_config/encoding"),
    (OURS, "applications/0/import_path", "bigray.serve.app", "x", None),
    (OURS, "applications/0/args/slo_ms", 0, "must be more than 0, got 0", None),
    (OURS, "applications/0/args/swap", "surges", "'surges' is not a choice here, did you mean 'surge'?", None),
    (OURS, "applications/0/args/max_batch_size", "64", "expected a whole number", None),
    (
        OURS,
        "applications/0/args/models",
        [{"name": "b", "bundle": "runs/b"}],
        "'runs/b' is rel",
        "applications/0/args/models/0/bundle",
    ),
    (
        OURS,
        f"{MODEL}/backpressure_config",
        {"status_code": 429},
        "Serve's own limit does not hold here; use args.max_queue_s",
        None,
    ),
    (OURS, f"{MODEL}/autoscaling_config/initial_replicas", 9, "9 is not between 2 and 4", None),
    (OURS, f"{MODEL}/autoscaling_config/policy/policy_kwargs/spare", -1, "must be at least 0, got -1", None),
    (
        OURS,
        f"{MODEL}/autoscaling_config/policy/policy_kwargs/target_utilisation",
        0.9,
        "must be at most 0.8, got 0.9",
        None,
    ),
    (
        OURS,
        f"{MODEL}/autoscaling_config/policy/policy_fn",
        "a:b",
        "is not a key here, did you mean 'policy_function'?",
        None,
    ),
    (OURS, f"{MODEL}/max_surge_percent", 101, "must be at most 100", None),
    (
        OURS,
        f"{MODEL}/ray_actor_options/runtime_env",
        {"env_var": {}},
        "is not a key here, did you mean 'env_vars'?",
        f"{MODEL}/ray_actor_options/runtime_env/env_var",
    ),
    (THEIRS, f"{MODEL}/num_replica", 2, "is not a key here, did you mean 'num_replicas'?", None),
    (THEIRS, f"{MODEL}/num_replicas", 0, "takes a whole number from 1 up or 'auto', got 0", None),
    (THEIRS, f"{MODEL}/max_concurrent_queries", 5, "is no longer read, use 'max_ongoing_requests'", None),
    (THEIRS, f"{MODEL}/num_gpus", 1, "belongs under 'ray_actor_options'", None),
    (THEIRS, f"{MODEL}/min_replicas", 1, "belongs under 'autoscaling_config'", None),
    (THEIRS, f"{MODEL}/max_replicas_per_node", 0, "must be at least 1, got 0", None),
    (
        THEIRS,
        f"{MODEL}/placement_group_strategy",
        "SPRAED",
        "'SPRAED' is not a choice here, did you mean 'SPREAD'?",
        None,
    ),
    (
        THEIRS,
        "applications/0/deployments/1/name",
        "Translate",
        "'Translate' is there twice",
        "applications/0/deployments",
    ),
    (THEIRS, "applications/0/route_prefix", "/text/", "has to start with '/' and not end with it", None),
    (THEIRS, "applications/0/import_path", "app.py", "x", None),
    (THEIRS, "applications/0/import_path", "my app:build", "'my app:build' is not of the form module:name", None),
    (THEIRS, "applications/0/num_replicas", 2, "belongs to a deployment", None),
]
PLANTED = [planted for planted in PLANTED if planted[3] != "x"]


@pytest.mark.parametrize(
    ("document", "path", "value", "message", "place"), PLANTED, ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_mistake_is_told_once_at_its_place(
    document: dict[str, Any], path: str, value: Any, message: str, place: str | None
) -> None:
    (mistake,) = serve_config_mistakes(changed(document, path, value))

    assert "/".join(map(str, mistake[0])) == (place or path)
    assert mistake[1].startswith(message)


def test_two_applications_have_names_and_prefixes_of_their_own() -> None:
    twice = {"applications": THEIRS["applications"] * 2}

    assert [path for path, _ in serve_config_mistakes(twice)] == [
        ("applications", 1, "name"),
        ("applications", 1, "route_prefix"),
    ]


def test_the_tables_have_the_keys_of_rays_own_schema() -> None:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        RayActorOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
        gRPCOptionsSchema,
    )

    def keys(model: Any) -> set[str]:
        return set(model.model_fields)

    serve = serve_config.SERVE.fields
    http, grpc, actor = (
        serve["http_options"],
        serve["grpc_options"],
        serve_config.DEPLOYMENT.fields["ray_actor_options"],
    )
    assert isinstance(http, Fields) and isinstance(grpc, Fields) and isinstance(actor, Fields)
    assert set(serve) == keys(ServeDeploySchema)
    assert set(serve_config.APPLICATION.fields) == keys(ServeApplicationSchema)
    assert set(serve_config.DEPLOYMENT.fields) == keys(DeploymentSchema)
    assert set(serve_config.AUTOSCALING.fields) == keys(AutoscalingConfig)
    assert set(actor.fields) == keys(RayActorOptionsSchema)
    assert set(http.fields) == keys(HTTPOptionsSchema)
    assert set(grpc.fields) == keys(gRPCOptionsSchema)


@pytest.mark.parametrize(
    ("table", "model"),
    [(serve_config.ARGS, BundleArgs), (serve_config.POLICY_SETTINGS, ScalingSettings)],
    ids=["args", "policy"],
)
def test_the_tables_of_our_own_application_are_those_of_its_settings(table: Fields, model: type[BaseModel]) -> None:
    assert set(table.fields) == set(model.model_fields)
    assert {name for name, field in model.model_fields.items() if field.is_required()} == set(table.required)


def test_the_further_models_have_the_keys_of_their_settings() -> None:
    from bigray.serve.config import ModelEntry

    models = serve_config.ARGS.fields["models"]
    assert isinstance(models, Each) and isinstance(models.of, Fields)
    assert set(models.of.fields) == set(ModelEntry.model_fields)


@pytest.mark.parametrize("setting", sorted(BundleArgs.model_fields))
def test_what_the_application_refuses_of_a_setting_is_refused_here_too(setting: str) -> None:
    for value in (-1, 0, 1.5, "x", True, [], {}, [1]):
        document = changed(OURS, f"applications/0/args/{setting}", value)
        try:
            ServeSpec.model_validate(document)
        except ValidationError:
            assert list(serve_config_mistakes(document)), f"{setting} = {value!r}"
