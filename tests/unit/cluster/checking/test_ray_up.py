from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.kinds import check_file
from bigray.cluster.checking.ray_commands import OPTIONS
from bigray.cluster.checking.ray_up import check_ray_up
from bigray.cluster.checking.yaml_file import read_yaml

CLUSTER = Path(__file__).parents[4] / "cluster"
HEAD_START = "ray start --head --port=6379"
WORKER_START = "ray start --address=$RAY_HEAD_IP:6379"
EXPORT = "- >-\n    export"
HEAD_STEP = f"{EXPORT} RAY_AUTH_MODE=token RAY_enable"
WORKER_STEP = f"{EXPORT} RAY_AUTH_MODE=token; ulimit"

# name: (what is there, what takes its place, text on the line that is told, words of the message)
PLANTED = {
    "key misspelt": ("max_workers: 2", "max_worker: 2", "max_worker: 2", "did you mean 'max_workers'"),
    "key of the provider misspelt": ("head_ip:", "head_ips:", "head_ips:", "did you mean 'head_ip'"),
    "key of auth misspelt": ("ssh_user: bigray", "ssh_usr: bigray", "ssh_usr", "did you mean 'ssh_user'"),
    "key that Ray dropped": ("min_workers: 2", "head_node: {}\nmin_workers: 2", "head_node", "no longer read"),
    "key from elsewhere": ("min_workers: 2", "replicas: 3\nmin_workers: 2", "replicas", "is not a key here"),
    "cluster name missing": ("cluster_name: bigray\n", "", "provider:", "'cluster_name' is required"),
    "cluster name with a slash": ("cluster_name: bigray", "cluster_name: big/ray", "big/ray", "file names"),
    "cluster name a number": ("cluster_name: bigray", "cluster_name: 7", "cluster_name: 7", "expected a text"),
    "provider's type missing": ("  type: local\n", "", "provider:", "'type' is required"),
    "provider's type misspelt": ("type: local", "type: locl", "type: locl", "did you mean 'local'"),
    "head's address missing": ("  head_ip: 192.168.1.10\n", "", "provider:", "'head_ip' is required"),
    "workers in one string": ("\n    - 192.168.1.11\n    - 192.168.1.12", " 192.168.1.11", "worker_ips", "a list"),
    "address out of range": ("192.168.1.11", "192.168.1.311", "192.168.1.311", "no IP address"),
    "address with a port": ("192.168.1.12", "192.168.1.12:22", "192.168.1.12:22", "no address or host name"),
    "same machine twice": ("192.168.1.12", "192.168.1.10", "    - 192.168.1.10", "twice"),
    "head on loopback": ("192.168.1.10", "127.0.0.1", "head_ip: 127.0.0.1", "another machine on each node"),
    "user missing": ("  ssh_user: bigray\n", "", "auth:", "'ssh_user' is required"),
    "most workers below the machines": ("max_workers: 2", "max_workers: 1", "max_workers: 1", "is 1, worker_ips has 2"),
    "most workers above the machines": ("max_workers: 2", "max_workers: 3", "max_workers: 3", "is 3, worker_ips has 2"),
    "workers as text": ("max_workers: 2", 'max_workers: "2"', "max_workers", "expected a whole number"),
    "workers negative": ("max_workers: 2", "max_workers: -2", "max_workers", "at least 0"),
    "no workers": ("max_workers: 2", "max_workers: 0", "max_workers: 0", "no workers"),
    "least workers a flag": ("min_workers: 2", "min_workers: true", "min_workers: true", "expected a whole number"),
    "least above most": ("min_workers: 2", "min_workers: 3", "min_workers: 3", "more than max_workers"),
    "idle timeout of nothing": ("minutes: 60", "minutes: 0", "idle_timeout_minutes", "as soon as they are idle"),
    "idle timeout negative": ("minutes: 60", "minutes: -1", "idle_timeout_minutes", "at least 0"),
    "speed of nothing": ("upscaling_speed: 1.0", "upscaling_speed: 0", "upscaling_speed", "never grows"),
    "speed as text": ("upscaling_speed: 1.0", "upscaling_speed: 1e-4", "upscaling_speed", "write 1.0e-4"),
    "node types of a cloud": ("metadata:", "head_node_type: head\nmetadata:", "head_node_type", "there already"),
    "storage with one slash": ("storage: /mnt/bigray/runs", "storage: s3:/b/runs", "s3:/b", "write 's3://b/runs'"),
    "storage without a bucket": ("storage: /mnt/bigray/runs", "storage: s3://", "storage: s3", "names no bucket"),
    "storage of one machine": ("storage: /mnt/bigray/runs", "storage: /tmp/runs", "storage: /tmp", "on each node"),
    "storage relative": ("storage: /mnt/bigray/runs", "storage: runs", "storage: runs", "not seen by every node"),
    "mount of AWS's keys": ("  ~/bigray/dist: dist", "  ~/bigray/dist: dist\n  ~/.aws: ~/.aws", "~/.aws", "every node"),
    "mount of ssh keys": ("  ~/bigray/dist: dist", "  ~/bigray/dist: dist\n  /k: ~/.ssh/id_rsa", "/k:", "every node"),
    "mount of the home folder": ("  ~/bigray/dist: dist", "  ~/bigray/dist: ~/", "~/bigray/dist: ~/", "every node"),
    "mount to a relative path": ("  ~/bigray/dist: dist", "  bigray: dist", "  bigray: dist", "start with / or ~"),
    "mount of a number": ("  ~/bigray/dist: dist", "  ~/bigray/dist: 7", "~/bigray/dist: 7", "expected the local path"),
    "no token on the nodes": ("  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "file_mounts", "no token on the nodes"),
    "token where Ray does not look": (
        "  ~/.ray/auth_token:",
        "  /etc/auth_token:",
        "file_mounts",
        "no token on the nodes",
    ),
    "token in the file": (HEAD_START, f"RAY_AUTH_TOKEN=abc123 {HEAD_START}", HEAD_STEP, "clear text"),
    "token echoed": (
        "setup_commands:\n",
        "setup_commands:\n  - echo abc123 > ~/.ray/auth_token\n",
        "echo abc",
        "a token in clear text",
    ),
    "AWS key in the file": (
        "metadata:\n",
        "metadata:\n  note: AKIAABCDEFGHIJKLMNOP\n",
        "note:",
        "an access key of AWS in clear text",
    ),
    "password in the file": ("metadata:\n", "metadata:\n  db_password: hunter2\n", "db_password", "clear text"),
    "token mode misspelt": (
        "RAY_AUTH_MODE=token RAY",
        "RAY_AUTH_MODE=tokens RAY",
        f"{EXPORT} RAY_AUTH_MODE=tokens",
        "'tokens'",
    ),
    "authentication off": (
        "RAY_AUTH_MODE=token; ul",
        "RAY_AUTH_MODE=disabled; ul",
        f"{EXPORT} RAY_AUTH_MODE=disabled",
        "'disabled'",
    ),
    "dashboard for all": ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", HEAD_STEP, "sends the token"),
    "dashboard switched off": ("--num-gpus=0", "--include-dashboard=false", HEAD_STEP, "Jobs API"),
    "head without --head": (HEAD_START, "ray start --port=6379", HEAD_STEP, "lacks --head"),
    "head with an address": (HEAD_START, f"{HEAD_START} --address=10.0.0.1:6379", HEAD_STEP, "exclude each other"),
    "head without autoscaling config": (
        "\n    --autoscaling-config=~/ray_bootstrap_config.yaml",
        "",
        HEAD_STEP,
        "lacks --autoscaling-config",
    ),
    "wrong autoscaling config": ("ray_bootstrap_config.yaml", "onprem.yaml", HEAD_STEP, "`ray up` writes"),
    "option misspelt": ("--dashboard-host", "--dashbord-host", HEAD_STEP, "did you mean '--dashboard-host'"),
    "port of letters": ("--num-gpus=0", "--num-gpus=none", HEAD_STEP, "a whole number"),
    "autoscaler v2": ("autoscaler_v2=0; ul", "autoscaler_v2=1; ul", HEAD_STEP, "never starts the last of worker_ips"),
    "autoscaler of ray up": (" RAY_enable_autoscaler_v2=0; ul", "; ul", f"{EXPORT} RAY_AUTH", "no RAY_enable_autosc"),
    "head reached on loopback": ("--num-gpus=0", "--node-ip-address=127.0.0.1", HEAD_STEP, "no worker reaches"),
    "head that blocks": ("--num-gpus=0", "--block", HEAD_STEP, "never comes to an end"),
    "worker without an address": (WORKER_START, "ray start", WORKER_STEP, "lacks --address=$RAY_HEAD_IP:6379"),
    "worker to another port": (WORKER_START, "ray start --address=$RAY_HEAD_IP:6380", WORKER_STEP, "where the head is"),
    "worker to a fixed address": (WORKER_START, "ray start --address=10.0.0.1:6379", WORKER_STEP, "where the head is"),
    "worker with --head": (WORKER_START, "ray start --head", WORKER_STEP, "a cluster of its own"),
    "no stop before the start": ("  - ray stop\n", "", HEAD_STEP, "no `ray stop`"),
    "stop after the start": (
        "\nworker_start_ray_commands:",
        "  - ray stop\n\nworker_start_ray_commands:",
        "  - ray stop\n\nworker",
        "ends what was just started",
    ),
    "start in the setup": (
        "setup_commands:\n",
        "setup_commands:\n  - ray start --head\n",
        "  - ray start --head\n",
        "belongs in head_start_ray_commands",
    ),
    "no start at all": (WORKER_START, "true", "worker_start_ray_commands", "never starts"),
    "worker's commands misspelt": (
        "worker_start_ray_commands",
        "workers_start_ray_commands",
        "workers_start",
        "did you mean",
    ),
    "another Ray": (
        "-c ~/bigray/constraints.txt ~/bigray/dist/*.whl)",
        "ray==2.49.0)",
        "- >-\n    test -x",
        "is not the",
    ),
    "nothing pinned": (
        "-c ~/bigray/constraints.txt ~/bigray/dist/*.whl)",
        "'ray[default]')",
        "- >-\n    test -x",
        "not pinned",
    ),
    "a nightly wheel": (
        "-c ~/bigray/constraints.txt ~/bigray/dist/*.whl)",
        "https://s3-us-west-2.amazonaws.com/ray-wheels/latest/ray-3.0.0.dev0-cp311.whl)",
        "- >-\n    test -x",
        "a wheel of its own choice",
    ),
    "commands in one string": (
        "worker_start_ray_commands:\n  - ray stop\n  - >-",
        "worker_start_ray_commands:\n  >-",
        "worker_start_ray",
        "expected a list",
    ),
    "key a number": ("cluster_name: bigray", "cluster_name: bigray\n7: x", "7: x", "a key has to be text"),
    "key twice": ("max_workers: 2", "max_workers: 2\nmin_workers: 1", "min_workers: 1", "is there twice"),
    "tab": ("  type: local", "\ttype: local", "\ttype", "a tab"),
    "tag": ("type: local", "type: !!python/name:os.system local", "type: !!", "tags are not taken"),
    "yes for true": ("  type: local", "  type: local\n  use_internal_ips: yes", "use_internal", "read as true"),
    "a second document": (f"    {WORKER_START}\n", f"    {WORKER_START}\n---\na: 1\n", "a: 1", "a second document"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_in_the_file_for_machines_of_ones_own_is_told_once(
    name: str, assert_told_once: Callable[..., None]
) -> None:
    assert_told_once("onprem.yaml", *PLANTED[name])


@pytest.mark.parametrize("file", ["onprem.yaml", "aws.yaml", "gcp.yaml"])
def test_our_own_files_have_no_fault(file: str) -> None:
    assert [str(fault) for fault in check_file(CLUSTER / file) if not fault.is_note] == []


VARIANTS = {
    "workers kept by the default": ("min_workers: 2\nmax_workers: 2\n", ""),
    "host names": ("192.168.1.11", "worker-1.example.org"),
    "one machine by its IPv6 address": ("192.168.1.11", "fd00::11"),
    "no key named": ("  ssh_private_key: ~/.ssh/id_ed25519", "  #"),
    "a proxy": ("  ssh_user: bigray", '  ssh_user: bigray\n  ssh_proxy_command: "ssh -W %h:%p gate"'),
    "token by the shell's start file alone": ("export RAY_AUTH_MODE=token RAY", "export RAY"),
    "the token's folder": ("  ~/.ray/auth_token: ~/.ray/auth_token", "  ~/.ray: ~/.ray"),
    "options apart from their values": ("--port=6379 --num-cpus=0", "--port 6379 --num-cpus 0"),
    "head with CPUs": (" --num-cpus=0 --num-gpus=0", ""),
    "braces around the variable": ("$RAY_HEAD_IP:6379", "${RAY_HEAD_IP}:6379"),
    "stop in the same line": (
        "  - ray stop\n  - >-\n    export",
        "  - >-\n    ~/.bigray/bin/ray stop; export",
    ),
    "no note on storage": ("metadata:\n  storage: /mnt/bigray/runs", "#"),
    "storage in a bucket": ("storage: /mnt/bigray/runs", "storage: s3://bucket/runs"),
    "pinned by hand": ("-c ~/bigray/constraints.txt ~/bigray/dist/*.whl", "'ray[default]==2.60.0' torch==2.13.0"),
    "a quoted key": ("cluster_name: bigray", '"cluster_name": "bigray"'),
    "aliases": ("    - 192.168.1.11\n", "    - &first 192.168.1.11\n"),
    "a password from the environment": (" --num-gpus=0", " --redis-password=$REDIS_PASSWORD"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_another_way_to_write_it_is_no_fault(name: str, faults_after: Callable[..., tuple[list[Fault], str]]) -> None:
    faults, _ = faults_after("onprem.yaml", *VARIANTS[name])
    assert [str(fault) for fault in faults] == []


@pytest.mark.parametrize("node", ["head", "worker"])
def test_a_node_that_is_started_without_a_token_is_told(node: str, tmp_path: Path) -> None:
    text = (CLUSTER / "onprem.yaml").read_text().replace("$PATH RAY_AUTH_MODE=token", "$PATH")
    start = {"head": "RAY_AUTH_MODE=token RAY_enable", "worker": "RAY_AUTH_MODE=token; ulimit"}[node]
    assert start in text
    file = tmp_path / "onprem.yaml"
    file.write_text(text.replace(start, start.replace("RAY_AUTH_MODE=token", "A=b")))
    (fault,) = check_file(file)
    assert fault.place == f"{node}_start_ray_commands[1]"
    assert "RAY_AUTH_MODE is not set" in fault.message


def test_a_head_that_takes_work_is_noted_and_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "onprem.yaml"
    file.write_text((CLUSTER / "onprem.yaml").read_text().replace("--num-cpus=0", ""))
    (note,) = check_file(file)
    assert note.is_note
    assert "--num-cpus=0" in note.message


def test_several_mistakes_are_told_together_by_line(tmp_path: Path) -> None:
    text = (CLUSTER / "onprem.yaml").read_text()
    for old, new in (("max_workers: 2", "max_workers: 0"), ("type: local", "type: locl"), ("--head ", "")):
        text = text.replace(old, new)
    file = tmp_path / "onprem.yaml"
    file.write_text(text)
    lines = [fault.line or 0 for fault in check_file(file)]
    assert len(lines) == 3
    assert lines == sorted(lines)


def test_the_options_of_ray_start_are_those_of_this_ray() -> None:
    from ray.scripts.scripts import start

    assert {option for parameter in start.params for option in parameter.opts} - {"--help"} == OPTIONS


@pytest.mark.parametrize("file", ["onprem.yaml", "aws.yaml", "gcp.yaml"])
def test_a_value_of_any_type_in_any_place_is_told_and_stops_nothing(file: str) -> None:
    (document,) = read_yaml((CLUSTER / file).read_text())
    wrong: Any
    for number, path in enumerate(path for path in document.lines if path):
        for wrong in (None, [{}], {"a": 1}, "x", -1.5)[number % 2 :: 2]:
            value = copy.deepcopy(document.value)
            around = value
            for step in path[:-1]:
                around = around[step]
            around[path[-1]] = wrong
            for fault in check_ray_up(dataclasses.replace(document, value=value)):
                assert fault.line


def test_ray_takes_the_file_as_it_is() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    for name in ("onprem.yaml", "aws.yaml", "gcp.yaml"):
        validate_config(prepare_config(yaml.safe_load((CLUSTER / name).read_text())))
