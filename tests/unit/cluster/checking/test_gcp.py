from __future__ import annotations

from collections.abc import Callable

import pytest

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.gcp import machine_size

IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570"
HEAD = "machineType: n2-standard-4\n"
WORKER = "machineType: g2-standard-8\n"
EMAIL = "bigray-worker@your-project.iam.gserviceaccount.com"
ACCOUNT = (
    "      # may read and write the bucket, and nothing else\n      serviceAccounts:\n"
    f"        - email: {EMAIL}\n          scopes: [https://www.googleapis.com/auth/cloud-platform]\n"
)
SPOT = """      scheduling:
        provisioningModel: SPOT
        instanceTerminationAction: DELETE
        onHostMaintenance: TERMINATE
        automaticRestart: false
"""
T4 = "machineType: n1-standard-8\n      guestAccelerators:\n        - acceleratorType: nvidia-tesla-t4\n"

# name: (what is there, what takes its place, text on the line that is told, words of the message)
PLANTED = {
    "region missing": ("  region: us-central1\n", "", "provider:", "'region' is required"),
    "region of another cloud": ("region: us-central1", "region: us-west-2", "region: us-west-2", "no region"),
    "zone missing": ("  availability_zone: us-central1-a\n", "", "provider:", "'availability_zone' is required"),
    "zone of another region": ("us-central1-a", "us-west1-a", "us-west1-a", "no zone of us-central1"),
    "two zones": ("us-central1-a", "us-central1-a,us-central1-b", "availability_zone", "one zone"),
    "project missing": ("  project_id: your-project\n", "", "provider:", "'project_id' is required"),
    "project empty": ("project_id: your-project", "project_id: null", "project_id", "whose machines"),
    "project by its title": ("project_id: your-project", "project_id: Your Project", "project_id", "no project id"),
    "project misspelt": ("  project_id:", "  projct_id:", "projct_id", "did you mean 'project_id'"),
    "credentials in the file": (
        "  project_id: your-project\n",
        "  project_id: your-project\n  gcp_credentials: {type: credentials_token, credentials: abc}\n",
        "gcp_credentials",
        "clear text",
    ),
    "name with capitals": ("cluster_name: bigray", "cluster_name: BigRay", "BigRay", "file names and tags"),
    "type with a dot": ("  gpu_spot:", "  gpu.spot:", "gpu.spot", "becomes a label"),
    "head of another name": ("head_node_type: head", "head_node_type: heads", "heads", "did you mean 'head'"),
    "least above most": ("min_workers: 0", "min_workers: 9", "min_workers: 9", "more than max_workers"),
    "more CPUs than the machine": ("CPU: 8, GPU: 1", "CPU: 12, GPU: 1", "CPU: 12", "is 12, the machine has 8"),
    "more GPUs than the machine": ("CPU: 8, GPU: 1", "CPU: 8, GPU: 2", "GPU: 2", "is 2, the machine has 1"),
    "GPUs of a machine without": (WORKER, "machineType: n2-standard-8\n", "GPU: 1", "the machine has 0"),
    "GPUs added to a machine that takes none": (
        WORKER,
        WORKER.replace("g2", "e2") + "      guestAccelerators: []\n",
        "GPU: 1",
        "the machine has 0",
    ),
    "no machine": ("      " + HEAD, "", "    node_config:\n", "'machineType' is missing"),
    "machine misspelt": ("machineType: n2", "machinType: n2", "machinType", "did you mean 'machineType'"),
    "machine of another cloud": (HEAD, "machineType: m6i.xlarge\n", "m6i.xlarge", "no machine type"),
    "machine a list": (HEAD, "machineType: [n2-standard-4]\n", "machineType: [", "expected a text"),
    "key that Ray sets": (HEAD, HEAD + "      zone: us-central1-a\n", "      zone:", "set by Ray"),
    "key from AWS": (HEAD, HEAD + "      InstanceType: m6i.xlarge\n", "InstanceType", "is not a key here"),
    "no disk to boot from": ("- boot: true", "- boot: false", "      disks:", "one disk has to have boot: true"),
    "boot as text": ("- boot: true", '- boot: "true"', '- boot: "true"', "true or false"),
    "disk without an image": (
        f"            sourceImage: {IMAGE}\n",
        "",
        "          initializeParams:",
        "'sourceImage'",
    ),
    "no image at all": (IMAGE, "ubuntu 22.04", "ubuntu 22.04", "is no image"),
    "image misspelt": ("sourceImage", "sourceImag", "sourceImag:", "did you mean 'sourceImage'"),
    "disk of nothing": ("diskSizeGb: 150", "diskSizeGb: 0", "diskSizeGb: 0", "10 to 65,536"),
    "disk's size with its unit": ("diskSizeGb: 150", "diskSizeGb: 150GB", "150GB", "10 to 65,536"),
    "disk that stays": ("autoDelete: true", "autoDelete: false", "autoDelete: false", "paid for"),
    "disk of no kind": ("type: PERSISTENT", "type: PERSISTANT", "PERSISTANT", "did you mean 'PERSISTENT'"),
    "disk's key misspelt": ("diskSizeGb: 150", "diskSizeGB: 150", "diskSizeGB", "did you mean 'diskSizeGb'"),
    "spot head": (HEAD, HEAD + "      scheduling: { preemptible: true }\n", "scheduling: {", "the whole cluster"),
    "market misspelt": ("provisioningModel: SPOT", "provisioningModel: SPOTT", "SPOTT", "not a choice"),
    "spot that restarts": (
        "automaticRestart: false",
        "automaticRestart: true",
        "automaticRestart: true",
        "false on a spot",
    ),
    "end of a machine that is not spot": (
        "        provisioningModel: SPOT\n",
        "",
        "instanceTerminationAction",
        "for spot machines",
    ),
    "GPUs that are moved": (
        "TERMINATE\n        automaticRestart: true",
        "MIGRATE\n        automaticRestart: true",
        "      scheduling:\n        onHost",
        "cannot be moved",
    ),
    "GPUs without a word on maintenance": (
        "        onHostMaintenance: TERMINATE\n        automaticRestart: true\n",
        "        automaticRestart: true\n",
        "      scheduling:\n        automaticRestart: true",
        "onHostMaintenance: TERMINATE is missing",
    ),
    "scheduling's key misspelt": ("provisioningModel", "provisionningModel", "provisionningModel", "did you mean"),
    "GPUs without a count": (WORKER, T4, "        - acceleratorType", "'acceleratorCount' is required"),
    "no GPUs of a kind": (WORKER, T4 + "          acceleratorCount: 0\n", "acceleratorCount: 0", "at least 1"),
    "GPUs of no kind": (
        WORKER,
        T4.replace("nvidia-tesla-t4", "tesla") + "          acceleratorCount: 1\n",
        "acceleratorType",
        "no accelerator",
    ),
    "workers without an account": (
        ACCOUNT,
        "",
        "    node_config:\n      machineType: g2",
        "'serviceAccounts' is missing",
    ),
    "account without a domain": (f"email: {EMAIL}", "email: bigray-worker", "email: bigray-worker\n", "no address"),
    "account without scopes": (
        "          scopes: [https://www.googleapis.com/auth/cloud-platform]\n",
        "",
        "        - email",
        "'scopes'",
    ),
    "scopes in one string": (
        "scopes: [https://www.googleapis.com/auth/cloud-platform]",
        "scopes: cloud-platform",
        "scopes: cloud",
        "a list",
    ),
    "label a flag": ("market: spot", "market: true", "market: true", "expected a text"),
    "image without CUDA": ("2.60.0-py311-gpu", "2.60.0-py311-cpu", "image: rayproject", "without CUDA"),
    "image of another Ray": ("2.60.0-py311-gpu", "2.50.0-py311-gpu", "image: rayproject", "not the 2.60.0"),
    "mount of Google's keys": ("  /home/ray/bigray/dist: dist", "  /c: ~/.config/gcloud", "/c:", "every node"),
    "storage without a bucket": ("storage: gs://your-bucket/runs", "storage: gs:///runs", "gs:///runs", "no bucket"),
    "API client of any version": (
        " -c /home/ray/bigray/constraints.txt # Ray",
        " # Ray",
        "google-api-python",
        "not pinned",
    ),
}

