"""An embedded Serve configuration (`serveConfigV2`), read strictly: Ray ignores keys that it does not know.

The tables are those of `ray.serve.schema` 2.60, for applications of any kind. For bigray's own they also hold its
`args` and the keys of its scaling policy: `bigray.serve` may not be imported from here, so a test compares the two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.runtime_env import runtime_env_mistakes
from bigray.cluster.checking.shapes import (
    ANYTHING,
    COUNT,
    FLAG,
    PORT,
    TEXT,
    TEXT_TABLE,
    TEXTS,
    Each,
    Fields,
    Mistake,
    Scalar,
    Table,
    choice,
    fields,
    mismatches,
    pruned,
)

IMPORT_PATH = "bigray.serve.app:build"
SCALING_POLICY = "bigray.serve.scaling.policy:ArrivalPolicy"

_NUMBER = Scalar("number", least=0)
_POSITIVE = Scalar("number", above=0)
_SHARE = Scalar("number", least=0, most=1)
_LOGGING = fields(
    encoding=choice("TEXT", "JSON"), log_level=ANYTHING, logs_dir=TEXT, enable_access_log=FLAG,
    additional_log_standard_attrs=TEXTS,
)  # fmt: skip
_POLICY = fields("policy_function", policy_function=TEXT, policy_kwargs=ANYTHING)
AUTOSCALING = Fields(
    {
        "min_replicas": COUNT, "initial_replicas": COUNT, "max_replicas": Scalar("whole", least=1),
        "target_ongoing_requests": _POSITIVE, "metrics_interval_s": _POSITIVE, "look_back_period_s": _POSITIVE,
        "smoothing_factor": _POSITIVE, "upscale_smoothing_factor": _POSITIVE, "downscale_smoothing_factor": _POSITIVE,
        "upscaling_factor": _POSITIVE, "downscaling_factor": _POSITIVE, "downscale_delay_s": _NUMBER,
        "downscale_to_zero_delay_s": _NUMBER, "upscale_delay_s": _NUMBER,
        "aggregation_function": choice("mean", "max", "min"), "policy": _POLICY,
    },
    gone={
        "target_num_ongoing_requests_per_replica": "is no longer read, use 'target_ongoing_requests'",
        "num_replicas": "stands beside 'autoscaling_config', and excludes it",
    },
)  # fmt: skip
_ACTOR = fields(
    num_cpus=_NUMBER, num_gpus=_NUMBER, memory=_NUMBER, resources=Table(_NUMBER), accelerator_type=TEXT,
    label_selector=TEXT_TABLE, fallback_strategy=ANYTHING, runtime_env=ANYTHING,
)  # fmt: skip
DEPLOYMENT = Fields(
    {
        "name": TEXT, "num_replicas": ANYTHING, "max_ongoing_requests": Scalar("whole", least=1),
        "max_queued_requests": Scalar("whole", least=-1), "backpressure_config": ANYTHING, "user_config": ANYTHING,
        "autoscaling_config": AUTOSCALING, "graceful_shutdown_wait_loop_s": _NUMBER,
        "graceful_shutdown_timeout_s": _NUMBER, "health_check_period_s": _POSITIVE, "health_check_timeout_s": _POSITIVE,
        "ray_actor_options": _ACTOR, "placement_group_bundles": Each(Table(_NUMBER)),
        "placement_group_strategy": choice("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
        "placement_group_bundle_label_selector": Each(TEXT_TABLE),
        "max_replicas_per_node": Scalar("whole", least=1, most=100), "logging_config": _LOGGING,
        "request_router_config": ANYTHING, "gang_scheduling_config": ANYTHING, "deployment_actors": ANYTHING,
        "rolling_update_percentage": _SHARE, "max_surge_percent": Scalar("whole", least=0, most=100),
    },
    ("name",),
    gone={
        "max_concurrent_queries": "is no longer read, use 'max_ongoing_requests'",
        "num_cpus": "belongs under 'ray_actor_options'",
        "num_gpus": "belongs under 'ray_actor_options'",
        "min_replicas": "belongs under 'autoscaling_config'",
        "max_replicas": "belongs under 'autoscaling_config'",
        "route_prefix": "belongs to the application, beside 'name' and 'import_path'",
    },
)  # fmt: skip
APPLICATION = Fields(
    {
        "name": TEXT, "route_prefix": TEXT,
        "import_path": Scalar("text", pattern=r"[A-Za-z_][\w.-]*([:.])[A-Za-z_]\w*", hint="of the form module:name"),
        "runtime_env": ANYTHING, "host": TEXT, "port": PORT, "deployments": Each(DEPLOYMENT),
        "autoscaling_policy": _POLICY, "args": Table(ANYTHING), "logging_config": _LOGGING,
        "external_scaler_enabled": FLAG,
    },
    ("import_path",),
    gone={
        "deployment": "is not a key here, did you mean 'deployments'?",
        "num_replicas": "belongs to a deployment, under 'deployments'",
    },
)  # fmt: skip
_HTTP = fields(
    host=TEXT, port=Scalar("whole", least=0, most=65535), root_path=TEXT, request_timeout_s=_NUMBER,
    keep_alive_timeout_s=COUNT, ssl_keyfile=TEXT, ssl_certfile=TEXT, ssl_keyfile_password=TEXT, ssl_ca_certs=TEXT,
)  # fmt: skip
SERVE = fields(
    "applications", proxy_location=choice("EveryNode", "HeadOnly", "Disabled"), http_options=_HTTP,
    grpc_options=fields(
        port=PORT, grpc_servicer_functions=TEXTS, request_timeout_s=_NUMBER, enable_reflection=FLAG
    ),
    controller_options=fields(runtime_env=ANYTHING), logging_config=_LOGGING,
    tracing_config=fields(enabled=FLAG, exporter_import_path=TEXT, sampling_ratio=_SHARE),
    applications=Each(APPLICATION), target_capacity=Scalar("number", least=0, most=100),
)  # fmt: skip

# bigray's own application

_MODEL = fields("name bundle", name=TEXT, bundle=TEXT, max_queued_requests=Scalar("whole", least=1))
ARGS = fields(
    "bundle", bundle=TEXT, max_batch_size=Scalar("whole", least=1), slo_ms=_POSITIVE,
    num_threads=Scalar("whole", least=1), max_body_mb=_POSITIVE, body_timeout_s=_POSITIVE,
    request_timeout_s=_POSITIVE, max_queue_s=_POSITIVE, max_queued_requests=Scalar("whole", least=1),
    allow_factories=TEXTS, keys=TEXT, open=FLAG, access_log=TEXT, swap=choice("auto", "in_place", "surge"),
    models=Each(_MODEL), models_memory_mb=_POSITIVE,
)  # fmt: skip
POLICY_SETTINGS = fields(
    target_utilisation=Scalar("number", least=0.1, most=0.8), max_queue_age_s=_POSITIVE, drain_within_s=_POSITIVE,
    spare=COUNT, scale_down_after_s=_POSITIVE, scale_to_zero_after_s=_POSITIVE, min_replicas=COUNT,
    max_replicas=Scalar("whole", least=1),
)  # fmt: skip
LIMITS_OF_SERVE = {
    "max_ongoing_requests": "args.max_queued_requests",
    "max_queued_requests": "args.max_queued_requests",
    "backpressure_config": "args.max_queue_s",
}
"""What Serve would count for nothing in front of bigray's application, and what counts."""


