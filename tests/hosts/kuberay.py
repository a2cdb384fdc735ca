"""What KubeRay's operator makes of a manifest: pods with their `ray start` lines and variables, and a job's submission.

Pure: it reads the text of a manifest and of cluster/Dockerfile, and starts nothing; `pods.py` does. The rules are those
of KubeRay 1.5 (ray-operator/controllers/ray/common/pod.go and job.go). What it leaves out: the autoscaler's container,
which needs Kubernetes; probes that the operator adds where a file has none; and the shortening of names that are long.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigray.cluster.checking.shapes import amount
from tests.hosts.hosts import REPOSITORY

Secrets = Mapping[str, Mapping[str, str]]
"""Name of a Secret -> key -> value."""
Object = dict[str, Any]

DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"
GCS_PORT = 6379
DASHBOARD_PORT = 8265
METRICS_PORT = 8080
AGENT_PORT = 52365
SHELL = ("/bin/bash", "-c", "--")
"""In which the operator runs a line."""
SUBMITTER_SHELL = ("/bin/bash", "-ce", "--")
MORE_FILES = "ulimit -n 65536"
NAMESPACE = "default"
HEAD_GROUP = "headgroup"
CLUSTER_SPECS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
"""Where a manifest that brings its own cluster describes it."""
REDIS_VARIABLES = ("RAY_REDIS_ADDRESS", "RAY_external_storage_namespace", "REDIS_USERNAME", "REDIS_PASSWORD")
"""Dropped, with the options of `ray start` that are named for them: there is no Redis here, and a head that is told of
one does not start without it. So a head that dies takes its state along, which a new one would find in Redis."""
REDIS_OPTIONS = ("redis-username", "redis-password")
ALSO_TRUE_OR_FALSE = ("log-color", "include-dashboard")
"""Options that are no switches: what they take may be the word true."""


@dataclass(frozen=True)
class Mount:
    """A volume at a place of a container."""

    path: Path
    volume: Object
    """As it stands under `volumes`."""
    is_read_only: bool

    @property
    def size_mb(self) -> int | None:
        """Of a folder in memory or on disk that is empty at first, where it has a limit."""
        limit = (self.volume.get("emptyDir") or {}).get("sizeLimit")
        return None if limit is None else int(amount(limit)) // 2**20


@dataclass(frozen=True)
class PodPlan:
    """A pod, and what its first container, which is Ray's, starts with."""

    name: str
    """Of the pod; Ray's autoscaler would know the node by it."""
    host: str
    """What to call its host, in at most 15 letters."""
    group: str
    ray_start: str
    container: Object
    mounts: tuple[Mount, ...]
    environment: Mapping[str, str] = field(repr=False)

    @property
    def is_head(self) -> bool:
        return self.group == HEAD_GROUP

    @property
    def line(self) -> str:
        """What the container's shell runs."""
        return f"{MORE_FILES}; {self.ray_start}"

    @property
    def memory_bytes(self) -> int | None:
        """The container's limit, from which Ray takes 30 % for its object store."""
        limit = _limits(self.container).get("memory")
        return None if limit is None else int(amount(limit))

    @property
    def shared_memory_mb(self) -> int | None:
        """Of /dev/shm; without a volume there it is as large as the container's memory."""
        sizes = [mount.size_mb for mount in self.mounts if mount.path == Path("/dev/shm")]
        memory_mb = None if self.memory_bytes is None else self.memory_bytes // 2**20
        return sizes[0] if sizes and sizes[0] else memory_mb

    def probe(self, kind: str) -> Object | None:
        """`kind`: startup, readiness or liveness."""
        probe: Object | None = self.container.get(f"{kind}Probe")
        return probe


@dataclass(frozen=True)
class ClusterPlan:
    """A RayCluster, the one of the manifest or the one that its job or service brings."""

    kind: str
    """RayCluster, RayJob or RayService."""
    name: str
    spec: Object
    """Of the manifest's object, not of the cluster."""
    pods: tuple[PodPlan, ...]
    """The head first."""
    token: str = field(repr=False)

    @property
    def head(self) -> PodPlan:
        return self.pods[0]

    @property
    def workers(self) -> tuple[PodPlan, ...]:
        return self.pods[1:]

    @property
    def service(self) -> str:
        """The head's address within the cluster."""
        return service_name(self.name)

    @property
    def dashboard(self) -> str:
        return f"http://{self.service}:{DASHBOARD_PORT}"


