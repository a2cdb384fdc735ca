from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bigray.loading import load_job, load_search
from bigray.presets import find_preset, preset_root

ROOT = Path(__file__).parents[2]
SEARCHES = sorted(ROOT.glob("tuning/*.toml"))
JOBS = sorted(ROOT.glob("examples/*/job.toml"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_files_to_check() -> None:
    assert SEARCHES
    assert JOBS


@pytest.mark.parametrize("path", SEARCHES, ids=_name)
def test_every_search_file_suits_every_example_that_it_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named = next(word for word in path.read_text().splitlines()[0].split() if word.endswith("job.toml"))

    assert load_search(path, load_job(named)).space


@pytest.mark.parametrize("path", SEARCHES, ids=_name)
def test_every_search_file_starts_with_the_command_that_uses_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]

    assert first.startswith("# bigray ")
    assert f"--search {_name(path)}" in first


@pytest.mark.parametrize("path", JOBS, ids=_name)
def test_every_example_starts_with_the_command_that_uses_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]

    assert first.startswith("# bigray ")
    assert _name(path) in first


def test_the_shipped_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert find_preset("tuning/lr.toml").samefile(ROOT / "tuning" / "lr.toml")


def test_the_users_own_file_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "lr.toml").write_text("")

    assert find_preset("tuning/lr.toml").samefile(tmp_path / "tuning" / "lr.toml")


def test_a_file_that_is_nowhere_keeps_the_name_it_was_asked_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert find_preset("tuning/none.toml") == Path("tuning/none.toml")


def test_the_preset_folders_are_under_one_root() -> None:
    assert {"cluster", "tuning", "serve"} <= {path.name for path in preset_root().iterdir()}


@pytest.mark.parametrize("path", sorted(ROOT.glob("cluster/*.sh")), ids=lambda path: path.name)
def test_every_cluster_script_is_valid_and_starts_with_its_command(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert path.read_text().splitlines()[1] == f"# bash cluster/{path.name}"
