"""The files of cluster/: each is in the table, and begins with the command that the table gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bigray.cluster.checking.kinds import kind_of

FOLDER = Path(__file__).parents[4] / "cluster"
ROWS = dict(re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \|[^|]*\| `([^`]+)` \|$", (FOLDER / "README.md").read_text(), re.M))
FILES = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in FOLDER.rglob("*")
    if path.is_file() and path.name not in ("README.md", "Dockerfile.dockerignore")
)


def test_the_table_has_every_file() -> None:
    assert sorted(ROWS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_begins_with_its_command(name: str) -> None:
    lines = (FOLDER / name).read_text().splitlines()
    first = lines[1] if lines[0].startswith("#!") else lines[0]

    assert first == f"# {ROWS[name]}"


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".sh")])
def test_the_kind_of_a_file_is_known_by_its_content_alone(name: str) -> None:
    text = (FOLDER / name).read_text()

    assert kind_of(text, Path(name).name) is not None
    assert name.endswith(".toml") or kind_of(text, "renamed") is kind_of(text, Path(name).name)
