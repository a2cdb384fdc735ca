"""The keys of a pod template: Kubernetes' own names (core/v1), all of them, so that none is refused that is right.

What matters to Ray is looked into; what does not (affinity, rare sources of volumes) is only known by name.
"""

from __future__ import annotations

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

NAME = Scalar("text", pattern=r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", hint="a name of small letters, digits and '-'")
SUBDOMAIN = Scalar(
    "text",
    pattern=r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*",
    hint="a name of small letters, digits, '-' and '.'",
)
LABEL = Scalar(
    "text",
    pattern=r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?",
    hint="a label: at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends",
)
LABEL_KEY = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
PORT_OR_NAME = Scalar("whole or text")
PULL = choice("Always", "IfNotPresent", "Never")
LABELS = Table(LABEL)

METADATA = fields(
    name=SUBDOMAIN, generateName=TEXT, namespace=NAME, labels=LABELS, annotations=TEXT_TABLE, finalizers=TEXTS,
    ownerReferences=ANYTHING, creationTimestamp=ANYTHING, uid=TEXT, resourceVersion=TEXT, generation=WHOLE,
    managedFields=ANYTHING, selfLink=TEXT, deletionTimestamp=ANYTHING, deletionGracePeriodSeconds=WHOLE,
)  # fmt: skip

# Environment

_KEY_REFERENCE = fields("key", name=TEXT, key=TEXT, optional=FLAG)
VALUE_SOURCE = Fields(
    {
        "secretKeyRef": _KEY_REFERENCE,
        "configMapKeyRef": _KEY_REFERENCE,
        "fieldRef": fields("fieldPath", fieldPath=TEXT, apiVersion=TEXT),
        "resourceFieldRef": fields("resource", containerName=TEXT, resource=TEXT, divisor=AMOUNT),
        "fileKeyRef": ANYTHING,
    },
    one_of=("secretKeyRef", "configMapKeyRef", "fieldRef", "resourceFieldRef", "fileKeyRef"),
)
ENV = Each(Fields({"name": TEXT, "value": TEXT, "valueFrom": VALUE_SOURCE}, ("name",), one_of=("value", "valueFrom")))
_SOURCE = fields(name=TEXT, optional=FLAG)
ENV_FROM = Each(Fields({"prefix": TEXT, "secretRef": _SOURCE, "configMapRef": _SOURCE}))

# Resources

_AMOUNTS = Table(
    AMOUNT, keys=r"cpu|memory|ephemeral-storage|hugepages-.+|[^/]+/.+", known=("cpu", "memory", "ephemeral-storage")
)
RESOURCES = Fields(
    {"limits": _AMOUNTS, "requests": _AMOUNTS, "claims": ANYTHING},
    gone={
        "limit": "is not a key here, did you mean 'limits'?",
        "request": "is not a key here, did you mean 'requests'?",
        "memory": "belongs under 'limits' and 'requests'",
        "cpu": "belongs under 'limits' and 'requests'",
    },
)

# What a container runs

_EXEC = fields(command=TEXTS)
_HTTP = fields(
    "port", path=TEXT, port=PORT_OR_NAME, host=TEXT, scheme=choice("HTTP", "HTTPS"),
    httpHeaders=Each(fields("name value", name=TEXT, value=TEXT)),
)  # fmt: skip
_TCP = fields("port", port=PORT_OR_NAME, host=TEXT)
PROBE = Fields(
    {
        "exec": _EXEC, "httpGet": _HTTP, "tcpSocket": _TCP, "grpc": fields("port", port=PORT, service=TEXT),
        "initialDelaySeconds": COUNT, "timeoutSeconds": Scalar("whole", least=1),
        "periodSeconds": Scalar("whole", least=1), "successThreshold": Scalar("whole", least=1),
        "failureThreshold": Scalar("whole", least=1), "terminationGracePeriodSeconds": Scalar("whole", least=1),
    },
    one_of=("exec", "httpGet", "tcpSocket", "grpc"),
)  # fmt: skip
_HANDLER = Fields(
    {"exec": _EXEC, "httpGet": _HTTP, "tcpSocket": _TCP, "sleep": fields("seconds", seconds=COUNT)},
    one_of=("exec", "httpGet", "tcpSocket", "sleep"),
)
_SECCOMP = fields(
    "type", type=choice("RuntimeDefault", "Localhost", "Unconfined"), localhostProfile=TEXT
)  # fmt: skip
_SHARED_SECURITY: dict[str, Shape] = {
    "runAsUser": COUNT, "runAsGroup": COUNT, "runAsNonRoot": FLAG, "seLinuxOptions": ANYTHING,
    "seccompProfile": _SECCOMP, "appArmorProfile": _SECCOMP, "windowsOptions": ANYTHING,
}  # fmt: skip
CONTAINER_SECURITY = Fields(
    _SHARED_SECURITY
    | {
        "allowPrivilegeEscalation": FLAG, "privileged": FLAG, "readOnlyRootFilesystem": FLAG, "procMount": TEXT,
        "capabilities": fields(add=TEXTS, drop=TEXTS),
    },
    gone={"fsGroup": "belongs into the pod's securityContext, beside 'containers'"},
)  # fmt: skip
POD_SECURITY = Fields(
    _SHARED_SECURITY
    | {
        "fsGroup": COUNT, "fsGroupChangePolicy": choice("Always", "OnRootMismatch"), "supplementalGroups": Each(COUNT),
        "supplementalGroupsPolicy": choice("Merge", "Strict"), "seLinuxChangePolicy": TEXT,
        "sysctls": Each(fields("name value", name=TEXT, value=TEXT)),
    },
    gone=dict.fromkeys(
        ("privileged", "allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"),
        "belongs into the securityContext of each container",
    ),
)  # fmt: skip
VOLUME_MOUNTS = Each(
    fields(
        "name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG, recursiveReadOnly=TEXT, subPath=TEXT,
        subPathExpr=TEXT, mountPropagation=choice("None", "HostToContainer", "Bidirectional"),
    )
)  # fmt: skip
CONTAINER = fields(
    "name image", name=NAME, image=TEXT, imagePullPolicy=PULL, command=TEXTS, args=TEXTS, workingDir=TEXT, env=ENV,
    envFrom=ENV_FROM,
    ports=Each(
        fields(
            "containerPort", containerPort=PORT, name=NAME, protocol=choice("TCP", "UDP", "SCTP"), hostPort=PORT,
            hostIP=TEXT,
        )
    ),
    resources=RESOURCES, resizePolicy=ANYTHING, restartPolicy=choice("Always", "OnFailure", "Never"),
    restartPolicyRules=ANYTHING, volumeMounts=VOLUME_MOUNTS,
    volumeDevices=Each(fields("name devicePath", name=TEXT, devicePath=TEXT)),
    livenessProbe=PROBE, readinessProbe=PROBE, startupProbe=PROBE,
    lifecycle=fields(postStart=_HANDLER, preStop=_HANDLER, stopSignal=TEXT),
    terminationMessagePath=TEXT, terminationMessagePolicy=choice("File", "FallbackToLogsOnError"),
    securityContext=CONTAINER_SECURITY, stdin=FLAG, stdinOnce=FLAG, tty=FLAG,
)  # fmt: skip

# Volumes

_MODE = Scalar("whole", least=0, most=0o777)
_ITEMS = Each(fields("key path", key=TEXT, path=TEXT, mode=_MODE))
CLAIM = fields(
    accessModes=Each(choice("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"), least=1),
    resources=fields(requests=Table(AMOUNT), limits=Table(AMOUNT)), storageClassName=TEXT, volumeName=TEXT,
    volumeMode=choice("Filesystem", "Block"), selector=ANYTHING, dataSource=ANYTHING, dataSourceRef=ANYTHING,
    volumeAttributesClassName=TEXT,
)  # fmt: skip
_VOLUME_SOURCES: dict[str, Shape] = {
    "emptyDir": fields(medium=choice("", "Memory", "HugePages"), sizeLimit=AMOUNT),
    "persistentVolumeClaim": fields("claimName", claimName=TEXT, readOnly=FLAG),
    "secret": Fields(
        {"secretName": TEXT, "items": _ITEMS, "defaultMode": _MODE, "optional": FLAG},
        gone={"name": "is not a key here, did you mean 'secretName'?"},
    ),
    "configMap": Fields(
        {"name": TEXT, "items": _ITEMS, "defaultMode": _MODE, "optional": FLAG},
        gone={"configMapName": "is not a key here, did you mean 'name'?"},
    ),
    "hostPath": fields("path", path=TEXT, type=TEXT),
    "projected": fields(sources=ANYTHING, defaultMode=_MODE),
    "downwardAPI": fields(items=ANYTHING, defaultMode=_MODE),
    "csi": fields(
        "driver", driver=TEXT, fsType=TEXT, readOnly=FLAG, volumeAttributes=TEXT_TABLE,
        nodePublishSecretRef=fields(name=TEXT),
    ),
    "nfs": fields("server path", server=TEXT, path=TEXT, readOnly=FLAG),
    "ephemeral": fields(volumeClaimTemplate=fields("spec", metadata=METADATA, spec=CLAIM)),
}  # fmt: skip
_VOLUME_SOURCES |= dict.fromkeys(
    (
        "awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "fc", "flexVolume", "flocker",
        "gcePersistentDisk", "gitRepo", "glusterfs", "image", "iscsi", "photonPersistentDisk", "portworxVolume",
        "quobyte", "rbd", "scaleIO", "storageos", "vsphereVolume",
    ),
    ANYTHING,
)  # fmt: skip
VOLUME = Fields({"name": NAME, **_VOLUME_SOURCES}, ("name",), one_of=tuple(_VOLUME_SOURCES))

# The pod

_TOLERATION = fields(
    key=TEXT, operator=choice("Exists", "Equal", "Lt", "Gt"), value=TEXT,
    effect=choice("NoSchedule", "PreferNoSchedule", "NoExecute"), tolerationSeconds=WHOLE,
)  # fmt: skip
_AFFINITY_TERMS = fields(
    requiredDuringSchedulingIgnoredDuringExecution=ANYTHING, preferredDuringSchedulingIgnoredDuringExecution=ANYTHING
)
POD_FIELDS: dict[str, Shape] = {
    "containers": Each(CONTAINER), "initContainers": Each(CONTAINER), "ephemeralContainers": ANYTHING,
    "volumes": Each(VOLUME), "restartPolicy": choice("Always", "OnFailure", "Never"),
    "terminationGracePeriodSeconds": COUNT, "activeDeadlineSeconds": Scalar("whole", least=1),
    "dnsPolicy": choice("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"), "dnsConfig": ANYTHING,
    "nodeSelector": TEXT_TABLE, "nodeName": TEXT, "serviceAccountName": TEXT, "serviceAccount": TEXT,
    "automountServiceAccountToken": FLAG, "hostNetwork": FLAG, "hostPID": FLAG, "hostIPC": FLAG, "hostUsers": FLAG,
    "shareProcessNamespace": FLAG, "securityContext": POD_SECURITY, "imagePullSecrets": Each(fields(name=TEXT)),
    "hostname": TEXT, "hostnameOverride": TEXT, "subdomain": TEXT, "setHostnameAsFQDN": FLAG,
    "affinity": fields(nodeAffinity=_AFFINITY_TERMS, podAffinity=_AFFINITY_TERMS, podAntiAffinity=_AFFINITY_TERMS),
    "tolerations": Each(_TOLERATION), "schedulerName": TEXT, "hostAliases": ANYTHING, "priorityClassName": TEXT,
    "priority": WHOLE, "preemptionPolicy": choice("PreemptLowerPriority", "Never"), "readinessGates": ANYTHING,
    "runtimeClassName": TEXT, "enableServiceLinks": FLAG, "overhead": Table(AMOUNT),
    "topologySpreadConstraints": Each(
        fields(
            "maxSkew topologyKey whenUnsatisfiable", maxSkew=Scalar("whole", least=1), topologyKey=TEXT,
            whenUnsatisfiable=choice("DoNotSchedule", "ScheduleAnyway"), labelSelector=ANYTHING, minDomains=COUNT,
            nodeAffinityPolicy=TEXT, nodeTaintsPolicy=TEXT, matchLabelKeys=TEXTS,
        )
    ),
    "os": ANYTHING, "schedulingGates": ANYTHING, "resourceClaims": ANYTHING, "resources": RESOURCES,
    "workloadRef": ANYTHING,
}  # fmt: skip
POD = Fields(
    POD_FIELDS,
    gone=dict.fromkeys(
        ("env", "envFrom", "volumeMounts", "ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle"),
        "belongs into a container; move it under 'containers'",
    )
    | dict.fromkeys(("image", "command", "args"), "belongs into a container; move it under 'containers'"),
)
TEMPLATE = fields(metadata=METADATA, spec=POD)
