"""Mistakes planted one by one in our own Dockerfile: each is found, in its line, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigray.cluster.checking.dockerfile import check_dockerfile
from bigray.cluster.checking.dockerfile_parts import instructions_of, stages_of
from bigray.cluster.checking.kinds import Kind, check_file, kind_of
from bigray.cluster.checking.versions import wanted_version

FILE = Path(__file__).parents[4] / "cluster/Dockerfile"
OURS = FILE.read_text()

BASE = "ARG BASE=rayproject/ray:2.60.0-py311\n"
PIP = 'RUN pip install --no-cache-dir -c constraints.txt ".[examples]"'
CMD = 'CMD ["bigray", "--help"]'
USER = "USER 1000"
FIRST_COPY = "COPY --chown=1000:100 constraints.txt pyproject.toml README.md ./"
APT = "apt-get update && apt-get install -y --no-install-recommends libgl1 && rm -rf /var/lib/apt/lists/*"
ZEROS = "0" * 64
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def _as_root(command: str) -> tuple[str, str]:
    return PIP, f"{PIP}\nUSER root\nRUN {command}"


MISTAKES: dict[str, tuple[str, str, str | None, str]] = {
    # name: (old text, new text, a text in the line of the fault, a part of the message)
    "instruction misspelt": (PIP, PIP.replace("RUN", "RNU"), "RNU", "RUN"),
    "instruction of nobody": (USER, f"INCLUDE base.docker\n{USER}", "INCLUDE", "no instruction"),
    "instruction without a word": (USER, f"VOLUME\n{USER}", "VOLUME", "says nothing"),
    "maintainer": (USER, f"MAINTAINER someone\n{USER}", "MAINTAINER", "LABEL"),
    "copy before the base": (BASE, f"COPY constraints.txt /tmp/\n{BASE}", "COPY constraints.txt /tmp", "before FROM"),
    "base of no version": (BASE, "ARG BASE=rayproject/ray\n", "FROM ${", "no tag"),
    "latest": (BASE, "ARG BASE=rayproject/ray:latest-py311\n", "FROM ${", "moves"),
    "nightly": (BASE, "ARG BASE=rayproject/ray:nightly-py311\n", "FROM ${", "moves"),
    "older Ray": (BASE, "ARG BASE=rayproject/ray:2.59.0-py311\n", "FROM ${", "2.59.0"),
    "older Python": (BASE, "ARG BASE=rayproject/ray:2.60.0-py310\n", "FROM ${", "3.10"),
    "other image of an older Python": (BASE, "ARG BASE=python:3.10.14-slim-bookworm\n", "FROM ${", "3.10"),
    "Python that moves": (BASE, "ARG BASE=python:3.11-slim-bookworm\n", "FROM ${", "3.11.14"),
    "no wheels for Alpine": (BASE, "ARG BASE=python:3.11.14-alpine3.20\n", "FROM ${", "Alpine"),
    "base without a default": (BASE, "ARG BASE\n", "FROM ${", "no default"),
    "made-up digest": (BASE, f"ARG BASE=rayproject/ray:2.60.0-py311@sha256:{ZEROS}\n", "FROM ${", "digest"),
    "placeholder for a digest": (BASE, "ARG BASE=rayproject/ray:2.60.0-py311@sha256:DIGEST\n", "FROM ${", "digest"),
    "words after from": ("FROM ${BASE}", "FROM ${BASE} base", "FROM ${", "AS name"),
    "runs as root": (USER, "USER root", "USER root", "1000"),
    "runs as number 0": (USER, "USER 0:0", "USER 0", "1000"),
    "user missing": (f"{USER}\n", "", None, "USER"),
    "user misspelt": (USER, "USRE 1000", "USRE", "USER"),
    "user that nobody made": (USER, "USER trainer", "USER trainer", "useradd"),
    "root again at the end": (CMD, f"USER root\n{CMD}", "USER root", "1000"),
    "secret variable": (USER, f"ENV HF_TOKEN=hf_x\n{USER}", "ENV HF_TOKEN", "type=secret"),
    "secret argument": (USER, f"ARG AWS_SECRET_ACCESS_KEY\n{USER}", "ARG AWS", "type=secret"),
    "secret by its form": (USER, f"ENV SETTING=AKIA0123456789ABCDEF\n{USER}", "ENV SETTING", "AWS"),
    "address with a password": (USER, f"ENV STORE=s3://key:word@bucket/runs\n{USER}", "ENV STORE", "address"),
    "secret in a command": (PIP, f"{PIP}\nRUN AWS_SECRET_ACCESS_KEY=abcdefgh aws s3 ls", "RUN AWS", "AWS_SECRET"),
    "secret file": (USER, f"COPY .env ./\n{USER}", "COPY .env", "secrets"),
    "private key": (USER, f"COPY deploy/id_rsa /home/ray/.ssh/\n{USER}", "COPY deploy", "id_rsa"),
    "variable without equals": (USER, f"ENV MODE fast\n{USER}", "ENV MODE", "NAME=value"),
    "token off": ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=dis", "token"),
    "address added": (USER, f"ADD https://example.org/model.pt ./\n{USER}", "ADD https", "sha256"),
    "file added": (FIRST_COPY, f"{FIRST_COPY}\nADD LICENSE ./", "ADD LICENSE", "COPY"),
    "everything copied": (FIRST_COPY, f"{FIRST_COPY}\nCOPY . .", "COPY . .", "name what is needed"),
    "copied from outside": (FIRST_COPY, f"{FIRST_COPY}\nCOPY ../data ./data", "COPY ../", "outside"),
    "several into a file": (FIRST_COPY, FIRST_COPY.replace(" ./", " app"), "COPY --chown=1000:100 const", "end in '/'"),
    "copy of one": (USER, f"COPY tests\n{USER}", "COPY tests", "where to"),
    "copy with a flag of nobody": (
        FIRST_COPY,
        FIRST_COPY.replace("--chown", "--chwon"),
        "COPY --chwon",
        "chown",
    ),
    "stage of no name": (USER, f"COPY --from=biuld /wheels /wheels\n{USER}", "COPY --from", "no stage"),
    "image of no version copied from": (
        USER,
        f"COPY --from=ghcr.io/astral-sh/uv:latest /uv /bin/\n{USER}",
        "uv",
        "moves",
    ),
    "piped into a shell": (PIP, f"{PIP}\nRUN curl -LsSf https://example.org/install.sh | sh", "RUN curl", "sha256"),
    "shell of a download": (PIP, f'{PIP}\nRUN bash -c "$(wget -qO- https://example.org/i.sh)"', "RUN bash", "sha256"),
    "sudo": (PIP, PIP.replace("RUN pip", "RUN sudo pip"), "RUN sudo", "USER root"),
    "everybody writes": (PIP, f"{PIP}\nRUN chmod -R 777 /home/ray", "RUN chmod", "everybody"),
    "cd alone": (PIP, f"{PIP}\nRUN cd examples", "RUN cd", "WORKDIR"),
    "Ray in the build": (PIP, f"{PIP}\nRUN ray start --head", "RUN ray", "no process"),
    "apt as a user": (PIP, f"{PIP}\nRUN {APT}", "RUN apt", "USER root"),
    "apt for people": (*_as_root("apt install -y git"), "RUN apt", "apt-get"),
    "apt upgrade": (*_as_root("apt-get update && apt-get upgrade -y"), "RUN apt", "newer base"),
    "apt update alone": (*_as_root("apt-get update"), "RUN apt", "alone"),
    "apt install alone": (*_as_root(APT.replace("apt-get update && ", "")), "RUN apt", "may be old"),
    "apt that asks": (*_as_root(APT.replace(" -y", "")), "RUN apt", "-y"),
    "apt that brings more": (*_as_root(APT.replace(" --no-install-recommends", "")), "RUN apt", "no-install"),
    "apt lists left": (*_as_root(APT.partition(" && rm")[0]), "RUN apt", "package lists"),
    "pip without constraints": (PIP, PIP.replace(" -c constraints.txt", ""), "RUN pip", "-c constraints.txt"),
    "pip of a free version": (
        PIP,
        f"{PIP}\nRUN pip install --no-cache-dir boto3",
        "RUN pip install --no-cache-dir boto3",
        "not pinned",
    ),
    "pip of another Ray": (PIP, f"{PIP}\nRUN pip install --no-cache-dir ray==2.40.0", "ray==2.40", "2.40.0"),
    "pip cache left": (PIP, PIP.replace(" --no-cache-dir", ""), "RUN pip", "cache"),
    "pip over http": (PIP, PIP.replace("-c ", "--index-url http://mirror/simple -c "), "RUN pip", "https"),
    "constraints not there": (FIRST_COPY, FIRST_COPY.replace(" constraints.txt", ""), "RUN pip", "COPY it"),
    "folder that depends": ("WORKDIR /home/ray/bigray", "WORKDIR bigray", "WORKDIR", "absolute"),
    "port of no number": (USER, f"EXPOSE 80000\n{USER}", "EXPOSE", "no port"),
    "signal without an answer": (USER, f"STOPSIGNAL SIGKILL\n{USER}", "STOPSIGNAL", "SIGTERM"),
    "shell of the build": (USER, f"SHELL /bin/bash -c\n{USER}", "SHELL", "JSON"),
    "command by a shell": (CMD, "CMD bigray --help", "CMD", "SIGTERM"),
    "command in single quotes": (CMD, "CMD ['bigray', '--help']", "CMD", "double quotes"),
    "two commands": (CMD, f'{CMD}\nCMD ["ray"]', 'CMD ["ray', "last one counts"),
    "no command": (f"{CMD}\n", "", None, "CMD"),
}


@pytest.fixture(autouse=True)
def _the_pinned_ray_is_the_one_of_the_tests() -> None:
    assert wanted_version("ray") == "2.60.0", "the base image's tag has to follow constraints.txt"


def test_our_own_file_has_no_fault() -> None:
    assert kind_of(OURS, FILE.name) is Kind.DOCKERFILE
    assert [str(fault) for fault in check_file(FILE)] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_the_one_fault_that_is_found(name: str) -> None:
    old, new, where, part = MISTAKES[name]
    assert OURS.count(old) == 1, f"{old!r} is in the file {OURS.count(old)} times"
    text = OURS.replace(old, new)

    faults = list(check_dockerfile(text))

    assert len(faults) == 1, [str(fault) for fault in faults]
    assert part in str(faults[0])
    assert "\n" not in str(faults[0])
    assert faults[0].line == (None if where is None else text[: text.index(where)].count("\n") + 1)


GOOD = f"""\
# syntax=docker/dockerfile:1
ARG PYTHON=3.11.14
FROM python:${{PYTHON}}-slim-bookworm@sha256:{DIGEST} AS build
COPY constraints.txt pyproject.toml /src/
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --wheel-dir /wheels /src

