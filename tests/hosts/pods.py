"""A small manifest runner: the files of cluster/kuberay on hosts, one for each pod, with the operator's own lines.

    plan = read_cluster(text, token=network.token)
    pods = Pods(network, plan)
    pods.start()
    job = pods.submit()
    print(pods.wait_for_job(job)["status"])

A host differs from a pod in this: it runs as this user rather than as 1000, with this Python and checkout rather than
an image (whose folder is there, as cluster/Dockerfile fills it), and what a pod may take of CPU and memory is what Ray
is told, and no limit. There is no autoscaler: how many workers there are is the plan's. What else the operator does, it
does here too, from the host "operator": it waits for the head, sends to the dashboard, and asks how things stand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts import kuberay
from tests.hosts.hosts import REPOSITORY, SHARED_MEMORY_MB, Host, Network
from tests.hosts.kuberay import ClusterPlan, Mount, PodPlan, Secrets
from tests.waiting import wait_until

START_S = 180.0
"""Three pods share two cores while they start."""
JOB_S = 400.0
SERVE_S = 300.0
BETWEEN_QUESTIONS_S = 1.0
PROBE_TIMEOUT_S = 1.0
"""Kubernetes', where a probe has none."""
PYTHON_STARTS_S = 30.0
"""Beyond what a probe may take: Kubernetes asks from the node, and here a program is started for it."""
OBJECT_STORE_SHARE = 0.3
"""What Ray takes of a pod's memory."""
NO_PROXY = {"NO_PROXY": "*", "no_proxy": "*"}
"""In a pod: a proxy of this machine does not know a name of the cluster's, and cannot be reached from there."""
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
GET_STATUS = """
import sys, urllib.error, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with opener.open(sys.argv[1], timeout=float(sys.argv[2])) as answer:
        print(answer.status, answer.read(200).decode(errors="replace"))
except urllib.error.HTTPError as error:
    print(error.code, error.reason)
except OSError as error:
    print(0, error)
"""
ASK_DASHBOARD = """
import os, sys, urllib.error, urllib.request
method, url, body = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
request = urllib.request.Request(url, data=body.encode() or None, method=method)
request.add_header("Content-Type", "application/json")
request.add_header("X-Ray-Authorization", "Bearer " + os.environ["RAY_AUTH_TOKEN"])
try:
    with opener.open(request, timeout=60) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode(errors="replace"))
except OSError as error:
    print(0, error)
"""
"""The header is the operator's: one that proxies leave alone."""


@dataclass(frozen=True)
class Probed:
    """What a probe of a pod came to, asked once."""

    pod: str
    kind: str
    """startup, readiness or liveness."""
    has_passed: bool
    said: str


@dataclass(frozen=True)
class Pod:
    """A pod that was started."""

    plan: PodPlan
    host: Host
    process: subprocess.Popen[bytes]
    """Its container's shell, with `ray start --block` in it."""


