"""Mistakes planted in our own manifests: each is told in one line, with its place, and nothing else is told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.kube import check_kube
from bigray.cluster.checking.kube_job_rules import COMMANDS
from bigray.cluster.checking.kube_start_params import START_OPTIONS
from bigray.cluster.checking.yaml_file import read_yaml

FOLDER = Path(__file__).parents[4] / "cluster" / "kuberay"
TOKEN = "ghp_" + "a1B2" * 9
"""Looks like a secret and is none."""


@dataclass(frozen=True)
class Planted:
    """One edit of a file and the fault it has to give."""

    name: str
    old: str
    new: str
    expected: str
    """How the fault begins: `place: message`."""
    at: str | None = None
    """A piece of the line that the fault names, in the edited file; the first line that changed where not given."""


@cache
def text_of(file: str) -> str:
    return (FOLDER / file).read_text(encoding="utf-8")


def faults_of(text: str, *, house: bool = True) -> list[Fault]:
    return list(check_kube(read_yaml(text), house=house))


def expect_one_fault(file: str, planted: Planted) -> None:
    original = text_of(file)
    assert planted.old in original
    edited = original.replace(planted.old, planted.new, 1)
    lines, before = edited.splitlines(), original.splitlines()

    faults = faults_of(edited)

    told = [str(fault) for fault in faults]
    assert len(faults) == 1, told
    assert f"{faults[0].place}: {faults[0].message}".startswith(planted.expected), told
    if planted.at is None:
        assert faults[0].line == next(
            number for number, line in enumerate(lines, start=1) if number > len(before) or line != before[number - 1]
        )
    else:
        assert planted.at in lines[(faults[0].line or 0) - 1], told


HEAD = "spec.headGroupSpec.template.spec"
CPU = "spec.workerGroupSpecs[0]"
GPU = "spec.workerGroupSpecs[1]"
IMAGE = "registry.example.com/bigray:0.1.0-ray2.60.0"

CLUSTER = (
    Planted(
        "a misspelt key", "  authOptions:", "  authOption:", "spec.authOption: is not a key here, did you mean 'auth"
    ),
    Planted(
        "a misspelt switch that others need",
        "enableInTreeAutoscaling",
        "enableInTreeAutoscalling",
        "spec.enableInTreeAutoscalling: is not a key here, did you mean 'enableInTreeAutoscaling'?",
    ),
    Planted(
        "a misspelt key of a container",
        "readinessProbe:",
        "readynessProbe:",
        f"{HEAD}.containers[0].readynessProbe: is not a key here, did you mean 'readinessProbe'?",
    ),
    Planted(
        "a misspelt resource",
        "memory: 8Gi}",
        "memroy: 8Gi}",
        f"{HEAD}.containers[0].resources.requests.memroy: is not a",
    ),
    Planted(
        "limits misspelt",
        'limits: {cpu: "2", memory: 8Gi}',
        'limit: {cpu: "2", memory: 8Gi}',
        f"{HEAD}.containers[0].resources.limit: is not a key here, did you mean 'limits'?",
    ),
    Planted(
        "a key of the autoscaler one level too high",
        "  autoscalerOptions:\n",
        "  idleTimeoutSeconds: 60\n  autoscalerOptions:\n",
        "spec.idleTimeoutSeconds: belongs under 'autoscalerOptions'",
    ),
    Planted(
        "a container's key in the pod",
        "        restartPolicy: Never   # autoscaler v2",
        "        ports: []\n        restartPolicy: Never   #",
        f"{HEAD}.ports: belongs into a container",
    ),
    Planted(
        "a number where text is needed",
        'num-cpus: "0"',
        "num-cpus: 0",
        "spec.headGroupSpec.rayStartParams.num-cpus: expected a text, got the number 0; put it in quotes",
    ),
    Planted(
        "text where a number is needed", "maxReplicas: 8", 'maxReplicas: "8"', f"{CPU}.maxReplicas: expected a whole"
    ),
    Planted(
        "less than no replicas", "minReplicas: 1", "minReplicas: -1", f"{CPU}.minReplicas: must be at least 0, got -1"
    ),
    Planted(
        "more at least than at most", "minReplicas: 1", "minReplicas: 9", f"{CPU}.minReplicas: 9 is more than maxRepl"
    ),
    Planted(
        "more replicas than there may be",
        "      maxReplicas: 8\n",
        "      replicas: 12\n      maxReplicas: 8\n",
        f"{CPU}.replicas: 12 is not between",
    ),
    Planted(
        "no hosts",
        "      maxReplicas: 8\n",
        "      numOfHosts: 0\n      maxReplicas: 8\n",
        f"{CPU}.numOfHosts: must be",
    ),
    Planted(
        "two groups of one name", "groupName: gpu", "groupName: cpu", f"{GPU}.groupName: 'cpu' is also that of workerGr"
    ),
    Planted(
        "an amount in other letters", "memory: 16Gi}", "memory: 16GB}", f"{CPU}.template.spec.containers[0].resources.r"
    ),
    Planted(
        "a limit in other letters",
        'limits: {cpu: "4", memory: 16Gi}',
        'limits: {cpu: "4", memory: 16GB}',
        f"{CPU}.template.spec.containers[0].resources.limits.memory: expected an amount such as 500m, 2 or 8Gi",
    ),
    Planted(
        "a version that is a number", '"2.60.0"', "2.60", "spec.rayVersion: expected a text, got the number 2.6; put it"
    ),
    Planted(
        "memory in thousandths",
        'requests: {cpu: "4", memory: 16Gi}',
        'requests: {cpu: "4", memory: 16m}',
        f"{CPU}.template.spec.containers[0].resources.requests.memory: 16m is 0.016 bytes; write 16Mi",
    ),
    Planted(
        "a request above its limit",
        'requests: {cpu: "4", memory: 16Gi}',
        'requests: {cpu: "6", memory: 16Gi}',
        f"{CPU}.template.spec.containers[0].resources.requests.cpu: 6 is more than the limit, 4",
    ),
    Planted(
        "less memory asked for than allowed",
        'requests: {cpu: "4", memory: 16Gi}',
        'requests: {cpu: "4", memory: 12Gi}',
        f"{CPU}.template.spec.containers[0].resources.requests.memory: 12Gi is not the limit, 16Gi",
    ),
    Planted(
        "no limit for memory",
        'limits: {cpu: "4", memory: 16Gi}',
        'limits: {cpu: "4"}',
        f"{CPU}.template.spec.containers[0].resources.limits: Ray's container needs a limit for 'memory'",
    ),
    Planted(
        "half a GPU",
        'limits: {cpu: "8", memory: 32Gi, nvidia.com/gpu: "1"}',
        'limits: {cpu: "8", memory: 32Gi}',
        f"{GPU}.template.spec.containers[0].resources.requests.nvidia.com/gpu: a device needs a limit too",
        at='requests: {cpu: "8"',
    ),
    Planted(
        "a parameter that Ray does not have",
        'num-cpus: "0"',
        'num-cpu: "0"',
        "spec.headGroupSpec.rayStartParams.num-cp",
    ),
    Planted(
        "a parameter with its dashes",
        'num-cpus: "0"',
        '--num-cpus: "0"',
        "spec.headGroupSpec.rayStartParams.--num-cpus: is not a key here, did you mean 'num-cpus'?",
    ),
    Planted(
        "memory as a parameter with a unit",
        'num-cpus: "0"',
        "object-store-memory: 2Gi",
        "spec.headGroupSpec.rayStartParams.object-store-memory: takes a plain number (bytes), got '2Gi'",
    ),
    Planted(
        "Ray's version is another than the images'", '"2.60.0"', '"2.59.0"', "spec.rayVersion: 2.59.0 is not the 2.60.0"
    ),
    Planted(
        "one image of another Ray",
        f"image: {IMAGE}-gpu",
        "image: registry.example.com/bigray:0.1.0-ray2.58.1-gpu",
        f"{GPU}.template.spec.containers[0].image: has Ray 2.58.1, rayVersion is 2.60.0",
    ),
    Planted(
        "an image that moves",
        f"image: {IMAGE}-gpu",
        "image: registry.example.com/bigray:latest",
        f"{GPU}.template.spec.containers[0].image: the tag 'latest' moves",
    ),
    Planted(
        "an image without a tag",
        f"image: {IMAGE}-gpu",
        "image: registry.example.com/bigray",
        f"{GPU}.template.spec.containers[0].image: 'registry.example.com/bigray' has no tag",
    ),
    Planted(
        "no token", "mode: token ", "mode: disabled ", "spec.authOptions.mode: without a token whoever reaches the head"
    ),
    Planted(
        "an open dashboard",
        "  authOptions:\n    mode: token          # the operator makes the Secret `bigray`; to use one of your own, "
        "name it in secretName\n",
        "",
        "spec: has no 'authOptions', and without a token whoever reaches the head runs code",
        at="spec:",
    ),
    Planted(
        "token authentication by Kubernetes and a secret",
        "    mode: token ",
        "    secretName: bigray\n    enableK8sTokenAuth: true\n    mode: token ",
        "spec.authOptions.secretName: does not go with enableK8sTokenAuth",
    ),
    Planted(
        "a pod that comes back under autoscaler v2",
        "restartPolicy: Never",
        "restartPolicy: Always",
        f"{HEAD}.restartPolicy: has to be Never for autoscaler v2",
    ),
    Planted(
        "options of an autoscaler that is off",
        "enableInTreeAutoscaling: true",
        "enableInTreeAutoscaling: false",
        "spec.autoscalerOptions: is not read while the autoscaler is off",
        at="autoscalerOptions:",
    ),
    Planted(
        "the first autoscaler for keys of the second",
        "version: v2",
        "version: v1",
        f"{GPU}.idleTimeoutSeconds: is only",
        "idleTimeoutSeconds: 300",
    ),
    Planted(
        "the autoscaler's version in two places",
        "            ports:\n",
        '            env: [{name: RAY_enable_autoscaler_v2, value: "1"}]\n            ports:\n',
        f"{HEAD}.containers[0].env[0]: is set by autoscalerOptions.version",
    ),
    Planted(
        "Redis in a variable",
        "            ports:\n",
        "            env: [{name: RAY_REDIS_ADDRESS, value: redis:6379}]\n            ports:\n",
        f"{HEAD}.containers[0].env[0].name: needs 'gcsFaultToleranceOptions'",
    ),
    Planted(
        "a secret in clear",
        "            ports:\n",
        "            env: [{name: HF_TOKEN, value: abcdef}]\n            ports:\n",
        f"{HEAD}.containers[0].env[0].value: HF_TOKEN is a secret in clear",
    ),
    Planted(
        "a secret by its form",
        "            ports:\n",
        f"            env: [{{name: ACCESS, value: {TOKEN}}}]\n            ports:\n",
        f"{HEAD}.containers[0].env[0].value: ACCESS is a secret in clear",
    ),
    Planted(
        "a variable twice",
        "            ports:\n",
        '            env: [{name: A, value: "1"}, {name: A, value: "2"}]\n            ports:\n',
        f"{HEAD}.containers[0].env[1].name: 'A' is there twice",
    ),
    Planted(
        "resources in two places",
        'num-cpus: "0"',
        'num-cpus: "0"\n    resources: {CPU: "0"}',
        "spec.headGroupSpec.resources: rayStartParams has 'num-cpus' too",
        at="resources: {CPU",
    ),
    Planted(
        "labels as a parameter",
        'num-cpus: "0"',
        'num-cpus: "0"\n      labels: a=b',
        "spec.headGroupSpec.rayStartParams.labels: is not taken here",
        at="labels: a=b",
    ),
    Planted(
        "a label of spaces",
        "rayStartParams: {}",
        "rayStartParams: {}\n      labels: {market: on demand}",
        f"{CPU}.labels.market: 'on demand' is not",
        "labels: {market",
    ),
    Planted(
        "a group that is suspended",
        "      maxReplicas: 8\n",
        "      suspend: true\n      maxReplicas: 8\n",
        f"{CPU}.suspend: is for the operator alone",
    ),
    Planted(
        "a volume that the pod does not have",
        "{name: ray, mountPath",
        "{name: rays, mountPath",
        f"{HEAD}.containers[0].volumeMounts[0].name: the pod has no volume 'rays', did you mean 'ray'?",
    ),
    Planted(
        "a misspelt source of a volume",
        "emptyDir: {sizeLimit: 20Gi}",
        "emptydir: {sizeLimit: 20Gi}",
        f"{HEAD}.volumes[0].emptydir: is not a key here, did you mean 'emptyDir'?",
    ),
    Planted(
        "two sources of a volume",
        "{name: ray, emptyDir: {sizeLimit: 20Gi}}",
        "{name: ray, emptyDir: {}, hostPath: {path: /tmp}}",
        f"{HEAD}.volumes[0].hostPath: ",
    ),
    Planted(
        "a root that may not be root", "runAsUser: 1000", "runAsUser: 0", f"{HEAD}.securityContext.runAsUser: 0 is root"
    ),
    Planted(
        "root", "runAsNonRoot: true", "runAsNonRoot: false", f"{HEAD}.securityContext.runAsNonRoot: lets the container"
    ),
    Planted(
        "a privileged container",
        "allowPrivilegeEscalation: false",
        "privileged: true",
        f"{HEAD}.containers[0].securityContext.privileged: makes the container root",
    ),
    Planted(
        "the node's network",
        "        restartPolicy: Never   #",
        "        hostNetwork: true\n        restartPolicy: Never   #",
        f"{HEAD}.hostNetwork: shares the node",
    ),
    Planted(
        "a drain longer than the grace",
        "terminationGracePeriodSeconds: 120",
        "terminationGracePeriodSeconds: 45",
        f"{CPU}.template.spec.containers[0].lifecycle.preStop: waits 60 s",
        "preStop",
    ),
    Planted(
        "a toleration of nothing",
        "operator: Exists, effect",
        "operator: Exists, value: present, effect",
        f"{GPU}.template.spec.tolerations[0].value: goes with operator: Equal",
    ),
    Planted(
        "a port out of range",
        "containerPort: 8265",
        "containerPort: 82650",
        f"{HEAD}.containers[0].ports[1].containerPort: must be at most 65535",
    ),
    Planted(
        "a port name too long",
        "{name: metrics,",
        "{name: autoscaler-metrics,",
        f"{HEAD}.containers[0].ports[3].name: 'autoscaler-metrics' has 18 characters",
    ),
    Planted(
        "a kind that is none",
        "kind: RayCluster",
        "kind: Raycluster",
        "kind: 'Raycluster' is no kind of KubeRay, did you mean 'RayCluster'?",
    ),
    Planted(
        "an old version of the API",
        "ray.io/v1\n",
        "ray.io/v1alpha1\n",
        "apiVersion: 'ray.io/v1alpha1' is no longer served, write ray.io/v1",
    ),
    Planted(
        "a name with capitals",
        "  name: bigray\n",
        "  name: BigRay\n",
        "metadata.name: 'BigRay' is not a name of small letters",
    ),
    Planted(
        "a name that starts with a digit",
        "  name: bigray\n",
        "  name: 2bigray\n",
        "metadata.name: '2bigray' has to be small letters",
    ),
    Planted(
        "a name too long",
        "  name: bigray\n",
        f"  name: {'big' * 18}\n",
        "metadata.name: has 54 characters, a RayCluster may have 53",
    ),
    Planted(
        "a claim that is not shared",
        "[ReadWriteMany]",
        "[ReadWriteOnce]",
        "spec.accessModes: pods on several nodes mount 'bigray-storage'",
    ),
    Planted(
        "a claim of nothing",
        "      storage: 100Gi",
        "      storge: 100Gi",
        "spec.resources: needs resources.requests.storage",
        "resources:",
    ),
    Planted(
        "a claim misspelt",
        "claimName: bigray-storage}",
        "claimName: bigray-storag}",
        f"{HEAD}.volumes[2].persistentVolumeClaim.claimName: this file has no PersistentVolumeClaim 'bigray-storag'",
    ),
    Planted(
        "a network policy without DNS",
        "  headGroupSpec:\n",
        "  networkPolicy: {mode: DenyAll}\n  headGroupSpec:\n",
        "spec.networkPolicy: head needs an egress rule for port 53",
    ),
)


@pytest.mark.parametrize("planted", CLUSTER, ids=lambda planted: planted.name)
def test_a_mistake_of_a_ray_cluster_is_told_once(planted: Planted) -> None:
    expect_one_fault("raycluster.yaml", planted)


JOB_HEAD = "spec.rayClusterSpec.headGroupSpec.template.spec"
JOB_CPU = "spec.rayClusterSpec.workerGroupSpecs[0]"
JOB = (
    Planted(
        "a misspelt entrypoint",
        "  entrypoint:",
        "  entry_point:",
        "spec.entry_point: is not a key here, did you mean 'ent",
    ),
    Planted(
        "no entrypoint",
        "  entrypoint: bigray train examples/digits/job.toml --set storage=s3://my-bucket/bigray/runs\n",
        "",
        "spec: 'entrypoint' is required",
        "spec:",
    ),
    Planted(
        "a command that bigray does not have",
        "bigray train",
        "bigray trian",
        "spec.entrypoint: `bigray trian`: 'trian' is not a command here, did you mean 'train'?",
    ),
    Planted(
        "storage on the pod's own disk",
        "storage=s3://my-bucket/bigray/runs",
        "storage=runs",
        "spec.entrypoint: storage=runs is on the pod's own disk",
    ),
    Planted(
        "a quote that does not end",
        "storage=s3://my-bucket/bigray/runs",
        "storage='s3://my-bucket",
        "spec.entrypoint: is no shell command",
    ),
    Planted(
        "a mode that is none",
        "K8sJobMode",
        "K8SJobMode",
        "spec.submissionMode: 'K8SJobMode' is not a choice here, did you mean 'K8sJobMode'?",
    ),
    Planted(
        "a submitter without its mode",
        "K8sJobMode",
        "HTTPMode",
        "spec.submitterConfig: is of K8sJobMode, submissionMode is HTTPMode",
        "submitterConfig",
    ),
    Planted(
        "a retry of a job that one submits oneself",
        "submissionMode: K8sJobMode\n  submitterConfig:\n    backoffLimit: 2             #",
        "submissionMode: InteractiveMode #",
        "spec.backoffLimit: does not go with InteractiveMode",
        "backoffLimit: 2",
    ),
    Planted(
        "fewer than no retries",
        "\n  backoffLimit: 2   ",
        "\n  backoffLimit: -1   ",
        "spec.backoffLimit: must be at least 0, got -1",
    ),
    Planted("no time at all", "86400", "0", "spec.activeDeadlineSeconds: must be at least 1, got 0"),
    Planted(
        "a deadline within a deadline",
        "  activeDeadlineSeconds: 86400",
        "  preRunningDeadlineSeconds: 90000\n  activeDeadlineSeconds: 86400",
        "spec.preRunningDeadlineSeconds: 90000 is not less",
    ),
    Planted(
        "a time to live of a cluster that stays",
        "Finishes: true",
        "Finishes: false",
        "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes",
        "ttlSeconds",
    ),
    Planted(
        "a misspelt switch that others need",
        "shutdownAfterJobFinishes",
        "shutdownAfterJobFinish",
        "spec.shutdownAfterJobFinish: is not a key here, did you mean 'shutdownAfterJobFinishes'?",
    ),
    Planted(
        "a flag in quotes",
        "shutdownAfterJobFinishes: true",
        'shutdownAfterJobFinishes: "true"',
        "spec.shutdownAfterJobFinishes: expected true or false",
    ),
    Planted(
        "rules of deletion and a shutdown",
        "  ttlSecondsAfterFinished: 300",
        "  deletionStrategy: {deletionRules: [{policy: DeleteCluster, condition: {jobStatus: FAILED}}]}\n"
        "  ttlSecondsAfterFinished: 300",
        "spec.deletionStrategy.deletionRules: do not go with",
    ),
    Planted(
        "half of an old strategy",
        "  ttlSecondsAfterFinished: 300",
        "  deletionStrategy: {onSuccess: {policy: DeleteCluster}}\n  ttlSecondsAfterFinished: 300",
        "spec.deletionStrategy: needs 'deletionRules', or both",
    ),
    Planted(
        "workers deleted under the autoscaler",
        "  ttlSecondsAfterFinished: 300",
        "  deletionStrategy: {onSuccess: {policy: DeleteWorkers}, onFailure: {policy: DeleteSelf}}\n"
        "  ttlSecondsAfterFinished: 300",
        "spec.deletionStrategy.onSuccess.policy: DeleteWorkers does not go with the autoscaler",
    ),
    Planted(
        "the service's key for a cluster",
        "  rayClusterSpec:",
        "  rayClusterConfig:",
        "spec.rayClusterConfig: is of a RayService, did you mean 'rayClusterSpec'?",
    ),
    Planted(
        "a misspelt cluster",
        "  rayClusterSpec:",
        "  rayClusterSpecs:",
        "spec.rayClusterSpecs: is not a key here, did you mean 'rayClusterSpec'?",
    ),
    Planted(
        "the group one level too high",
        "  rayClusterSpec:\n",
        "  rayVersion: '2.60.0'\n  rayClusterSpec:\n",
        "spec.rayVersion: belongs under 'rayClusterSpec'",
    ),
    Planted(
        "a misspelt key of the environment",
        "    working_dir:",
        "    working_dirs:",
        "spec.runtimeEnvYAML.working_dirs: is not a key here, did you mean 'working_dir'?",
    ),
    Planted(
        "variables under another name",
        "    env_vars:",
        "    env:",
        "spec.runtimeEnvYAML.env: is not a key here, did you mean 'env_vars'?",
    ),
    Planted(
        "a variable that is a number",
        'PYTHONUNBUFFERED: "1"',
        "PYTHONUNBUFFERED: 1",
        "spec.runtimeEnvYAML.env_vars.PYTHONUNBUFFERED: expected a text",
    ),
    Planted(
        "a secret in the environment",
        'PYTHONUNBUFFERED: "1"',
        "AWS_SECRET_ACCESS_KEY: abcdefgh",
        "spec.runtimeEnvYAML.env_vars.AWS_SECRET_ACCESS_KEY: is a secret in clear",
    ),
    Planted(
        "a package that is no archive",
        "/home/ray/bigray ",
        "s3://my-bucket/job ",
        "spec.runtimeEnvYAML.working_dir: 's3://my-bucket/job' is no archive",
    ),
    Planted(
        "an address with one slash",
        "/home/ray/bigray ",
        "s3:/my-bucket/job.zip ",
        "spec.runtimeEnvYAML.working_dir: 's3:/my-bucket/job.zip' has one slash",
    ),
    Planted(
        "pip and uv",
        "    excludes: [runs]",
        "    pip: [scipy]\n    uv: [scipy]",
        "spec.runtimeEnvYAML.uv: 'pip' and 'uv' exclude each other",
        "uv: [scipy]",
    ),
    Planted(
        "another Ray by pip",
        "    excludes: [runs]",
        "    pip: [ray==2.59.0]",
        "spec.runtimeEnvYAML.pip[0]: ray==2.59.0 is not the 2.60.0",
    ),
    Planted(
        "an excludes that is no list",
        "excludes: [runs]",
        "excludes: runs",
        "spec.runtimeEnvYAML.excludes: expected a list",
    ),
    Planted(
        "a key of the environment twice",
        "    excludes: [runs]",
        "    working_dir: /srv",
        "spec.runtimeEnvYAML.working_dir: is there twice",
    ),
    Planted(
        "an environment that is no YAML",
        "    excludes: [runs]",
        "    excludes: [runs",
        "spec.runtimeEnvYAML: is not YAML",
        "env_vars:",
    ),
    Planted(
        "an environment that is no text",
        "  runtimeEnvYAML: |\n",
        "  runtimeEnvYAML:\n",
        "spec.runtimeEnvYAML: expected a text, got a mapping",
        "runtimeEnvYAML:",
    ),
    Planted(
        "resources that are no JSON",
        "\n  backoffLimit: 2   ",
        "\n  entrypointResources: big=1\n  backoffLimit: 2   ",
        "spec.entrypointResources: is not JSON",
    ),
    Planted(
        "tokens by Kubernetes",
        "      mode: token ",
        "      enableK8sTokenAuth: true\n      mode: token ",
        "spec.rayClusterSpec.authOptions.enableK8sTokenAuth: is not taken in a RayJob",
    ),
    Planted(
        "more at least than at most",
        "minReplicas: 1",
        "minReplicas: 5",
        f"{JOB_CPU}.minReplicas: 5 is more than maxReplicas, 4",
    ),
    Planted(
        "a service account misspelt",
        "serviceAccountName: bigray",
        "serviceAccountName: bigry",
        f"{JOB_HEAD}.serviceAccountName: this file has no ServiceAccount 'bigry', did you mean",
    ),
    Planted(
        "a name too long",
        "  name: bigray-digits",
        f"  name: {'digits' * 8}",
        "metadata.name: has 48 characters, a RayJob may have 47",
    ),
    Planted(
        "a strategy of upgrades",
        "    enableInTreeAutoscaling",
        "    upgradeStrategy: {type: Recreate}\n    enableInTreeAutoscaling",
        "spec.rayClusterSpec.upgradeStrategy: only a RayCluster",
    ),
)


@pytest.mark.parametrize("planted", JOB, ids=lambda planted: planted.name)
def test_a_mistake_of_a_ray_job_is_told_once(planted: Planted) -> None:
    expect_one_fault("rayjob.yaml", planted)


SERVE = "spec.serveConfigV2"
MODEL = f"{SERVE}.applications[0].deployments[0]"
SERVICE_HEAD = "spec.rayClusterConfig.headGroupSpec"
SERVICE = (
    Planted(
        "a misspelt configuration",
        "  serveConfigV2:",
        "  serveConfig2:",
        "spec.serveConfig2: is not a key here, did you mean 'serveConfigV2'?",
    ),
    Planted(
        "a configuration of the old API", "  serveConfigV2: |", "  serveConfig: |", "spec.serveConfig: was of v1alpha1"
    ),
    Planted(
        "the job's key for a cluster",
        "  rayClusterConfig:",
        "  rayClusterSpec:",
        "spec.rayClusterSpec: is of a RayJob, did you mean 'rayClusterConfig'?",
    ),
    Planted(
        "a misspelt key of the application",
        "import_path:",
        "import_paths:",
        f"{SERVE}.applications[0].import_paths: is not a key here, did you mean 'import_path'?",
    ),
    Planted(
        "deployments in the singular",
        "        deployments:",
        "        deployment:",
        f"{SERVE}.applications[0].deployment: is not a key here, did you mean 'deployments'?",
    ),
    Planted(
        "a misspelt key of the deployment",
        "max_replicas_per_node",
        "max_replica_per_node",
        f"{MODEL}.max_replica_per_node: is not a key here, did you mean",
    ),
    Planted(
        "a misspelt key of the scaling",
        "max_replicas: 4",
        "max_replica: 4",
        f"{MODEL}.autoscaling_config.max_replica: is not a key here, did you mean 'max_replicas'?",
    ),
    Planted(
        "a misspelt setting of the policy",
        "target_utilisation",
        "target_utilization",
        f"{MODEL}.autoscaling_config.policy.policy_kwargs.target_utilization: is not",
    ),
    Planted(
        "a misspelt argument",
        "          bundle: s3",
        "          bundel: s3",
        f"{SERVE}.applications[0].args.bundel: is not a key here, did you mean 'bundle'?",
    ),
    Planted(
        "a bundle on no volume",
        "bundle: s3://my-bucket/bigray/",
        "bundle: ",
        f"{SERVE}.applications[0].args.bundle: 'runs/digits-1a2b3c/bundle' is relative",
    ),
    Planted(
        "an endpoint that anybody may ask",
        "          keys: /etc/bigray/keys.json\n",
        "",
        f"{SERVE}.applications[0].args: anybody who reaches the Service may ask",
        "args:",
    ),
    Planted(
        "an address that nobody reaches",
        "host: 0.0.0.0 ",
        "host: 127.0.0.1 ",
        f"{SERVE}.http_options.host: '127.0.0.1' can only be reached from inside its pod",
    ),
    Planted(
        "a port that the Service does not have",
        "port: 8000",
        "port: 8080",
        f"{SERVICE_HEAD}.template.spec.containers[0].ports[3].containerPort: the port named 'serve' is 8000",
        "{name: serve",
    ),
    Planted(
        "more at least than at most",
        "min_replicas: 2",
        "min_replicas: 5",
        f"{MODEL}.autoscaling_config.min_replicas: 5 is more than max_replicas, 4",
    ),
    Planted(
        "a fixed number and a scaling",
        "            max_replicas_per_node: 1 ",
        "            num_replicas: 2 ",
        f"{MODEL}.num_replicas: 'num_replicas' and 'autoscaling_config' exclude",
    ),
    Planted(
        "no replicas at most",
        "max_replicas: 4",
        "max_replicas: 0",
        f"{MODEL}.autoscaling_config.max_replicas: must be at least 1, got 0",
    ),
    Planted(
        "Serve's own limit",
        "            max_replicas_per_node: 1 ",
        "            max_ongoing_requests: 8 ",
        f"{MODEL}.max_ongoing_requests: Serve's own limit does not hold here",
    ),
    Planted(
        "another deployment",
        "- name: Model",
        "- name: Modle",
        f"{MODEL}.name: bigray's application has one deployment, 'Model', got 'Modle'",
    ),
    Planted(
        "a prefix without its slash",
        "route_prefix: /",
        "route_prefix: model",
        f"{SERVE}.applications[0].route_prefix: has to start with '/'",
    ),
    Planted(
        "a place that is none", "EveryNode", "EachNode", f"{SERVE}.proxy_location: 'EachNode' is not a choice here"
    ),
    Planted(
        "a key of the configuration twice",
        "      port: 8000\n",
        "      port: 8000\n      host: 0.0.0.0\n",
        f"{SERVE}.http_options.host: is there twice",
    ),
    Planted(
        "CPUs of the deployment",
        "              num_cpus: 1\n",
        "              num_cpu: 1\n",
        f"{MODEL}.ray_actor_options.num_cpu: is not a key here, did you mean 'num_cpus'?",
    ),
    Planted(
        "a text for a number",
        "num_cpus: 1\n",
        'num_cpus: "1"\n',
        f"{MODEL}.ray_actor_options.num_cpus: expected a number",
    ),
    Planted(
        "a configuration that is no text",
        "serveConfigV2: |",
        "serveConfigV2:",
        "spec.serveConfigV2: expected a text, got a mapping",
    ),
    Planted(
        "an environment misspelt",
        "        deployments:\n",
        "        runtime_env: {working_dirs: .}\n        deployments:\n",
        f"{SERVE}.applications[0].runtime_env.working_dirs: is not a key",
    ),
    Planted(
        "an upgrade that is none",
        "type: NewCluster ",
        "type: NewClusters ",
        "spec.upgradeStrategy.type: 'NewClusters' is not a choice here, did you mean 'NewCluster'?",
    ),
    Planted(
        "a gradual upgrade without its options",
        "type: NewCluster ",
        "type: NewClusterWithIncrementalUpgrade ",
        "spec.upgradeStrategy: 'clusterUpgradeOptions' is required",
        "upgradeStrategy:",
    ),
    Planted(
        "a step above the surge",
        "type: NewCluster ",
        "clusterUpgradeOptions: {gatewayClassName: istio, intervalSeconds: 30, stepSizePercent: 20, "
        "maxSurgePercent: 10}\n    type: NewClusterWithIncrementalUpgrade ",
        "spec.upgradeStrategy.clusterUpgradeOptions.stepSizePercent: 20 is more than",
    ),
    Planted(
        "no delay",
        "DelaySeconds: 60",
        "DelaySeconds: -1",
        "spec.rayClusterDeletionDelaySeconds: must be at least 0, got -1",
    ),
    Planted(
        "a time that is none",
        "15m",
        "15 minutes",
        "metadata.annotations.ray.io/initializing-timeout: takes a time such as 5m",
    ),
    Planted(
        "a name for the head's service",
        "    headGroupSpec:\n",
        "    headGroupSpec:\n      headService: {metadata: {name: head}}\n",
        f"{SERVICE_HEAD}.headService.metadata.name: is not taken in a RayService",
    ),
    Planted(
        "Redis' password in clear",
        "        valueFrom:\n          secretKeyRef: {name: bigray-redis, key: password}",
        "        value: swordfish",
        "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword.value: is a secret in clear",
    ),
    Planted(
        "Redis' password as a parameter",
        'num-cpus: "0" ',
        "redis-password: $REDIS_PASSWORD ",
        f"{SERVICE_HEAD}.rayStartParams.redis-password: is not taken here",
    ),
    Planted(
        "Redis without an address",
        "      redisAddress: redis:6379\n",
        "",
        "spec.rayClusterConfig.gcsFaultToleranceOptions: 'redisAddress' is required",
        "gcsFaultToleranceOptions:",
    ),
    Planted(
        "a disk for Redis",
        "      redisAddress: redis:6379\n",
        "      redisAddress: redis:6379\n      storage: {size: 1Gi}\n",
        "spec.rayClusterConfig.gcsFaultToleranceOptions.storage: goes with backend: rocksdb",
    ),
    Planted(
        "fault tolerance by annotation too",
        "  annotations:\n",
        '  annotations:\n    ray.io/ft-enabled: "true"\n',
        "metadata.annotations.ray.io/ft-enabled: excludes 'gcsFaultToleranceOptions'",
    ),
    Planted(
        "a key of a secret under another name",
        "secret: {secretName: bigray-keys,",
        "secret: {name: bigray-keys,",
        f"{SERVICE_HEAD}.template.spec.volumes[2].secret.name: is not a key here, did you mean 'secretName'?",
    ),
    Planted(
        "a probe of no port",
        "httpGet: {path: /api/gcs_healthz, port: 8265}",
        "httpGet: {path: /api/gcs_healthz, port: web}",
        f"{SERVICE_HEAD}.template.spec.containers[0].readinessProbe.httpGet.port: the container has no port",
    ),
    Planted(
        "two ways to probe",
        "httpGet: {path: /api/gcs_healthz, port: 8265}",
        "httpGet: {path: /api/gcs_healthz, port: 8265}\n                tcpSocket: {port: 8265}",
        f"{SERVICE_HEAD}.template.spec.containers[0].readinessProbe.tcpSocket: 'httpGet' and 'tcpSocket' exclude",
    ),
    Planted(
        "an upgrade of clusters",
        "    enableInTreeAutoscaling: true",
        "    upgradeStrategy: {type: Recreate}\n    enableInTreeAutoscaling: true",
        "spec.rayClusterConfig.upgradeStrategy: only a RayCluster of its own",
    ),
    Planted(
        "GPUs of which none is asked for",
        'requests: {cpu: "8", memory: 32Gi, nvidia.com/gpu: "1"}',
        'requests: {cpu: "8", memory: 32Gi, nvidia.com/gpu: "2"}',
        "spec.rayClusterConfig.workerGroupSpecs[1].template.spec.containers[0].resources.requests.nvidia.com/gpu: 2 ",
    ),
)


@pytest.mark.parametrize("planted", SERVICE, ids=lambda planted: planted.name)
def test_a_mistake_of_a_ray_service_is_told_once(planted: Planted) -> None:
    expect_one_fault("rayservice.yaml", planted)


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"])
def test_our_own_manifests_have_no_fault(file: str) -> None:
    assert faults_of(text_of(file)) == []


def test_at_least_thirty_mistakes_are_planted_in_each_kind() -> None:
    assert min(len(CLUSTER), len(JOB), len(SERVICE)) >= 30


FROM_OUTSIDE = {"submit", "jobs", "logs", "stop", "resume", "doctor", "cluster"}
"""Commands that drive a cluster, and are no job on it."""


def test_the_commands_of_an_entrypoint_are_those_of_the_command_line() -> None:
    import typer

    from bigray.cli import app

    commands = set(getattr(typer.main.get_command(app), "commands", ()))

    assert commands - FROM_OUTSIDE == set(COMMANDS)


def test_the_parameters_known_are_those_of_ray_start() -> None:
    from ray.scripts.scripts import start

    options = {name.removeprefix("--") for option in start.params for name in option.opts if name.startswith("--")}

    assert options >= START_OPTIONS
    assert {name for name in options - START_OPTIONS if "_" not in name} <= {"verbose", "log-style", "log-color"}
