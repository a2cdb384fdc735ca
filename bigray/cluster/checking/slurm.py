"""An sbatch file: its `#SBATCH` lines, and the mistakes that cost a night in starting Ray and bigray from it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.ray_commands import OPTIONS as OPTIONS_OF_RAY_START
from bigray.cluster.checking.sbatch_options import (
    FLAGS,
    OF_THE_COMMAND_LINE,
    OPTIONS,
    SHORT,
    WITH_A_VALUE,
    nodes_of,
    seconds_of,
    signal_of,
    value_fault,
)
from bigray.cluster.checking.secret_values import secret_in
from bigray.cluster.checking.shell_script import Command, commands_of, syntax_fault
from bigray.errors import did_you_mean

LEAST_SIGNAL_AHEAD_S = 60
"""A checkpoint is written and Ray ended in it."""
LONGEST_TEMP_DIR = 40
"""Ray adds some 65 bytes to a socket's path, which has at most 107."""

_PORTS = r"(?:\w+-)*ports?(?:-list)?"
"""Names of options of `ray start` that take ports."""
_CALL = r"""(?:^|[\s;&|('"/])bigray\s+(?="?\$|[a-z-])"""
_LOOKS_LIKE_ONE = re.compile(r"\s*#\s{0,2}(SBATCH|SBTACH|SBACTH|SBATH|SBTCH)\s*-", re.IGNORECASE)


@dataclass(frozen=True)
class Directive:
    """One option of one `#SBATCH` line."""

    line: int
    name: str
    """Long, without dashes."""
    value: str | None


@dataclass(frozen=True)
class _Batch:
    """An sbatch file taken apart."""

    directives: Sequence[Directive]
    meant: frozenset[str]
    """Options that are there, and those that a mistaken one was probably meant for."""
    commands: Sequence[Command]

    def value(self, name: str) -> str | None:
        """Of the last directive of this name: the one that counts. None where there is none, or it has no value."""
        return next((found.value for found in reversed(self.directives) if found.name == name), None)

    def line(self, name: str) -> int | None:
        return next((found.line for found in reversed(self.directives) if found.name == name), None)

    def has(self, name: str) -> bool:
        return self.line(name) is not None

    def fault(self, name: str, message: str) -> Fault:
        return Fault(f"--{name}", message, self.line(name))

    def first(self, pattern: str) -> Command | None:
        return next(self.all(pattern), None)

    def all(self, pattern: str) -> Iterator[Command]:
        return (command for command in self.commands if re.search(pattern, command.text))

    def mentions(self, pattern: str) -> bool:
        return self.first(pattern) is not None


def check_slurm(text: str) -> Iterator[Fault]:
    """Every fault of an sbatch file."""
    yield from _file_faults(text)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    commands = commands_of(text)
    directives: list[Directive] = []
    meant: set[str] = set()
    for found in _directives(text, commands[0].line if commands else None):
        if isinstance(found, Directive):
            directives.append(found)
            meant.add(found.name)
        else:
            meant |= _meant(found)
            yield found
    batch = _Batch(directives, frozenset(meant), commands)
    yield from _value_faults(batch)
    yield from _missing_faults(batch)
    yield from _combination_faults(batch)
    if (mistake := syntax_fault(text)) is not None:
        yield Fault("", f"bash cannot read it: {mistake[1]}", mistake[0])
        return
    for rules in (_ray_faults, _port_faults, _token_faults, _place_faults, _bigray_faults):
        yield from rules(batch)


def _meant(fault: Fault) -> set[str]:
    """Names of options in a fault: a mistyped option is not missing as well."""
    return {name for name in re.findall(r"--([a-z][a-z-]*)", f"{fault.place} {fault.message}") if name in OPTIONS}


def _file_faults(text: str) -> Iterator[Fault]:
    if text.startswith("\ufeff"):
        yield Fault("", "starts with a byte order mark, so sbatch finds no '#!'; save it as UTF-8 without one", 1)
    if "\r" in text:
        yield Fault("", "has line ends of Windows, which sbatch refuses; run `sed -i 's/\\r$//' FILE`", 1)
    first = text.removeprefix("\ufeff").split("\n", 1)[0].rstrip("\r")
    if not first.startswith("#!"):
        yield Fault("", "the first line has to be '#!/usr/bin/env bash', or sbatch refuses the file", 1)
    elif not re.fullmatch(r"#!\s*/\S*?/?(env\s+)?(\S*/)?(ba|z|k|da)?sh(\s+-\w+)?\s*", first):
        yield Fault("", f"{first!r} starts no shell; write '#!/usr/bin/env bash'", 1)


