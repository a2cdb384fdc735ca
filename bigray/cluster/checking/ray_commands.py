"""The shell commands of a `ray up` file: how Ray is started and stopped, and with which token."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.nearest import unknown
from bigray.cluster.checking.ray_cluster import CLOUDS, OTHER_PROVIDERS, at, mapping, node_types, provider_of
from bigray.cluster.checking.versions import pip_faults
from bigray.cluster.checking.yaml_file import Document

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts the file on the head."""


def _named(names: str) -> frozenset[str]:
    return frozenset(f"--{name}" for name in names.split())


FLAGS = _named(
    "head block no-redirect-output enable-object-reconstruction no-monitor ray-debugger-external "
    "disable-usage-stats enable-resource-isolation verbose"
) | {"-v"}
NUMBERS = _named(
    "port object-manager-port node-manager-port min-worker-port max-worker-port ray-client-server-port memory "
    "object-store-memory num-cpus num-gpus dashboard-port dashboard-agent-listen-port dashboard-agent-grpc-port "
    "runtime-env-agent-port metrics-export-port system-reserved-memory"
)
TEXTS = _named(
    "node-ip-address address node-name redis-username redis-password redis-shard-ports worker-port-list "
    "resources include-dashboard dashboard-host plasma-directory object-spilling-directory autoscaling-config "
    "temp-dir system-config labels-file tracing-startup-hook labels include-log-monitor system-reserved-cpu "
    "cgroup-path proxy-server-url log-style log-color"
)
OPTIONS = FLAGS | NUMBERS | TEXTS
"""Of `ray start`, held against Ray's own in the tests."""

SETUP = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
HEAD, WORKER = "head_start_ray_commands", "worker_start_ray_commands"
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class RayStart:
    """One `ray start`, where it stands, its options and the variables set before it."""

    path: Path
    options: dict[str, str]
    environment: dict[str, str]
    position: int
    """Among all steps of its list of commands."""


def check_commands(document: Document) -> Iterator[Fault]:
    """How the head and the workers are started, and what is installed before."""
    for key in SETUP:
        yield from _setup_faults(document, (key,))
    for name in node_types(document):
        for key in ("initialization_commands", "worker_setup_commands"):
            yield from _setup_faults(document, ("available_node_types", name, key))
    head, worker = _start(document, HEAD), _start(document, WORKER)
    yield from _missing_lists(document)
    for key, start in ((HEAD, head), (WORKER, worker)):
        if document.value.get(key):
            yield from _list_faults(document, key, start)
    if head is not None:
        yield from _head_faults(document, head)
    if worker is not None:
        yield from _worker_faults(document, worker, head)
    yield from _token_faults(document, [start for start in (head, worker) if start is not None])


def has_token(document: Document, start: RayStart) -> bool:
    """Whether token authentication is on where Ray is started."""
    mode = start.environment.get("RAY_AUTH_MODE")
    return mode == "token" if mode is not None else _mode_of_shells(document) == "token"


def _setup_faults(document: Document, path: Path) -> Iterator[Fault]:
    for index, command in enumerate(_commands(document, path)):
        for message in pip_faults(command):
            yield document.fault((*path, index), message)
        if re.search(r"(^|[\s/'\"])ray-\d\S*\.whl|ray-wheels", command):
            yield document.fault((*path, index), "installs a wheel of its own choice; install ray by its version")
        for _, words in _steps(command):
            if words[:2] in (["ray", "start"], ["ray", "stop"]):
                where = HEAD if words[1] == "start" else f"{HEAD} and {WORKER}"
                yield document.fault((*path, index), f"`ray {words[1]}` belongs in {where}, setup runs before them")


def _missing_lists(document: Document) -> Iterator[Fault]:
    cloud = provider_of(document) in CLOUDS
    for key in (HEAD, WORKER):
        if not document.value.get(key):
            risk = ", with the dashboard open to all" if cloud and key == HEAD else ""
            yield document.fault((key,), f"{_lack(document, key)}: Ray's own default starts without a token{risk}")
    if cloud and "setup_commands" not in document.value and not mapping(document.value.get("docker")).get("image"):
        yield document.fault(("setup_commands",), "is missing: Ray's own default installs a nightly build of Ray")


def _lack(document: Document, key: str) -> str:
    return "is empty" if key in document.value else "is missing"


