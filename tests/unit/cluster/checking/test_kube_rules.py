"""Rules of the operator that our own manifests give no occasion to break, on manifests of a few lines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from bigray.cluster.checking.kube import check_kube
from bigray.cluster.checking.yaml_file import read_yaml

Spec = dict[str, Any]


def pod(**extra: Any) -> Spec:
    memory = {"cpu": 1, "memory": "2Gi"}
    return {
        "spec": {
            "containers": [{"name": "ray", "image": "rayproject/ray:2.60.0", "resources": {"limits": memory}} | extra]
        }
    }


def cluster(**extra: Any) -> Spec:
    return {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"template": pod()},
        "workerGroupSpecs": [{"groupName": "cpu", "template": pod()}],
    } | extra


def head(**container: Any) -> Spec:
    return {"headGroupSpec": {"template": pod(**container)}}


def group(**extra: Any) -> Spec:
    return {"workerGroupSpecs": [{"groupName": "cpu", "template": pod()} | extra]}


def env(**variables: str) -> list[Spec]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def job(**extra: Any) -> Spec:
    return {"entrypoint": "python train.py", "rayClusterSpec": cluster()} | extra


def told(kind: str, spec: Spec, **metadata: Any) -> list[str]:
    document = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": "x"} | metadata, "spec": spec}
    return [f"{fault.place}: {fault.message}" for fault in check_kube(read_yaml(yaml.safe_dump(document)))]


DNS = {"egressRules": [{"ports": [{"port": 53, "protocol": "UDP"}]}]}
OPEN = {"ingressRules": [{"ports": [{"port": 8265}]}]}
ON = {"enableInTreeAutoscaling": True}
SELECTED = {"entrypoint": "python train.py", "clusterSelector": {"ray.io/cluster": "x"}}
CLUSTERS: dict[str, tuple[Spec, str]] = {
    "no container": (
        head() | {"headGroupSpec": {"template": {"spec": {"containers": []}}}},
        "template.spec: has no container",
    ),
    "token without a version": ({"rayVersion": None}, "spec: 'rayVersion' is required with authOptions.mode: token"),
    "token by Kubernetes without a token": (
        {"authOptions": {"mode": "disabled", "enableK8sTokenAuth": True}} | head(env=env(RAY_AUTH_MODE="token")),
        "spec.authOptions.enableK8sTokenAuth: needs authOptions.mode: token",
    ),
    "no policy for ingress": (
        {"networkPolicy": {"mode": "DenyAllEgress", "head": DNS | OPEN, "worker": DNS}},
        "spec.networkPolicy.head.ingressRules: counts for nothing with mode: DenyAllEgress",
    ),
    "no policy for egress": (
        {"networkPolicy": {"mode": "DenyAllIngress", "worker": DNS}},
        "spec.networkPolicy.worker.egressRules: counts for nothing with mode: DenyAllIngress",
    ),
    "policy without names": ({"networkPolicy": {"head": DNS}}, "spec.networkPolicy: worker (cpu) needs an egress rule"),
    "policy of a group that is not there": (
        {"networkPolicy": {"head": DNS, "worker": DNS, "workerGroups": [{"groupName": "cpus"} | DNS]}},
        "spec.networkPolicy.workerGroups[0].groupName: no worker group is called 'cpus', did you mean 'cpu'?",
    ),
    "group with capitals under a policy": (
        {"networkPolicy": {"head": DNS, "worker": DNS}} | group(groupName="Cpu"),
        "spec.workerGroupSpecs[0].groupName: 'Cpu' is part of a NetworkPolicy's name",
    ),
    "certificates by hand": (
        {"tlsOptions": {"enabled": True}} | head(env=env(RAY_USE_TLS="1")),
        "spec.headGroupSpec.template.spec.containers[0].env[0].name: the operator sets it with tlsOptions",
    ),
    "history without a collector": ({"historyServerOptions": {}}, "spec.historyServerOptions: 'collectorOptions' is"),
    "history without a store": (
        {"historyServerOptions": {"collectorOptions": {"image": "collector:v1"}}},
        "spec.historyServerOptions.collectorOptions: needs STORAGE_BACKEND",
    ),
    "address of Redis for a disk": (
        {"gcsFaultToleranceOptions": {"backend": "rocksdb", "redisAddress": "redis:6379"}},
        "spec.gcsFaultToleranceOptions.redisAddress: does not go with backend: rocksdb",
    ),
    "size of a claim that is there": (
        {"gcsFaultToleranceOptions": {"backend": "rocksdb", "storage": {"claimName": "c", "size": "1Gi"}}},
        "spec.gcsFaultToleranceOptions.storage.size: does not go with 'claimName'",
    ),
    "Redis' password as a variable": (
        {"gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}} | head(env=env(REDIS_PASSWORD="$X")),
        "spec.headGroupSpec.template.spec.containers[0].env[0].name: is not taken here",
    ),
    "Redis' user as a variable": (
        head(env=env(REDIS_USERNAME="me")),
        "spec.headGroupSpec.template.spec.containers[0].env[0].name: is not taken here; use gcs",
    ),
    "second autoscaler that is off": (
        head(env=env(RAY_enable_autoscaler_v2="1")),
        "spec.headGroupSpec.template.spec.containers[0].env[0]: the autoscaler is off",
    ),
    "command of the autoscaler": (
        ON | {"autoscalerOptions": {"env": env(KUBERAY_GEN_AUTOSCALER_START_CMD="x")}},
        "spec.autoscalerOptions.env[0].name: the operator sets it",
    ),
    "volume of the autoscaler": (
        ON | {"autoscalerOptions": {"volumeMounts": [{"name": "certs", "mountPath": "/certs"}]}},
        "spec.autoscalerOptions.volumeMounts[0].name: the pod has no volume 'certs'",
    ),
    "priority under the first autoscaler": (
        ON | {"autoscalerOptions": {"version": "v1"}} | group(priority=1),
        "spec.workerGroupSpecs[0].priority: is only read by autoscaler v2",
    ),
    "a worker of another Python": (
        group(template=pod(image="rayproject/ray:2.60.0-py312"))
        | {"headGroupSpec": {"template": pod(image="rayproject/ray:2.60.0-py311")}},
        "spec.workerGroupSpecs[0].template.spec.containers[0].image: has Python 3.12, the first image has 3.11",
    ),
    "an old Python": (
        head(image="rayproject/ray:2.60.0-py310"),
        "spec.headGroupSpec.template.spec.containers[0].image: 'ray",
    ),
    "a port twice": (
        head(ports=[{"name": "a", "containerPort": 1}, {"name": "a", "containerPort": 2}]),
        "spec.headGroupSpec.template.spec.containers[0].ports[1].name: 'a' is there twice",
    ),
    "a folder of the node": (
        {
            "headGroupSpec": {
                "template": {"spec": pod()["spec"] | {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}}
            }
        },
        "spec.headGroupSpec.template.spec.volumes[0].hostPath: is a folder of whichever node",
    ),
    "a capability that is root": (
        head(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}),
        "spec.headGroupSpec.template.spec.containers[0].securityContext.capabilities.add[0]: SYS_ADMIN makes",
    ),
    "an open dashboard": (
        {"authOptions": None, "headGroupSpec": {"template": pod(), "rayStartParams": {"dashboard-host": "0.0.0.0"}}},
        "spec.headGroupSpec.rayStartParams.dashboard-host: listens on all addresses without a token",
    ),
    "resources that are no JSON": (
        {"headGroupSpec": {"template": pod(), "rayStartParams": {"resources": "a=1"}}},
        "spec.headGroupSpec.rayStartParams.resources: is not JSON in quotes",
    ),
    "a flag that is none": (
        {"headGroupSpec": {"template": pod(), "rayStartParams": {"block": "yes please"}}},
        "spec.headGroupSpec.rayStartParams.block: takes 'true' or 'false'",
    ),
    "what the operator sets": (
        group(rayStartParams={"address": "x:6379"}),
        "spec.workerGroupSpecs[0].rayStartParams.address: the operator sets it",
    ),
    "an object for a spec": ({"headGroupSpec": None}, "spec: 'headGroupSpec' is required, but missing"),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_that_breaks_a_rule_is_told_once(name: str) -> None:
    changes, expected = CLUSTERS[name]
    faults = told("RayCluster", cluster(**changes))

    assert len(faults) == 1, faults
    assert expected in faults[0]


JOBS: dict[str, tuple[Spec, str]] = {
    "no cluster": ({"entrypoint": "python train.py"}, "spec: needs 'rayClusterSpec', or 'clusterSelector'"),
    "two clusters": (job(clusterSelector={"ray.io/cluster": "x"}), "spec.clusterSelector: does not go with 'rayClust"),
    "a cluster without its name": (
        SELECTED | {"clusterSelector": {"app": "x"}},
        "spec.clusterSelector: needs the cluster's",
    ),
    "a retry on a cluster that is there": (
        SELECTED | {"backoffLimit": 1},
        "spec.backoffLimit: does not go with 'cluster",
    ),
    "a side car in a cluster that is there": (
        SELECTED | {"submissionMode": "SidecarMode"},
        "spec.submissionMode: SidecarMod",
    ),
    "a pause on a cluster that is there": (
        SELECTED | {"suspend": True},
        "spec.suspend: does not go with 'clusterSelector'",
    ),
    "a pause of a cluster that stays": (job(suspend=True), "spec.suspend: needs shutdownAfterJobFinishes: true"),
    "a side car with a submitter": (
        job(submissionMode="SidecarMode", submitterConfig={"backoffLimit": 1}),
        "spec.submitterConfig: is of K8sJobMode",
    ),
    "a submitter that comes back": (
        job(submitterPodTemplate={"spec": pod()["spec"] | {"restartPolicy": "Always"}}),
        "spec.submitterPodTemplate.spec.restartPolicy: a submitter ends",
    ),
    "old and new rules": (
        job(
            deletionStrategy={
                "onSuccess": {"policy": "DeleteSelf"},
                "deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}],
            }
        ),
        "spec.deletionStrategy.onSuccess: does not go with 'deletionRules'",
    ),
    "a rule twice": (
        job(deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}] * 2}),
        "spec.deletionStrategy.deletionRules[1].policy: DeleteSelf after FAILED is there twice",
    ),
    "rules out of order": (
        job(
            deletionStrategy={
                "deletionRules": [
                    {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}},
                    {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 30}},
                ]
            }
        ),
        "spec.deletionStrategy.deletionRules[1].condition.ttlSeconds: DeleteCluster after FAILED comes at 30 s, before",
    ),
    "a rule for two states": (
        job(
            deletionStrategy={
                "deletionRules": [
                    {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}
                ]
            }
        ),
        "condition.jobDeploymentStatus: 'jobStatus' and 'jobDeploymentStatus' exclude each other",
    ),
    "a rule for no state": (
        job(deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]}),
        "spec.deletionStrategy.deletionRules[0].condition: needs 'jobStatus' or 'jobDeploymentStatus'",
    ),
    "a cluster deleted that is not the job's": (
        SELECTED
        | {"deletionStrategy": {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]}},
        "spec.deletionStrategy.deletionRules[0].policy: DeleteCluster does not go with 'clusterSelector'",
    ),
    "no deletion after a shutdown": (
        job(
            shutdownAfterJobFinishes=True,
            deletionStrategy={"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteSelf"}},
        ),
        "spec.deletionStrategy.onSuccess.policy: DeleteNone does not go with",
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_breaks_a_rule_is_told_once(name: str) -> None:
    spec, expected = JOBS[name]
    faults = told("RayJob", copy.deepcopy(spec))

    assert len(faults) == 1, faults
    assert expected in faults[0]


def test_a_token_needs_a_ray_that_has_it() -> None:
    faults = told(
        "RayCluster", cluster(rayVersion="2.51.0", headGroupSpec={"template": pod(image="r:1")}, workerGroupSpecs=[])
    )

    assert "spec.rayVersion: token authentication needs Ray 2.52 or newer, got 2.51.0" in faults


PLAIN = {
    "a secret in the file": (
        "v1",
        "Secret",
        "stringData: {token: abcdef}",
        "stringData.token: a secret does not belong into",
    ),
    "a secret that is not base64": ("v1", "Secret", "data: {token: 'a b!'}", "data.token: is not base64"),
    "a claim without a mode": (
        "v1",
        "PersistentVolumeClaim",
        "spec: {resources: {requests: {storage: 1Gi}}}",
        "spec: 'accessModes' is required",
    ),
    "a service's port as text": (
        "v1",
        "Service",
        "spec: {ports: [{port: '80'}]}",
        "spec.ports[0].port: expected a whole",
    ),
    "a policy misspelt": (
        "networking.k8s.io/v1",
        "NetworkPolicy",
        "spec: {podSelectors: {}}",
        "spec.podSelectors: is not a key here, did you mean 'podSelector'?",
    ),
    "a policy of another API": (
        "v1",
        "NetworkPolicy",
        "spec: {}",
        "apiVersion: a NetworkPolicy is of networking.k8s.io/v1",
    ),
    "a kind misspelt": ("v1", "ConfigMaps", "data: {}", "kind: 'ConfigMaps' is no kind, did you mean 'ConfigMap'?"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_object_with_a_mistake_is_told_once(name: str) -> None:
    api, kind, body, expected = PLAIN[name]
    text = f"apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x}}\n{body}\n"
    faults = [f"{fault.place}: {fault.message}" for fault in check_kube(read_yaml(text))]

    assert len(faults) == 1, faults
    assert faults[0].startswith(expected)


@pytest.mark.parametrize("text", ["- 1", "kind: RayCluster", "apiVersion: ray.io/v1\nkind: [RayJob]", "a: b"])
def test_what_is_no_object_is_told_and_nothing_raised(text: str) -> None:
    assert len([*check_kube(read_yaml(text))]) >= 1


def _values(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _values(item, (*path, key))


@pytest.mark.parametrize("wrong", [7, "text", [], [{}], {}, {"a": None}, None, True])
def test_no_value_of_a_wrong_type_raises(wrong: Any) -> None:
    service = {
        "rayClusterConfig": cluster(**ON, **group(priority=1, rayStartParams={"num-cpus": "1"})),
        "serveConfigV2": "a: b",
    }
    for kind, spec in (
        ("RayService", service),
        ("RayJob", job(deletionStrategy={"deletionRules": [{}]}, suspend=True)),
    ):
        for path in list(_values(spec))[1:]:
            changed = copy.deepcopy(spec)
            part: Any = changed
            for step in path[:-1]:
                part = part[step]
            part[path[-1]] = wrong
            told(kind, changed)