def _directives(text: str, first_command: int | None) -> Iterator[Directive | Fault]:
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"#SBATCH(\s|$)", line):
            if first_command is not None and number > first_command:
                yield Fault(line.strip(), "comes after the first command, so Slurm ignores it; move it up", number)
            else:
                yield from _of_line(number, line.removeprefix("#SBATCH"))
        elif _LOOKS_LIKE_ONE.match(line):
            yield Fault(
                line.strip(), f"is a comment for Slurm; write '#SBATCH {line[line.index('-') :].strip()}'", number
            )


def _of_line(number: int, rest: str) -> Iterator[Directive | Fault]:
    try:
        words = shlex.split(rest, comments=True)
    except ValueError:
        yield Fault(rest.strip(), "a quote is not closed", number)
        return
    if not words:
        yield Fault("#SBATCH", "has no option", number)
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            hint = f"; write --{word}" if word.partition("=")[0] in OPTIONS else ""
            yield Fault(word, f"is no option{hint}", number)
            continue
        yield (found := _option(number, word, words))
        while isinstance(found, Fault) and words and not words[0].startswith("-"):
            words.pop(0)  # belongs to what was wrong


def _option(number: int, word: str, words: list[str]) -> Directive | Fault:
    """One option, which takes its value from the words after it where it has none of its own."""
    value: str | None
    if word.startswith("--"):
        name, is_given, text = word[2:].partition("=")
        value = text if is_given else None
        if name not in OPTIONS:
            return Fault(f"--{name}", f"Slurm has no such option{_near(name)}", number)
    else:
        name, value = SHORT.get(word[1], ""), word[2:].removeprefix("=") or None
        if not name:
            return Fault(word[:2], "Slurm has no such option; write the long form, such as --nodes=2", number)
    if name in FLAGS and value is not None:
        return Fault(f"--{name}", f"takes no value, got {value!r}", number)
    if name in WITH_A_VALUE and not value:
        if not words or words[0].startswith("-") or words[0] == "=":
            return Fault(f"--{name}", f"needs a value, written --{name}=VALUE", number)
        value = words.pop(0)
    if name in OF_THE_COMMAND_LINE:
        return Fault(f"--{name}", "is for the command line: in a file it keeps the script from running", number)
    return Directive(number, "ntasks-per-node" if name == "tasks-per-node" else name, value)


def _near(name: str) -> str:
    hint = did_you_mean(name, OPTIONS)
    return re.sub(r"'(.+)'", r"'--\1'", hint) if hint.startswith(", did") else ""


def _value_faults(batch: _Batch) -> Iterator[Fault]:
    seen: dict[str, Directive] = {}
    for directive in batch.directives:
        if directive.name in seen:
            first = seen[directive.name].line
            yield Fault(f"--{directive.name}", f"is in line {first} too, and the last one counts", directive.line)
        seen[directive.name] = directive
        if directive.value is not None and (message := value_fault(directive.name, directive.value)):
            yield Fault(f"--{directive.name}", message, directive.line)
        elif directive.value is not None and (what := secret_in(directive.value)):
            yield Fault(f"--{directive.name}", f"holds {what}, and every user sees a job's options", directive.line)


_MISSING = {
    "nodes": "say how many nodes, such as --nodes=2",
    "time": "without it the partition's limit holds, which --signal may never come before; such as --time=04:00:00",
    "exclusive": "without it two jobs share a node, its memory and Ray's ports",
    "signal": "without it the time limit kills the run where it is; --signal=B:TERM@120",
    "requeue": "without it a lost node or the time limit ends the run",
    "open-mode": "a job that is queued again would begin its output anew; --open-mode=append",
}
_EXCLUDED_BY = {"requeue": ("no-requeue",), "exclusive": ("oversubscribe",)}


def _missing_faults(batch: _Batch) -> Iterator[Fault]:
    for name, why in _MISSING.items():
        if not batch.meant.intersection((name, *_EXCLUDED_BY.get(name, ()))):
            yield Fault(f"--{name}", f"is missing: {why}")


_NOT_FOR_US = {
    "no-requeue": "a lost node or the time limit would end the run; write --requeue",
    "oversubscribe": "other jobs on the node take its memory and Ray's ports; write --exclusive",
    "overcommit": "puts several tasks on one CPU, and Ray counts each; leave it out",
    "nodelist": "waits for these very nodes, even when one is down; ask for what they have by --constraint",
    "nodefile": "waits for these very nodes, even when one is down; ask for what they have by --constraint",
    "no-kill": "holds too few nodes for the run's groups once one is lost; leave it out, --requeue starts anew",
    "gpus": "are spread over the nodes as Slurm likes; write --gpus-per-node",
}