def _list_faults(document: Document, key: str, start: RayStart | None) -> Iterator[Fault]:
    """What holds for both lists: one start, a stop before it, known options."""
    stops = [(index, place) for index, place, words in _all_steps(document, key) if words[:2] == ["ray", "stop"]]
    starts = [index for index, _, words in _all_steps(document, key) if words[:2] == ["ray", "start"]]
    if start is None:
        yield document.fault((key,), "has no `ray start`, so Ray never starts")
        return
    for index in starts[1:]:
        yield document.fault((key, index), "a second `ray start` on the same node")
    if not stops:
        yield document.fault(start.path, "no `ray stop` before `ray start`: running `ray up` again would fail")
    for index, place in stops:
        if place > start.position:
            yield document.fault((key, index), "`ray stop` after `ray start` ends what was just started; put it first")
    yield from _option_faults(document, start)


def _option_faults(document: Document, start: RayStart) -> Iterator[Fault]:
    for option, value in start.options.items():
        if option not in OPTIONS:
            yield document.fault(start.path, f"ray start {option} {unknown(option, OPTIONS)}")
        elif option in NUMBERS and not re.fullmatch(r"\d+|\$.+", value):
            yield document.fault(start.path, f"ray start {option} takes a whole number, found {value!r}")
    if "--block" in start.options:
        yield document.fault(start.path, "with --block `ray up` never comes to an end; leave it out")
    v2 = start.environment.get(AUTOSCALER_V2)
    if v2 not in (None, "1") and provider_of(document) in (*CLOUDS, *OTHER_PROVIDERS):
        yield document.fault(
            start.path, f"{AUTOSCALER_V2}={v2}, while `ray up` of this Ray starts the autoscaler v2; set 1"
        )


def _autoscaler_faults(document: Document, start: RayStart) -> Iterator[Fault]:
    """Of a head among machines that are there: `ray up` sets the autoscaler v2, and what the command sets goes before.

    Such machines are of one kind, the head among them. The v2 of Ray 2.60 counts the head to those
    that `min_workers` asks for, and never starts the last machine (tests/hosts/test_ray_up.py with v2); v1 does.
    """
    v2 = start.environment.get(AUTOSCALER_V2)
    is_managed = at(document.value, ("provider", "coordinator_address")) is not None
    if provider_of(document) == "local" and not is_managed and v2 != "0":
        found = f"{AUTOSCALER_V2}={v2}" if v2 else f"no {AUTOSCALER_V2}=0"
        yield document.fault(
            start.path, f"{found}: the autoscaler v2 of `ray up` never starts the last of worker_ips; export 0"
        )


def _head_faults(document: Document, start: RayStart) -> Iterator[Fault]:
    yield from _autoscaler_faults(document, start)
    options = start.options
    if "--head" not in options:
        yield document.fault(start.path, "the head's `ray start` lacks --head")
    elif "--address" in options:
        yield document.fault(start.path, "--head and --address exclude each other; the head has no --address")
    config = options.get("--autoscaling-config")
    if config is None and not _is_near(options, "--autoscaling-config"):
        yield document.fault(start.path, f"lacks --autoscaling-config={BOOTSTRAP}, so no worker is ever launched")
    elif config is not None and not config.endswith("ray_bootstrap_config.yaml"):
        yield document.fault(start.path, f"--autoscaling-config={config}: `ray up` writes {BOOTSTRAP}")
    if options.get("--node-ip-address") in LOOPBACK:
        yield document.fault(start.path, "--node-ip-address on loopback: no worker reaches the head")
    if options.get("--include-dashboard", "true").lower() in ("false", "0", "no"):
        yield document.fault(start.path, "without the dashboard there is no Jobs API, which `bigray submit` needs")
    host = options.get("--dashboard-host", LOOPBACK[0])
    if host not in LOOPBACK:
        risk = "sends the token unencrypted" if has_token(document, start) else "lets anyone who reaches it run code"
        yield document.fault(start.path, f"--dashboard-host={host} {risk}; use 127.0.0.1 and `ray dashboard`")
    yield from _head_cpus(document, start)


def _head_cpus(document: Document, start: RayStart) -> Iterator[Fault]:
    """Whether trials and replicas stay off the head, which has to outlive them."""
    name = str(document.value.get("head_node_type"))
    written = at(node_types(document), (name, "resources", "CPU"))
    given = start.options.get("--num-cpus")
    if written is not None and given is not None and given.isdigit() and int(given) != written:
        path = ("available_node_types", name, "resources", "CPU")
        yield document.fault(path, f"is {written}, but the head is started with --num-cpus={given}; make them equal")
    elif given is None and written != 0 and not _is_near(start.options, "--num-cpus") and "--head" in start.options:
        note = "has CPUs that trials and replicas are placed on; --num-cpus=0 keeps the head for itself"
        yield Fault(HEAD, note, document.line_of(start.path), is_note=True)


