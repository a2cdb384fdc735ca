"""The file of `bigray cluster local`: checked by the spec that the command reads it with, and told with its lines."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

from bigray.cluster.checking.faults import Fault
from bigray.cluster.checking.secret_values import secret_in
from bigray.cluster.dry_run.spec import LocalClusterSpec
from bigray.errors import SpecError
from bigray.loading import validate_document

_HEADER = re.compile(r"\s*\[(\[)?\s*([\w.\"/-]+)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*([\w-]+|\"[^\"]+\"|'[^']+')((?:\s*\.\s*(?:[\w-]+|\"[^\"]+\"))*)\s*=")


def check_local_toml(text: str) -> Iterator[Fault]:
    """Every fault of a cluster/local.toml."""
    told = {number: what for number, line in enumerate(text.splitlines(), start=1) if (what := secret_in(line))}
    for number, what in told.items():
        yield Fault("", f"holds {what}; a local cluster makes its own token, leave it out", number)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line_of_it = _of_parser(str(error))
        yield Fault("", f"not valid TOML: {message}", line_of_it)
        return
    lines = lines_of(text)
    try:
        spec = validate_document(LocalClusterSpec, document, "")
    except SpecError as error:
        faults = [_with_line(fault, lines) for fault in error.faults]
        yield from (fault for fault in faults if fault.line not in told)
        return
    yield from _idle_faults(spec, lines)


def _idle_faults(spec: LocalClusterSpec, lines: dict[str, int]) -> Iterator[Fault]:
    """What a spec allows, since each value is good, and which no run could use."""
    if spec.head_cpus == 0 and spec.nodes == 1 and not any(group.cpus for group in spec.groups):
        yield Fault("head_cpus", "is 0 and there is no other node with CPUs: nothing could run", lines.get("head_cpus"))
    if spec.memory_mib is not None and spec.memory_mib <= spec.object_store_mib:
        message = f"{spec.memory_mib} MiB leave nothing beside the object store's {spec.object_store_mib} MiB"
        yield Fault("memory_mib", message, lines.get("memory_mib"))


def _of_parser(message: str) -> tuple[str, int | None]:
    """tomllib's message without its place, and the line in it."""
    match = re.fullmatch(r"(.*?)\s*\(at (?:line (\d+), column \d+|end of document)\)", message, re.DOTALL)
    if match is None:
        return message, None
    return match[1], int(match[2]) if match[2] else None


def _with_line(fault: str, lines: dict[str, int]) -> Fault:
    """`groups.0.count: is wrong` as a fault at its line, or at that of the table which it is in."""
    place, colon, message = fault.partition(": ")
    if not colon or not re.fullmatch(r"[\w./ -]+", place) or place.split(".")[0] not in _known(lines):
        return Fault("", fault, None)
    shown, parts = place, place.split(".")
    while parts:
        if (line := lines.get(".".join(parts))) is not None:
            return Fault(shown, message, line)
        parts.pop()
    return Fault(shown, message)


def _known(lines: dict[str, int]) -> set[str]:
    return {path.split(".")[0] for path in lines} | set(LocalClusterSpec.model_fields)


def lines_of(text: str) -> dict[str, int]:
    """The line of each key and table by its dotted path, with the index of an array's table: `groups.0.count`."""
    lines: dict[str, int] = {}
    table = ""
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            name = header[2]
            if header[1]:
                counts[name] = counts.get(name, -1) + 1
                lines.setdefault(name, number)
                name = f"{name}.{counts[name]}"
            else:
                first, _, rest = name.partition(".")
                name = f"{first}.{counts[first]}.{rest}" if first in counts and rest else name
            table = name
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            parts = [part.strip().strip("\"'") for part in re.findall(r"[\w-]+|\"[^\"]+\"|'[^']+'", key[1] + key[2])]
            for end in range(1, len(parts) + 1):
                lines.setdefault(".".join([*([table] if table else []), *parts[:end]]), number)
    return lines
