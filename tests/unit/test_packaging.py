from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESETS = ("cluster", "tuning", "serve")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_installs_bigray_and_nothing_else(wheel_names: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    (metadata,) = top - {"bigray"}

    assert metadata.startswith("bigray-")
    assert metadata.endswith(".dist-info")


def test_every_module_is_in_the_wheel(wheel_names: list[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("bigray/**/*.py")}

    assert modules <= set(wheel_names)


@pytest.mark.parametrize("folder", PRESETS)
def test_the_preset_files_are_in_the_wheel(wheel_names: list[str], folder: str) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}

    assert files
    assert {f"bigray/_presets/{name}" for name in files} <= set(wheel_names)


@pytest.mark.parametrize("folder", PRESETS)
def test_the_preset_folders_hold_no_python(folder: str) -> None:
    assert list((ROOT / folder).rglob("*.py")) == []