def _combination_faults(batch: _Batch) -> Iterator[Fault]:
    for name, why in _NOT_FOR_US.items():
        if batch.has(name) and value_fault(name, batch.value(name) or "") is None and batch.value(name) != "off":
            yield batch.fault(name, why)
    if (sharing := batch.value("exclusive")) in ("user", "mcs"):
        yield batch.fault("exclusive", f"={sharing} lets other jobs of yours share the node; write --exclusive")
    if batch.value("open-mode") == "truncate":
        yield batch.fault("open-mode", "a job that is queued again begins its output anew; write append")
    if (batch.value("export") or "").upper() in ("NONE", "NIL"):
        yield batch.fault("export", "NONE leaves out PATH and Ray's settings on every node; leave it out")
    yield from _memory_and_gpu_faults(batch)
    yield from _task_faults(batch)
    yield from _signal_faults(batch)


def _memory_and_gpu_faults(batch: _Batch) -> Iterator[Fault]:
    memory = [name for name in ("mem", "mem-per-cpu", "mem-per-gpu") if batch.has(name)]
    if len(memory) > 1:
        yield batch.fault(memory[1], f"and --{memory[0]} exclude each other; leave one out")
    if batch.has("gpus-per-node") and re.search(r"(^|,|/)gpu\b", batch.value("gres") or ""):
        yield batch.fault("gres", "asks for GPUs as --gpus-per-node does; leave one out")
    asks_for_gpus = any(name.startswith("gpus") for name in batch.meant) or "gpu" in (batch.value("gres") or "")
    for command in batch.all(r"--num-gpus[= ]['\"]?\d"):
        number = int(re.findall(r"--num-gpus[= ]['\"]?(\d+)", command.text)[0])
        if number > 0 or asks_for_gpus:
            yield Fault(
                "--num-gpus", f'{number} is fixed; pass on what Slurm gives: "${{SLURM_GPUS_ON_NODE:-0}}"', command.line
            )


def _task_faults(batch: _Batch) -> Iterator[Fault]:
    per_node = batch.value("ntasks-per-node")
    if per_node is not None and per_node.isdigit() and int(per_node) > 1:
        yield batch.fault("ntasks-per-node", f"{per_node} would start as many Ray nodes on each; write 1")
    tasks, nodes = batch.value("ntasks"), nodes_of(batch.value("nodes") or "")
    if tasks is not None and tasks.isdigit() and nodes is not None and int(tasks) > nodes[1]:
        yield batch.fault(
            "ntasks", f"{tasks} on {nodes[1]} nodes would start several Ray nodes on one; write one a node"
        )


def _signal_faults(batch: _Batch) -> Iterator[Fault]:
    told = signal_of(batch.value("signal") or "")
    if told is None:
        return
    to_shell, name, ahead_s = told
    limit = batch.value("time") or ""
    limit_s = seconds_of(limit)
    if not to_shell:
        yield batch.fault("signal", f"goes to Ray's nodes, which end before bigray does; write B:{name}@{ahead_s}")
    elif "@" not in (batch.value("signal") or "") or ahead_s < LEAST_SIGNAL_AHEAD_S:
        yield batch.fault("signal", f"comes {ahead_s} s ahead, too late for a checkpoint; write B:{name}@120")
    elif limit_s and ahead_s >= limit_s:
        yield batch.fault("time", f"{limit} is {limit_s} s, and --signal ends the run {ahead_s} s before; give it more")
    if name in ("KILL", "STOP"):
        yield batch.fault("signal", f"no program can answer {name}; write B:TERM@120")
    elif not batch.mentions(rf"\btrap\s+(?!''|\"\"|-).*\b(SIG)?{name}\b"):
        yield batch.fault("signal", f"the script has no `trap ... {name}`, so bash ends and bigray is killed")
    if not batch.mentions(r"\bscontrol\s+requeue\b"):
        yield batch.fault("signal", "nothing calls `scontrol requeue` after it: the time limit ends the run")


