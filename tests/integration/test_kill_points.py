"""Every write, fsync, rename, deletion and open of a change to the checkpoints is a safe place to die, or to fail.

The change runs in a process under strace, which kills it, or lets the call fail, at one system call after the other.
With BIGRAY_FULL=1 that is each of them; by default a few of each kind.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from bigray.journal import Journal
from bigray.storage import read_manifest
from bigray.training.checkpoint import Checkpoint, load_checkpoint
from tests.full_size import IS_FULL
from tests.integration import checkpoint_process as process

pytestmark = pytest.mark.timeout(1800 if IS_FULL else 180)
SYSCALLS = "openat,write,fsync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"
ACTIONS = {"a new step": ("save", "30"), "the same step again": ("save", "20"), "trim": ("trim",)}


@dataclass(frozen=True)
class Point:
    """A system call on the run's folder: the `number`-th of its kind there, from 1."""

    syscall: str
    number: int
    makes: bool
    """Whether it takes space on the disk, or makes sure of it."""
    line: str


def _strace(folder: Path, action: Sequence[str], *options: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run one change under strace; also returns the calls on the folder, with descriptors written as paths."""
    log = folder.with_suffix(".strace")
    command = ["strace", "-y", "-qq", "-s", "0", "-e", f"trace={SYSCALLS}", *options, "-o", str(log)]
    child = [sys.executable, "-B", str(Path(process.__file__)), str(folder), *action]
    done = subprocess.run([*command, *child], capture_output=True, text=True, check=False, timeout=60)
    return done, [line for line in log.read_text().splitlines() if str(folder) in line]


@pytest.fixture(scope="module", autouse=True)
def _can_trace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this process may not trace others (ptrace)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a second attempt: two good checkpoints of the first, and what the first left when it died."""
    folder = tmp_path_factory.mktemp("kill_points") / "base"
    paths = process.paths_of(str(folder))
    Journal.open(paths)
    for step in (10, 20):
        process.save(str(folder), step, attempt=1)
    dead = folder / paths.checkpoint(process.TRIAL.trial_id, 25)
    dead.mkdir()
    (dead / ".model-0001-dead.safetensors.1.tmp").write_bytes(b"half")
    (folder / paths.checkpoint(process.TRIAL.trial_id, 20) / "model-0001-dead.safetensors").write_bytes(b"whole")
    Journal.open(paths)
    return folder


def _points(base: Path, name: str) -> list[Point]:
    folder = _copy(base)
    done, lines = _strace(folder, ACTIONS[name])
    assert done.returncode == 0, done.stdout + done.stderr
    counts: dict[str, int] = {}
    points = []
    for line in lines:
        syscall = line.split("(", 1)[0]
        counts[syscall] = counts.get(syscall, 0) + 1
        makes = syscall in ("write", "fsync", "rename", "mkdir") or "O_CREAT" in line
        points.append(Point(syscall, counts[syscall], makes, line.replace(str(folder), "RUN")))
    return points


def _strike(
    base: Path, name: str, points: Sequence[Point], point: Point, fault: str
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Make the change in a copy of the run, with a fault at one point; returns the copy and how the process ended."""
    folder = _copy(base)
    paths = sorted({path for other in points for path in re.findall(r'RUN[^">]*', other.line)})
    only_there = [option for path in paths for option in ("-P", path.replace("RUN", str(folder)))]
    inject = f"inject={point.syscall}:{fault}:when={point.number}"
    done, lines = _strace(folder, ACTIONS[name], *only_there, "-e", inject)
    struck = [line.replace(str(folder), "RUN") for line in lines if line.startswith(f"{point.syscall}(")]
    arguments = point.line.rsplit(" = ", 1)[0].rstrip(" )")
    assert len(struck) >= point.number and struck[point.number - 1].startswith(arguments), f"missed: {struck[-1:]}"
    return folder, done


def _copy(base: Path) -> Path:
    return Path(shutil.copytree(base, Path(tempfile.mkdtemp(dir=base.parent)) / "run"))


def _some(points: Sequence[Point], per_kind: int) -> list[Point]:
    """All points in the full size; else a few of each kind, evenly spaced, the first and the last among them."""
    if IS_FULL:
        return list(points)
    chosen = []
    for kind in dict.fromkeys(point.syscall for point in points):
        of_kind = [point for point in points if point.syscall == kind]
        last = len(of_kind) - 1
        numbers = {round(last * step / max(1, per_kind - 1)) for step in range(per_kind)}
        chosen += [of_kind[number] for number in sorted(numbers)]
    return chosen


def _check_all(points: Sequence[Point], check: Callable[[Point], str | None]) -> None:
    with ThreadPoolExecutor(2) as pool:
        faults = [
            f"{point.line}: {fault}" for point, fault in zip(points, pool.map(check, points), strict=True) if fault
        ]
    print(f"{len(points)} points, {len(faults)} failures")
    assert not faults, f"{len(faults)} of {len(points)} points:\n" + "\n".join(faults)


def _loaded(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return load_checkpoint(process.paths_of(str(folder)), process.TRIAL, warnings.append), warnings


def _fault_of(folder: Path, name: str) -> str | None:
    """What is wrong with the checkpoints after the change was interrupted; None where nothing is."""
    checkpoint, warnings = _loaded(folder)
    if checkpoint is None or warnings:
        return f"nothing to load, or damage: {warnings}"
    step = checkpoint.progress.step
    old = step == 20 and checkpoint.files == process.files_of(20, 1)
    if name == "trim":
        new = step == 20 and checkpoint.is_record
    else:
        new = step == int(ACTIONS[name][1]) and checkpoint.files == process.files_of(step, 2)
    return None if old or new else f"loaded step {step}, which is neither the old state nor the new one"


def _fault_after_next_save(folder: Path) -> str | None:
    """What is wrong after a third attempt saved step 40."""
    paths, trial = process.paths_of(str(folder)), process.TRIAL
    before, _ = _loaded(folder)
    attempt = Journal.open(paths).attempt
    process.save(str(folder), 40, attempt)
    checkpoint, warnings = _loaded(folder)
    steps = paths.checkpoint_steps(trial.trial_id)
    if checkpoint is None or checkpoint.files != process.files_of(40, attempt) or warnings:
        return f"step 40 does not load: {warnings}"
    if before is None or len(steps) > 2 or steps[:2] != [40, before.progress.step]:
        return f"kept {steps}"
    for step in steps:
        of_step = paths.checkpoint(trial.trial_id, step)
        entries = read_manifest(paths.storage, of_step)["files"].values()
        if paths.storage.list_names(of_step) != sorted(["manifest.json", *(entry["stored"] for entry in entries)]):
            return f"left over in step {step}: {paths.storage.list_names(of_step)}"
    return None


@pytest.mark.parametrize("name", ACTIONS)
def test_a_process_may_die_anywhere_and_the_checkpoints_are_the_old_ones_or_the_new_ones(base: Path, name: str) -> None:
    points = _points(base, name)
    if name != "trim":
        assert len(points) >= 100

    def check(point: Point) -> str | None:
        folder, done = _strike(base, name, points, point, "signal=SIGKILL")
        assert done.returncode != 0, "the process was not killed"
        fault = _fault_of(folder, name) or _fault_after_next_save(folder)
        shutil.rmtree(folder)
        return fault

    _check_all(_some(points, per_kind=2), check)


@pytest.mark.parametrize(("error", "kind"), [("ENOSPC", "DiskFull"), ("EIO", "StorageError")])
def test_a_disk_that_is_full_or_fails_leaves_the_checkpoints_as_they_were_and_is_told(
    base: Path, error: str, kind: str
) -> None:
    points = _points(base, "a new step")

    def check(point: Point) -> str | None:
        folder, done = _strike(base, "a new step", points, point, f"error={error}")
        said = done.stdout.strip()
        if done.returncode != 4 or not re.fullmatch(rf"{kind}: \S+: cannot (write|delete): .+", said):
            return f"exit code {done.returncode}, {said or done.stderr}"
        fault = _fault_of(folder, "a new step") or _fault_after_next_save(folder)
        shutil.rmtree(folder)
        return fault

    _check_all(_some([point for point in points if point.makes], per_kind=1), check)
