"""`ray up` on Google Cloud: rules of our own for each node type's machine. Checked against them, and never launched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.nearest import nearest
from bigray.cluster.checking.ray_cluster import is_head, is_worker, items, mapping, node_types, storage_of, too_large
from bigray.cluster.checking.shapes import (
    ANYTHING,
    COUNT,
    FLAG,
    TEXT,
    TEXT_TABLE,
    TEXTS,
    Each,
    Fields,
    Scalar,
    choice,
    fields,
    mismatches,
)
from bigray.cluster.checking.yaml_file import Document

SCHEDULING = fields(
    preemptible=FLAG,
    provisioningModel=choice("STANDARD", "SPOT", "FLEX_START", "RESERVATION_BOUND"),
    onHostMaintenance=choice("MIGRATE", "TERMINATE"),
    automaticRestart=FLAG,
    instanceTerminationAction=choice("STOP", "DELETE"),
    maxRunDuration=fields(seconds=Scalar("whole or text"), nanos=COUNT),
    nodeAffinities=ANYTHING,
    minNodeCpus=COUNT,
)
DISK = Fields(
    {
        "boot": FLAG,
        "autoDelete": FLAG,
        "type": choice("PERSISTENT", "SCRATCH"),
        "mode": choice("READ_WRITE", "READ_ONLY"),
        "interface": choice("SCSI", "NVME"),
        "deviceName": TEXT,
        "source": TEXT,
        "index": COUNT,
        "kind": TEXT,
        "diskEncryptionKey": ANYTHING,
        "initializeParams": fields(
            diskSizeGb=Scalar("whole or text"),
            diskType=TEXT,
            diskName=TEXT,
            sourceImage=TEXT,
            sourceSnapshot=TEXT,
            labels=TEXT_TABLE,
            description=TEXT,
            provisionedIops=Scalar("whole or text"),
            provisionedThroughput=Scalar("whole or text"),
            resourcePolicies=TEXTS,
        ),
    },
)
INTERFACE = fields(
    network=TEXT,
    subnetwork=TEXT,
    networkIP=TEXT,
    kind=TEXT,
    name=TEXT,
    nicType=choice("VIRTIO_NET", "GVNIC", "MRDMA", "IRDMA"),
    stackType=choice("IPV4_ONLY", "IPV4_IPV6", "IPV6_ONLY"),
    aliasIpRanges=ANYTHING,
    accessConfigs=Each(fields(type=TEXT, name=TEXT, natIP=TEXT, kind=TEXT, networkTier=choice("PREMIUM", "STANDARD"))),
)
NODE = Fields(
    {
        "machineType": TEXT,
        "minCpuPlatform": TEXT,
        "description": TEXT,
        "hostname": TEXT,
        "sourceInstanceTemplate": TEXT,
        "sourceMachineImage": TEXT,
        "canIpForward": FLAG,
        "deletionProtection": FLAG,
        "disks": Each(DISK, least=1),
        "scheduling": SCHEDULING,
        "guestAccelerators": Each(
            fields("acceleratorType acceleratorCount", acceleratorType=TEXT, acceleratorCount=COUNT)
        ),
        "networkInterfaces": Each(INTERFACE, least=1),
        "serviceAccounts": Each(fields("email scopes", email=TEXT, scopes=TEXTS), least=1),
        "metadata": fields(kind=TEXT, fingerprint=TEXT, items=Each(fields("key", key=TEXT, value=ANYTHING))),
        "labels": TEXT_TABLE,
        "tags": fields(items=TEXTS, fingerprint=TEXT),
        "shieldedInstanceConfig": fields(enableSecureBoot=FLAG, enableVtpm=FLAG, enableIntegrityMonitoring=FLAG),
        "confidentialInstanceConfig": ANYTHING,
        "reservationAffinity": ANYTHING,
        "advancedMachineFeatures": ANYTHING,
        "networkPerformanceConfig": ANYTHING,
        "resourcePolicies": TEXTS,
    },
    (),
    {"name": "is set by Ray, from the node type", "zone": "is set by Ray, from provider.availability_zone"},
)
"""What Ray hands to `instances.insert`."""

TPU = frozenset({"acceleratorType", "acceleratorConfig"})
"""Keys of a TPU's node_config, which is for another API."""

WITHOUT_GPU = re.compile(r"[ceht]\d\w?|n[24]d?|m\d|x4|z3")
"""Families that take no GPUs; n1 takes them, and the rest is not known."""
G2_GPUS = {4: 1, 8: 1, 12: 1, 16: 1, 24: 2, 32: 1, 48: 4, 96: 8}
"""L4 GPUs of a g2-standard machine by its CPUs."""