def serve_config_mistakes(value: Any, path: Path = (), *, house: bool = True) -> Iterator[Mistake]:
    """What is wrong with a Serve configuration that a cluster of pods is to run.

    `house` adds what Ray takes and bigray does not: an address that nobody reaches, an endpoint that anybody may ask.
    """
    value = pruned(value)
    yield from mismatches(SERVE, value, path)
    if not isinstance(value, dict):
        return
    applications = value.get("applications")
    entries = applications if isinstance(applications, list) else []
    for index, application in enumerate(entries):
        if isinstance(application, dict):
            yield from _application_mistakes(application, (*path, "applications", index), house)
    yield from _clashes(entries, (*path, "applications"))
    http = value.get("http_options")
    yield from _address_mistakes(http if isinstance(http, dict) else {}, path)


def _application_mistakes(application: dict[str, Any], path: Path, house: bool) -> Iterator[Mistake]:
    prefix = application.get("route_prefix", "/")
    if isinstance(prefix, str) and (not prefix.startswith("/") or (prefix != "/" and prefix.endswith("/"))):
        yield (*path, "route_prefix"), f"has to start with '/' and not end with it, got '{prefix}'"
    if "runtime_env" in application:
        yield from runtime_env_mistakes(application["runtime_env"], (*path, "runtime_env"), house=house)
    is_bigrays = application.get("import_path") == IMPORT_PATH
    for index, deployment in enumerate(_list(application.get("deployments"))):
        if isinstance(deployment, dict):
            where: Path = (*path, "deployments", index)
            yield from _deployment_mistakes(deployment, where)
            actor = deployment.get("ray_actor_options")
            if isinstance(actor, dict) and "runtime_env" in actor:
                yield from runtime_env_mistakes(
                    actor["runtime_env"], (*where, "ray_actor_options", "runtime_env"), house=house
                )
            if is_bigrays:
                yield from _own_deployment_mistakes(deployment, where)
    names = Counter(item.get("name") for item in _list(application.get("deployments")) if isinstance(item, dict))
    if twice := [name for name, times in names.items() if times > 1 and name is not None]:
        yield (*path, "deployments"), f"'{twice[0]}' is there twice; merge the two"
    if is_bigrays:
        yield from _own_args_mistakes(application.get("args", {}), (*path, "args"), house)


