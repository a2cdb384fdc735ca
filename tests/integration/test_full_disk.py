"""A disk that fills up under a run: a real one, of 64 MB in memory. Without Ray; skipped where none can be mounted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import storage_process as process

SIZE_MB = 64
CHECKPOINT_MB = 12


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(disk: Path, megabytes: int) -> Path:
    """Somebody else's file, as large as asked or as the disk allows."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for _ in range(megabytes * 16):
            try:
                file.write(bytes(1 << 16))
            except OSError:
                break
    return filler


def _run(disk: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, process.__file__, "run", str(disk / "runs"), str(CHECKPOINT_MB)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("taken_mb", [SIZE_MB + 1, SIZE_MB - CHECKPOINT_MB // 2, SIZE_MB - 2 * CHECKPOINT_MB])
def test_a_full_disk_ends_the_run_in_one_line_and_with_space_again_the_same_command_finishes(
    disk: Path, taken_mb: int
) -> None:
    filler = _fill(disk, taken_mb)

    done = _run(disk)

    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(str(disk))
    assert "No space left on device" in line or "cannot write here" in line
    committed = [path.parent for path in disk.rglob("manifest.json")]
    assert len(committed) == max(0, (SIZE_MB - taken_mb) // CHECKPOINT_MB - 1)
    left = [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size > 1 << 16]
    assert len(left) == len(committed) + 1, "what was written in vain gives its space back"

    filler.unlink()
    again = _run(disk)
    assert again.returncode == 0, again.stderr
    process.check(str(disk / "runs"), CHECKPOINT_MB)