def check_gcp(document: Document) -> Iterator[Fault]:
    """The provider's and the node types' faults."""
    yield from _place_faults(document)
    for name, node_type in node_types(document).items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", str(name)):
            path: Path = ("available_node_types", name)
            yield document.fault(path, f"{name!r} becomes a label; use lower-case letters, digits, _ and -")
        config = mapping(node_type).get("node_config")
        if isinstance(config, dict) and not TPU & set(config):
            yield from _node_faults(document, str(name), config)


def machine_size(machine_type: str) -> tuple[int | None, int | None]:
    """CPUs and GPUs of a machine type, each None where its name does not tell."""
    name = machine_type.rpartition("/")[2]
    if own := re.fullmatch(r"\w+-\w+gpu-(\d+)g(-\w+)?", name):
        return None, int(own.group(1))
    if custom := re.fullmatch(r"(?:\w+-)?custom-(\d+)-\d+(-ext)?", name):
        return int(custom.group(1)), None
    usual = re.fullmatch(r"(\w+)-(?:standard|highmem|highcpu|ultramem|megamem|hypermem)-(\d+)(-\w+)?", name)
    if usual is None:
        return None, None
    family, cpus = usual.group(1), int(usual.group(2))
    return cpus, G2_GPUS.get(cpus) if family == "g2" else 0 if WITHOUT_GPU.fullmatch(family) else None


def _place_faults(document: Document) -> Iterator[Fault]:
    provider = document.value["provider"]
    region, zone, project = (provider.get(key) for key in ("region", "availability_zone", "project_id"))
    if isinstance(region, str) and not re.fullmatch(r"[a-z]+(-[a-z]+)+\d+", region):
        yield document.fault(("provider", "region"), f"{region!r} is no region, such as us-west1")
    elif isinstance(region, str) and isinstance(zone, str) and not re.fullmatch(rf"{region}-[a-z]", zone):
        hint = "; Ray takes one zone here" if "," in zone else ""
        yield document.fault(("provider", "availability_zone"), f"{zone!r} is no zone of {region}{hint}")
    if "project_id" in provider and project is None:
        yield document.fault(("provider", "project_id"), "is empty: whose machines are they?")
    elif isinstance(project, str) and not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", project):
        yield document.fault(("provider", "project_id"), f"{project!r} is no project id; it has 6 to 30 of a-z, 0-9, -")


def _node_faults(document: Document, name: str, config: dict[str, Any]) -> Iterator[Fault]:
    path: Path = ("available_node_types", name, "node_config")
    config = _plain(config)
    mistakes = list(mismatches(NODE, config, path))
    yield from (document.fault(*mistake) for mistake in mistakes)
    wrong: set[Any] = {at[3] for at, _ in mistakes if len(at) > 3}
    wrong |= {nearest(key, NODE.fields) for key in wrong if key not in NODE.fields}
    for key, risk in (("machineType", "which machine?"), ("disks", "with which image does it start?")):
        if key not in config and key not in wrong and "sourceInstanceTemplate" not in config:
            yield document.fault(path, f"'{key}' is missing: {risk}")
    sound = {key: value for key, value in config.items() if key not in wrong}
    yield from _disk_faults(document, path, sound)
    yield from _machine_faults(document, name, sound, wrong)
    yield from _spot_faults(document, name, sound)
    yield from _account_faults(document, name, config)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without what Ray's examples write in a list of one, and Google takes."""
    scheduling = config.get("scheduling")
    if isinstance(scheduling, list) and len(scheduling) == 1 and isinstance(scheduling[0], dict):
        return {**config, "scheduling": scheduling[0]}
    return config


def _disk_faults(document: Document, path: Path, config: dict[str, Any]) -> Iterator[Fault]:
    disks = items(config.get("disks"))
    boots = [index for index, disk in enumerate(disks) if disk.get("boot") is True]
    if disks and len(boots) != 1:
        found = "none" if not boots else f"{len(boots)}"
        yield document.fault((*path, "disks"), f"one disk has to have boot: true, found {found}")
    for index, disk in enumerate(disks):
        parameters = disk.get("initializeParams")
        place: Path = (*path, "disks", index)
        if not isinstance(parameters, dict):
            continue
        sources = [str(key) for key in (*disk, *parameters) if str(key).lower().startswith("source")]
        if disk.get("boot") is True and not sources:
            yield document.fault((*place, "initializeParams"), "'sourceImage' is required to boot, but missing")
        image = parameters.get("sourceImage")
        if isinstance(image, str) and not re.search(r"(^|/)images/(family/)?[a-z0-9-]+$", image):
            message = f"{image!r} is no image, such as projects/PROJECT/global/images/family/FAMILY"
            yield document.fault((*place, "initializeParams", "sourceImage"), message)
        size = parameters.get("diskSizeGb")
        if size is not None and not (str(size).isdigit() and 10 <= int(size) <= 65_536):
            yield document.fault((*place, "initializeParams", "diskSizeGb"), f"must be 10 to 65,536 GB, got {size!r}")
        if disk.get("autoDelete") is False:
            yield document.fault((*place, "autoDelete"), "is false: disks of nodes that are gone are paid for on")


