"""The shapes of the operator's own samples, shortened to what is unusual in each: none of them may be refused.

Where a sample is refused after all, it is by one of bigray's own rules, and `house=False` leaves those out.
"""

# ruff: noqa: E501 (manifests in the short form of YAML, one object of them a line)
from __future__ import annotations

import pytest

from bigray.cluster.checking.kube import check_kube
from bigray.cluster.checking.yaml_file import read_yaml

HEAD = """
  headGroupSpec:
    template:
      spec:
        containers:
          - {name: ray-head, image: "rayproject/ray:2.52.0", resources: {limits: {cpu: 1, memory: 5Gi}, requests: {cpu: 1, memory: 2Gi}}}
"""
WORKER = """
  workerGroupSpecs:
    - groupName: small-group
      replicas: 1
      minReplicas: 1
      maxReplicas: 5
      rayStartParams: {}
      template:
        spec:
          containers:
            - {name: ray-worker, image: "rayproject/ray:2.52.0", resources: {limits: {cpu: "1", memory: 1Gi}, requests: {cpu: 500m, memory: 1Gi}}}
"""


def sample(spec: str, *, kind: str = "RayCluster", metadata: str = "{name: sample}", head: str = HEAD) -> str:
    return f"apiVersion: ray.io/v1\nkind: {kind}\nmetadata: {metadata}\nspec:\n  rayVersion: '2.52.0'\n{head}{WORKER}{spec}"


def indented(text: str) -> str:
    return "\n".join(f"  {line}" if line.strip() else line for line in text.splitlines())


def job(spec: str, cluster: str = HEAD + WORKER, metadata: str = "{name: sample}") -> str:
    return (
        f"apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {metadata}\nspec:\n{spec}\n  rayClusterSpec:\n"
        f"    rayVersion: 2.52.0\n{indented(cluster)}\n"
    )


def service(serve: str, spec: str = "", cluster: str = HEAD + WORKER) -> str:
    body = "\n".join(f"    {line}" for line in serve.strip().splitlines())
    return (
        f"apiVersion: ray.io/v1\nkind: RayService\nmetadata: {{name: sample}}\nspec:\n  serveConfigV2: |\n{body}\n{spec}\n"
        f"  rayClusterConfig:\n    rayVersion: '2.52.0'\n{indented(cluster)}\n"
    )


APP = """
applications:
  - name: fruit
    import_path: fruit.deployment_graph
    route_prefix: /fruit
    runtime_env:
      working_dir: "https://example.com/archive/78b4a5da38796123d9f9ffff59bab2792a043e95.zip"
      pip: ["diffusers==0.12.1"]
    deployments:
      - {name: Stand, num_replicas: 2, max_replicas_per_node: 1, user_config: {price: 3}, ray_actor_options: {num_cpus: 0.1}}
      - {name: Market}
  - name: math
    import_path: conditional_dag.serve_dag
    route_prefix: /calc
"""
DNS = "[{to: [{namespaceSelector: {matchLabels: {a: b}}, podSelector: {matchLabels: {k8s-app: dns}}}], ports: [{port: 53, protocol: UDP}]}]"

SAMPLES = {
    "as short as it gets": sample("", head=HEAD).replace("  rayVersion: '2.52.0'\n", ""),
    "autoscaler with empty lists": sample(
        "  enableInTreeAutoscaling: true\n"
        "  autoscalerOptions: {version: v2, upscalingMode: Default, idleTimeoutSeconds: 60, imagePullPolicy: IfNotPresent,\n"
        "    securityContext: {}, env: [], envFrom: [], resources: {limits: {cpu: 500m, memory: 512Mi}}}"
    ),
    "autoscaler of one's own command": sample(
        "  enableInTreeAutoscaling: true\n"
        "  autoscalerOptions: {command: [/bin/bash, -lc, --], args: ['echo go; $KUBERAY_GEN_AUTOSCALER_START_CMD']}"
    ),
    "autoscaler v2 by a variable, mode in octal": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample}
spec:
  rayVersion: '2.41.0'
  enableInTreeAutoscaling: true
  headGroupSpec:
    rayStartParams: {num-cpus: "0"}
    template:
      spec:
        restartPolicy: Never
        containers:
          - name: ray-head
            image: rayproject/ray:2.41.0
            env: [{name: RAY_enable_autoscaler_v2, value: "1"}]
            volumeMounts: [{mountPath: /home/ray/samples, name: code}]
        volumes:
          - {name: code, configMap: {name: code, defaultMode: 0777, items: [{key: a.py, path: a.py}]}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: code}