FROM python:${{PYTHON}}-slim-bookworm
RUN apt-get update \\
    # what torch needs
    && apt-get install -qqy --no-install-recommends libgomp1 \\
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
ENV PIP_NO_CACHE_DIR=1 GREETING="two words" \\
    RAY_AUTH_TOKEN_PATH=/run/secrets/ray
RUN pip install -c /wheels/constraints.txt /wheels/*.whl && useradd --create-home --uid 1001 trainer
USER trainer
EXPOSE 8000 8265/tcp
HEALTHCHECK CMD ["bigray", "--version"]
ENTRYPOINT ["bigray"]
CMD ["--help"]
"""


def test_another_good_file_with_stages_has_no_fault() -> None:
    assert [str(fault) for fault in check_dockerfile(GOOD)] == []


def test_a_base_that_was_never_pinned_is_found_in_an_earlier_stage_too() -> None:
    text = GOOD.replace(f"FROM python:${{PYTHON}}-slim-bookworm@sha256:{DIGEST}", "FROM debian")

    assert [(fault.place, fault.line) for fault in check_dockerfile(text)] == [("FROM", 3)]


def test_a_file_without_a_base_is_no_image() -> None:
    assert [fault.place for fault in check_dockerfile("ARG A=1\n")] == ["FROM"]


def test_what_is_copied_is_there_and_is_let_into_the_build() -> None:
    root = FILE.parents[1]
    copies = [one for one in instructions_of(OURS) if one.name == "COPY"]
    sources = {source for one in copies for source in one.arguments[:-1]}
    let_in = {line[1:] for line in (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}

    assert all((root / source).exists() for source in sources)
    assert let_in == sources


def test_line_ends_of_windows_are_one_fault() -> None:
    assert [fault.line for fault in check_dockerfile(OURS.replace("\n", "\r\n"))] == [1]


def test_continued_lines_comments_and_heredocs_are_one_instruction_each() -> None:
    text = "FROM a:1\nRUN one \\\n  # why\n  two\nRUN <<END\nthree\nEND\nUSER 1\n"

    assert [(one.line, one.name) for one in instructions_of(text)] == [(1, "FROM"), (2, "RUN"), (5, "RUN"), (8, "USER")]


def test_variables_have_the_defaults_of_before_the_first_stage() -> None:
    stages = stages_of(instructions_of("ARG A=x:1\nARG B\nFROM $A AS one\nFROM ${B:-y:2}\nARG A\nENV C=3\n"))

    assert [(stage.image, stage.name, stage.is_bound) for stage in stages] == [
        ("x:1", "one", True),
        ("y:2", None, True),
    ]
    assert stages[1].variables == {"A": "x:1", "C": "3"}