def _ray_faults(batch: _Batch) -> Iterator[Fault]:
    for command in batch.commands:
        text = command.text
        if re.search(r"\bray\s+stop\b", text):
            yield Fault("ray stop", "ends every Ray of this user on the node; end the steps by pid", command.line)
        if found := re.search(r"\b(pkill|killall)\b", text):
            yield Fault(found[1], "ends the processes of other jobs too; end the steps by pid", command.line)
        if re.search(r"\brm\s+-\w*r\w*\s.*['\"]?/tmp/(ray|\*)?['\"]?(\s|/|$)", text):
            yield Fault(
                "rm", "/tmp/ray has the sessions of other jobs; give --temp-dir a folder of the job", command.line
            )
        if re.search(r"\bray\s+start\b", text):
            yield from _ray_start_faults(command)
    yield from _symmetric_faults(batch)
    binding = r"(--cpu-bind|--cpus-per-task)[= ]|\bsrun\s[^|;&]*\s-c\s?[\d$]"
    if batch.mentions(r"\bray\s+(start|symmetric-run)\b") and not batch.mentions(binding):
        step = batch.first(r"\bsrun\b.*(\bray\s+start\b|\bbash\b)") or batch.first(r"\bsrun\b")
        yield Fault(
            "srun", "binds its task, and all of Ray, to one CPU; add --cpu-bind=none", step.line if step else None
        )


def _ray_start_faults(command: Command) -> Iterator[Fault]:
    rest = re.split(r"\bray\s+start\b", command.text, maxsplit=1)[1]
    options = re.findall(r"(?<!\S)--[a-z][\w-]*", re.split(r"&&|\|\||;", rest)[0])
    for option in options:
        if option not in OPTIONS_OF_RAY_START:
            hint = did_you_mean(option, OPTIONS_OF_RAY_START)
            near = hint if hint.startswith(", did") else ""
            yield Fault(option, f"`ray start` has no such option{near}", command.line)
    if "--block" not in options:
        yield Fault("ray start", "returns at once, and Slurm ends the step with all of Ray; add --block", command.line)


def _symmetric_faults(batch: _Batch) -> Iterator[Fault]:
    """`ray symmetric-run` exits 0 when Ray does not start, waits for 30 s, and ends with `ray stop`."""
    found = batch.first(r"\bray\s+symmetric-run\b")
    if found is None:
        return
    if not batch.mentions(r"\bRAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="):
        yield Fault(
            "ray symmetric-run",
            "waits 30 s for the nodes; export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=180",
            found.line,
        )
    after = [command.text for command in batch.commands if command.line > found.line]
    if not any(re.search(r"(\[\[?|\btest)\s+(!\s+)?-[efs]\s", text) for text in after):
        message = "exits 0 even when Ray did not start; look for a result file after it, or use srun and ray start"
        yield Fault("ray symmetric-run", message, found.line)


def _port_faults(batch: _Batch) -> Iterator[Fault]:
    for command in batch.all(r"--[a-z]"):
        for option, value in re.findall(rf"(?<!\S)--({_PORTS})[= ]['\"]?([\d,]+)", command.text):
            if value != "0":
                yield Fault(f"--{option}", f"{value} may be taken by another job; write 0 for a free one", command.line)
        for option, name in re.findall(rf"(?<!\S)--({_PORTS})[= ]['\"]?\$\{{?(\w+)", command.text):
            if (set_by := batch.first(rf"(?<!\S){name}=['\"]?\d+['\"]?(\s|;|$)")) is not None:
                message = f"{set_by.text.strip()} is the same for every job; write --{option}=0 for a free one"
                yield Fault(f"--{option}", message, set_by.line)
        if found := re.search(r"--dashboard-host[= ]['\"]?(0\.0\.0\.0|::)", command.text):
            yield Fault("--dashboard-host", f"{found[1]} opens it to the network; leave it out", command.line)
    head = batch.first(r"(?<!\S)--head\b")
    if head is not None and not batch.mentions(r"(?<!\S)--port[= ]"):
        yield Fault("--head", "takes port 6379, which another job may have; add --port=0", head.line)
    least = batch.first(r"--min-worker-port[= ]['\"]?0\b")
    if least is not None and not batch.mentions(r"--max-worker-port[= ]"):
        yield Fault("--min-worker-port", "0 without --max-worker-port=0 takes all ports up to 19999", least.line)


