"""A Dockerfile: what it is built on, who it runs as, what it lets in, and whether a build next year is the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from bigray.cluster.checking.dockerfile_parts import (
    INSTRUCTIONS,
    Instruction,
    Stage,
    filled_in,
    instructions_of,
    json_form,
    pairs_of,
    stages_of,
)
from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.secret_values import secret_in
from bigray.cluster.checking.versions import LEAST_PYTHON, RAY_IMAGES, image_fault, pip_faults
from bigray.cluster.secrets import SECRET_KEY, is_secret_path
from bigray.errors import did_you_mean

ROOT = ("root", "0")
COPY_FLAGS = ("from", "chown", "chmod", "link", "parents", "exclude", "checksum", "keep-git-dir", "unpack")
PARSER_DIRECTIVES = r"#\s*(syntax|escape|check)\s*="


def check_dockerfile(text: str) -> Iterator[Fault]:
    """Every fault of a Dockerfile."""
    if "\r" in text:
        yield Fault("", "has line ends of Windows, which end up in scripts; run `sed -i 's/\\r$//' FILE`", 1)
    instructions = instructions_of(text)
    yield from _instruction_faults(instructions)
    stages = stages_of(instructions)
    if not stages:
        if not any(_meant(one.name) == "FROM" for one in instructions):
            yield Fault("FROM", "is missing: write FROM rayproject/ray:VERSION-py311")
        return
    for index, stage in enumerate(stages):
        yield from _base_faults(stage, {other.name for other in stages[:index]})
        yield from _stage_faults(stage, stages[:index])
    yield from _user_faults(stages[-1])
    yield from _start_faults(stages[-1])


def _meant(name: str) -> str:
    """An instruction, or the one that a mistyped one was probably meant for."""
    if name in INSTRUCTIONS:
        return name
    match = re.search(r"'(\w+)'", did_you_mean(name, INSTRUCTIONS))
    return match[1] if match else name


def _instruction_faults(instructions: Sequence[Instruction]) -> Iterator[Fault]:
    has_from = False
    for one in instructions:
        if one.name not in INSTRUCTIONS:
            hint = did_you_mean(one.name, INSTRUCTIONS)
            yield Fault(one.name, f"is no instruction{hint if hint.startswith(', did') else ''}", one.line)
        elif not one.rest:
            yield Fault(one.name, "says nothing", one.line)
        elif one.name == "MAINTAINER":
            yield Fault(one.name, "is gone; write LABEL org.opencontainers.image.authors=...", one.line)
        elif one.name not in ("FROM", "ARG") and not has_from:
            yield Fault(one.name, "comes before FROM, where only ARG may", one.line)
        has_from = has_from or _meant(one.name) == "FROM"


def _base_faults(stage: Stage, earlier: set[str | None]) -> Iterator[Fault]:
    line, image = stage.start.line, stage.image
    words = stage.start.arguments
    if image in earlier or image == "scratch":
        return
    if len(words) not in (1, 3) or (len(words) == 3 and words[1].lower() != "as"):
        yield Fault("FROM", "takes an image, or an image AS name", line)
    elif not stage.is_bound:
        yield Fault("FROM", f"{image}: the ARG has no default before FROM, so a plain build fails; give it one", line)
    elif (digest := image.partition("@")[2]) and not _is_digest(digest):
        yield Fault(
            "FROM", f"{digest[:24]!r} is no digest of an image; leave it out, or take it from the registry", line
        )
    elif message := image_fault(image) or _of_python(image):
        yield Fault("FROM", message, line)
    elif re.search(r"alpine|musl", image):
        yield Fault("FROM", f"{image!r}: Ray and torch have no wheels for Alpine; take a -slim image of Debian", line)


def _is_digest(text: str) -> bool:
    """64 digits, and not a made-up one such as zeros or 0123456789abcdef over and over."""
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", text)
    return match is not None and len({match[1][at : at + 8] for at in range(0, 64, 8)}) > 4 and len(set(match[1])) > 8


def _of_python(image: str) -> str | None:
    match = re.fullmatch(r"(?:docker\.io/)?(?:library/)?python:([\d.]+)(-[\w.-]+)?", image.partition("@")[0])
    if match is None:
        return None
    version = [int(part) for part in match[1].split(".") if part]
    if tuple(version[:2]) < LEAST_PYTHON:
        return f"{image!r} has Python {match[1]}, bigray needs 3.11 or newer"
    if len(version) < 3 and "@" not in image:
        return f"{image!r} moves with each patch; write all three numbers, such as python:3.11.14{match[2] or ''}"
    return None


def _stage_faults(stage: Stage, earlier: Sequence[Stage]) -> Iterator[Fault]:
    user = "root"
    if any(stage.image.partition(":")[0].removeprefix("docker.io/") == image for image in RAY_IMAGES):
        user = "ray"
    for one in stage.instructions:
        if one.name == "USER":
            user = filled_in(one.rest, stage.variables)[0].partition(":")[0]
        elif one.name in ("ENV", "ARG"):
            yield from _variable_faults(one)
        elif one.name in ("ADD", "COPY"):
            yield from _copy_faults(one, stage, earlier)
        elif one.name == "RUN":
            yield from _run_faults(one, stage, user)
        elif one.name == "WORKDIR" and not re.match(r"/|\$|[A-Za-z]:", one.rest.strip("\"'")):
            yield Fault("WORKDIR", f"{one.rest!r} depends on the base image; write an absolute folder", one.line)
        elif one.name in ("EXPOSE", "STOPSIGNAL", "SHELL"):
            yield from _small_faults(one)


def _variable_faults(one: Instruction) -> Iterator[Fault]:
    pairs = pairs_of(one)
    if one.name == "ENV" and pairs and any(value is None for _, value in pairs):
        yield Fault("ENV", f"{one.rest!r} is not NAME=value", one.line)
        return
    for name, value in pairs:
        if SECRET_KEY.search(name):
            yield Fault(f"{one.name} {name}", "stays in the image for all to read; RUN --mount=type=secret", one.line)
        elif value and (what := secret_in(f"{name}={value}")):
            yield Fault(f"{one.name} {name}", f"holds {what}, which stays in the image for all to read", one.line)
        elif name == "RAY_AUTH_MODE" and value not in (None, "token"):
            yield Fault(f"{one.name} {name}", f"{value!r}: who reaches a port runs code; write token", one.line)


def _copy_faults(one: Instruction, stage: Stage, earlier: Sequence[Stage]) -> Iterator[Fault]:
    *sources, target = one.arguments or [""]
    if "<<" in one.rest:
        return
    if not sources:
        yield Fault(one.name, "takes what is copied and where to", one.line)
        return
    for flag in one.flags:
        if flag not in COPY_FLAGS:
            yield Fault(one.name, f"--{flag} is none of its flags{did_you_mean(flag, COPY_FLAGS)}", one.line)
    if len(sources) > 1 and not target.endswith(("/", ".")):
        yield Fault(one.name, f"copies several into {target!r}, which has to end in '/'", one.line)
    for source in sources:
        if message := _source_fault(one, source):
            yield Fault(one.name, message, one.line)
    origin = one.flags.get("from")
    names = [other.name for other in earlier if other.name]
    if origin and not origin.isdigit() and origin not in names and not re.search(r"[:/@]", origin):
        yield Fault(one.name, f"--from={origin}: no stage has this name{did_you_mean(origin, names)}", one.line)
    elif origin and re.search(r"[:/@]", origin) and (fault := image_fault(origin)):
        yield Fault(one.name, f"--from: {fault}", one.line)


def _source_fault(one: Instruction, source: str) -> str | None:
    name = source.rstrip("/").rpartition("/")[2]
    if re.match(r"https?://|ftp://|git@", source):
        return f"{source} is fetched anew by each build, and not checked; take it from the package or check its sha256"
    if "from" in one.flags:
        return None
    if source in (".", "./", "/", "*", "./*"):
        return "copies all there is, with .git, runs and secrets; name what is needed: COPY bigray pyproject.toml ./"
    if source.startswith("../"):
        return f"{source} is outside of what is sent to the build; start it from the root"
    if is_secret_path(name, is_folder=False):
        return f"{name} holds secrets, which stay in the image for all to read; RUN --mount=type=secret"
    if one.name == "ADD" and not re.search(r"\.(tar|tgz|tar\.\w+|zip)$", source):
        return f"{source} is no archive; write COPY"
    return None


def _run_faults(one: Instruction, stage: Stage, user: str) -> Iterator[Fault]:
    listed = json_form(one.rest)
    command = " ".join(listed) if listed is not None else filled_in(one.rest, stage.variables)[0]
    if re.search(
        r"\b(curl|wget)\b[^;&]*\|\s*(sudo\s+)?(\S*/)?(ba|da|z)?sh\b|\b(ba)?sh\s+(-c\s+)?[\"']?[<$]\(\s*(curl|wget)",
        command,
    ):
        yield Fault("RUN", "runs what a server sends, whatever it is; fetch a version and check its sha256", one.line)
    if re.search(r"\bsudo\b", command):
        yield Fault("RUN", "sudo: write USER root before it, and USER 1000 after it", one.line)
    if re.search(r"\bchmod\s+(-\w+\s+)*(0?777|a\+w|o\+w)\b", command):
        yield Fault("RUN", "lets everybody write; COPY --chown, or chmod 755", one.line)
    if re.fullmatch(r"cd\s+\S+", command):
        yield Fault("RUN", "`cd` holds for this line alone; write WORKDIR", one.line)
    if re.search(r"\bray\s+start\b", command):
        yield Fault("RUN", "no process lives on after the build; start Ray by CMD, or leave it to KubeRay", one.line)
    if what := secret_in(command):
        yield Fault("RUN", f"holds {what}, which stays in the image for all to read", one.line)
    if message := _apt_fault(command, user):
        yield Fault("RUN", message, one.line)
    yield from _pip_faults(one, command, stage)


def _apt_fault(command: str, user: str) -> str | None:
    if not re.search(r"\bapt(-get)?\b", command):
        return None
    if user not in ROOT:
        return f"apt-get as user {user}, who may not; write USER root before it"
    if re.search(r"\bapt\s+(-\S+\s+)*(install|update|upgrade)\b", command):
        return "apt is for people, and changes; write apt-get"
    if re.search(r"\bapt-get\s+(-\S+\s+)*(upgrade|dist-upgrade|full-upgrade)\b", command):
        return "an upgrade makes another image of each build; take a newer base image"
    installs = re.search(r"\bapt-get\s+(-\S+\s+)*install\b([^;&|]*)", command)
    has_update = re.search(r"\bapt-get\s+(-\S+\s+)*update\b", command) is not None
    if installs is None:
        return "apt-get update alone is cached and grows old; put it before install" if has_update else None
    if not has_update:
        return "installs from lists that may be old, or gone; put apt-get update && before it"
    return _apt_install_fault(command, installs.group())


def _apt_install_fault(command: str, install: str) -> str | None:
    if not re.search(r"\s(-\w*y\w*|--yes|--assume-yes)(\s|$)", install):
        return "waits for an answer that never comes; apt-get install -y"
    if "--no-install-recommends" not in install:
        return "brings more than it names; apt-get install --no-install-recommends"
    if not re.search(r"rm\s+-rf?\s+/var/lib/apt/lists|--mount=type=cache", command):
        return "leaves the package lists in the image; && rm -rf /var/lib/apt/lists/*"
    return None


def _pip_faults(one: Instruction, command: str, stage: Stage) -> Iterator[Fault]:
    if not re.search(r"\bpip[\d.]*\s+install\b", command):
        return
    if messages := list(pip_faults(command)):
        yield from (Fault("RUN", message, one.line) for message in messages)
        return
    if found := re.search(r"--trusted-host|--(extra-)?index-url[= ]http://|-i\s+http://", command):
        yield Fault("RUN", f"{found.group().split('=')[0]}: packages could be anybody's; use https", one.line)
    if not re.search(r"--no-cache-dir|--mount=type=cache", command) and "PIP_NO_CACHE_DIR" not in stage.variables:
        yield Fault("RUN", "leaves pip's cache in the image; pip install --no-cache-dir", one.line)
    bound = re.search(r"(?<!\S)(?:-c|--constraint)[= ]?\s*(\S+)", command)
    names_only_versions = re.search(r"install\b[^;&|]*==", command) is not None
    if bound is None and "PIP_CONSTRAINT" not in stage.variables and not names_only_versions:
        yield Fault("RUN", "installs whatever is newest today; pip install -c constraints.txt", one.line)
    elif bound is not None and not _is_copied_before(stage, one, bound[1].rpartition("/")[2]):
        yield Fault("RUN", f"{bound[1]} is not in the image yet; COPY it before", one.line)


def _is_copied_before(stage: Stage, run: Instruction, name: str) -> bool:
    if "type=bind" in run.rest or name.startswith("http"):
        return True
    before = [one for one in stage.instructions if one.name in ("COPY", "ADD") and one.line < run.line]
    return any(
        "from" in one.flags or any(source in (".", "./") or source.endswith(name) for source in one.arguments[:-1])
        for one in before
    )


def _small_faults(one: Instruction) -> Iterator[Fault]:
    if one.name == "EXPOSE":
        for port in one.rest.split():
            match = re.fullmatch(r"(\d+)(-\d+)?(/(tcp|udp|sctp))?", port)
            if "$" not in port and (match is None or not 0 < int(match[1]) < 65536):
                yield Fault("EXPOSE", f"{port!r} is no port; write 8000", one.line)
    elif one.name == "STOPSIGNAL" and one.rest.upper().removeprefix("SIG") not in ("TERM", "15", "INT", "2"):
        yield Fault("STOPSIGNAL", f"bigray writes its checkpoint on SIGTERM, not on {one.rest}", one.line)
    elif one.name == "SHELL" and json_form(one.rest) is None:
        yield Fault("SHELL", 'has to be JSON, such as ["/bin/bash", "-c"]', one.line)


def _user_faults(last: Stage) -> Iterator[Fault]:
    users = [one for one in last.instructions if _meant(one.name) == "USER"]
    if not users:
        yield Fault("USER", "is missing: the container runs as the base image's user, often root; USER 1000")
        return
    one = users[-1]
    name = filled_in(one.rest, last.variables)[0].partition(":")[0]
    if name in ROOT:
        yield Fault("USER", f"{one.rest}: who gets into the container is root; write USER 1000", one.line)
    elif name and not name.isdigit() and not _has_user(last, name):
        yield Fault(
            "USER", f"{name!r} is made nowhere in this stage; RUN useradd, or write a number: USER 1000", one.line
        )


def _has_user(stage: Stage, name: str) -> bool:
    if "$" in name or (name == "ray" and stage.image.startswith(RAY_IMAGES)):
        return True
    return any(re.search(rf"\b(useradd|adduser)\b.*\b{re.escape(name)}\b", one.rest) for one in stage.instructions)


def _start_faults(last: Stage) -> Iterator[Fault]:
    found: dict[str, Instruction] = {}
    for one in last.instructions:
        if (name := _meant(one.name)) in ("CMD", "ENTRYPOINT"):
            if name in found:
                yield Fault(name, f"is in line {found[name].line} too, and the last one counts", one.line)
            found[name] = one
    if not found:
        yield Fault("CMD", 'is missing: CMD ["bigray", "--help"]')
    for name, one in found.items():
        if one.name == name and one.rest and json_form(one.rest) is None:
            message = (
                "is not JSON with double quotes, so that" if one.rest.startswith("[") else "is run by a shell, and"
            )
            yield Fault(name, f'{message} SIGTERM never reaches it; write {name} ["bigray", "--help"]', one.line)