def _worker_faults(document: Document, start: RayStart, head: RayStart | None) -> Iterator[Fault]:
    if "--head" in start.options:
        yield document.fault(start.path, "a worker is started with --head, which makes a cluster of its own")
        return
    if "--autoscaling-config" in start.options:
        yield document.fault(start.path, "--autoscaling-config is for the head alone")
    port = (head.options.get("--port") if head else None) or "6379"
    address = start.options.get("--address")
    if address is None:
        if not _is_near(start.options, "--address"):
            yield document.fault(start.path, f"lacks --address=$RAY_HEAD_IP:{port}")
    elif not re.fullmatch(rf"\$(RAY_HEAD_IP|{{RAY_HEAD_IP}}):{re.escape(port)}", address):
        yield document.fault(start.path, f"--address={address} is not $RAY_HEAD_IP:{port}, where the head is")


def _token_faults(document: Document, starts: list[RayStart]) -> Iterator[Fault]:
    """Token authentication: on for every node, its file on every node."""
    wrong = False
    for start in starts:
        mode = start.environment.get("RAY_AUTH_MODE", _mode_of_shells(document))
        if mode == "token":
            continue
        wrong = True
        public = start.options.get("--dashboard-host", LOOPBACK[0]) not in LOOPBACK
        if mode is None and public and "--head" in start.options:
            continue  # told with the host
        found = "is not set" if mode is None else f"is {mode!r}"
        yield document.fault(start.path, f"RAY_AUTH_MODE {found}: anyone who reaches a port runs code; export token")
    if starts and not wrong and not _brings_token(document, starts):
        yield document.fault(
            ("file_mounts",), "no token on the nodes; mount ~/.ray/auth_token (made by `ray get-auth-token --generate`)"
        )


def _brings_token(document: Document, starts: list[RayStart]) -> bool:
    mounts = document.value.get("file_mounts")
    if mounts is not None and not isinstance(mounts, dict):
        return True
    remote = [str(path).rstrip("/") for path in mounts or ()]
    if any(path.endswith((".ray/auth_token", "/.ray")) for path in remote):
        return True
    if all("RAY_AUTH_TOKEN_PATH" in start.environment or "RAY_AUTH_TOKEN" in start.environment for start in starts):
        return True
    commands = [command for key in SETUP for command in _commands(document, (key,))]
    return any("auth_token" in command or "RAY_AUTH_TOKEN" in command for command in commands)


def _mode_of_shells(document: Document) -> str | None:
    """What every shell has: by `echo "export RAY_AUTH_MODE=token" >> ~/.bashrc`, or the container's `-e`."""
    for option in _commands(document, ("docker", "run_options")):
        if found := re.search(r"(?:^|\s)(?:-e|--env)[= ]?['\"]?RAY_AUTH_MODE=(\w+)", option):
            return found.group(1)
    for key in SETUP:
        for command in _commands(document, (key,)):
            if found := re.search(r"RAY_AUTH_MODE=['\"]?(\w+).*>>?\s*\S*(bashrc|profile|environment)", command):
                return found.group(1)
    return None


def _is_near(options: dict[str, str], wanted: str) -> bool:
    """Whether a wanted option is there misspelt, which is told by itself."""
    return any(option not in OPTIONS and f"'{wanted}'" in unknown(option, OPTIONS) for option in options)


def _start(document: Document, key: str) -> RayStart | None:
    position = 0
    for index, command in enumerate(_commands(document, (key,))):
        for environment, words in _steps(command):
            if words[:2] == ["ray", "start"]:
                return RayStart((key, index), _options(words[2:]), environment, position)
            position += 1
    return None


def _all_steps(document: Document, key: str) -> Iterator[tuple[int, int, list[str]]]:
    position = 0
    for index, command in enumerate(_commands(document, (key,))):
        for _, words in _steps(command):
            yield index, position, words
            position += 1


def _steps(command: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The simple commands of a shell line, each with the variables set for it so far."""
    exported: dict[str, str] = {}
    for part in re.split(r"&&|\|\||[;|()\n]", command.replace("\\\n", " ")):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a quote that spans parts: no command of Ray's
            continue
        own: dict[str, str] = {}
        if words[:1] == ["export"]:
            exported |= dict(word.split("=", 1) for word in words[1:] if "=" in word)
            continue
        while words and re.match(r"\w+=", words[0]):
            name, value = words.pop(0).split("=", 1)
            own[name] = value
        if not words:
            exported |= own
            continue
        words[0] = words[0].rpartition("/")[2] if words[0].endswith("/ray") else words[0]
        yield {**exported, **own}, words


def _options(words: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    pending: str | None = None
    for word in words:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            options[name] = value
            pending = None if equals or name in FLAGS else name
        elif pending is not None:
            options[pending], pending = word, None
    return options


def _commands(document: Document, path: Path) -> list[str]:
    value: Any = document.value
    for step in path:
        value = mapping(value).get(step)
    return [command if isinstance(command, str) else "" for command in value] if isinstance(value, list) else []