def _token_faults(batch: _Batch) -> Iterator[Fault]:
    for command in batch.commands:
        if what := secret_in(command.text):
            yield Fault("", f"holds {what} in clear; keep it in a file with mode 600, and its path here", command.line)
    if not batch.mentions(r"\bray\s+(start|symmetric-run)\b"):
        return
    mode = batch.first(r"\bRAY_AUTH_MODE=")
    if mode is None:
        yield Fault(
            "RAY_AUTH_MODE", "is not set: who reaches a port of Ray runs code as you; export RAY_AUTH_MODE=token"
        )
        return
    if not re.search(r"RAY_AUTH_MODE=['\"]?token\b", mode.text):
        yield Fault("RAY_AUTH_MODE", "who reaches a port of Ray runs code as you; write RAY_AUTH_MODE=token", mode.line)
        return
    path = batch.first(r"\bRAY_AUTH_TOKEN_PATH=")
    if path is None:
        yield Fault(
            "RAY_AUTH_TOKEN_PATH", "is not set; make a token in the job's folder, and export its path", mode.line
        )
    elif re.search(r"RAY_AUTH_TOKEN_PATH=['\"]?(/tmp|/dev/shm|\$\{?TMPDIR)", path.text):
        yield Fault("RAY_AUTH_TOKEN_PATH", "is a folder of one node; put it where all nodes see it", path.line)
    elif not batch.mentions(r"\bumask\s+0?[0-7]?77\b|\binstall\b.*-m\s*0?600\b|\bchmod\s+0?[64]00\b"):
        yield Fault("RAY_AUTH_TOKEN_PATH", "others may read the token; write `umask 077` before it is made", path.line)


def _place_faults(batch: _Batch) -> Iterator[Fault]:
    for command in batch.all(r"\bsrun\b"):
        if found := re.search(r"(?<!\S)(?:--nodelist[= ]|-w\s*)['\"]?([A-Za-z][\w.\[\],-]*)", command.text):
            yield Fault("srun", f"{found[1]} is one of the cluster's nodes, not of the job's", command.line)
    for command in batch.commands:
        if found := re.search(r"(?:RAY_ADDRESS=|--address[= ])['\"]?([\w.-]+:\d+)", command.text):
            yield Fault("", f"the address {found[1]} is fixed; take it from the job's first node", command.line)
        if re.search(r"\bhostname\s+(-i\b|--ip-address)", command.text):
            yield Fault(
                "hostname -i", "gives 127.0.1.1 on Debian and Ubuntu; take the address of a route", command.line
            )
    yield from _temp_dir_faults(batch)


def _temp_dir_faults(batch: _Batch) -> Iterator[Fault]:
    start = batch.first(r"\bray\s+start\b")
    if start is None:
        return
    given = batch.first(r"--temp-dir[= ]")
    if given is None:
        yield Fault("--temp-dir", "is missing: /tmp/ray is shared with other users' jobs", start.line)
        return
    value = re.findall(r"--temp-dir[= ]['\"]?([^\s'\"]*)", given.text)[0]
    if (variable := re.fullmatch(r"\$\{?(\w+)\}?", value)) is None:
        place = given
    else:
        place = batch.first(rf"\b{variable[1]}=") or given
        value = (re.findall(rf"\b{variable[1]}=['\"]?([^\s'\"]*)", place.text) or [""])[0]
    if value and "$" not in value:
        yield Fault("--temp-dir", f"{value} is the same for every job; put $SLURM_JOB_ID into it", place.line)
    elif len(re.sub(r"\$\{[^}]*\}|\$\w+", "1" * 8, value)) > LONGEST_TEMP_DIR:
        yield Fault("--temp-dir", "is too long: the path of a socket in it may have 107 bytes", place.line)


def _bigray_faults(batch: _Batch) -> Iterator[Fault]:
    runs = list(batch.all(_CALL))
    if not runs:
        if not batch.mentions(r"-m\s+bigray\b"):
            yield Fault("bigray", 'is never called; end with `bigray "$@"`')
        return
    has_pipefail = batch.mentions(r"\bset\s+-\w*o\s+pipefail|\bset\s+.*pipefail")
    for command in runs:
        call = re.split(_CALL, command.text, maxsplit=1)[1]
        if re.search(r"\|\|\s*(true|:)\s*(;|$)", call):
            yield Fault("bigray", "`|| true` makes a failed run a good job; keep its exit code", command.line)
        if re.search(r"(?<!\|)\|(?!\|)", call) and not has_pipefail:
            yield Fault("bigray", "its exit code is lost in the pipe; write `set -o pipefail`", command.line)
        if re.search(r"(?<![&>])&\s*$", call) and not batch.mentions(r"\bwait\b"):
            yield Fault("bigray", "runs behind the script, which ends at once; `wait` for it", command.line)
        if found := re.search(r"\bstorage=['\"]?(?![/$'\"]|\w+://)([^\s'\"]+)", call):
            yield Fault("storage", f"{found[1]} is relative; give a folder that every node sees by /...", command.line)
    last = batch.commands[-1]
    if re.fullmatch(r"exit\s+0", last.text) or last.text in ("true", ":"):
        yield Fault(last.text, "makes a failed run a good job; exit with bigray's code", last.line)