def _deployment_mistakes(deployment: dict[str, Any], path: Path) -> Iterator[Mistake]:
    replicas, scaling = deployment.get("num_replicas"), deployment.get("autoscaling_config")
    if replicas is not None and replicas != "auto":
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1:
            yield (*path, "num_replicas"), f"takes a whole number from 1 up or 'auto', got {replicas!r}"
        elif scaling is not None:
            yield (*path, "num_replicas"), "'num_replicas' and 'autoscaling_config' exclude each other; keep one"
    if isinstance(scaling, dict) and set(scaling) <= set(AUTOSCALING.fields):  # else a bound may be misspelt
        low, high = scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
        if _is_whole(low) and _is_whole(high) and low > high >= 1:
            yield (*path, "autoscaling_config", "min_replicas"), f"{low} is more than max_replicas, {high}"
        first = scaling.get("initial_replicas")
        if _is_whole(first) and _is_whole(low) and _is_whole(high) and low <= high and not low <= first <= high:
            yield (*path, "autoscaling_config", "initial_replicas"), f"{first} is not between {low} and {high}"
    if "placement_group_bundles" in deployment and "max_replicas_per_node" in deployment:
        yield (*path, "max_replicas_per_node"), "does not go with 'placement_group_bundles'; keep one"


def _own_deployment_mistakes(deployment: dict[str, Any], path: Path) -> Iterator[Mistake]:
    name = deployment.get("name")
    if isinstance(name, str) and name != "Model":
        yield (*path, "name"), f"bigray's application has one deployment, 'Model', got '{name}'"
    for key, instead in LIMITS_OF_SERVE.items():
        if key in deployment:
            yield (*path, key), f"Serve's own limit does not hold here; use {instead}"
    scaling = deployment.get("autoscaling_config")
    policy = scaling.get("policy") if isinstance(scaling, dict) else None
    if isinstance(policy, dict) and policy.get("policy_function") == SCALING_POLICY:
        where: Path = (*path, "autoscaling_config", "policy", "policy_kwargs")
        yield from mismatches(POLICY_SETTINGS, policy.get("policy_kwargs", {}), where)


def _own_args_mistakes(args: Any, path: Path, house: bool) -> Iterator[Mistake]:
    yield from mismatches(ARGS, args, path)
    if not isinstance(args, dict) or not house:
        return
    bundles = [((*path, "bundle"), args.get("bundle"))]
    bundles += [
        ((*path, "models", index, "bundle"), model.get("bundle"))
        for index, model in enumerate(_list(args.get("models")))
        if isinstance(model, dict)
    ]
    for where, bundle in bundles:
        if isinstance(bundle, str) and "://" not in bundle and not bundle.startswith("/"):
            yield where, f"'{bundle}' is relative, and pods have no such folder; use s3://... or a path on a volume"
    has_unknown_key = any(key not in ARGS.fields for key in args)
    if "keys" not in args and args.get("open") is not True and not has_unknown_key:
        yield path, "anybody who reaches the Service may ask the model; set 'keys' to a mounted file, or open: true"


def _clashes(applications: list[Any], path: Path) -> Iterator[Mistake]:
    for key, default in (("name", "default"), ("route_prefix", "/")):
        seen: dict[str, int] = {}
        for index, application in enumerate(applications):
            found = application.get(key, default) if isinstance(application, dict) else None
            if not isinstance(found, str):
                continue
            if found in seen:
                yield (*path, index, key), f"'{found}' is also that of applications[{seen[found]}]; give it another"
            seen.setdefault(found, index)


def _address_mistakes(http: dict[str, Any], path: Path) -> Iterator[Mistake]:
    host = http.get("host")
    if isinstance(host, str) and re.fullmatch(r"localhost|127\.\d+\.\d+\.\d+|\[?::1\]?", host):
        yield (
            (*path, "http_options", "host"),
            f"'{host}' can only be reached from inside its pod, so the Service has nothing to send to; use 0.0.0.0",
        )
    if http.get("port") == 0:
        yield (*path, "http_options", "port"), "the Service needs a port that stays the same, such as 8000, got 0"
    for one, other in (("ssl_keyfile", "ssl_certfile"), ("ssl_certfile", "ssl_keyfile")):
        if one in http and other not in http:
            yield (*path, "http_options", one), f"'{one}' needs '{other}' beside it"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
