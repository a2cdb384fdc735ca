from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bigray.cluster.checking import aws
from bigray.cluster.checking.aws import instance_size
from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.kinds import check_file

CLUSTER = Path(__file__).parents[4] / "cluster"
GROUP = "  region: us-west-2\n  security_group:\n    GroupName: bigray\n    IpPermissions:\n"
RULE = GROUP + "      - {{FromPort: {0}, ToPort: {0}, IpProtocol: tcp, IpRanges: [{{CidrIp: {1}}}]}}\n"
DISK = "Ebs: { VolumeSize: 150, VolumeType: gp3 }"
HEAD = "node_config:\n      InstanceType: m6i.xlarge\n"
SPOT = "InstanceType: g5.2xlarge\n      ImageId: ami-0123456789abcdef0\n      InstanceMarketOptions:\n"
ROLE = "      IamInstanceProfile: { Name: bigray-worker }\n"

# name: (what is there, what takes its place, text on the line that is told, words of the message)
PLANTED = {
    "region missing": ("  region: us-west-2\n", "", "provider:", "'region' is required"),
    "region that is a zone": ("region: us-west-2\n", "region: us-west-2a\n", "region: us", "that is a zone"),
    "region of nowhere": ("region: us-west-2\n", "region: oregon\n", "region: oregon", "no region"),
    "zone of another region": ("us-west-2b", "us-east-1b", "availability_zone", "no zone of us-west-2"),
    "key of the provider misspelt": ("cache_stopped_nodes", "cache_stoped_nodes", "cache_stoped", "did you mean"),
    "yes for a flag": ("nodes: false", "nodes: no", "cache_stopped", "read as false"),
    "credentials in the file": (
        "  region: us-west-2\n",
        "  region: us-west-2\n  aws_credentials: {aws_access_key_id: abc, aws_secret_access_key: def}\n",
        "aws_credentials",
        "clear text",
    ),
    "a port open to all": ("  region: us-west-2\n", RULE.format(8265, "0.0.0.0/0"), "0.0.0.0/0", "port 8265 is open"),
    "ssh open to all": ("  region: us-west-2\n", RULE.format(22, "0.0.0.0/0"), "0.0.0.0/0", "port 22 is open"),
    "everything open to all of IPv6": (
        "  region: us-west-2\n",
        GROUP + '      - {IpProtocol: "-1", Ipv6Ranges: [{CidrIpv6: "::/0"}]}\n',
        "::/0",
        "every port is open",
    ),
    "head's type missing": ("head_node_type: head\n", "", "cluster_name", "which of available_node_types"),
    "head of another name": ("head_node_type: head\n", "head_node_type: haed\n", "haed", "did you mean 'head'"),
    "type without node_config": (
        "spot }\n    node_config:\n",
        "spot }\n    node_confg:\n",
        "node_confg",
        "did you mean 'node_config'",
    ),
    "type without resources": ("    resources: { CPU: 0 }\n", "", "  head:\n", "'resources' is required"),
    "least above most": (
        "min_workers: 0\n    max_workers: 2",
        "min_workers: 3\n    max_workers: 2",
        "min_workers: 3",
        "more than max_workers",
    ),
    "least negative": ("min_workers: 0", "min_workers: -1", "min_workers: -1", "at least 0"),
    "type that never comes": ("    max_workers: 2", "    max_workers: 0", "    max_workers: 0", "ever launched"),
    "type above the cluster": (
        "    max_workers: 8",
        "    max_workers: 80",
        "    max_workers: 80",
        "the cluster's max_workers is 8",
    ),
    "far too many workers": ("\nmax_workers: 8\n", "\nmax_workers: 80000\n", "max_workers: 80000", "a slip"),
    "workers at the top": (
        "\nmax_workers: 8\n",
        "\nmax_workers: 8\nmin_workers: 1\n",
        "min_workers: 1",
        "of each node type",
    ),
    "idle for a week": ("minutes: 10\n", "minutes: 10080\n", "minutes: 10080", "longer than a day"),
    "more CPUs than the machine": ("CPU: 8, GPU: 1", "CPU: 16, GPU: 1", "CPU: 16", "is 16, the machine has 8"),
    "more GPUs than the machine": ("CPU: 8, GPU: 1", "CPU: 8, GPU: 4", "GPU: 4", "is 4, the machine has 1"),
    "GPUs of a machine without": (
        "InstanceType: g5.2xlarge",
        "InstanceType: m6i.2xlarge",
        "GPU: 1",
        "the machine has 0",
    ),
    "head's CPUs of two minds": ("CPU: 0 }", "CPU: 4 }", "CPU: 4", "--num-cpus=0"),
    "fraction of a GPU": ("CPU: 8, GPU: 1", "CPU: 8, GPU: 0.5", "GPU: 0.5", "a whole number"),
    "label that is a flag": ("market: spot", "market: on", "market: on", "read as true"),
    "label that is a number": ("market: spot", "market: 1", "market: 1", "expected a text"),
    "no machine named": ("      InstanceType: m6i.xlarge\n", "", "    node_config:\n", "'InstanceType' is missing"),
    "no such machine": ("InstanceType: m6i.xlarge", "InstanceType: m6i-xlarge", "m6i-xlarge", "no instance type"),
    "no image named": ("ImageId: ami", "# ami", "    node_config:\n", "'ImageId' is missing"),
    "image cut short": ("ami-0123456789abcdef0", "ami-0123", "ami-0123", "is no AMI"),
    "image of Ray's old default": ("ImageId: ami-0123456789abcdef0", "ImageId: latest_dlami", "latest_dlami", "18.04"),
    "image the head cannot look up": (
        "ImageId: ami-0123456789abcdef0",
        "ImageId: resolve:ssm:/a",
        "resolve:",
        "looked up",
    ),
    "spot head": (
        HEAD,
        HEAD + "      InstanceMarketOptions: { MarketType: spot }\n",
        "InstanceMarketOptions: { M",
        "the whole cluster",
    ),
    "spot options without the market": (
        "        MarketType: spot\n",
        "",
        "      InstanceMarketOptions:",
        "'MarketType'",
    ),
    "spot that comes back": ("SpotInstanceType: one-time", "SpotInstanceType: persistent", "persistent", "one-time"),
    "price in words": ("SpotInstanceType: one-time", "MaxPrice: cheap", "cheap", "no price"),
    "disk of nothing": ("VolumeSize: 150", "VolumeSize: 0", "VolumeSize: 0", "1 to 65,536"),
    "fast disk without its speed": ("150, VolumeType: gp3", "150, VolumeType: io2", "io2", "'Iops' is required"),
    "disk without a name": ("        - DeviceName: /dev/sda1\n          Ebs", "        - Ebs", "- Ebs", "'DeviceName'"),
    "worker without a role": (ROLE, "", "    node_config:\n      InstanceType: g5", "'IamInstanceProfile' is missing"),
    "key pair without its file": (HEAD, HEAD + "      KeyName: mine\n", "KeyName", "auth.ssh_private_key"),
    "count of machines": (HEAD, HEAD + "      MinCount: 2\n", "MinCount", "is set by Ray"),
    "one subnet": (HEAD, HEAD + "      SubnetId: subnet-1\n", "SubnetId", "write SubnetIds"),
    "image without a tag": ("ray:2.60.0-py311-gpu", "ray", "image: rayproject", "has no tag"),
    "image that moves": ("ray:2.60.0-py311-gpu", "ray:latest-gpu", "image: rayproject", "moves"),
    "image of another Ray": ("ray:2.60.0-py311-gpu", "ray:2.49.2-py311-gpu", "image: rayproject", "not the"),
    "image of an old Python": ("ray:2.60.0-py311-gpu", "ray:2.60.0-py310-gpu", "image: rayproject", "Python 3.10"),
    "image without CUDA": ("ray:2.60.0-py311-gpu", "ray:2.60.0-py311", "image: rayproject", "without CUDA"),
    "autoscaler v1 on a worker": (
        "RAY_AUTH_MODE=token; ul",
        "RAY_AUTH_MODE=token RAY_enable_autoscaler_v2=0; ul",
        "- >-\n    export RAY_AUTH_MODE=token RAY_enable_autoscaler_v2=0",
        "autoscaler v2",
    ),
    "autoscaler v1": (
        "autoscaler_v2=1",
        "autoscaler_v2=0",
        "- >-\n    export RAY_AUTH_MODE=token RAY",
        "autoscaler v2",
    ),
    "container without a name": ("  container_name: bigray\n", "", "docker:", "'container_name'"),
    "container with all rights": ("--ulimit nofile=65536:65536", "--privileged", "- --privileged", "whole machine"),
    "published port": ("--ulimit nofile=65536:65536", "-p 8265:8265", "- -p", "publishes a port"),
    "keys handed to the container": ("--ulimit nofile=65536:65536", "-v ~/.aws:/home/ray/.aws", "- -v", "a role"),
    "secret handed to the container": (
        "--ulimit nofile=65536:65536",
        "-e AWS_SECRET_ACCESS_KEY=abc",
        "- -e",
        "clear text",
    ),
    "boto3 of any version": (" -c /home/ray/bigray/constraints.txt # Ray", " # Ray", "boto3", "not pinned"),
    "another Ray in the setup": (
        "-c /home/ray/bigray/constraints.txt /home",
        "ray==2.9.0 /home",
        "==2.9.0",
        "is not the",
    ),
}

