"""What `#SBATCH` takes: the options of Slurm 20.11 to 25.05, and the forms of their values."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

from bigray.errors import did_you_mean


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHORT = {
    "A": "account",
    "a": "array",
    "b": "begin",
    "B": "extra-node-info",
    "C": "constraint",
    "c": "cpus-per-task",
    "D": "chdir",
    "d": "dependency",
    "e": "error",
    "F": "nodefile",
    "G": "gpus",
    "H": "hold",
    "h": "help",
    "i": "input",
    "J": "job-name",
    "k": "no-kill",
    "L": "licenses",
    "M": "clusters",
    "m": "distribution",
    "N": "nodes",
    "n": "ntasks",
    "O": "overcommit",
    "o": "output",
    "p": "partition",
    "Q": "quiet",
    "q": "qos",
    "S": "core-spec",
    "s": "oversubscribe",
    "t": "time",
    "V": "version",
    "v": "verbose",
    "W": "wait",
    "w": "nodelist",
    "x": "exclude",
}

FLAGS = _words(
    "contiguous help hold ignore-pbs overcommit oversubscribe parsable quiet reboot requeue no-requeue spread-job "
    "stepmgr test-only usage use-min-nodes verbose version wait"
)
"""Those that take no value."""
MAYBE_A_VALUE = _words("exclusive no-kill nice get-user-env propagate resv-ports")
WITH_A_VALUE = _words(
    "account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container "
    "container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency "
    "distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node "
    "gpus-per-socket gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type "
    "mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks "
    "ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition power prefer priority "
    "profile qos reservation segment signal sockets-per-node switches tasks-per-node thread-spec threads-per-core time "
    "time-min tmp tres-bind tres-per-task uid umask wait-all-nodes wckey wrap"
)
OPTIONS = FLAGS | MAYBE_A_VALUE | WITH_A_VALUE
OF_THE_COMMAND_LINE = frozenset({"wrap", "help", "usage", "version", "test-only"})
"""They make sbatch do something else than run the script that they are in."""

SIGNALS = _words("HUP INT QUIT ABRT KILL ALRM TERM USR1 USR2 URG CONT STOP TSTP TTIN TTOU")
MAIL_TYPES = _words(
    "NONE BEGIN END FAIL REQUEUE ALL INVALID_DEPEND STAGE_OUT TIME_LIMIT TIME_LIMIT_90 TIME_LIMIT_80 TIME_LIMIT_50 "
    "ARRAY_TASKS"
)
NO_LIMIT = ("UNLIMITED", "INFINITE", "INFINITY", "-1", "0")
SIGNAL_AHEAD_S = 60
"""What Slurm takes where `--signal` names no time."""
MOST_GPUS = 64
"""Of one node."""


def value_fault(name: str, value: str) -> str | None:
    """What is wrong with the form of an option's value; None where nothing is, or where nothing is known of it."""
    rule = _RULES.get(name)
    return rule(value) if rule else None


def seconds_of(time: str) -> int | None:
    """A time limit in seconds, as sbatch reads it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if any(number > 59 for number in numbers[1:]):
        return None
    if days is not None:  # starts at hours
        return sum(number * unit for number, unit in zip([int(days), *numbers], (86400, 3600, 60, 1), strict=False))
    hours = [0, *numbers, 0] if len(numbers) == 1 else [0, *numbers] if len(numbers) == 2 else numbers
    return hours[0] * 3600 + hours[1] * 60 + hours[2]


def megabytes_of(memory: str) -> float | None:
    """An amount of memory as sbatch reads it: megabytes, or with K, M, G, T; None if it is none."""
    match = re.fullmatch(r"(\d+)(?:([KMGTkmgt])[Bb]?)?", memory)
    if match is None:
        return None
    return int(match[1]) * {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}[(match[2] or "M").upper()]


def signal_of(value: str) -> tuple[bool, str, int] | None:
    """Of `--signal`: whether it goes to the batch shell, the signal's name, seconds ahead; None if it is none."""
    match = re.fullmatch(r"(?:([RB]+):)?(?:SIG)?(\w+)(?:@(\d+))?", value)
    if match is None:
        return None
    name = match[2].upper()
    if name.isdigit():
        name = _name_of(int(name))
    ahead_s = int(match[3]) if match[3] else SIGNAL_AHEAD_S
    return ("B" in (match[1] or ""), name, ahead_s) if name in SIGNALS else None


