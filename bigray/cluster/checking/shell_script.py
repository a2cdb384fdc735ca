"""A shell script as logical lines: comments gone, continued lines joined. Close enough for looking for mistakes in."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

SYNTAX_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Command:
    """One logical line."""

    line: int
    """Where it starts, 1-based."""
    text: str


def commands_of(text: str) -> list[Command]:
    """The logical lines that are no comments. Inside quotes nothing is one, so embedded scripts come line by line."""
    found: list[Command] = []
    start, joined = 0, ""
    for number, line in _without_comments(text):
        if not joined:
            start = number
        if re.search(r"(?<!\\)(\\\\)*\\$", line):
            joined += line[:-1] + " "
            continue
        if (whole := joined + line).strip():
            found.append(Command(start, whole.strip()))
        joined = ""
    if joined.strip():
        found.append(Command(start, joined.strip()))
    return found


def _without_comments(text: str) -> Iterator[tuple[int, str]]:
    quote, heredoc, is_for_a_shell = "", "", False
    for number, line in enumerate(text.splitlines(), start=1):
        if heredoc:
            if line.strip() == heredoc:
                heredoc = ""
            elif is_for_a_shell:
                yield number, line
            continue
        bare, quote = _bare(line, quote)
        if not quote and (opened := re.search(r"(?<!<)<<-?\s*(['\"]?)(\w+)\1", bare)):
            heredoc, is_for_a_shell = opened[2], re.search(r"\b(ba|z|k)?sh\b|\bsrun\b", bare) is not None
        yield number, bare


def _bare(line: str, quote: str) -> tuple[str, str]:
    """A line up to its comment, and the quote that is open at its end; `quote` is the one open at its start."""
    index = 0
    while index < len(line):
        letter = line[index]
        if letter == "\\" and quote != "'":
            index += 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (index == 0 or line[index - 1] in " \t;&|("):
            return line[:index].rstrip(), quote
        index += 1
    return line, quote


def syntax_fault(text: str) -> tuple[int, str] | None:
    """Line and message of what bash cannot read; None where it can, or where there is no bash. Runs nothing of it."""
    bash = shutil.which("bash")
    if bash is None:
        return None
    try:
        done = subprocess.run(
            [bash, "--norc", "-n"],
            input=text,
            capture_output=True,
            text=True,
            timeout=SYNTAX_TIMEOUT_S,
            check=False,
            env={"LC_ALL": "C"},  # nothing of the user's, such as BASH_ENV, which bash would run
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return None
    first = next((line for line in done.stderr.splitlines() if line), "")
    match = re.search(r"line (\d+): (.*)", first)
    return (int(match[1]), match[2]) if match else (1, first)