def _machine_faults(document: Document, name: str, config: dict[str, Any], wrong: set[Any]) -> Iterator[Fault]:
    """The machine, its GPUs, and what the node type promises of them."""
    machine = config.get("machineType")
    path: Path = ("available_node_types", name, "node_config")
    if not isinstance(machine, str):
        return
    if not re.fullmatch(r"(.*/)?([a-z]\w*-[a-z]+(-\w+)*|(\w+-)?custom-\d+-\d+(-ext)?)", machine):
        yield document.fault((*path, "machineType"), f"{machine!r} is no machine type, such as g2-standard-8")
        return
    cpus, gpus = machine_size(machine)
    added = items(config.get("guestAccelerators"))
    refused = list(_accelerator_faults(document, path, machine, added, gpus))
    yield from refused
    if gpus is None and not refused and "guestAccelerators" not in wrong:
        takes_them = machine.rpartition("/")[2].startswith(("n1-", "custom-"))
        gpus = sum(item["acceleratorCount"] for item in added) if added or takes_them else None
    yield from too_large(document, name, cpus, None if refused else gpus)
    if gpus and "scheduling" not in wrong:
        yield from _maintenance_faults(document, path, config)


def _accelerator_faults(
    document: Document, path: Path, machine: str, added: list[Any], own: int | None
) -> Iterator[Fault]:
    if added and own == 0:
        message = f"{machine} takes no GPUs; n1 machines do, g2 and a2 have their own"
        yield document.fault((*path, "guestAccelerators"), message)
        return
    for index, item in enumerate(added):
        place: Path = (*path, "guestAccelerators", index)
        if item["acceleratorCount"] == 0:
            yield document.fault((*place, "acceleratorCount"), "must be at least 1, got 0")
        if not re.fullmatch(r"(.*/acceleratorTypes/)?(nvidia|ct)[a-z0-9-]+", item["acceleratorType"]):
            message = f"{item['acceleratorType']!r} is no accelerator, such as nvidia-tesla-t4"
            yield document.fault((*place, "acceleratorType"), message)


def _maintenance_faults(document: Document, path: Path, config: dict[str, Any]) -> Iterator[Fault]:
    """Machines with GPUs cannot be moved while they run."""
    scheduling = mapping(config.get("scheduling"))
    found = scheduling.get("onHostMaintenance")
    if found == "MIGRATE":
        yield document.fault((*path, "scheduling"), "onHostMaintenance has to be TERMINATE: GPUs cannot be moved")
    elif found is None and not _is_spot(scheduling):
        place = (*path, "scheduling") if scheduling else path
        yield document.fault(place, "onHostMaintenance: TERMINATE is missing: GPUs cannot be moved")


def _is_spot(scheduling: dict[str, Any]) -> bool:
    return scheduling.get("preemptible") is True or scheduling.get("provisioningModel") == "SPOT"


def _spot_faults(document: Document, name: str, config: dict[str, Any]) -> Iterator[Fault]:
    scheduling = config.get("scheduling")
    if not isinstance(scheduling, dict):
        return
    path: Path = ("available_node_types", name, "node_config", "scheduling")
    spot = _is_spot(scheduling)
    if spot and is_head(document, name):
        yield document.fault(path, "the head on a spot machine: when it goes, the whole cluster goes")
    elif spot and scheduling.get("automaticRestart") is True:
        yield document.fault((*path, "automaticRestart"), "has to be false on a spot machine")
    elif scheduling.get("preemptible") is False and scheduling.get("provisioningModel") == "SPOT":
        yield document.fault((*path, "preemptible"), "is false while provisioningModel is SPOT; leave it out")
    elif not spot and "instanceTerminationAction" in scheduling and "maxRunDuration" not in scheduling:
        yield document.fault((*path, "instanceTerminationAction"), "is for spot machines; set provisioningModel: SPOT")


def _account_faults(document: Document, name: str, config: dict[str, Any]) -> Iterator[Fault]:
    """Ray gives an account to the head alone, so workers cannot reach a bucket without one of their own."""
    accounts = config.get("serviceAccounts")
    path: Path = ("available_node_types", name, "node_config")
    for index, account in enumerate(accounts if isinstance(accounts, list) else ()):
        email = account.get("email") if isinstance(account, dict) else None
        if isinstance(email, str) and email != "default" and not re.fullmatch(r"[^@\s]+@[^@\s]+", email):
            yield document.fault((*path, "serviceAccounts", index, "email"), f"{email!r} is no address of an account")
    missing = not any(str(key).lower().startswith("serviceacc") for key in config)
    if missing and storage_of(document).startswith("gs://") and is_worker(document, name):
        yield document.fault(path, f"'serviceAccounts' is missing: nothing lets it reach {storage_of(document)}")