data:
  a.py: |
    import ray
""",
    "nulls where lists are empty, two hosts": """
apiVersion: ray.io/v1
kind: RayCluster
metadata:
  labels: {app.kubernetes.io/name: kuberay}
  name: sample
spec:
  headGroupSpec:
    serviceType: ClusterIP
    rayStartParams: {dashboard-host: "0.0.0.0"}
    template:
      metadata:
      spec:
        imagePullSecrets: []
        affinity: {}
        tolerations: []
        nodeSelector: {}
        containers:
          - volumeMounts: [{mountPath: /tmp/ray, name: ray-logs}]
            name: ray-head
            image: rayproject/ray:2.9.0-py310
            env:
            ports: null
            securityContext: {}
            resources: {limits: {cpu: "8", ephemeral-storage: 20Gi, memory: 40G, google.com/tpu: "4"}, requests: {google.com/tpu: "4"}}
        volumes: [{emptyDir: {}, name: ray-logs}]
  workerGroupSpecs:
    - {groupName: hosts, numOfHosts: 2, template: {spec: {containers: [{name: w, image: "rayproject/ray:2.9.0-py310"}]}}}
""",
    "Redis outside, by annotation": """
apiVersion: ray.io/v1
kind: RayCluster
metadata:
  annotations: {ray.io/ft-enabled: "true"}
  name: sample
spec:
  headGroupSpec:
    rayStartParams: {num-cpus: "0", redis-password: $REDIS_PASSWORD}
    template:
      spec:
        containers:
          - name: ray-head
            image: rayproject/ray:2.34.0
            env:
              - {name: RAY_REDIS_ADDRESS, value: "redis:6379"}
              - {name: REDIS_PASSWORD, valueFrom: {secretKeyRef: {name: redis, key: password}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: redis}
spec: {replicas: 1, selector: {matchLabels: {app: redis}}}
""",
    "Redis by its options, worker without parameters": sample(
        "  gcsFaultToleranceOptions:\n    redisAddress: redis:6379\n    externalStorageNamespace: mine\n"
        "    redisPassword: {valueFrom: {secretKeyRef: {name: redis, key: password}}}\n"
    ).replace("      rayStartParams: {}\n", ""),
    "a store of the head's own": sample("  gcsFaultToleranceOptions: {backend: rocksdb, storage: {size: 1Gi}}"),
    "token by the operator": sample("  authOptions: {mode: token}"),
    "token from a secret": sample("  authOptions: {mode: token, secretName: mine}\n  enableInTreeAutoscaling: true"),
    "token by Kubernetes": sample("  authOptions: {mode: 'token', enableK8sTokenAuth: true}").replace(
        "2.52.0", "2.55.0"
    ),
    "a proxy before the dashboard": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample}
spec:
  headGroupSpec:
    rayStartParams: {dashboard-host: '127.0.0.1', dashboard-port: '8443'}
    template:
      spec:
        serviceAccountName: kube-rbac-proxy
        containers:
          - name: ray-head
            image: rayproject/ray:2.39.0
            readinessProbe: {exec: {command: [bash, -c, "wget -q localhost:8443"]}, failureThreshold: 10, timeoutSeconds: 2}
          - {name: kube-rbac-proxy, image: "quay.io/brancz/kube-rbac-proxy:v0.18.1", args: ["--upstream=http://127.0.0.1:8443/"]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: kube-rbac-proxy}
rules: [{apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}]
""",
    "the pod's own command, a hook after its start": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample}
spec:
  headGroupSpec:
    template:
      spec:
        containers:
          - name: ray-head
            image: rayproject/ray:2.8.0
            command: ["echo 123"]
            args: ["456"]
            lifecycle: {postStart: {exec: {command: [/bin/sh, -c, /home/ray/samples/ray_cluster_resources.sh]}}}
            resources: {limits: {cpu: 1, memory: 2Gi}, requests: {cpu: 500m, memory: 2Gi}}