class Pods:
    """The pods of one RayCluster. They end with the network, or at `remove`."""

    def __init__(self, network: Network, plan: ClusterPlan, secrets: Secrets | None = None) -> None:
        """`secrets`: those that are mounted; what is in variables is in the plan already."""
        self.network = network
        self.plan = plan
        self.started: dict[str, Pod] = {}
        """By the name of the host."""
        self._secrets = secrets or {}

    @property
    def head(self) -> Pod:
        return self.started[self.plan.head.host]

    @property
    def workers(self) -> list[Pod]:
        return [self.started[plan.host] for plan in self.plan.workers]

    @property
    def operator(self) -> Host:
        return self._host_beside("operator")

    def start(self) -> None:
        """The head, and the workers once it is ready; until Ray is up on all.

        Raises:
            TimeoutError, RuntimeError: a pod does not come up; with its log.
        """
        self._make_image()
        self._start(self.plan.head)
        self._wait_for(self.head, "readiness")
        for plan in self.plan.workers:
            self._start(plan)
        for worker in self.workers:
            self._wait_for(worker, "liveness")

    def remove(self) -> None:
        """All pods vanish, as those of a RayCluster that is deleted when there is no time left."""
        for pod in self.started.values():
            self.network.remove(pod.host)
        self.started.clear()

    def _start(self, plan: PodPlan) -> None:
        host = self.network.add(plan.host, shared_memory_mb=plan.shared_memory_mb or SHARED_MEMORY_MB)
        host.token_file.unlink()  # a pod has the token in a variable
        if plan.is_head:
            self._name_service(host)
        self._mount_image(host)
        for mount in plan.mounts:
            self._mount(host, mount)
        if not plan.is_head:
            self._wait_for_gcs(host, plan)
        command = [*kuberay.SHELL, plan.line]
        process = host.start("ray", command, environment=environment(plan), folder=kuberay.image_folder())
        self.started[plan.host] = Pod(plan, host, process)

    def _wait_for_gcs(self, host: Host, plan: PodPlan) -> None:
        """As the container does that the operator puts before a worker's own."""
        command = ["ray", "health-check", "--address", plan.environment["RAY_ADDRESS"]]

        def answers() -> bool:
            return host.run(command, environment=environment(plan)).returncode == 0

        wait_until(answers, f"{plan.name}: {' '.join(command)} does not end well", START_S)

    def _wait_for(self, pod: Pod, kind: str) -> None:
        deadline = time.monotonic() + START_S
        while not (probed := self.probe(pod, kind)).has_passed:
            log = pod.host.log("ray")
            if pod.process.poll() is not None:
                raise RuntimeError(f"{pod.plan.name}: Ray ended: {log}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{pod.plan.name}: {kind}: {probed.said}: {log}")
            time.sleep(BETWEEN_QUESTIONS_S)

    def _name_service(self, host: Host) -> None:
        """Every host knows the head's Service by its names, as from the cluster's name server."""
        full = self.plan.service
        names = (full, full.removesuffix(".svc.cluster.local"), full.partition(".")[0])
        with (self.network.folder / "hosts").open("a") as file:
            file.write(f"{host.address} {' '.join(names)}\n")

    @property
    def _image(self) -> Path:
        return self.network.folder / "image"

    def _make_image(self) -> None:
        """What the image's folder holds, once for all pods: it is not written to."""
        if self._image.exists():
            return
        for source, target in kuberay.image_copies().items():
            copy_of_checkout(source, self._image / target)

    def _mount_image(self, host: Host) -> None:
        bind(host, self._image, kuberay.image_folder())

    def _mount(self, host: Host, mount: Mount) -> None:
        """Of memory and `/tmp/ray` a host has its own; a folder that is missing is made, empty, on the machine too."""
        if mount.path in (Path("/dev/shm"), Path("/tmp/ray")):
            return
        bind(host, self._source(host, mount.volume), mount.path, is_read_only=mount.is_read_only)

    def _source(self, host: Host, volume: Mapping[str, Any]) -> Path:
        """Where on the machine a volume lies."""
        if (claim := volume.get("persistentVolumeClaim")) is not None:
            folder = self.network.folder / "claims" / str(claim["claimName"])
        elif (secret := volume.get("secret")) is not None:
            folder = self.network.folder / "secrets" / str(secret["secretName"])
            write_files(folder, self._secrets[secret["secretName"]])
        elif "emptyDir" in volume:
            folder = host.folder / "volumes" / str(volume["name"])
        else:
            raise ValueError(f"{volume}: a kind of volume that is not known here")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _host_beside(self, name: str) -> Host:
        """One that is no node of Ray."""
        if (host := self.network.hosts.get(name)) is not None:
            return host
        host = self.network.add(name)
        host.token_file.unlink()
        self._mount_image(host)
        return host

    def probe(self, pod: Pod, kind: str) -> Probed:
        """Ask once, as Kubernetes does: a command in the container, or a request to the pod's address."""
        probe = pod.plan.probe(kind)
        if probe is None:
            return Probed(pod.plan.name, kind, True, "there is none")
        timeout_s = float(probe.get("timeoutSeconds", PROBE_TIMEOUT_S))
        if (asked := probe.get("exec")) is not None:
            return self._probe_by_command(pod, kind, asked["command"], timeout_s)
        get = probe["httpGet"]
        url = f"http://{pod.host.address}:{get['port']}{get['path']}"
        done = pod.host.run([sys.executable, "-I", "-S", "-c", GET_STATUS, url, str(timeout_s)])
        status, _, said = done.stdout.strip().partition(" ")
        return Probed(pod.plan.name, kind, status.isdigit() and 200 <= int(status) < 400, f"{status} {said}")

    def _probe_by_command(self, pod: Pod, kind: str, command: list[str], timeout_s: float) -> Probed:
        try:
            done = pod.host.run(
                command,
                timeout_s=timeout_s + PYTHON_STARTS_S,
                environment=environment(pod.plan),
                folder=kuberay.image_folder(),
            )
        except subprocess.TimeoutExpired as late:
            return Probed(pod.plan.name, kind, False, str(late))
        return Probed(pod.plan.name, kind, done.returncode == 0, (done.stdout + done.stderr)[-500:])

    def probe_all(self) -> list[Probed]:
        """Every probe of every pod that is up, once."""
        pods = [pod for name, pod in self.started.items() if name in self.network.hosts]
        return [self.probe(pod, kind) for pod in pods for kind in ("readiness", "liveness") if pod.plan.probe(kind)]

    def ask_dashboard(self, method: str, path: str, document: Any = None) -> tuple[int, str]:
        """Status and text of an answer, 0 where there is none; with the cluster's token, from the operator's host."""
        body = "" if document is None else json.dumps(document)
        command = [sys.executable, "-I", "-S", "-c", ASK_DASHBOARD, method, self.plan.dashboard + path, body]
        done = self.operator.run(command, timeout_s=90, environment={"RAY_AUTH_TOKEN": self.plan.token})
        status, _, text = done.stdout.partition(" ")
        if not status.isdigit():
            raise RuntimeError(f"{method} {path}: {done.stdout}{done.stderr}")
        return int(status), text.strip()

    def submit(self) -> Submitted:
        """Submit the entrypoint of a RayJob by a pod of its own, which follows it."""
        job_id = f"{self.plan.name}-job"
        host = self._host_beside("submitter")
        variables = {"RAY_DASHBOARD_ADDRESS": f"{self.plan.service}:{kuberay.DASHBOARD_PORT}"}
        variables |= {"PYTHONUNBUFFERED": "1", "RAY_JOB_SUBMISSION_ID": job_id}
        variables |= {**kuberay.image_environment(), **kuberay.token_variables(self.plan.token), **NO_PROXY}
        command = [*kuberay.SUBMITTER_SHELL, kuberay.submit_line(self.plan, job_id)]
        process = host.start(job_id, command, environment=variables, folder=kuberay.image_folder())
        return Submitted(job_id, host, process)

    def job(self, job_id: str) -> dict[str, Any] | None:
        """What the dashboard tells of a job; None where it does not know it, or does not answer."""
        status, text = self.ask_dashboard("GET", f"/api/jobs/{job_id}")
        return json.loads(text) if status == 200 else None

    def wait_for_job(self, submitted: Submitted, timeout_s: float = JOB_S) -> dict[str, Any]:
        """What the dashboard tells of a job that has ended, as the operator finds out.

        Raises:
            TimeoutError: it has not, or was never there; with what was printed.
        """
        deadline = time.monotonic() + timeout_s
        while (job := self.job(submitted.id)) is None or job["status"] not in ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{submitted.id}: {job}: {submitted.log()}")
            time.sleep(BETWEEN_QUESTIONS_S)
        return job

    def deploy(self) -> None:
        """Send the applications of a RayService, and wait until each is running and every worker is ready.

        Raises:
            RuntimeError: the dashboard refuses, or an application cannot be deployed.
            TimeoutError: they do not come up.
        """
        status, text = self.ask_dashboard("PUT", "/api/serve/applications/", kuberay.serve_config(self.plan))
        if status != 200:
            raise RuntimeError(f"PUT /api/serve/applications/: {status} {text}")
        deadline = time.monotonic() + SERVE_S
        while set((states := self.applications()).values()) != {"RUNNING"}:
            if "DEPLOY_FAILED" in states.values():
                raise RuntimeError(f"{states}: {self._told_of_applications()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{states}: {self._told_of_applications()}")
            time.sleep(BETWEEN_QUESTIONS_S)
        for worker in self.workers:  # the Service sends nothing to one that is not
            self._wait_for(worker, "readiness")

    def applications(self) -> dict[str, str]:
        """State of each application of Serve."""
        told = self._told_of_applications().get("applications", {})
        return {name: str(application["status"]) for name, application in told.items()}

    def _told_of_applications(self) -> dict[str, Any]:
        status, text = self.ask_dashboard("GET", "/api/serve/applications/?api_type=declarative")
        told: dict[str, Any] = json.loads(text) if status == 200 else {}
        return told