def service_name(cluster: str) -> str:
    """Of the head's Service, in full."""
    return f"{cluster}-head-svc.{NAMESPACE}.svc.cluster.local"


def with_values(text: str, values: Mapping[str, str]) -> str:
    """The text of a shipped file with what its user writes in the place of the examples.

    Raises:
        ValueError: a value to be replaced is not in the file.
    """
    for example, value in values.items():
        if example not in text:
            raise ValueError(f"{example!r} is not in the file")
        text = text.replace(example, value)
    return text


def read_cluster(
    text: str,
    *,
    token: str,
    secrets: Secrets | None = None,
    replicas: Mapping[str, int] | None = None,
    attempt: int = 1,
    has_redis: bool = False,
) -> ClusterPlan:
    """The pods of a manifest with one RayCluster, RayJob or RayService.

    Args:
        text: of the file; Secrets that stand in it count, too.
        token: what the operator would write into the Secret that it makes for the cluster.
        secrets: those that the user makes beforehand.
        replicas: by group, where the autoscaler would have gone beyond the least.
        attempt: of a job; each has a cluster of its own.
        has_redis: whether to leave in what is for Redis.
    """
    documents = [document for document in yaml.safe_load_all(text) if document]
    (top,) = (document for document in documents if document["kind"] in ("RayCluster", *CLUSTER_SPECS))
    known = {**_secrets_in(documents), **(secrets or {})}
    own = top["kind"] == "RayCluster"
    name = top["metadata"]["name"] if own else f"{top['metadata']['name']}-{attempt:05}"
    spec = top["spec"] if own else top["spec"][CLUSTER_SPECS[top["kind"]]]
    if spec.get("authOptions", {}).get("mode") == "token":
        known[_token_secret(name, spec)] = {"auth_token": token}
    reader = _Pods(top["kind"], name, spec, known, attempt, has_redis)
    return ClusterPlan(top["kind"], name, top["spec"], tuple(reader.all(replicas or {})), token)


def _secrets_in(documents: Iterable[Object]) -> dict[str, Mapping[str, str]]:
    found = (document for document in documents if document["kind"] == "Secret")
    return {document["metadata"]["name"]: document.get("stringData") or {} for document in found}


def _token_secret(cluster: str, spec: Object) -> str:
    return spec["authOptions"].get("secretName") or cluster


