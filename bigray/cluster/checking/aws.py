"""`ray up` on AWS: each node type's machine against EC2's own model of RunInstances, as botocore ships it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.ray_cluster import is_head, is_worker, mapping, node_types, storage_of, too_large
from bigray.cluster.checking.shapes import (
    ANYTHING,
    FLAG,
    TEXT,
    WHOLE,
    Each,
    Fields,
    Scalar,
    Shape,
    Table,
    fields,
    mismatches,
)
from bigray.cluster.checking.yaml_file import Document

BY_RAY = {
    "MinCount": "is set by Ray; use min_workers of the node type",
    "MaxCount": "is set by Ray; use max_workers of the node type",
    "SubnetId": "is overwritten by Ray; write SubnetIds, a list",
}
"""Parameters of RunInstances that are not for the file."""

GPUS = {
    "g4dn": {"12xlarge": 4, "metal": 8},
    "g5": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6e": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "p3": {"8xlarge": 4, "16xlarge": 8},
    "p4d": {"24xlarge": 8},
    "p4de": {"24xlarge": 8},
    "p5": {"48xlarge": 8},
    "p5e": {"48xlarge": 8},
    "p5en": {"48xlarge": 8},
}
"""GPUs of instance types by family and size; sizes that are not named have one."""

WITHOUT_GPU = re.compile(r"[acdhimrtxz]\d\w*|is4gen|im4gn|hpc\w+")


def check_aws(document: Document) -> Iterator[Fault]:
    """The provider's and the node types' faults, and a note where botocore is missing."""
    yield from _place_faults(document)
    yield from _group_faults(document)
    if find_spec("botocore") is None:
        note = "node_config was not held against EC2's own model; pip install botocore"
        yield Fault("available_node_types", note, document.line_of(("available_node_types",)), is_note=True)
    for name, node_type in node_types(document).items():
        config = mapping(node_type).get("node_config")
        if isinstance(config, dict):
            yield from _node_faults(document, name, config)


def instance_size(instance_type: str) -> tuple[int | None, int | None]:
    """CPUs and GPUs of an instance type, each None where its name does not tell."""
    family, _, size = instance_type.partition(".")
    number = re.fullmatch(r"(\d*)xlarge", size)
    cpus = 4 * int(number.group(1) or 1) if number else 2 if size == "large" else None
    if family in GPUS:
        return cpus, GPUS[family].get(size, 1)
    return cpus, 0 if WITHOUT_GPU.fullmatch(family) else None


def _place_faults(document: Document) -> Iterator[Fault]:
    provider = document.value["provider"]
    region, zones = provider.get("region"), provider.get("availability_zone")
    if not isinstance(region, str):
        return
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+){1,3}-\d", region):
        zone = " (that is a zone)" if re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d[a-z]", region) else ""
        yield document.fault(("provider", "region"), f"{region!r} is no region, such as us-west-2{zone}")
        return
    for zone in re.split(r"\s*,\s*", zones) if isinstance(zones, str) else ():
        if not re.fullmatch(rf"{region}(-[a-z]+-\d)?[a-z]", zone):
            yield document.fault(("provider", "availability_zone"), f"{zone!r} is no zone of {region}")


def _group_faults(document: Document) -> Iterator[Fault]:
    """The inbound rules that Ray adds to those of its own: ssh, and everything within the cluster."""
    group = document.value["provider"].get("security_group")
    rules = group.get("IpPermissions") if isinstance(group, dict) else None
    path: Path = ("provider", "security_group", "IpPermissions")
    shape = _permissions()
    if rules is not None and shape is not None:
        yield from (document.fault(*mistake) for mistake in mismatches(shape, rules, path))
    for index, rule in enumerate(rules if isinstance(rules, list) else ()):
        for ranges, key in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
            for at, allowed in enumerate(_items(rule, ranges)):
                if str(allowed.get(key)) in ("0.0.0.0/0", "::/0"):
                    place = (*path, index, ranges, at, key)
                    yield document.fault(place, f"{_ports(rule)} open to the whole internet; name your own network")


def _ports(rule: dict[str, Any]) -> str:
    first, last = rule.get("FromPort"), rule.get("ToPort")
    if str(rule.get("IpProtocol")) == "-1" or first is None:
        return "every port is"
    return f"port {first} is" if first == last else f"ports {first} to {last} are"


def _node_faults(document: Document, name: str, config: dict[str, Any]) -> Iterator[Fault]:
    path: Path = ("available_node_types", name, "node_config")
    shape = _run_instances()
    told = [document.fault(*mistake) for mistake in mismatches(shape, config, path)] if shape else []
    yield from told
    if shape is None:
        yield from (document.fault((*path, key), message) for key, message in BY_RAY.items() if key in config)
    misspelt = " ".join(fault.message for fault in told)
    for key, risk in (("InstanceType", "which machine?"), ("ImageId", "Ray's own default is an image of Ubuntu 18.04")):
        if key not in config and f"'{key}'" not in misspelt:
            yield document.fault(path, f"'{key}' is missing: {risk}")
    yield from _image_faults(document, path, config.get("ImageId"))
    yield from _machine_faults(document, name, config.get("InstanceType"))
    yield from _market_faults(document, name, config)
    yield from _disk_faults(document, path, config)
    yield from _role_faults(document, name, config)
    yield from _key_faults(document, path, config)


def _image_faults(document: Document, path: Path, image: Any) -> Iterator[Fault]:
    if isinstance(image, str) and not re.fullmatch(r"ami-([0-9a-f]{8}|[0-9a-f]{17})", image):
        hint = "is Ubuntu 18.04" if image.lower() == "latest_dlami" else "is no AMI, such as ami-0123456789abcdef0"
        hint = (
            "cannot be looked up by the head's role; write the AMI it stands for" if image[:8] == "resolve:" else hint
        )
        yield document.fault((*path, "ImageId"), f"{image!r} {hint}")


def _machine_faults(document: Document, name: str, instance_type: Any) -> Iterator[Fault]:
    if not isinstance(instance_type, str):
        return
    path: Path = ("available_node_types", name, "node_config", "InstanceType")
    if not re.fullmatch(r"[a-z][a-z0-9-]*\.(nano|micro|small|medium|large|\d*xlarge|metal(-\w+)?)", instance_type):
        yield document.fault(path, f"{instance_type!r} is no instance type, such as g5.2xlarge")
        return
    yield from too_large(document, name, *instance_size(instance_type))


def _market_faults(document: Document, name: str, config: dict[str, Any]) -> Iterator[Fault]:
    market = config.get("InstanceMarketOptions")
    if not isinstance(market, dict):
        return
    path: Path = ("available_node_types", name, "node_config", "InstanceMarketOptions")
    options = mapping(market.get("SpotOptions"))
    if market.get("MarketType") == "spot" and is_head(document, name):
        yield document.fault(path, "the head on a spot machine: when it goes, the whole cluster goes")
    elif options and not any(str(key).startswith("Market") for key in market):
        yield document.fault(path, "'MarketType' is required with SpotOptions, but missing")
    elif options.get("SpotInstanceType") == "persistent":
        place = (*path, "SpotOptions", "SpotInstanceType")
        yield document.fault(place, "a persistent request starts machines again that Ray has ended; use one-time")
    price = options.get("MaxPrice")
    if isinstance(price, str) and not re.fullmatch(r"\d+(\.\d+)?", price):
        yield document.fault((*path, "SpotOptions", "MaxPrice"), f"{price!r} is no price in dollars per hour")


def _disk_faults(document: Document, path: Path, config: dict[str, Any]) -> Iterator[Fault]:
    for index, device in enumerate(_items(config, "BlockDeviceMappings")):
        disk = device.get("Ebs")
        place: Path = (*path, "BlockDeviceMappings", index)
        if not isinstance(disk, dict):
            continue
        size = disk.get("VolumeSize")
        if isinstance(size, int) and not isinstance(size, bool) and not 1 <= size <= 65_536:
            yield document.fault((*place, "Ebs", "VolumeSize"), f"must be 1 to 65,536 GiB, got {size}")
        if disk.get("VolumeType") in ("io1", "io2") and "Iops" not in disk:
            yield document.fault((*place, "Ebs"), f"'Iops' is required with {disk['VolumeType']}, but missing")
        if "DeviceName" not in device and not any("Device" in str(key) for key in device):
            yield document.fault(place, "'DeviceName' is required, but missing")


def _role_faults(document: Document, name: str, config: dict[str, Any]) -> Iterator[Fault]:
    """Ray gives a role to the head alone, so workers cannot reach a bucket without one of their own."""
    needs_role = storage_of(document).startswith("s3://") and is_worker(document, name)
    if needs_role and not any(str(key).startswith("Iam") for key in config):
        path: Path = ("available_node_types", name, "node_config")
        yield document.fault(path, f"'IamInstanceProfile' is missing: nothing lets it reach {storage_of(document)}")


def _key_faults(document: Document, path: Path, config: dict[str, Any]) -> Iterator[Fault]:
    auth = document.value.get("auth")
    has_key = isinstance(auth, dict) and "ssh_private_key" in auth
    if has_key and "KeyName" not in config and "UserData" not in config:
        yield document.fault(path, "'KeyName' is required with auth.ssh_private_key, but missing")
    elif not has_key and "KeyName" in config:
        yield document.fault((*path, "KeyName"), "needs auth.ssh_private_key, the path of the key it names")


def _items(value: Any, key: str) -> list[dict[str, Any]]:
    found = value.get(key) if isinstance(value, dict) else None
    return [item if isinstance(item, dict) else {} for item in found] if isinstance(found, list) else []


def _run_instances() -> Fields | None:
    """The shape of `node_config`: RunInstances' input, with Ray's own keys; None without botocore."""
    shape = _operation_input("RunInstances")
    if shape is None:
        return None
    known = {key: of for key, of in shape.fields.items() if key not in BY_RAY}
    # instance types are new every month: those that this botocore does not know are none the worse
    return Fields({**known, "InstanceType": TEXT, "SubnetIds": Each(TEXT)}, (), BY_RAY)


def _permissions() -> Shape | None:
    shape = _operation_input("AuthorizeSecurityGroupIngress")
    return shape.fields["IpPermissions"] if shape else None


@lru_cache(maxsize=4)
def _operation_input(operation: str) -> Fields | None:
    if find_spec("botocore") is None:
        return None
    import botocore.loaders
    import botocore.model

    description = botocore.loaders.Loader().load_service_model("ec2", "service-2")
    model = botocore.model.ServiceModel(description).operation_model(operation)
    shape = _shape_of(model.input_shape, 0)
    return shape if isinstance(shape, Fields) else fields()


def _shape_of(model: Any, depth: int) -> Shape:
    """botocore's model of a value in the terms of `shapes`."""
    kind = model.type_name
    if depth > 12:
        return ANYTHING
    if kind == "structure":
        members = {key: _shape_of(member, depth + 1) for key, member in model.members.items()}
        return Fields(members, tuple(model.required_members))
    if kind == "list":
        return Each(_shape_of(model.member, depth + 1))
    if kind == "map":
        return Table(_shape_of(model.value, depth + 1))
    if kind == "string":
        return Scalar("text", choices=tuple(model.enum))
    if kind in ("integer", "long"):
        bounds = model.metadata
        return Scalar("whole", least=bounds.get("min"), most=bounds.get("max"))
    return {"boolean": FLAG, "float": Scalar("number"), "double": Scalar("number"), "integer": WHOLE}.get(
        kind, ANYTHING
    )
