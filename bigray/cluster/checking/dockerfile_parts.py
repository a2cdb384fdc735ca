"""A Dockerfile taken apart: its instructions, in stages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

INSTRUCTIONS = (
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "MAINTAINER"),
    *("ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    line: int
    name: str
    """In capitals."""
    rest: str

    @property
    def flags(self) -> dict[str, str]:
        """`--from=build` and the like, which come first."""
        return dict(re.findall(r"--([a-z-]+)(?:=(\S+))?", self._flag_text()))

    @property
    def arguments(self) -> list[str]:
        """The words after the flags; those of the JSON form where it is one."""
        text = self.rest[len(self._flag_text()) :].strip()
        return listed if (listed := json_form(text)) is not None else text.split()

    def _flag_text(self) -> str:
        match = re.match(r"(?:--[a-z-]+(?:=\S+)?\s+)*", self.rest)
        return match.group() if match else ""


@dataclass(frozen=True)
class Stage:
    """What one FROM starts."""

    start: Instruction
    image: str
    """As written, with the defaults of ARGs filled in."""
    name: str | None
    is_bound: bool
    """False where a variable in it has no value."""
    instructions: list[Instruction] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    """ARGs with a default and ENVs, as they are at the end of the stage."""


def instructions_of(text: str) -> list[Instruction]:
    """Every instruction with its first line; comments are gone, also those between continued lines."""
    found: list[Instruction] = []
    start, joined, heredoc = 0, "", ""
    for number, line in enumerate(text.splitlines(), start=1):
        if heredoc:
            joined += "\n" + line
            if line.strip() == heredoc:
                heredoc = ""
                found.append(_instruction(start, joined))
                joined = ""
            continue
        if re.match(r"\s*#", line) or (not line.strip() and joined):
            continue
        start = start if joined else number
        if re.search(r"\\\s*$", line):
            joined += re.sub(r"\\\s*$", " ", line)
            continue
        joined += line
        if opened := re.search(r"<<-?['\"]?(\w+)['\"]?", joined if re.match(r"\s*(RUN|COPY|ADD)\b", joined) else ""):
            heredoc = opened[1]
            continue
        if joined.strip():
            found.append(_instruction(start, joined))
        joined = ""
    if joined.strip():
        found.append(_instruction(start, joined))
    return found


def _instruction(line: int, text: str) -> Instruction:
    name, _, rest = text.strip().partition(" ")
    return Instruction(line, name.upper(), rest.strip())


def stages_of(instructions: Sequence[Instruction]) -> list[Stage]:
    """The stages; ARGs before the first FROM hold for the FROMs alone."""
    stages: list[Stage] = []
    outer: dict[str, str] = {}
    for instruction in instructions:
        if instruction.name == "FROM":
            words = instruction.arguments
            image, is_bound = filled_in(words[0] if words else "", outer)
            name = words[2] if len(words) == 3 and words[1].lower() == "as" else None
            stages.append(Stage(instruction, image, name, is_bound))
        elif stages:
            stages[-1].instructions.append(instruction)
            stages[-1].variables.update(_set_by(instruction, outer))
        else:
            outer.update(_set_by(instruction, {}))
    return stages


def _set_by(instruction: Instruction, outer: dict[str, str]) -> Iterator[tuple[str, str]]:
    if instruction.name not in ("ARG", "ENV"):
        return
    for name, value in pairs_of(instruction):
        if value is not None:
            yield name, value
        elif name in outer:
            yield name, outer[name]


def pairs_of(instruction: Instruction) -> list[tuple[str, str | None]]:
    """`NAME=value` of an ARG, ENV or LABEL; the value is None where there is no '='."""
    words = re.findall(r"""(?:[^\s"']|"(?:\\.|[^"])*"|'[^']*')+""", instruction.rest)
    pairs = [word.partition("=") for word in words]
    return [(name, value.strip("\"'") if equals else None) for name, equals, value in pairs]


def filled_in(text: str, variables: dict[str, str]) -> tuple[str, bool]:
    """A text with its variables replaced, and whether all of them have a value."""
    is_bound = True

    def value_of(match: re.Match[str]) -> str:
        nonlocal is_bound
        value = variables.get(match[1] or match[2], match[3])
        is_bound = is_bound and value is not None
        return match.group() if value is None else value

    return _VARIABLE.sub(value_of, text), is_bound


def json_form(text: str) -> list[str] | None:
    """The words of the exec form, `["bigray", "serve"]`; None where it is none."""
    try:
        words = json.loads(text)
    except ValueError:
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None
