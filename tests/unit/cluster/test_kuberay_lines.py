"""What the manifest runner of tests/hosts makes of the files of cluster/kuberay, by the rules of KubeRay's operator."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigray.cluster.checking.kube_start_params import START_OPTIONS
from tests.hosts.hosts import REPOSITORY
from tests.hosts.kuberay import (
    REDIS_OPTIONS,
    REDIS_VARIABLES,
    ClusterPlan,
    container_variables,
    image_copies,
    image_environment,
    image_folder,
    ray_start_line,
    read_cluster,
    resource_options,
    runtime_env_json,
    serve_config,
    submit_line,
    with_values,
)

FOLDER = REPOSITORY / "cluster" / "kuberay"
REDIS = {"bigray-redis": {"password": "of redis"}}


MIB = 2**20


def plan_of(name: str, **options: Any) -> ClusterPlan:
    return read_cluster((FOLDER / name).read_text(), token="of the cluster", secrets=REDIS, **options)


def test_the_heads_line_is_the_operators_to_the_letter() -> None:
    assert plan_of("rayjob.yaml").head.ray_start == (
        "ray start --head  --block  --dashboard-agent-listen-port=52365  --dashboard-host=0.0.0.0 "
        f" --memory={8 * 2**30}  --metrics-export-port=8080  --no-monitor  --num-cpus=0 "
    )


def test_a_workers_line_is_the_operators_to_the_letter() -> None:
    (worker,) = plan_of("rayjob.yaml").workers
    service = "bigray-digits-00001-head-svc.default.svc.cluster.local:6379"
    assert worker.line == (
        f"ulimit -n 65536; ray start  --address={service}  --block  --dashboard-agent-listen-port=52365 "
        f" --memory={16 * 2**30}  --metrics-export-port=8080  --num-cpus=4 "
    )
    assert worker.environment["RAY_ADDRESS"] == service


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"])
def test_every_option_of_a_line_is_one_of_rays(name: str) -> None:
    for pod in plan_of(name, replicas={"cpu": 1, "gpu": 1}, has_redis=True).pods:
        words = shlex.split(pod.ray_start)[2:]
        assert {word.partition("=")[0].removeprefix("--") for word in words} <= START_OPTIONS


@pytest.mark.parametrize(
    ("resources", "options"),
    [
        ({"limits": {"cpu": "500m", "memory": "1Gi"}}, {"num-cpus": "1", "memory": str(2**30)}),
        ({"requests": {"cpu": 3, "memory": "1Gi"}}, {"num-cpus": "3"}),
        ({"limits": {"nvidia.com/gpu": "2"}}, {"num-gpus": "2"}),
        ({"limits": {"nvidia.com/mig-2g.32gb": 1}}, {"num-gpus": "1"}),
        ({"limits": {"nvidia.com/gpu": 0}}, {}),
        ({}, {}),
    ],
)
def test_ray_is_told_of_a_containers_limits(resources: dict[str, Any], options: dict[str, str]) -> None:
    assert resource_options({"resources": resources}) == options


def test_what_a_file_says_of_a_line_is_not_changed_and_a_switch_takes_no_word() -> None:
    params = {"num-cpus": "7", "metrics-export-port": "1", "no-monitor": "False", "include-dashboard": "true"}
    line = ray_start_line(params, {"resources": {"limits": {"cpu": 2}}}, is_head=True)
    assert {"--num-cpus=7", "--metrics-export-port=1", "--include-dashboard=true", "--block"} <= set(line.split())
    assert "--no-monitor" not in line


def test_pods_are_as_many_as_the_file_has_at_least_and_no_two_have_a_host_or_name_in_common() -> None:
    assert [pod.host for pod in plan_of("rayservice.yaml").pods] == ["head", "cpu-0", "cpu-1"]
    pods = plan_of("rayjob.yaml", replicas={"cpu": 3, "gpu": 1}, attempt=2).pods
    assert [pod.host for pod in pods] == ["head-2", "cpu-0-2", "cpu-1-2", "cpu-2-2", "gpu-0-2"]
    assert len({pod.name for pod in pods}) == 5


def test_every_pod_has_the_token_that_the_operator_makes_and_does_not_show_it() -> None:
    plan = plan_of("rayjob.yaml")
    assert {pod.environment["RAY_AUTH_TOKEN"] for pod in plan.pods} == {"of the cluster"}
    assert {pod.environment["RAY_AUTH_MODE"] for pod in plan.pods} == {"token"}
    assert "of the cluster" not in repr(plan)


def test_without_redis_nothing_of_the_head_names_it_and_with_it_all_does() -> None:
    with_it, without = plan_of("rayservice.yaml", has_redis=True).head, plan_of("rayservice.yaml").head
    assert {*REDIS_VARIABLES} - {"REDIS_USERNAME"} <= set(with_it.environment)
    assert with_it.environment["REDIS_PASSWORD"] == "of redis"
    assert "--redis-password=$REDIS_PASSWORD" in with_it.ray_start
    assert not {*REDIS_VARIABLES} & set(without.environment)
    assert not [option for option in REDIS_OPTIONS if option in without.ray_start]


def test_variables_come_from_values_and_secrets_and_a_secret_that_is_missing_is_an_error() -> None:
    def key(secret: str, name: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": "of"}}}

    pod = {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    sources = [{"secretRef": {"name": "mine"}}, {"secretRef": {"name": "none", "optional": True}}]
    container = {"envFrom": sources, "env": [{"name": "A", "value": "1"}, key("mine", "B"), pod]}
    found = dict(container_variables(container, {"mine": {"of": "hidden"}}, {"metadata.name": "pod-1"}))
    assert found == {"of": "hidden", "A": "1", "B": "hidden", "POD": "pod-1"}
    with pytest.raises(KeyError):
        list(container_variables({"env": [key("none", "C")]}, {}, {}))


def test_the_line_that_submits_is_read_by_a_shell_as_it_is_meant(tmp_path: Path) -> None:
    """A `ray` that knows no job yet, and writes down what it is asked."""
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/asked-$2\n[ $2 != status ]\n')
    ray.chmod(0o755)
    plan = plan_of("rayjob.yaml")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["/bin/bash", "-ce", "--", submit_line(plan, "job-1")], env=environment, check=True, timeout=30)

    submitted = (tmp_path / "asked-submit").read_text().splitlines()
    entrypoint = submitted[submitted.index("--") + 1 :]
    assert " ".join(entrypoint) == plan.spec["entrypoint"]
    given = submitted[submitted.index("--runtime-env-json") + 1]
    assert json.loads(given)["working_dir"] == str(image_folder())
    assert submitted[submitted.index("--submission-id") + 1] == "job-1"
    assert (tmp_path / "asked-logs").read_text().split()[-2:] == ["--follow", "job-1"]


def test_a_runtime_environment_is_handed_on_as_one_line_of_json() -> None:
    assert runtime_env_json('b: 1\na: {c: "x"}\n') == '{"a":{"c":"x"},"b":1}'


def test_the_image_has_what_the_job_needs_and_its_variables() -> None:
    copies = image_copies()
    assert all((REPOSITORY / source).exists() for source in copies)
    assert {str(target) for target in copies.values()} >= {"bigray", "examples", "pyproject.toml"}
    assert image_environment()["RAY_AUTH_MODE"] == "token"


def test_the_services_applications_are_sent_as_they_are_in_the_file() -> None:
    (application,) = serve_config(plan_of("rayservice.yaml"))["applications"]
    assert application["import_path"] == "bigray.serve.app:build"


def test_a_value_that_is_not_in_the_file_cannot_be_replaced() -> None:
    assert with_values("a: b", {"b": "c"}) == "a: c"
    with pytest.raises(ValueError, match="'d'"):
        with_values("a: b", {"d": "c"})


def test_what_is_mounted_has_the_size_that_the_file_gives_it() -> None:
    plan = plan_of("raycluster.yaml")
    assert plan.head.shared_memory_mb == 3072
    (claim,) = [mount for mount in plan.head.mounts if mount.path == Path("/mnt/bigray")]
    assert claim.volume["persistentVolumeClaim"] == {"claimName": "bigray-storage"}


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"])
def test_rays_object_store_finds_room_in_the_shared_memory_of_every_pod(name: str) -> None:
    """Ray gives it 30 % of the memory, and where /dev/shm has less, puts it on disk with a warning."""
    plan = plan_of(name, replicas={"cpu": 1, "gpu": 1})
    for pod in (plan.head, *plan.workers):
        assert 0.3 * pod.memory_bytes <= pod.shared_memory_mb * MIB, pod.name
