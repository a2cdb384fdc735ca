"""What the options of a command have to do with each other: told before a file is read or Ray is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigray import cli
from bigray.paths import RUN_FILE
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.app(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


COMMANDS = [command.callback.__name__ for command in cli.app.registered_commands if command.callback]

BAD_OPTIONS = {
    "no job": (("tune",), "JOB: required, such as examples/digits/job.toml; only with --extend RUN it can be left out"),
    "a budget of 0": (("tune", "job.toml", "--budget", "0m"), "--budget: '0m' must be more than 0"),
    "a budget without a unit": (("tune", "job.toml", "--budget", "10"), "--budget: '10': a unit is missing"),
    "no trials": (("tune", "job.toml", "--trials", "0"), "--trials: use a number from 1, got 0"),
    "more, without how many": (("tune", "--extend", "runs/a"), "--extend runs/a: say how many trials more"),
    "more of a new run": (
        ("tune", "--extend", "runs/a", "--trials", "3", "--new"),
        "--extend: goes on with a run, --new starts one; give one of the two",
    ),
    "two kinds of output": (
        ("train", "job.toml", "--json", "--events"),
        "--events: its last line is the document of --json; give one of the two",
    ),
    "a budget without a search": (
        ("run", "job.toml", "--budget", "10m"),
        "--budget: is for sweeps; give a --search file, or remove it",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_do_not_go_together_are_one_line_and_exit_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD_OPTIONS[name]
    code, out, err = _run(capsys, *arguments)

    assert (code, out) == (2, "")
    assert err.startswith(f"error: {expected}")
    assert len(err.splitlines()) == 1


def test_all_faults_of_the_options_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "tune", "--json", "--events", "--budget", "never", "--trials", "0")

    assert code == 2
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["--events", "JOB", "--trials", "--budget"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, command, "--help")

    assert code == 0
    assert f"bigray {command}" in out.split("Example")[-1]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "digits-1a2b3c"
    (folder / "journal").mkdir(parents=True)
    training = TrainingSpec(task="classification")
    trial = TrialSpec(
        trial_id="0-mlp", model_name="mlp", model=ModelSpec(factory="bigray.models:mlp"), training=training, seed=0
    )
    document = {
        "run": folder.name,
        "job": {"name": "digits"},
        "search": None,
        "trials": [trial.model_dump(mode="json")],
    }
    (folder / RUN_FILE).write_text(json.dumps(document))
    state = {"epoch": 3, "ended": "finished", "best_epoch": 3, "best_step": 9, "best_metrics": {"val_accuracy": 0.75}}
    line = {"time": 1.0, "attempt": 1, "kind": "state", "trial": "0-mlp", **state}
    (folder / "journal" / "0001.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_a_run_is_shown_as_a_table_and_as_json(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(("show", str(run_folder)), standalone_mode=False)
    shown = capsys.readouterr().out
    cli.app(("show", str(run_folder), "--json"), standalone_mode=False)
    document = json.loads(capsys.readouterr().out)

    assert "status not complete: interrupted, or still running" in shown
    assert "0-mlp" in shown
    assert document["trials"][0]["metrics"] == {"val_accuracy": 0.75}


def test_a_run_that_is_not_there_is_one_line_and_exit_4(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "show", str(run_folder.parent / "digits"))

    assert (code, out) == (4, "")
    assert err == f"error: {run_folder.parent}/digits: no run here; did you mean {run_folder}?\n"


def test_showing_a_run_loads_neither_torch_nor_ray(run_folder: Path) -> None:
    code = f"""
import sys
from bigray import cli
cli.app(("show", {str(run_folder)!r}), standalone_mode=False)
assert not {{"torch", "ray", "onnxruntime"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