""",
    "certificates made by hand": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample}
spec:
  headGroupSpec:
    template:
      metadata: {labels: {}}
      spec:
        initContainers:
          - name: tls
            image: rayproject/ray:2.52.0
            command: [/bin/sh, -c, "cp -R /etc/ca/tls /etc/ray"]
            volumeMounts: [{mountPath: /etc/ca/tls, name: ca-tls, readOnly: true}, {mountPath: /etc/ray/tls, name: ray-tls}]
            env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
        containers:
          - name: ray-head
            image: rayproject/ray:2.52.0
            env: [{name: RAY_USE_TLS, value: "1"}, {name: RAY_TLS_SERVER_KEY, value: /etc/ray/tls/tls.key}]
        volumes:
          - {name: ca-tls, secret: {secretName: ca-tls}}
          - {name: ray-tls, emptyDir: {}}
---
apiVersion: v1
kind: Secret
metadata: {name: ca-tls}
data:
  ca.crt: |
    LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0t
    LS0tCg==
""",
    "all traffic denied": sample(
        f"  networkPolicy: {{mode: DenyAll, head: {{egressRules: {DNS}}}, worker: {{egressRules: {DNS}}}}}"
    ),
    "traffic from outside denied": sample(
        "  networkPolicy:\n    mode: DenyAllIngress\n"
        "    head: {ingressRules: [{from: [{namespaceSelector: {matchLabels: {a: b}}}], ports: [{port: 8265, protocol: TCP}]}]}"
    ),
    "labels and resources of groups, images of the night": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample}
spec:
  enableInTreeAutoscaling: true
  autoscalerOptions: {version: v2, imagePullPolicy: Always}
  headGroupSpec:
    labels: {ray.io/region: us-central2}
    resources: {CPU: "0"}
    template: {spec: {containers: [{name: ray-head, image: "rayproject/ray:nightly"}]}}
  workerGroupSpecs:
    - groupName: spot
      minReplicas: 0
      maxReplicas: 10
      labels: {cpu-family: amd, ray.io/market-type: spot}
      resources: {GPU: "1"}
      template: {spec: {containers: [{name: w, image: "rayproject/ray:nightly-gpu"}], nodeSelector: {cloud.google.com/gke-spot: "true"}}}
""",
    "another scheduler's queue and shares of a GPU": """
apiVersion: scheduling.run.ai/v2
kind: Queue
metadata: {name: team-a}
spec: {resources: {cpu: {quota: -1, limit: -1}}}
---
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample, labels: {kai.scheduler/queue: team-a}}
spec:
  headGroupSpec: {template: {spec: {containers: [{name: head, image: "rayproject/ray:2.50.1", resources: {limits: {cpu: "1", memory: 2Gi}}}]}}}
  workerGroupSpecs:
    - {groupName: shared, replicas: 2, minReplicas: 2, template: {metadata: {annotations: {gpu-fraction: "0.5"}}, spec: {containers: [{name: w, image: "rayproject/ray:2.50.1"}]}}}
""",
    "the history server": sample(
        "  historyServerOptions:\n    collectorOptions:\n      image: quay.io/kuberay/collector:nightly\n"
        "      env: [{name: STORAGE_BACKEND, value: GCS}, {name: GCS_BUCKET, value: mine}]\n"
    ),
    "logs sent on, a field of the pod": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample}
spec:
  headGroupSpec:
    rayStartParams: {enable-resource-isolation: "true"}
    template:
      metadata: {annotations: {node.gke.io/enable-writable-cgroups.ray-head: "true"}}
      spec:
        containers:
          - name: ray-head
            image: rayproject/ray:2.52.0
            volumeMounts: [{mountPath: /tmp/ray, name: logs}]
            securityContext: {capabilities: {add: [SYS_PTRACE]}}
          - name: fluentbit
            image: fluent/fluent-bit:3.2.2
            env: [{name: POD_LABELS, valueFrom: {fieldRef: {fieldPath: 'metadata.labels["ray.io/cluster"]'}}}]
            volumeMounts: [{mountPath: /tmp/ray, name: logs}, {mountPath: /etc/f.conf, subPath: f.conf, name: config}]
        volumes: [{name: logs, emptyDir: {}}, {name: config, configMap: {name: config}}]
""",
    "a service of one's own for the head": sample(
        "",
        head=HEAD
        + (
            "    headService:\n      metadata: {name: custom, labels: {a: b}}\n"
            "      spec: {type: LoadBalancer, ports: [{port: 12345, targetPort: 12345, name: custom-ray-head-service-port}]}\n"
        ),
    ),
    "a pod that may do little": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: sample}
