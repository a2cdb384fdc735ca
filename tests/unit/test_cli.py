"""What the options of a command have to do with each other: told before a file is read or Ray is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigray import cli
from bigray.bundle import ModelBundle
from bigray.paths import RUN_FILE
from bigray.serve.protect.keys import load_ring, secret_id
from bigray.serve.sample import write_sample_bundle
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.app(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


COMMANDS = [command.callback.__name__ for command in cli.app.registered_commands if command.callback]
OF_KEYS = ["keys add", "keys list", "keys revoke"]

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
    "a canary that is a shadow": (
        ("deploy", "runs/a", "--canary", "10%", "--shadow"),
        "--canary: answers requests, --shadow answers none; give one of the two",
    ),
    "a canary of nothing": (("deploy", "runs/a", "--canary", "0"), "--canary: '0': use a share above 0 and up to 100%"),
    "a canary of too much": (("deploy", "runs/a", "--canary", "101%"), "--canary: '101%': use a share above 0"),
    "a canary of what": (("deploy", "runs/a", "--canary", "ten"), "--canary: 'ten': use a share above 0"),
    "a canary without time": (
        ("deploy", "runs/a", "--canary", "10%", "--max-minutes", "0"),
        "--max-minutes: use a number above 0, got 0",
    ),
    "a time that is none": (
        ("deploy", "runs/a", "--shadow", "--max-minutes", "nan"),
        "--max-minutes: use a number above 0, got nan",
    ),
    "requests of no canary": (
        ("deploy", "runs/a", "--requests", "50"),
        "--requests: is for a candidate that is tried; give --canary or --shadow, or remove it",
    ),
    "minutes of no canary": (
        ("deploy", "runs/a", "--max-minutes", "5"),
        "--max-minutes: is for a candidate that is tried; give --canary or --shadow, or remove it",
    ),
    "a shadow of a file": (
        ("deploy", "runs/a", "--shadow", "--write-config", "out.yaml"),
        "--write-config: deploys nothing that could be tried; remove --canary or --shadow",
    ),
    "a serve file that is not there": (("deploy", "runs/a", "--config", "none.yaml"), "none.yaml: no such file"),
    "a trace that is not there": (
        ("autoscale", "runs/a", "--trace", "nightly"),
        "nightly: no such file, and not a trace that comes with bigray; known: bursts, day, step",
    ),
    "a serve file without autoscaling": (
        ("autoscale", "runs/a", "--config", "serve/local.yaml"),
        "serve/local.yaml: autoscaling_config: has no policy",
    ),
    "a key without a name": (("keys", "add", "a/b"), "name: 'a/b' is not one; use up to 64 letters"),
    "a key for what": (("keys", "add", "a", "--scope", "root"), "scopes: unknown 'root'; known: admin, predict"),
    "a key that may not ask": (("keys", "add", "a", "--rate", "0"), "rate_per_s: expected a number above 0, got 0.0"),
    "a key in a folder": (("keys", "add", "a", "--file", "keys/"), "keys/: expected a key file such as keys.json"),
    "no version": (("trace", "latest"), "'latest': no version; it has 12 hex digits (6 of them at least)"),
    "no address": (("predict", "localhost:8000", "rows.csv"), "localhost:8000: expected the address of an endpoint"),
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


def test_all_faults_of_a_deployment_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "deploy", "runs/a", "--shadow", "--canary", "0", "--max-minutes", "0")

    assert code == 2
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["--canary", "--canary", "--max-minutes"]


@pytest.mark.parametrize("command", [*COMMANDS, *OF_KEYS])
def test_the_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, *command.split(), "--help")

    assert code == 0
    assert f"bigray {command}" in out.split("Example")[-1]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def _shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """Of a command that goes well."""
    cli.app(arguments, standalone_mode=False)
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_a_key_is_made_listed_and_revoked(keys: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = _shown(capsys, "keys", "add", "web", "--rate", "50", "--file", keys)
    secret = out.strip()
    assert load_ring(keys).authenticate(secret), "standard output is the key and nothing else"
    assert err == f"this is the only time it is shown; {keys} holds its hash\n"

    out, _ = _shown(capsys, "keys", "list", "--file", keys)
    (line,) = [" ".join(line.split()) for line in out.splitlines() if "web" in line]
    assert line.startswith(f"{secret_id(secret)} web predict 50/s")
    assert line.endswith("live")
    assert secret not in out

    out, err = _shown(capsys, "keys", "revoke", "web", "--file", keys)
    assert (out, err) == ("", f"revoked {secret_id(secret)} (web)\n")
    assert load_ring(keys).authenticate(secret) is None
    assert "revoked" in _shown(capsys, "keys", "list", "--file", keys)[0]


def test_keys_are_documents_for_scripts(keys: str, capsys: pytest.CaptureFixture[str]) -> None:
    scopes = ("--scope", "predict", "--scope", "admin")
    made = json.loads(_shown(capsys, "keys", "add", "web", *scopes, "--file", keys, "--json")[0])
    assert made == {"name": "web", "key": made["key"], "file": keys}
    assert load_ring(keys).authenticate(made["key"])

    out, _ = _shown(capsys, "keys", "list", "--file", keys, "--json")
    (key,) = json.loads(out)
    assert (key["name"], key["scopes"], key["rate_per_s"], key["revoked"]) == ("web", ["admin", "predict"], None, None)
    assert "sha256" not in key
    assert made["key"] not in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("add", "web"), 2, "there is a live key named 'web'; revoke it first, or choose another name"),
        (("revoke", "wep"), 2, "no key with the id or name 'wep', did you mean 'web'?"),
    ],
)
def test_what_a_key_file_cannot_do_is_one_line(
    keys: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    _shown(capsys, "keys", "add", "web", "--file", keys)

    assert _run(capsys, "keys", *arguments, "--file", keys) == (code, "", f"error: {keys}: {message}\n")


@pytest.mark.parametrize("command", [("list",), ("revoke", "web")])
def test_a_key_file_that_is_not_there_is_one_line_and_exit_4(
    keys: str, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    code, out, err = _run(capsys, "keys", *command, "--file", keys)

    assert (code, out) == (4, "")
    assert err == f"error: {keys}: no key file here; make one with `bigray keys add NAME --file {keys}`\n"


def test_a_version_that_is_nowhere_is_one_line_and_exit_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "trace", "0123456789ab", "--storage", str(tmp_path))

    assert (code, out) == (4, "")
    assert err.startswith("error: version 0123456789ab: not served here, and not in 0 bundles below")
    assert len(err.splitlines()) == 1


def test_a_version_is_traced_by_the_header_of_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_sample_bundle(str(tmp_path / "digits-1a2b3c"), name="bundle", params={"hidden": [2]}, onnx=False)
    version = ModelBundle.load(bundle).version
    out, _ = _shown(capsys, "trace", f"x-bigray-version: {version}", "--storage", str(tmp_path), "--json")

    assert (json.loads(out)["version"], json.loads(out)["run"]) == (version, "sample")


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


@pytest.mark.parametrize(
    ("command", "interrupted", "told"),
    [
        (("cluster", "local"), "bigray.cluster.local.load_local_spec", "interrupted\n"),
        (
            ("train", "job.toml"),
            "bigray.workflow.read_files",
            "interrupted; the same command goes on where it stopped\n",
        ),
    ],
)
def test_only_a_command_that_goes_on_says_so_when_it_is_interrupted(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    interrupted: str,
    told: str,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, interrupt)

    assert _run(capsys, *command) == (130, "", told)