@dataclass(frozen=True)
class _Pods:
    """Makes pods out of the groups of a RayCluster."""

    kind: str
    cluster: str
    spec: Object
    secrets: Secrets
    attempt: int
    has_redis: bool

    def all(self, replicas: Mapping[str, int]) -> Iterator[PodPlan]:
        yield self._pod(self.spec["headGroupSpec"], HEAD_GROUP, f"{self.cluster}-head", "head")
        for group in self.spec.get("workerGroupSpecs", ()):
            name = group["groupName"]
            least = max(group.get("replicas", 0), group.get("minReplicas", 0))
            for number in range(replicas.get(name, least)):
                yield self._pod(group, name, f"{self.cluster}-{name}-worker-{number}", f"{name[:9]}-{number}")

    def _pod(self, group: Object, name: str, pod: str, host: str) -> PodPlan:
        pod_spec = group["template"]["spec"]
        container = pod_spec["containers"][0]
        params = self._kept(self._start_params(group, name), REDIS_OPTIONS)
        ray_start = ray_start_line(params, container, is_head=name == HEAD_GROUP)
        environment = self._kept(self._environment(container, name, pod, ray_start), REDIS_VARIABLES)
        host = host if self.attempt == 1 else f"{host}-{self.attempt}"
        return PodPlan(pod, host, name, ray_start, container, tuple(_mounts(pod_spec)), environment)

    def _kept(self, values: dict[str, str], of_redis: tuple[str, ...]) -> dict[str, str]:
        return {name: value for name, value in values.items() if self.has_redis or name not in of_redis}

    def _start_params(self, group: Object, name: str) -> dict[str, str]:
        params = dict(group.get("rayStartParams") or {})
        if name != HEAD_GROUP:
            return {"address": f"{service_name(self.cluster)}:{self._port}", **params}
        if self.spec.get("enableInTreeAutoscaling"):
            params["no-monitor"] = "true"
        params.update(self._redis_params())
        return {"dashboard-host": "0.0.0.0", **params}

    @property
    def _port(self) -> str:
        return str((self.spec["headGroupSpec"].get("rayStartParams") or {}).get("port", GCS_PORT))

    def _redis_params(self) -> dict[str, str]:
        options = self.spec.get("gcsFaultToleranceOptions") or {}
        given = {"redis-username": "redisUsername", "redis-password": "redisPassword"}
        return {option: f"${option.upper().replace('-', '_')}" for option, key in given.items() if key in options}

    def _environment(self, container: Object, group: str, pod: str, ray_start: str) -> dict[str, str]:
        """What is set later does not count where the file has set it, as with the operator."""
        is_head = group == HEAD_GROUP
        own = dict(container_variables(container, self.secrets, {"metadata.name": pod}))
        address = "127.0.0.1" if is_head else service_name(self.cluster)
        defaults = {
            "RAY_PORT": self._port,
            "RAY_ADDRESS": f"{address}:{self._port}",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        }
        always = {
            "RAY_CLUSTER_NAME": self.cluster,
            "RAY_CLUSTER_NAMESPACE": NAMESPACE,
            "RAY_CLOUD_INSTANCE_ID": pod,
            "RAY_NODE_TYPE_NAME": group,
            "KUBERAY_GEN_RAY_START_CMD": ray_start,
        }
        if not is_head:
            always |= {"FQ_RAY_IP": address, "RAY_IP": address.partition(".")[0]}
        elif self.spec.get("enableInTreeAutoscaling") and _is_second_autoscaler(self.spec):
            always["RAY_enable_autoscaler_v2"] = "true"
        more = self._for_services() | self._for_redis(is_head) | self._for_tokens()
        return {**image_environment(), **defaults, **more, **own, **always}

    def _for_services(self) -> dict[str, str]:
        if self.kind != "RayService":
            return {}
        waits = {"RAY_gcs_server_request_timeout_seconds": "5", "RAY_SERVE_KV_TIMEOUT_S": "5"}
        return {"RAY_timeout_ms_task_wait_for_death_info": "0", **waits}

    def _for_redis(self, is_head: bool) -> dict[str, str]:
        options = self.spec.get("gcsFaultToleranceOptions")
        if options is None:
            return {}
        if not is_head:
            return {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        secret = {"REDIS_USERNAME": "redisUsername", "REDIS_PASSWORD": "redisPassword"}
        given = [{"name": name, **options[key]} for name, key in secret.items() if key in options]
        variables = dict(container_variables({"env": given}, self.secrets, {}))
        place = {"RAY_external_storage_namespace": options.get("externalStorageNamespace", self.cluster)}
        return {"RAY_REDIS_ADDRESS": options["redisAddress"], **place, **variables}

    def _for_tokens(self) -> dict[str, str]:
        if (self.spec.get("authOptions") or {}).get("mode") != "token":
            return {}
        return token_variables(self.secrets[_token_secret(self.cluster, self.spec)]["auth_token"])


def token_variables(token: str) -> dict[str, str]:
    """Of every container that talks to a cluster with a token; there is no token file in a pod."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _is_second_autoscaler(spec: Object) -> bool:
    return (spec.get("autoscalerOptions") or {}).get("version") == "v2"


def ray_start_line(params: Mapping[str, str], container: Object, *, is_head: bool) -> str:
    """`ray start` with the options of a group, as the operator completes them from the container's resources."""
    given = {"metrics-export-port": str(METRICS_PORT), "dashboard-agent-listen-port": str(AGENT_PORT), **params}
    options = {**resource_options(container), **given, "block": "true"}
    written = "".join(_option(name, options[name]) for name in sorted(options))
    return f"ray start {'--head ' if is_head else ''}{written}"


def resource_options(container: Object) -> dict[str, str]:
    """Of the container's limits; of its request for CPUs where they have no limit. A part of a CPU counts as one."""
    limits = _limits(container)
    requests = (container.get("resources") or {}).get("requests") or {}
    found = {"num-cpus": limits.get("cpu", requests.get("cpu", 0)), "memory": limits.get("memory", 0)}
    found |= {"num-gpus": next((limits[name] for name in sorted(limits) if _is_gpu(name)), 0)}
    return {name: str(math.ceil(amount(value))) for name, value in found.items() if amount(value)}


def _limits(container: Object) -> Object:
    return (container.get("resources") or {}).get("limits") or {}


def _is_gpu(resource: str) -> bool:
    return resource.endswith("gpu") or re.search(r"nvidia\.com/mig-\d+g\.\d+gb$", resource) is not None


def _option(name: str, value: str) -> str:
    if value.lower() not in ("true", "false") or name in ALSO_TRUE_OR_FALSE:
        return f" --{name}={value} "
    return f" --{name} " if value.lower() == "true" else ""


def container_variables(container: Object, secrets: Secrets, fields: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and values of a container's variables, of those from Secrets first.

    `fields`: what a fieldRef may name.

    Raises:
        KeyError: a Secret, or a key of it, is not there and is not optional; the pod would not start.
    """
    for source in container.get("envFrom", ()):
        reference = source.get("secretRef") or {}
        if reference.get("name") in secrets or not reference.get("optional"):
            yield from secrets[reference["name"]].items()
    for variable in container.get("env", ()):
        origin = variable.get("valueFrom") or {}
        if (reference := origin.get("secretKeyRef")) is not None:
            secret = secrets.get(reference["name"], {}) if reference.get("optional") else secrets[reference["name"]]
            if reference["key"] in secret or not reference.get("optional"):
                yield variable["name"], secret[reference["key"]]
        elif (path := origin.get("fieldRef", {}).get("fieldPath")) is not None:
            yield variable["name"], fields[path]
        else:
            yield variable["name"], str(variable.get("value", ""))


def _mounts(pod_spec: Object) -> Iterator[Mount]:
    volumes = {volume["name"]: volume for volume in pod_spec.get("volumes", ())}
    for mount in pod_spec["containers"][0].get("volumeMounts", ()):
        yield Mount(Path(mount["mountPath"]), volumes[mount["name"]], bool(mount.get("readOnly")))


def image_environment() -> dict[str, str]:
    """What the image sets."""
    lines = re.findall(r"^ENV (.+)$", DOCKERFILE.read_text(), re.M)
    return dict(word.split("=", 1) for line in lines for word in line.split())


def image_folder() -> Path:
    """Where the image's commands run."""
    (folder,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE.read_text(), re.M)
    return Path(folder)


def image_copies() -> dict[Path, Path]:
    """What the image holds of the checkout: path there -> path below the image's folder."""
    copies = {}
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.M):
        *sources, target = (word for word in line.split() if not word.startswith("--"))
        for source in sources:
            copies[Path(source)] = Path(target) / source if target.endswith("/") else Path(target)
    return copies


def submit_line(plan: ClusterPlan, job_id: str) -> str:
    """What the pod that submits runs: a job that is there already is followed, not started once more.

    The operator puts a loop before it that waits for the dashboard.

    Raises:
        ValueError: the job is not submitted by a pod of its own.
    """
    if (mode := plan.spec.get("submissionMode", "K8sJobMode")) != "K8sJobMode":
        raise ValueError(f"submissionMode: {mode}: only K8sJobMode is known here")
    at = f"--address {plan.dashboard}"
    options = "--no-wait"
    if runtime_env := plan.spec.get("runtimeEnvYAML"):
        options += f" --runtime-env-json {_quoted(runtime_env_json(runtime_env))}"
    if metadata := plan.spec.get("metadata"):
        options += f" --metadata-json {_quoted(json.dumps(metadata))}"
    options += f" --submission-id {job_id}"
    if cpus := plan.spec.get("entrypointNumCpus"):
        options += f" --entrypoint-num-cpus {cpus:f}"
    submit = f"ray job submit {at} {options} -- {plan.spec['entrypoint'].strip()}"
    is_there = f"ray job status {at} {job_id} >/dev/null 2>&1"
    return f"if ! {is_there} ; then {submit} ; fi ; ray job logs {at} --follow {job_id}"


def runtime_env_json(text: str) -> str:
    """Of the YAML of a RayJob, as the operator writes it."""
    return json.dumps(yaml.safe_load(text), sort_keys=True, separators=(",", ":"))


def _quoted(text: str) -> str:
    """In double quotes, in which the shell still fills in variables."""
    return json.dumps(text, ensure_ascii=False)


def serve_config(plan: ClusterPlan) -> Object:
    """What the operator sends to the dashboard for a RayService."""
    config: Object = yaml.safe_load(plan.spec["serveConfigV2"])
    return config