spec:
  headGroupSpec:
    rayStartParams: {block: 'true'}
    template:
      spec:
        containers:
          - name: ray-head
            image: rayproject/ray-ml:2.0.0
            lifecycle: {preStop: {exec: {command: [/bin/sh, -c, ray stop]}}}
            securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
""",
    "a job": job(
        "  entrypoint: python /home/ray/samples/sample_code.py\n  runtimeEnvYAML: |\n    pip:\n      - requests==2.34.2\n"
        '      - pendulum==2.1.2\n    env_vars:\n      counter_name: "test_counter"'
    ),
    "a job whose name is made": job(
        "  entrypoint: |\n    python -c \"\n    import ray\n    ray.init()\n    print(f'{ray.cluster_resources()}')\n    \"\n"
        "  shutdownAfterJobFinishes: true\n  ttlSecondsAfterFinished: 10\n  suspend: true",
        metadata="{generateName: sample-}",
    ),
    "a job with resources of its own": job(
        '  entrypoint: python a.py\n  entrypointNumCpus: 2\n  entrypointNumGpus: 0.5\n  entrypointResources: \'{"a": 1, "b": 2}\'',
        HEAD + "    rayStartParams: {num-cpus: '3', num-gpus: '2', resources: '\"{\\\"a\\\": 2, \\\"b\\\": 3}\"'}\n",
    ),
    "a job that one submits": job('  submissionMode: InteractiveMode\n  jobId: ""'),
    "a job beside the head": job("  submissionMode: SidecarMode\n  entrypoint: python a.py"),
    "a job on a cluster that is there": (
        "apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {name: sample}\nspec:\n"
        '  entrypoint: python -c "import ray; ray.init()"\n  clusterSelector: {ray.io/cluster: other}\n'
    ),
    "a job with a submitter of its own": job(
        "  submitterPodTemplate:\n    spec:\n      restartPolicy: Never\n      containers:\n        - name: submitter\n"
        "          image: quay.io/kuberay/submitter:v1.5.1\n          command: [/submitter]\n"
        '          args: [--runtime-env-json, \'{"pip":["requests==2.26.0"]}\', --, python, a.py]'
    ),
    "a job that is deleted in steps": job(
        "  entrypoint: python a.py\n  deletionStrategy:\n    deletionRules:\n"
        "      - {policy: DeleteWorkers, condition: {jobStatus: FAILED, ttlSeconds: 30}}\n"
        "      - {policy: DeleteCluster, condition: {jobStatus: FAILED, ttlSeconds: 60}}\n"
        "      - {policy: DeleteSelf, condition: {jobStatus: FAILED, ttlSeconds: 90}}\n"
        "      - {policy: DeleteSelf, condition: {jobDeploymentStatus: Failed}}"
    ),
    "a job with a bucket as a folder": job(
        "  shutdownAfterJobFinishes: true\n  entrypoint: python a.py\n  runtimeEnvYAML: |\n    pip: [numpy, 'transformers>=4.19.1']\n"
        '    working_dir: "https://example.com/archive/master.zip"',
        """
  headGroupSpec:
    template:
      metadata: {annotations: {gke-gcsfuse/volumes: "true", gke-gcsfuse/cpu-limit: "0"}}
      spec:
        serviceAccountName: training
        tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
        containers:
          - name: ray-head
            image: rayproject/ray-ml:2.52.0-gpu
            env:
            resources: {limits: {memory: 8G, nvidia.com/gpu: "1"}, requests: {cpu: "1", memory: 8G, nvidia.com/gpu: "1"}}
            volumeMounts: [{mountPath: /mnt/cluster_storage, name: storage}]
        volumes:
          - {name: storage, csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: B, mountOptions: implicit-dirs}}}
