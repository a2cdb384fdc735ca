"""The serve file: Ray Serve's own YAML, read strictly.

Ray ignores keys it does not know, so a misspelt `num_replica` would silently serve one replica; here it is a fault with
the nearest known key. Nothing of Ray is imported: `bigray plan` reads these files in milliseconds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bigray.cluster.plan import ServeNeeds
from bigray.errors import SpecError
from bigray.loading import validate_document
from bigray.presets import find_preset
from bigray.serve.scaling.settings import ScalingSettings, read_settings

IMPORT_PATH = "bigray.serve.app:build"
DEPLOYMENT = "Model"
SCALING_POLICY = "bigray.serve.scaling.policy:ArrivalPolicy"
GRPC_SERVICE = "bigray.serve.wire.grpc_service.add_inference_service"

JsonObject = dict[str, Any]

_SERVES_OWN_LIMITS = {
    "max_ongoing_requests": "args.max_queued_requests",
    "max_queued_requests": "args.max_queued_requests",
    "request_timeout_s": "args.request_timeout_s",
    "backpressure_config": "args.max_queue_s, and the answer is a 503 with Retry-After",
}
"""Limits that Serve puts around a request. HTTP goes past them to bigray's own (`direct.py`)."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Section):
    """A further model behind the same endpoint, loaded when it is first asked for."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """In `/v2/models/{name}`."""
    bundle: str
    max_queued_requests: int | None = Field(default=None, ge=1)
    """Of this model; the endpoint's where it is not given."""


class BundleArgs(_Section):
    """The `args:` of the application, which Ray hands to `bigray.serve.app:build`."""

    bundle: str
    """Folder or URI of the bundle; `bigray deploy RUN` puts the run's own here."""
    max_batch_size: int = Field(default=64, ge=1)
    """Rows the model takes at once, at most; a larger request runs by itself."""
    slo_ms: float | None = Field(default=None, gt=0)
    """What an answer may take. Caps the batch by measured latency, and a slower version is refused by the gate."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of the model in each replica; the replica's CPUs where it is not given."""
    max_body_mb: float = Field(default=8, gt=0)
    """Requests with a larger body are refused with 413."""
    body_timeout_s: float = Field(default=10, gt=0)
    """A body that takes longer to come in is refused with 408."""
    request_timeout_s: float = Field(default=30, gt=0)
    """An answer that takes the model longer is a 504."""
    max_queue_s: float = Field(default=1, gt=0)
    """Work of the model, in seconds, that may wait; beyond it requests are refused with 503 and Retry-After."""
    max_queued_requests: int = Field(default=1024, ge=1)
    """Requests that may wait, however quick the model."""
    allow_factories: tuple[str, ...] = ("bigray.models:*",)
    """Factories whose code may run where the bundle has no `model.onnx`; patterns such as `my_project.*`."""
    keys: str | None = None
    """File of API keys (`bigray keys add`); without it whoever reaches the endpoint may ask."""
    open: bool = False
    """Whether anybody may ask an endpoint that other machines can reach; `bigray deploy --open` sets it."""
    access_log: str | None = None
    """File on each node for a line of JSON a request."""
    swap: Literal["auto", "in_place", "surge"] = "auto"
    """How a new version comes in: beside the old one in each replica, or in replicas of its own beside the old ones;
    `auto` decides by the memory that is free."""
    models: tuple[ModelEntry, ...] = ()
    """Further models."""
    models_memory_mb: float | None = Field(default=None, gt=0)
    """Bundles of further models held at once; the least recently asked is let go first."""

    @model_validator(mode="after")
    def _models_have_names_of_their_own(self) -> BundleArgs:
        names = [entry.name for entry in self.models]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"models: '{min(twice)}' is there twice")
        return self

    def check_own_name(self, own: str) -> None:
        """`own` is what the endpoint's bundle calls its model, which the file does not tell.

        Raises:
            SpecError: a further model has this name too, and nobody could ask it.
        """
        for number, entry in enumerate(self.models):
            if entry.name == own:
                place = f"applications.0.args.models.{number}.name"
                raise SpecError(f"{place}: '{own}' is the endpoint's own model; give this one another name")


