"""`bigray cluster ...` as a user types it. No Ray is started: what starts nodes is tested in tests/integration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bigray.cli.cluster  # noqa: F401  # registers its commands
from bigray import cli

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"
LOCAL = ROOT / "cluster/local.toml"
SBATCH = ROOT / "cluster/slurm/bigray.sbatch"


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.app(("cluster", *arguments))
    output = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, output.out, output.err


@pytest.fixture(autouse=True)
def _no_cluster_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "local.toml"
    path.write_text("node = 3\ngpus_per_node = -1\n")
    return path


def test_a_good_file_is_told_by_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "check", str(DOCKERFILE), str(LOCAL), str(SBATCH))

    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{DOCKERFILE}: Dockerfile, ok",
        f"{LOCAL}: bigray cluster local, ok",
        f"{SBATCH}: Slurm, ok",
    ]


def test_every_fault_is_one_line_with_its_place_and_the_exit_code_is_2(
    capsys: pytest.CaptureFixture[str], broken: Path
) -> None:
    code, out, err = _run(capsys, "check", str(broken), str(LOCAL))

    assert code == 2
    assert out == f"{LOCAL}: bigray cluster local, ok\n"
    lines = err.splitlines()
    assert [line.startswith(f"error: {broken}:") for line in lines] == [True, True]
    assert f"{broken}:1: node: unknown key, did you mean 'nodes'?" in lines[0]
    assert f"{broken}:2: gpus_per_node: " in lines[1]


def test_json_holds_every_file_with_its_faults(capsys: pytest.CaptureFixture[str], broken: Path) -> None:
    code, out, err = _run(capsys, "check", str(broken), str(DOCKERFILE), "--json")

    assert (code, err) == (2, "")
    first, second = json.loads(out)["files"]
    assert (first["ok"], first["kind"], [fault["line"] for fault in first["faults"]]) == (
        False,
        "bigray cluster local",
        [1, 2],
    )
    assert second == {"file": str(DOCKERFILE), "kind": "Dockerfile", "ok": True, "faults": [], "notes": []}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("none.yaml", None, "no such file"),
        ("notes.txt", b"hello", "none of the files"),
        ("local.toml", b"name = '\xff'", "not UTF-8"),
        ("folder", b"", "not a file"),
    ],
)
def test_what_cannot_be_checked_is_a_fault_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: bytes | None, part: str
) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)

    code, out, err = _run(capsys, "check", str(path))

    assert (code, out) == (2, "")
    assert part in err
    assert len(err.splitlines()) == 1


def test_every_cluster_file_of_ours_is_checked_and_good(capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in sorted((ROOT / "cluster").rglob("*")) if path.suffix in (".yaml", ".toml", ".sbatch")]

    code, out, err = _run(capsys, "check", *map(str, files), str(DOCKERFILE))

    assert [line for line in err.splitlines() if line.startswith("error:")] == []
    assert (code, len(out.splitlines())) == (0, len(files) + 1)


def test_checking_starts_neither_ray_nor_torch() -> None:
    script = (
        "import sys, bigray.cli, bigray.cli.cluster\n"
        f"sys.argv = ['bigray', 'cluster', 'check', {str(DOCKERFILE)!r}, {str(LOCAL)!r}, {str(SBATCH)!r}]\n"
        "try: bigray.cli.main()\n"
        "finally: print(sorted({'ray', 'torch'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""}
    )

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("local", "--nodes", "0"), "--nodes: "),
        (("local", "--gpus-per-node", "-1"), "--gpus-per-node: "),
        (("local", "--file", "none.toml"), "none.toml: "),
        (("add-node", "--gpus", "-1"), "--gpus: "),
        (("preempt-node", "node-1", "--notice", "0"), "--notice: "),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    code, out, err = _run(capsys, *arguments)

    assert (code, out) == (2, "")
    assert err.startswith(f"error: {part}"), err


@pytest.mark.parametrize("command", [("status",), ("add-node",), ("kill-node", "node-1"), ("preempt-node", "node-1")])
def test_without_a_cluster_the_way_to_one_is_told(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    code, out, err = _run(capsys, *command)

    assert (code, out) == (5, "")
    assert "start one with bigray cluster local" in err
    assert len(err.splitlines()) == 1


def test_down_where_nothing_is_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "down") == (0, "", "nothing was there\n")
    assert json.loads(_run(capsys, "down", "--json")[1]) == {"nodes": [], "processes": 0}