# what only EC2's own model knows
MODELLED = {
    "parameter misspelt": (
        "      InstanceType: m6i",
        "      InstanceTyp: m6i",
        "InstanceTyp:",
        "did you mean 'InstanceType'",
    ),
    "parameter of the market misspelt": ("        MarketType", "        MarketTyp", "MarketTyp:", "did you mean"),
    "parameter of a disk misspelt": ("VolumeSize: 150", "VolumeSiz: 150", "VolumeSiz:", "did you mean 'VolumeSize'"),
    "disk's size as text": ("VolumeSize: 150", 'VolumeSize: "150"', "VolumeSize", "a whole number"),
    "no such market": ("MarketType: spot", "MarketType: spott", "spott", "did you mean 'spot'"),
    "no such disk": ("150, VolumeType: gp3", "150, VolumeType: gp33", "gp33", "not a choice"),
    "no such answer to a notice": ("Behavior: terminate", "Behavior: kill", "kill", "not a choice"),
    "tokens of no kind": ("HttpTokens: required", "HttpTokens: needed", "needed", "not a choice"),
    "role as a name": (
        "IamInstanceProfile: { Name: bigray-worker }",
        "IamInstanceProfile: bigray",
        "IamInst",
        "a mapping",
    ),
    "role's name misspelt": ("{ Name: bigray-worker }", "{ Nam: bigray-worker }", "{ Nam:", "did you mean 'Name'"),
    "groups in one string": (HEAD, HEAD + "      SecurityGroupIds: sg-1\n", "SecurityGroupIds", "a list"),
    "subnets in one string": (HEAD, HEAD + "      SubnetIds: subnet-1\n", "SubnetIds", "a list"),
    "flag as text": (HEAD, HEAD + '      EbsOptimized: "true"\n', "EbsOptimized", "true or false"),
    "rule's key misspelt": (
        "  region: us-west-2\n",
        RULE.format(22, "10.0.0.0/8").replace("ToPort", "ToPrt"),
        "ToPrt",
        "ToPort",
    ),
    "port as text": (
        "  region: us-west-2\n",
        RULE.format('"22"', "10.0.0.0/8").replace('ToPort: "22"', "ToPort: 22"),
        "FromPort",
        "a whole number",
    ),
}

