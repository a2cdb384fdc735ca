from __future__ import annotations

import os
from pathlib import Path

import pytest

from bigray.cluster.checking.kinds import MOST_BYTES, Kind, check_file, kind_of
from bigray.cluster.checking.literal_secrets import is_private
from bigray.cluster.checking.secret_values import secret_in


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("#!/bin/bash\n#SBATCH --nodes=2\n", "job.sh", Kind.SLURM),
        ("# raycluster\napiVersion: ray.io/v1\nkind: RayCluster\n", "any.yaml", Kind.KUBE),
        ("kind: RayJob\nprovider: x\n", "aws.yaml", Kind.KUBE),
        ("cluster_name: a\nprovider: {type: aws}\n", "any.yml", Kind.RAY_UP),
        ("cluster_name: a\n  broken: [\n", "any.yml", Kind.RAY_UP),
        ("# syntax=docker/dockerfile:1\nARG X=1\nFROM python:3.11 AS build\n", "image.txt", Kind.DOCKERFILE),
        ("RUN true\n", "Dockerfile.gpu", Kind.DOCKERFILE),
        ("echo\n", "train.sbatch", Kind.SLURM),
        ("nodes = 3\n", "local.toml", Kind.LOCAL),
        ("kind: x\n", "local.toml", Kind.LOCAL),
        ("", "aws.yaml", Kind.RAY_UP),
        ("", "rayservice-gpu.yaml", Kind.KUBE),
        ("data:\n  kind: x\n", "job.yaml", None),
        ("applications: []\n", "serve.yaml", None),
        ("FROM here on it is prose\n", "README.md", None),
    ],
)
def test_a_files_kind_is_known_by_its_content_and_then_by_its_name(text: str, name: str, kind: Kind | None) -> None:
    assert kind_of(text, name) is kind


def test_what_cannot_be_read_is_one_fault(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: 1\ncluster_name: größe\n".encode("latin-1"))
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MOST_BYTES + 1))
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    for path, says in (
        (latin, ":2: is not UTF-8: byte 0xf6"),
        (large, "at most 200,000"),
        (pipe, "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "none.yaml", "no such file"),
        (other, "none of the files that are checked"),
    ):
        (fault,) = check_file(path)
        assert str(fault).startswith(str(path))
        assert says in str(fault)


@pytest.mark.parametrize(
    "text",
    [
        "export RAY_AUTH_TOKEN=abc123; ray start",
        "ray start --redis-password=hunter2",
        "ray start --redis-password hunter2",
        "ray start --redis-password 12345",
        "login --credentials abc",
        'pip install x; HF_TOKEN="abc" python y.py',
        "aws_secret_access_key = wJalrXUtnFEMI",
        "echo abc > ~/.ray/auth_token",
        "AKIAABCDEFGHIJKLMNOP",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "git clone https://ghp_" + "a" * 36 + "@github.com/a/b",
    ],
)
def test_a_secret_in_a_command_is_seen(text: str) -> None:
    assert secret_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "export RAY_AUTH_MODE=token",
        "export RAY_AUTH_TOKEN=$(cat /run/token)",
        "export RAY_AUTH_TOKEN_PATH=/etc/ray/auth_token",
        "ray start --redis-password=$REDIS_PASSWORD",
        "ray get-auth-token --generate",
        "the token is made by hand",
        "cp token auth_token && chmod 600 ~/.ray/auth_token",
        "echo $TOKEN > ~/.ray/auth_token",
    ],
)
def test_a_variable_a_path_or_a_mention_is_no_secret(text: str) -> None:
    assert secret_in(text) is None


def test_folders_of_keys_and_whole_homes_are_private() -> None:
    for path in (
        "~",
        "~/",
        "/",
        "/root",
        "/home/me",
        "~/.aws",
        "~/.ssh/id_rsa",
        "/home/me/.config/gcloud",
        "./a.pem",
        ".env",
    ):
        assert is_private(path), path
    for path in (".", "~/bigray", "~/.ray/auth_token", "/data/awsome", "keys.md", "~/.environment"):
        assert not is_private(path), path