""",
    ),
    "a service": service(APP),
    "a service that lasts": service(
        APP,
        cluster=HEAD + WORKER + "  gcsFaultToleranceOptions:\n    redisAddress: redis:6379\n"
        "    redisPassword: {valueFrom: {secretKeyRef: {name: redis, key: password}}}\n",
    )
    + "---\napiVersion: v1\nkind: Pod\nmetadata: {name: asker}\nspec: {containers: [{name: c, image: 'x:1', command: [sh]}]}\n",
    "a service that changes step by step": service(
        APP,
        "  upgradeStrategy:\n    type: NewClusterWithIncrementalUpgrade\n    clusterUpgradeOptions: {gatewayClassName: istio, "
        "stepSizePercent: 10, intervalSeconds: 30, maxSurgePercent: 10}",
        HEAD + WORKER + "  enableInTreeAutoscaling: true\n",
    ),
    "a service of its own": service(
        APP,
        "  serveService:\n    metadata: {name: custom}\n    spec: {type: LoadBalancer, ports: [{port: 12345, targetPort: 12345}]}\n"
        "  serviceUnhealthySecondThreshold: 300\n  deploymentUnhealthySecondThreshold: 300",
    ),
    "a service of language models": service(
        """
proxy_location: EveryNode
applications:
  - name: llms
    import_path: ray.serve.llm:build_openai_app
    route_prefix: "/"
    args: {llm_configs: [{model_loading_config: {model_id: a}, engine_kwargs: {dtype: bfloat16}}]}
""",
        cluster=HEAD + "    rayStartParams: {num-cpus: '0', num-gpus: '0'}\n",
    )
    + "---\napiVersion: v1\nkind: Secret\nmetadata: {name: hf-token}\nstringData: {hf_token: <your-hf-access-token-value>}\n",
    "a service that scales to none": service(
        """
applications:
  - name: no_ops
    import_path: microbenchmarks.no_ops:app_builder
    args: {num_forwards: 0}
    deployments:
      - name: NoOp
        autoscaling_config: {initial_replicas: 0, min_replicas: 0, max_replicas: 5, upscale_delay_s: 3, metrics_interval_s: 0.1}
        max_replicas_per_node: 1
        graceful_shutdown_timeout_s: 1
""",
        cluster=HEAD + WORKER + "  enableInTreeAutoscaling: true\n  autoscalerOptions: {idleTimeoutSeconds: 1}\n",
    ),
}

HOUSE = (
    "is not the limit",
    "without a token",
    "needs a limit for 'memory'",
    "of constraints.txt",
    "moves; write",
    "is a secret in clear",
    "does not belong into a file",
    "bigray needs 3.11",
)
"""Words of bigray's own rules: what the operator takes and bigray asks for beyond it."""


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_of_the_operator_is_not_refused(name: str) -> None:
    documents = read_yaml(SAMPLES[name])

    assert [str(fault) for fault in check_kube(documents, house=False)] == []
    own = [str(fault) for fault in check_kube(documents)]
    assert [fault for fault in own if not any(words in fault for words in HOUSE)] == []


REALLY_WRONG = {
    "a volume under another name": (
        sample("")
        .replace("{name: ray-head,", "{name: ray-head, volumeMounts: [{name: log-volume, mountPath: /tmp/ray}],", 1)
        .replace(
            "    template:\n      spec:\n",
            "    template:\n      spec:\n        volumes: [{name: ray-logs, emptyDir: {}}]\n",
            1,
        ),
        "the pod has no volume 'log-volume'",
    ),
    "an image newer than rayVersion": (
        sample("").replace("'2.52.0'", "'2.5.0'"),
        "2.5.0 is not the 2.52.0 of the images",
    ),
    "a name with a dot": (
        sample("", metadata="{name: raycluster-custom-head-service.yaml}"),
        "has to be small letters, digits and '-'",
    ),
    "a key of the first API": (sample("", head=HEAD + "    replicas: 1\n"), "a cluster has one head; remove it"),
    "a base64 environment of the first API": (
        job("  entrypoint: python a.py\n  runtimeEnv: e30="),
        "did you mean 'runtimeEnvYAML'?",
    ),
    "a limit that Serve no longer reads": (
        service("applications: [{import_path: 'a:b', deployments: [{name: A, max_concurrent_queries: 1000}]}]"),
        "use 'max_ongoing_requests'",
    ),
    "a policy under another name": (
        sample("  networkIsolation: {mode: denyAll}"),
        "networkIsolation: is not a key here",
    ),
}
"""Mistakes that the operator's samples had at one time or still have: these are no false alarms."""


@pytest.mark.parametrize("name", REALLY_WRONG)
def test_what_is_wrong_in_a_sample_is_found(name: str) -> None:
    text, words = REALLY_WRONG[name]
    faults = [str(fault) for fault in check_kube(read_yaml(text), house=False)]

    assert len(faults) == 1, faults
    assert words in faults[0]