@dataclass(frozen=True)
class Submitted:
    """A job, and the pod that follows it."""

    id: str
    host: Host
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        """What was printed there, of the job as well."""
        return self.host.log(self.id)


def environment(plan: PodPlan) -> dict[str, str]:
    """A pod's variables, and what stands for the limit of its memory, which a host does not have.

    Ray counts on the limit where there is one, and here on the whole machine.
    """
    if plan.memory_bytes is None:
        return {**NO_PROXY, **plan.environment}
    most = str(int(OBJECT_STORE_SHARE * plan.memory_bytes))
    return {**NO_PROXY, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": most, **plan.environment}


def copy_of_checkout(source: Path, target: Path) -> None:
    """A file or a folder, without what Python has compiled."""
    if (REPOSITORY / source).is_dir():
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / source, target, ignore=without, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / source, target)


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).touch(mode=0o440)
        (folder / name).write_text(content)


def bind(host: Host, source: Path, target: Path, *, is_read_only: bool = False) -> None:
    """Show a folder of the machine at a place of one host only; the place stays on the machine as an empty folder."""
    target.mkdir(parents=True, exist_ok=True)
    options = "bind,ro" if is_read_only else "bind"
    done = host.run(["mount", "-o", options, str(source), str(target)])
    if done.returncode != 0:
        raise RuntimeError(f"{host.name}: mount {target}: {done.stderr.strip()}")