def nodes_of(value: str) -> tuple[int, int] | None:
    """Least and most of `--nodes`; None if it is none."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", value)
    if match is None:
        return None
    least, most = int(match[1]), int(match[2] or match[1])
    return (least, most) if 1 <= least <= most else None


def gpus_of(value: str) -> int | None:
    """The number in `4` or `a100:4`, of one kind or of several; None if it is none."""
    numbers = [re.fullmatch(r"(?:[A-Za-z][\w.-]*:)?(\d+)", part) for part in value.split(",")]
    return None if None in numbers else sum(int(number[1]) for number in numbers if number)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return ""


def _time_fault(value: str) -> str | None:
    if value.upper() in NO_LIMIT:
        return f"{value} is no limit, so that --signal never comes; give a time, such as 04:00:00"
    return None if seconds_of(value) else f"{value!r} is no time; write hours:minutes:seconds, such as 04:00:00"


def _memory_fault(value: str) -> str | None:
    if value == "0":
        return None
    megabytes = megabytes_of(value)
    if megabytes is None:
        return f"{value!r} is no amount of memory; write a whole number with K, M, G or T, such as 64G"
    if megabytes < 1024:
        return f"{value} is {megabytes:g} MB, and Ray alone needs 1 GB; write a unit, such as {value.rstrip('KMBkmb')}G"
    return None


def _signal_fault(value: str) -> str | None:
    if signal_of(value) is None:
        name = re.sub(r"^([RB]+:)?(SIG)?|@.*$", "", value)
        hint = did_you_mean(name, SIGNALS) if name.isalpha() and name.upper() not in SIGNALS else ""
        return f"{value!r} is no signal and time{hint}; write B:TERM@120"
    return None


def _nodes_fault(value: str) -> str | None:
    return None if nodes_of(value) else f"{value!r} is no number of nodes; write 2, or 2-4 for what can be had"


def _gpus_fault(value: str) -> str | None:
    number = gpus_of(value)
    if number is None:
        return f"{value!r} is no number of GPUs; write 4, or with the kind a100:4"
    if number < 1:
        return "0 GPUs; leave it out"
    return f"{number} GPUs in one node; it counts those of each node" if number > MOST_GPUS else None


def _gres_fault(value: str) -> str | None:
    for part in value.split(","):
        name, *counts = part.removeprefix("gres/").removeprefix("gres:").split(":")
        if not name or (name.lower() in ("gpus", "cuda", "nvidia") and counts):
            return f"{part!r} is no resource of Slurm's; for GPUs use --gpus-per-node"
        if counts and not re.fullmatch(r"[A-Za-z][\w.-]*|\d+[KMGkmg]?", counts[-1]):
            return f"{part!r} does not end in a number; write gpu:4"
    return None


def _count_fault(value: str) -> str | None:
    return None if re.fullmatch(r"[1-9]\d*", value) else f"{value!r} is not a whole number above 0"


def _one_of(*choices: str) -> Callable[[str], str | None]:
    def rule(value: str) -> str | None:
        return None if value in choices else f"{value!r} is none of its values{did_you_mean(value, choices)}"

    return rule


def _mail_fault(value: str) -> str | None:
    for part in value.split(","):
        if part.upper() not in MAIL_TYPES:
            return f"{part!r} is none of its values{did_you_mean(part.upper(), MAIL_TYPES)}"
    return None


def _file_fault(value: str) -> str | None:
    """Of a file that Slurm writes: a pattern whose letters it knows, and another file for each job."""
    letters = re.findall(r"%(?:\d*([A-Za-z%]))?", value.replace("\\", ""))
    if unknown := [letter for letter in letters if letter not in tuple("%AaJjNnstuxb")]:
        return f"%{unknown[0]} is no letter of file names; %j is the job's number"
    if not {"j", "J", "A"} & set(letters) and value != "/dev/null":
        return f"{value!r} is the same file for every job; put %j into it"
    return None


_RULES: dict[str, Callable[[str], str | None]] = {
    "time": _time_fault,
    "time-min": _time_fault,
    "mem": _memory_fault,
    "mem-per-cpu": _memory_fault,
    "mem-per-gpu": _memory_fault,
    "signal": _signal_fault,
    "nodes": _nodes_fault,
    "gpus-per-node": _gpus_fault,
    "gpus-per-task": _gpus_fault,
    "gpus": _gpus_fault,
    "gres": _gres_fault,
    "ntasks": _count_fault,
    "ntasks-per-node": _count_fault,
    "cpus-per-task": _count_fault,
    "cpus-per-gpu": _count_fault,
    "open-mode": _one_of("append", "truncate"),
    "exclusive": _one_of("user", "mcs", "topo"),
    "mail-type": _mail_fault,
    "output": _file_fault,
    "error": _file_fault,
}