VARIANTS = {
    "preemptible as Ray's examples have it": (SPOT, "      scheduling:\n        - preemptible: true\n"),
    "preemptible": (SPOT, "      scheduling: { preemptible: true, onHostMaintenance: TERMINATE }\n"),
    "GPUs added to n1": (WORKER, T4 + "          acceleratorCount: 1\n"),
    "GPUs by their address": (
        WORKER,
        T4.replace("nvidia", "projects/p/zones/us-central1-a/acceleratorTypes/nvidia")
        + "          acceleratorCount: 1\n",
    ),
    "A100s": (WORKER, "machineType: a2-highgpu-1g\n"),
    "a machine made to measure": (HEAD, "machineType: n2-custom-4-16384\n"),
    "a machine by its address": (HEAD, "machineType: zones/us-central1-a/machineTypes/n2-standard-4\n"),
    "storage on NFS": ("storage: gs://your-bucket/runs", "storage: /mnt/filestore/runs"),
    "no account, no bucket": ("gs://your-bucket/runs # a", "/mnt/filestore/runs # a"),
    "a template": (HEAD, HEAD + "      sourceInstanceTemplate: global/instanceTemplates/head\n"),
    "an exact image": (IMAGE, "projects/p/global/images/bigray-20260101"),
    "a size as text": ("diskSizeGb: 150", 'diskSizeGb: "150"'),
    "a network of one's own": (
        HEAD,
        HEAD + "      networkInterfaces:\n        - subnetwork: regions/us-central1/subnetworks/ray\n",
    ),
    "tags and metadata": (
        HEAD,
        HEAD
        + "      tags: { items: [ray] }\n      metadata: { items: [{ key: install-nvidia-driver, value: true }] }\n",
    ),
    "a second disk": (
        "      disks:\n",
        "      disks:\n        - { type: SCRATCH, autoDelete: true, interface: NVME }\n",
    ),
    "an old project id": ("project_id: your-project", "project_id: example.com:your-project"),
    "no public addresses": ("  project_id:", "  use_internal_ips: true\n  project_id:"),
    "GPUs of a family that is not known": (WORKER, "machineType: g4-standard-48\n"),
    "resources not told": ("resources: { CPU: 8, GPU: 1 }", "resources: {}"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_in_the_file_for_google_cloud_is_told_once(name: str, assert_told_once: Callable[..., None]) -> None:
    assert_told_once("gcp.yaml", *PLANTED[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_another_way_to_write_it_is_no_fault(name: str, faults_after: Callable[..., tuple[list[Fault], str]]) -> None:
    faults, _ = faults_after("gcp.yaml", *VARIANTS[name])
    assert [str(fault) for fault in faults] == []


@pytest.mark.parametrize(
    ("machine_type", "size"),
    [
        ("n2-standard-4", (4, 0)),
        ("g2-standard-24", (24, 2)),
        ("a2-highgpu-4g", (None, 4)),
        ("n1-standard-8", (8, None)),
        ("n2-custom-6-16384", (6, None)),
        ("zones/us-central1-a/machineTypes/c3-highcpu-22", (22, 0)),
        ("a4-highgpu-8g", (None, 8)),
        ("g4-standard-48", (48, None)),
        ("e2-micro", (None, None)),
    ],
)
def test_a_machines_size_is_read_from_its_name(machine_type: str, size: tuple[int | None, int | None]) -> None:
    assert machine_size(machine_type) == size