class AutoscalingSection(_Section):
    """How many replicas; Ray's `AutoscalingConfig`."""

    min_replicas: int = Field(default=1, ge=0)
    initial_replicas: int | None = Field(default=None, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=2, gt=0)
    metrics_interval_s: float = Field(default=10, gt=0)
    look_back_period_s: float = Field(default=30, gt=0)
    upscale_delay_s: float = Field(default=30, ge=0)
    downscale_delay_s: float = Field(default=600, ge=0)
    downscale_to_zero_delay_s: float | None = Field(default=None, ge=0)
    upscaling_factor: float | None = Field(default=None, gt=0)
    downscaling_factor: float | None = Field(default=None, gt=0)
    smoothing_factor: float | None = Field(default=None, gt=0)
    upscale_smoothing_factor: float | None = Field(default=None, gt=0)
    downscale_smoothing_factor: float | None = Field(default=None, gt=0)
    aggregation_function: Literal["mean", "max", "min"] = "mean"
    policy: JsonObject | None = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> AutoscalingSection:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    @model_validator(mode="after")
    def _policy_can_be_made(self) -> AutoscalingSection:
        """In Serve's controller a wrong key could only be logged."""
        policy = self.policy or {}
        if policy.get("policy_function") == SCALING_POLICY:
            bounds = {"min_replicas": self.min_replicas, "max_replicas": self.max_replicas}
            try:
                ScalingSettings.model_validate({**policy.get("policy_kwargs", {}), **bounds})
            except ValidationError as error:
                fault = error.errors()[0]
                raise ValueError(f"policy_kwargs.{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
        return self


class ActorSection(_Section):
    """What each replica holds."""

    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    memory: float | None = Field(default=None, ge=0)
    resources: dict[str, float] = {}
    accelerator_type: str | None = None
    label_selector: dict[str, str] | None = None
    fallback_strategy: list[JsonObject] | None = None
    runtime_env: JsonObject = {}

    @field_validator("num_gpus")
    @classmethod
    def _many_gpus_are_whole(cls, value: float) -> float:
        """Ray would refuse each replica, one after another."""
        if value > 1 and value != int(value):
            raise ValueError(f"more than one GPU must be whole ones; use {math.ceil(value)}")
        return value


class DeploymentSection(_Section):
    """Options of the one deployment."""

    name: Literal["Model"]
    num_replicas: int | Literal["auto"] | None = None
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    max_queued_requests: int | None = None
    backpressure_config: JsonObject | None = None
    autoscaling_config: AutoscalingSection | None = None
    ray_actor_options: ActorSection = ActorSection()
    user_config: JsonObject | None = None
    graceful_shutdown_wait_loop_s: float | None = Field(default=None, ge=0)
    graceful_shutdown_timeout_s: float | None = Field(default=None, ge=0)
    health_check_period_s: float | None = Field(default=None, gt=0)
    health_check_timeout_s: float | None = Field(default=None, gt=0)
    max_replicas_per_node: int | None = Field(default=None, ge=1)
    placement_group_bundles: list[dict[str, float]] | None = None
    placement_group_strategy: str | None = None
    placement_group_bundle_label_selector: list[dict[str, str]] | None = None
    logging_config: JsonObject | None = None
    request_router_config: JsonObject | None = None
    rolling_update_percentage: float | None = Field(default=None, gt=0, le=1)
    max_surge_percent: int | None = Field(default=None, ge=0)

    @field_validator("max_ongoing_requests", "max_queued_requests", "backpressure_config", mode="before")
    @classmethod
    def _limits_are_bigrays(cls, value: Any, info: ValidationInfo) -> Any:
        return _refuse_serves_own(value, info)

    @model_validator(mode="after")
    def _one_way_to_count_replicas(self) -> DeploymentSection:
        if isinstance(self.num_replicas, int):
            if self.autoscaling_config is not None:
                raise ValueError("num_replicas and autoscaling_config exclude each other; remove one")
            if self.num_replicas < 1:
                raise ValueError(f"num_replicas must be at least 1, got {self.num_replicas}")
        return self

    def needs(self) -> ServeNeeds:
        """Resources at the floor and the ceiling."""
        scaling = self.autoscaling_config
        if self.num_replicas == "auto":
            low, high = (scaling.min_replicas, scaling.max_replicas) if scaling else (1, 100)  # Ray's defaults
        elif scaling is not None:
            low, high = scaling.min_replicas, scaling.max_replicas
        else:
            low = high = self.num_replicas or 1
        return ServeNeeds(low, high, self.ray_actor_options.num_cpus, self.ray_actor_options.num_gpus)


class ApplicationSection(_Section):
    """One application: one bundle behind one route prefix."""

    name: str = Field(default="default", min_length=1)
    route_prefix: str = "/"
    import_path: Literal["bigray.serve.app:build"]
    args: BundleArgs
    deployments: tuple[DeploymentSection, ...] = Field(default=(), max_length=1)
    runtime_env: JsonObject = {}
    autoscaling_policy: JsonObject | None = None
    logging_config: JsonObject | None = None
    external_scaler_enabled: bool = False

    @model_validator(mode="after")
    def _prefix_is_a_path(self) -> ApplicationSection:
        prefix = self.route_prefix
        if not prefix.startswith("/") or (prefix != "/" and prefix.endswith("/")):
            raise ValueError(f"route_prefix must start with '/' and not end with it, got '{prefix}'")
        return self


class HttpSection(_Section):
    """Where the endpoint listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    root_path: str = ""
    request_timeout_s: float | None = Field(default=None, gt=0)
    keep_alive_timeout_s: int = Field(default=5, ge=1)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None

    @field_validator("request_timeout_s", mode="before")
    @classmethod
    def _limits_are_bigrays(cls, value: Any, info: ValidationInfo) -> Any:
        return _refuse_serves_own(value, info)


class GrpcSection(_Section):
    """Where gRPC inference listens; without this section there is none."""

    port: int = Field(default=9000, ge=1, le=65535)
    request_timeout_s: float | None = Field(default=None, gt=0)

    def to_native(self) -> JsonObject:
        """As Ray reads it, with the services it is to offer."""
        return self.model_dump(mode="json", exclude_none=True) | {"grpc_servicer_functions": [GRPC_SERVICE]}


class ControllerSection(_Section):
    """Environment variables of Serve's own processes; they go before bigray's."""

    runtime_env: dict[Literal["env_vars"], dict[str, str]] = {}


class ServeSpec(_Section):
    """A whole serve file."""

    proxy_location: Literal["EveryNode", "HeadOnly"] = "EveryNode"
    http_options: HttpSection = HttpSection()
    grpc_options: GrpcSection | None = None
    controller_options: ControllerSection = ControllerSection()
    logging_config: JsonObject | None = None
    tracing_config: JsonObject | None = None
    target_capacity: float | None = Field(default=None, ge=0, le=100)
    applications: tuple[ApplicationSection]

    @property
    def application(self) -> ApplicationSection:
        return self.applications[0]

    @property
    def deployment(self) -> DeploymentSection:
        return self.application.deployments[0] if self.application.deployments else DeploymentSection(name=DEPLOYMENT)

    def needs(self) -> ServeNeeds:
        """Resources the endpoint holds, for the planner."""
        return self.deployment.needs()

    def with_bundle(self, location: str) -> ServeSpec:
        """The same file serving another bundle."""
        return self.with_args(bundle=location)

    def with_args(self, **changes: Any) -> ServeSpec:
        """The same file with other keys of its `args`."""
        application = self.application
        args = BundleArgs.model_validate(application.args.model_dump(exclude_unset=True) | changes)
        return self.model_copy(update={"applications": (application.model_copy(update={"args": args}),)})

    def with_port(self, port: int) -> ServeSpec:
        """The same file listening on another port."""
        return self.model_copy(update={"http_options": self.http_options.model_copy(update={"port": port})})

    def scaling_settings(self, place: str) -> ScalingSettings:
        """What bigray's autoscaling policy is asked for; `place` names the file in messages.

        Raises:
            SpecError: the file has no autoscaling, or by another policy.
        """
        scaling = self.deployment.autoscaling_config
        policy = (scaling.policy or {}) if scaling is not None else {}
        if scaling is None or policy.get("policy_function") != SCALING_POLICY:
            raise SpecError(f"{place}: autoscaling_config: has no policy '{SCALING_POLICY}'; see serve/autoscale.yaml")
        return read_settings(
            policy.get("policy_kwargs", {}),
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            place=f"{place}: policy_kwargs",
        )

    def to_native(self) -> JsonObject:
        """The file as Ray reads it: what was not written is left to Ray, except where it listens and how it changes."""
        document = self.model_dump(mode="json", exclude_unset=True)
        document["http_options"] = {"host": self.http_options.host, "port": self.http_options.port} | document.get(
            "http_options", {}
        )
        if self.grpc_options is not None:
            document["grpc_options"] = self.grpc_options.to_native()
        document["applications"] = [self.application_document()]
        return document

    def application_document(self) -> JsonObject:
        """The application as Ray reads it; replicas go once those that replace them answer, if not said otherwise."""
        document = self.application.model_dump(mode="json", exclude_unset=True)
        deployments = document.get("deployments") or [{"name": DEPLOYMENT}]
        document["deployments"] = [{"max_surge_percent": 100} | deployment for deployment in deployments]
        return document


def _refuse_serves_own(value: Any, info: ValidationInfo) -> Any:
    """What Serve would count for nothing must not look as if it counted."""
    if value is not None:
        key = str(info.field_name)
        raise ValueError(f"Serve's own limit does not hold here; use {_SERVES_OWN_LIMITS[key]}")
    return value


def load_serve(path: str | Path) -> ServeSpec:
    """Read a serve file; one that does not exist here is looked up among the shipped ones, such as `serve/local.yaml`.

    Raises:
        SpecError: with one line for each fault.
    """
    return validate_document(ServeSpec, _read_yaml(find_preset(path), str(path)), str(path))


def _read_yaml(path: Path, shown: str) -> JsonObject:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{shown}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{shown}: cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{shown}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise SpecError(f"{shown}: expected a mapping with 'applications', got {type(document).__name__}")
    return document
