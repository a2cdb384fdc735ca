"""The keys of KubeRay's objects (ray.io/v1, operator 1.4 to 1.7) and of the plain objects that stand beside them."""

from __future__ import annotations

from bigray.cluster.checking.kube_pod import (
    CLAIM,
    CONTAINER_SECURITY,
    ENV,
    ENV_FROM,
    LABELS,
    METADATA,
    NAME,
    PORT_OR_NAME,
    PULL,
    RESOURCES,
    TEMPLATE,
    VALUE_SOURCE,
    VOLUME_MOUNTS,
)
from bigray.cluster.checking.shapes import (
    AMOUNT,
    ANYTHING,
    COUNT,
    FLAG,
    PORT,
    TEXT,
    TEXT_TABLE,
    TEXTS,
    WHOLE,
    Each,
    Fields,
    Scalar,
    Shape,
    Table,
    choice,
    fields,
)

_SERVICE_TYPE = choice("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_SERVICE_PORT = fields(
    "port", port=PORT, targetPort=PORT_OR_NAME, name=TEXT, protocol=choice("TCP", "UDP", "SCTP"), nodePort=PORT,
    appProtocol=TEXT,
)  # fmt: skip
_SERVICE_SPEC = fields(
    type=_SERVICE_TYPE, ports=Each(_SERVICE_PORT), selector=TEXT_TABLE, clusterIP=TEXT, clusterIPs=TEXTS,
    externalIPs=TEXTS, externalName=TEXT, externalTrafficPolicy=choice("Cluster", "Local"),
    internalTrafficPolicy=choice("Cluster", "Local"), healthCheckNodePort=PORT, ipFamilies=TEXTS, ipFamilyPolicy=TEXT,
    loadBalancerIP=TEXT, loadBalancerClass=TEXT, loadBalancerSourceRanges=TEXTS, allocateLoadBalancerNodePorts=FLAG,
    publishNotReadyAddresses=FLAG, sessionAffinity=choice("ClientIP", "None"), sessionAffinityConfig=ANYTHING,
    trafficDistribution=TEXT,
)  # fmt: skip
_SERVICE: dict[str, Shape] = {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": _SERVICE_SPEC}
_SELECTOR = fields(matchLabels=TEXT_TABLE, matchExpressions=ANYTHING)
_PEER = Fields(
    {
        "podSelector": _SELECTOR,
        "namespaceSelector": _SELECTOR,
        "ipBlock": Fields({"cidr": TEXT, "except": TEXTS}, ("cidr",)),
    }
)
_POLICY_PORT = fields(port=PORT_OR_NAME, endPort=PORT, protocol=choice("TCP", "UDP", "SCTP"))
_INGRESS = Each(Fields({"from": Each(_PEER), "ports": Each(_POLICY_PORT)}))
_EGRESS = Each(Fields({"to": Each(_PEER), "ports": Each(_POLICY_PORT)}))

# What RayCluster, RayJob and RayService share

_START_PARAMS = TEXT_TABLE
_GROUP: dict[str, Shape] = {
    "rayStartParams": _START_PARAMS, "template": TEMPLATE, "resources": TEXT_TABLE, "labels": TEXT_TABLE,
}  # fmt: skip
HEAD_GROUP = Fields(
    _GROUP
    | {
        "serviceType": _SERVICE_TYPE, "headService": Fields(_SERVICE), "enableIngress": FLAG,
        "ingressOptions": fields(
            host=TEXT, path=TEXT, pathType=choice("Exact", "Prefix", "ImplementationSpecific"), tls=ANYTHING
        ),
    },
    ("template",),
    gone={
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), "a cluster has one head; remove it"),
        "groupName": "the head group has no name; remove it",
    },
)  # fmt: skip
WORKER_GROUP = Fields(
    _GROUP
    | {
        "groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
        "numOfHosts": Scalar("whole", least=1), "idleTimeoutSeconds": COUNT, "priority": WHOLE, "suspend": FLAG,
        "scaleStrategy": fields(workersToDelete=TEXTS, multihostReplicasToDelete=TEXTS),
    },
    ("groupName", "template"),
    gone={
        "rayActorOptions": "belongs into serveConfigV2",
        "serviceType": "only the head group has a service; remove it",
    },
)  # fmt: skip
AUTOSCALER = fields(
    version=choice("v1", "v2"), upscalingMode=choice("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT, image=TEXT, imagePullPolicy=PULL, resources=RESOURCES, env=ENV, envFrom=ENV_FROM,
    volumeMounts=VOLUME_MOUNTS, securityContext=CONTAINER_SECURITY, command=TEXTS, args=TEXTS,
)  # fmt: skip
_CREDENTIAL = Fields({"value": TEXT, "valueFrom": VALUE_SOURCE}, one_of=("value", "valueFrom"))
GCS_FAULT_TOLERANCE = fields(
    backend=choice("redis", "rocksdb"), redisAddress=TEXT, redisUsername=_CREDENTIAL, redisPassword=_CREDENTIAL,
    externalStorageNamespace=TEXT,
    storage=fields(
        claimName=TEXT, size=AMOUNT, storageClassName=TEXT, subPath=TEXT, accessModes=TEXTS,
        deletionPolicy=choice("DeleteWithCluster", "Retain"),
    ),
)  # fmt: skip
_RULES: dict[str, Shape] = {"ingressRules": _INGRESS, "egressRules": _EGRESS}
CLUSTER_FIELDS: dict[str, Shape] = {
    "rayVersion": Scalar("text", pattern=r"\d+\.\d+\.\d+\S*", hint="a Ray version such as 2.60.0"),
    "headGroupSpec": HEAD_GROUP, "workerGroupSpecs": Each(WORKER_GROUP), "enableInTreeAutoscaling": FLAG,
    "autoscalerOptions": AUTOSCALER, "headServiceAnnotations": TEXT_TABLE, "suspend": FLAG,
    "authOptions": fields(mode=choice("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    "gcsFaultToleranceOptions": GCS_FAULT_TOLERANCE,
    "networkPolicy": fields(
        mode=choice("DenyAll", "DenyAllIngress", "DenyAllEgress"), head=Fields(_RULES), worker=Fields(_RULES),
        workerGroups=Each(Fields({"groupName": TEXT, **_RULES}, ("groupName",))),
    ),
    "tlsOptions": fields(enabled=FLAG),
    "historyServerOptions": fields(
        collectorOptions=fields(image=TEXT, imagePullPolicy=PULL, resources=RESOURCES, env=ENV)
    ),
    "managedBy": choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    "upgradeStrategy": fields(type=choice("Recreate", "None")),
}  # fmt: skip
_MISPLACED = {
    "idleTimeoutSeconds": "belongs under 'autoscalerOptions'",
    "upscalingMode": "belongs under 'autoscalerOptions'",
    "rayClusterSpec": "is of a RayJob; here its keys stand under 'spec' themselves",
    "entrypoint": "is of a RayJob; set kind: RayJob, and this cluster under spec.rayClusterSpec",
    "serveConfigV2": "is of a RayService; set kind: RayService, and this cluster under spec.rayClusterConfig",
}
CLUSTER = Fields(CLUSTER_FIELDS, ("headGroupSpec",), gone=_MISPLACED)
_INNER = Fields(
    {key: shape for key, shape in CLUSTER_FIELDS.items() if key != "upgradeStrategy"},
    ("headGroupSpec",),
    gone={key: message for key, message in _MISPLACED.items() if key in ("idleTimeoutSeconds", "upscalingMode")}
    | {"upgradeStrategy": "only a RayCluster of its own has one; remove it"},
)

# RayJob

_POLICY = choice("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
JOB = Fields(
    {
        "entrypoint": TEXT, "rayClusterSpec": _INNER, "clusterSelector": TEXT_TABLE, "runtimeEnvYAML": TEXT,
        "submissionMode": choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "submitterPodTemplate": TEMPLATE, "submitterConfig": fields(backoffLimit=COUNT), "metadata": TEXT_TABLE,
        "jobId": TEXT, "entrypointNumCpus": Scalar("number", least=0), "entrypointNumGpus": Scalar("number", least=0),
        "entrypointResources": TEXT, "shutdownAfterJobFinishes": FLAG, "ttlSecondsAfterFinished": COUNT,
        "activeDeadlineSeconds": Scalar("whole", least=1), "preRunningDeadlineSeconds": Scalar("whole", least=1),
        "backoffLimit": COUNT, "suspend": FLAG, "managedBy": CLUSTER_FIELDS["managedBy"],
        "deletionStrategy": fields(
            onSuccess=fields(policy=_POLICY), onFailure=fields(policy=_POLICY),
            deletionRules=Each(
                fields(
                    "policy condition", policy=_POLICY,
                    condition=Fields(
                        {
                            "jobStatus": choice("SUCCEEDED", "FAILED"), "jobDeploymentStatus": choice("Failed"),
                            "ttlSeconds": COUNT,
                        },
                        one_of=("jobStatus", "jobDeploymentStatus"),
                    ),
                ),
                least=1,
            ),
        ),
    },
    gone={
        "rayClusterConfig": "is of a RayService, did you mean 'rayClusterSpec'?",
        "runtimeEnv": "is not a key here, did you mean 'runtimeEnvYAML'?",
        "headGroupSpec": "belongs under 'rayClusterSpec'",
        "workerGroupSpecs": "belongs under 'rayClusterSpec'",
        "rayVersion": "belongs under 'rayClusterSpec'",
    },
)  # fmt: skip

# RayService

SERVICE = Fields(
    {
        "serveConfigV2": TEXT, "rayClusterConfig": _INNER, "serveService": Fields(_SERVICE),
        "rayClusterDeletionDelaySeconds": COUNT, "excludeHeadPodFromServeSvc": FLAG,
        "serviceUnhealthySecondThreshold": WHOLE, "deploymentUnhealthySecondThreshold": WHOLE, "suspend": FLAG,
        "managedBy": CLUSTER_FIELDS["managedBy"],
        "upgradeStrategy": fields(
            type=choice("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
            clusterUpgradeOptions=fields(
                "stepSizePercent intervalSeconds gatewayClassName", maxSurgePercent=Scalar("whole", least=0, most=100),
                stepSizePercent=Scalar("whole", least=0, most=100), intervalSeconds=Scalar("whole", least=1),
                gatewayClassName=TEXT, upgradePolicy=ANYTHING,
            ),
        ),
    },
    ("rayClusterConfig",),
    gone={
        "rayClusterSpec": "is of a RayJob, did you mean 'rayClusterConfig'?",
        "serveConfig": "was of v1alpha1 and is not read, use 'serveConfigV2'",
        "headGroupSpec": "belongs under 'rayClusterConfig'",
        "workerGroupSpecs": "belongs under 'rayClusterConfig'",
        "rayVersion": "belongs under 'rayClusterConfig'",
    },
)  # fmt: skip

RAY_KINDS: dict[str, tuple[str, Fields]] = {
    "RayCluster": ("spec", CLUSTER),
    "RayJob": ("spec", JOB),
    "RayService": ("spec", SERVICE),
}

# Plain objects


def _object(required: str = "metadata", /, **shapes: Shape) -> Fields:
    return fields(required, apiVersion=TEXT, kind=TEXT, metadata=METADATA, status=ANYTHING, **shapes)


_DATA = Scalar("text")
PLAIN_KINDS: dict[str, tuple[str, Fields]] = {
    "Secret": ("v1", _object(type=TEXT, data=Table(_DATA), stringData=TEXT_TABLE, immutable=FLAG)),
    "ConfigMap": ("v1", _object(data=TEXT_TABLE, binaryData=Table(_DATA), immutable=FLAG)),
    "PersistentVolumeClaim": ("v1", _object("metadata spec", spec=CLAIM)),
    "Service": ("v1", _object("metadata spec", spec=_SERVICE_SPEC)),
    "ServiceAccount": (
        "v1",
        _object(automountServiceAccountToken=FLAG, secrets=ANYTHING, imagePullSecrets=Each(fields(name=TEXT))),
    ),
    "Namespace": ("v1", _object(spec=ANYTHING)),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        _object(
            "metadata spec",
            spec=fields(
                podSelector=_SELECTOR, policyTypes=Each(choice("Ingress", "Egress")), ingress=_INGRESS, egress=_EGRESS
            ),
        ),
    ),
}


def ray_object(spec: Fields) -> Fields:
    """The whole object around a spec."""
    return fields("metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec, status=ANYTHING)


__all__ = ["LABELS", "NAME", "PLAIN_KINDS", "RAY_KINDS", "ray_object"]