VARIANTS = {
    "resources found by Ray": ("resources: { CPU: 8, GPU: 1 }", "resources: {}"),
    "one zone": ("us-west-2a,us-west-2b", "us-west-2a"),
    "no zone": ("  availability_zone: us-west-2a,us-west-2b # the first with machines to spare\n", ""),
    "a local zone": ("us-west-2a,us-west-2b", "us-west-2-lax-1a"),
    "a rule for one's own network": ("  region: us-west-2\n", RULE.format(22, "203.0.113.0/24")),
    "spot at a price": ("SpotInstanceType: one-time", 'MaxPrice: "0.9"'),
    "metal": ("InstanceType: m6i.xlarge", "InstanceType: m6i.metal"),
    "a family that is not known": ("InstanceType: g5.2xlarge", "InstanceType: g9x.2xlarge"),
    "four GPUs": ("InstanceType: g5.2xlarge", "InstanceType: g5.12xlarge"),
    "subnets and groups": (HEAD, HEAD + "      SubnetIds: [subnet-1]\n      SecurityGroupIds: [sg-1]\n"),
    "tags": (HEAD, HEAD + "      TagSpecifications: [{ResourceType: instance, Tags: [{Key: team, Value: ml}]}]\n"),
    "a network of one's own": ("storage: s3://your-bucket/runs", "storage: /mnt/efs/runs"),
    "an image of one's own": ("rayproject/ray:2.60.0-py311-gpu", "registry.example.org:5000/bigray:0.1.0"),
    "an image by its digest": ("rayproject/ray:2.60.0-py311-gpu", "example.org/bigray@sha256:" + "0" * 64),
    "images for head and workers": (
        "  image: ray",
        "  worker_image: rayproject/ray:2.60.0-py311-gpu\n  head_image: ray",
    ),
    "image of the workers": (
        "  image: rayproject/ray:2.60.0-py311-gpu",
        "  head_image: rayproject/ray:2.60.0-py311\n  worker_image: rayproject/ray:2.60.0-py311-gpu",
    ),
    "head without its machine's CPUs told": (" --num-cpus=0", ""),
    "idle time of a type": ("    labels: { market: spot }", "    labels: { market: spot }\n    idle_timeout_s: 60"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_in_the_file_for_aws_is_told_once(name: str, assert_told_once: Callable[..., None]) -> None:
    assert_told_once("aws.yaml", *PLANTED[name])


@pytest.mark.parametrize("name", MODELLED)
def test_a_mistake_that_ec2s_own_model_knows_is_told_once(name: str, assert_told_once: Callable[..., None]) -> None:
    pytest.importorskip("botocore", reason="needs botocore, which brings EC2's model")
    assert_told_once("aws.yaml", *MODELLED[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_another_way_to_write_it_is_no_fault(name: str, faults_after: Callable[..., tuple[list[Fault], str]]) -> None:
    faults, _ = faults_after("aws.yaml", *VARIANTS[name])
    assert [str(fault) for fault in faults] == []


def test_without_botocore_the_rest_is_checked_and_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore", None)
    aws._operation_input.cache_clear()
    try:
        (note,) = check_file(CLUSTER / "aws.yaml")
    finally:
        aws._operation_input.cache_clear()
    assert note.is_note
    assert "botocore" in note.message


def test_botocore_takes_the_machines_as_they_are() -> None:
    pytest.importorskip("botocore", reason="needs botocore, which brings EC2's model")
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    for node_type in yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"].values():
        report = ParamValidator().validate({**node_type["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()


@pytest.mark.parametrize(
    ("instance_type", "size"),
    [
        ("g5.2xlarge", (8, 1)),
        ("g5.48xlarge", (192, 8)),
        ("p4d.24xlarge", (96, 8)),
        ("m6i.xlarge", (4, 0)),
        ("c7gn.large", (2, 0)),
        ("m6i.metal", (None, 0)),
        ("trn1.32xlarge", (128, None)),
        ("u-6tb1.112xlarge", (448, None)),
    ],
)
def test_a_machines_size_is_read_from_its_name(instance_type: str, size: tuple[int | None, int | None]) -> None:
    assert instance_size(instance_type) == size
