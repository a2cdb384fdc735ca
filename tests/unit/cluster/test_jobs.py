"""Jobs are started once, followed through what breaks, and stopped: a dashboard of real sockets, and no Ray."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigray import cli
from bigray.cluster import jobs as jobs_module
from bigray.cluster.jobs import DEFAULT_DASHBOARD, Job, Jobs, Watch, check_token, decide, find_dashboard
from bigray.cluster.package import find_package
from bigray.cluster.submission import (
    EntrypointResources,
    JobFiles,
    Submission,
    id_fault,
    parse_resources,
    run_command,
    storage_fault,
)
from bigray.errors import ClusterError, SpecError
from bigray.specs import JobSpec
from tests.unit.cluster.jobs_server import JobsServer, Serving

TOKEN = "0123456789abcdef0123456789abcdef"
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # by Ray's client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[JobsServer]:
    from ray._private.authentication_test_utils import reset_auth_token_state

    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update({"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path), "no_proxy": "127.0.0.1"})
    reset_auth_token_state()
    monkeypatch.setattr(jobs_module, "SILENT_S", 0.2)
    monkeypatch.setattr(jobs_module, "LONGEST_PAUSE_S", 0.2)
    with Serving(JobsServer()) as server:
        yield server
    os.environ.clear()
    os.environ.update(before)
    reset_auth_token_state()


def use_token(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    from ray._private.authentication_test_utils import reset_auth_token_state

    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
    reset_auth_token_state()
    return file


class Heard:
    """What a watch was given."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.said: list[str] = []
        self.watch = Watch(self.written.append, self.said.append)

    @property
    def text(self) -> str:
        return "".join(self.written)


ADDRESSES = {
    "nothing": (None, {}, DEFAULT_DASHBOARD),
    "auto": (None, {"RAY_ADDRESS": "auto"}, DEFAULT_DASHBOARD),
    "option": ("http://a:1", {"RAY_API_SERVER_ADDRESS": "http://b:2", "RAY_ADDRESS": "c:6379"}, "http://a:1"),
    "variable": (None, {"RAY_API_SERVER_ADDRESS": "http://b:2/", "RAY_ADDRESS": "c:6379"}, "http://b:2"),
    "dashboard in RAY_ADDRESS": (None, {"RAY_ADDRESS": "https://c"}, "https://c"),
    "dashboard without a scheme": (None, {"RAY_ADDRESS": "c:8265"}, "http://c:8265"),
    "host alone": ("head", {}, "http://head:8265"),
    "port of one's own": ("head:9000", {}, "http://head:9000"),
    "below a path of a proxy": (None, {"RAY_API_SERVER_ADDRESS": "https://a/ray/"}, "https://a/ray"),
    "version 6": ("[::1]:8265", {}, "http://[::1]:8265"),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_the_dashboard_is_found(case: str) -> None:
    address, environment, expected = ADDRESSES[case]

    assert find_dashboard(address, environment) == expected


BAD_ADDRESSES = {
    "of Ray": (None, {"RAY_ADDRESS": "head:6379"}, "RAY_ADDRESS=head:6379: is where programs join Ray"),
    "of Ray on another port": (None, {"RAY_ADDRESS": "head:7000"}, "use --address http://head:8265"),
    "of Ray as an option": ("10.0.0.1:6379", {}, "use --address http://10.0.0.1:8265"),
    "of Ray's client": ("ray://head:10001", {}, "--address ray://head:10001: is where programs join Ray"),
    "unknown scheme": ("ftp://head", {}, "not the URL of a dashboard; use http://HOST:8265"),
    "no port": ("head:port", {}, "not an address"),
    "password": ("http://me:secret@head:8265", {}, "--address: an address may hold no name and password"),
}


@pytest.mark.parametrize("case", BAD_ADDRESSES)
def test_what_is_no_dashboard_is_refused_with_what_to_write(case: str) -> None:
    address, environment, message = BAD_ADDRESSES[case]

    with pytest.raises(ClusterError) as refused:
        find_dashboard(address, environment)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
def test_a_token_that_others_can_read_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    file = tmp_path / "a token"
    file.write_text(TOKEN)
    file.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))

    with pytest.raises(ClusterError) as refused:
        check_token()
    assert f"(mode {mode:04o}); chmod 600 '{file}'" in str(refused.value)
    assert TOKEN not in str(refused.value)
    file.chmod(0o600)
    assert check_token() == f"the token in {file}"


TOKENS = {
    "none": ({}, "no token"),
    "in the environment": (
        {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_TOKEN_PATH": "/none"},
        "the token in RAY_AUTH_TOKEN",
    ),
    "switched off": (
        {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/none"},
        "no token (RAY_AUTH_MODE=disabled)",
    ),
}


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize("case", TOKENS)
def test_a_token_is_looked_for_where_ray_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, expected = TOKENS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert check_token() == expected


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RAY_AUTH_MODE", "token", "RAY_AUTH_MODE asks for a token, and this user has none"),
        ("RAY_AUTH_TOKEN_PATH", "/none", r"the token file /none cannot be read \(No such file or directory\)"),
        ("RAY_AUTH_TOKEN_PATH", "/dev/null", "the token file /dev/null is empty"),
    ],
)
def test_a_token_that_is_not_there_is_told(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ClusterError, match=message):
        check_token()


def job(job_id: str, status: str = "RUNNING", key: str | None = "k", **more: Any) -> Job:
    return Job(job_id, status, "command", key=key, **more)


DECISIONS: dict[str, tuple[list[Job], tuple[str, int, bool]]] = {
    "the first": ([job("other"), job("ab-2")], ("a", 1, False)),
    "it runs": ([job("a")], ("a", 1, True)),
    "it waits": ([job("a", "PENDING")], ("a", 1, True)),
    "it has ended": ([job("a", "FAILED")], ("a.2", 2, False)),
    "with success": ([job("a", "SUCCEEDED")], ("a.2", 2, False)),
    "the second attempt runs": ([job("a", "FAILED"), job("a.2")], ("a.2", 2, True)),
    "ten have ended": ([job("a.10", "STOPPED"), job("a.9", "FAILED")], ("a.11", 11, False)),
    "an ended one was another": ([job("a", "FAILED", key=None)], ("a.2", 2, False)),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_a_submission_is_followed_where_it_runs_and_an_attempt_more_where_it_has_ended(case: str) -> None:
    there, (job_id, attempt, is_running) = DECISIONS[case]

    decision = decide("a", "k", there)

    assert (decision.id, decision.attempt, decision.is_running) == (job_id, attempt, is_running)


def test_an_id_under_which_another_command_runs_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"a\.2: runs another command or folder; end it with bigray stop a\.2"):
        decide("a", "k", [job("a", "FAILED"), job("a.2", key="other")])


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (job("a", "SUCCEEDED", code=0), 0),
        (job("a", "FAILED", code=3), 3),
        (job("a", "FAILED", code=-9), 137),
        (job("a", "FAILED"), 5),
        (job("a", "FAILED", code=0), 5),
        (job("a", "STOPPED"), 143),
    ],
)
def test_the_exit_code_is_the_jobs_own(ended: Job, code: int) -> None:
    assert ended.exit_code == code


def test_the_command_of_a_job_survives_the_shell() -> None:
    command = run_command(
        "my job.toml", search="tuning/a.toml", serve="serve/b.yaml", overrides=["name=a b", "x=$(id)"], leave=True
    )

    assert shlex.split(command) == [
        *("python", "-m", "bigray", "run", "my job.toml", "--serve", "serve/b.yaml"),
        *("--search", "tuning/a.toml", "--set", "name=a b", "--set", "x=$(id)", "--exit"),
    ]


def test_a_relative_storage_is_refused_and_others_are_not() -> None:
    assert "--set storage=/shared/runs" in (storage_fault("runs") or "")
    assert storage_fault("/shared/runs") is storage_fault("s3://b/runs") is None


@pytest.mark.parametrize("text", ["head", "head=", "=1", "head=none", "head=0", "head=-1", "head=inf", "head=nan"])
def test_a_resource_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=f"--entrypoint-resource: '{text}': use NAME=AMOUNT"):
        parse_resources([text])


def test_ids_are_of_the_letters_that_urls_and_files_take() -> None:
    assert id_fault("night-run_2") is None
    assert all(id_fault(bad) for bad in ("", "a.2", "../a", "-a", "a b", "a" * 81))


SUBMISSION = Submission("digits", "python -m bigray run job.toml")


def test_what_is_submitted_holds_no_secret_of_this_machine(server: JobsServer, tmp_path: Path) -> None:
    os.environ["AWS_SECRET_ACCESS_KEY"] = "planted-secret"
    server.token = TOKEN
    use_token(tmp_path, TOKEN)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "job.toml").write_text("name = 'a'")
    (folder / ".env").write_text("planted-secret")
    resources = EntrypointResources(cpus=2, memory=2**30, custom={"head": 0.5})

    decision = Jobs.at(server.url).submit(
        Submission("digits", "command", find_package(folder), ("numpy==2.1.0",), resources)
    )

    (sent,) = server.submitted
    assert re.fullmatch(r"digits-[0-9a-f]{10}", decision.id)
    assert sent["submission_id"] == decision.id
    (package,) = server.packages
    assert sent["runtime_env"]["working_dir"] == f"gcs://{package}"
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert sent["runtime_env"]["pip"]["packages"] == ["numpy==2.1.0"]
    assert set(sent["metadata"]) == {"bigray"}
    assert (sent["entrypoint_num_cpus"], sent["entrypoint_resources"]) == (2, {"head": 0.5})
    assert "planted-secret" not in json.dumps(sent) + server.packages[package].decode("latin-1")
    assert TOKEN not in json.dumps(sent)


def test_the_same_submission_runs_once_and_again_once_it_has_ended(server: JobsServer) -> None:
    there = Jobs.at(server.url)
    first = there.submit(SUBMISSION)

    assert not first.is_running
    assert there.submit(SUBMISSION) == type(first)(first.id, 1, is_running=True)
    other = there.submit(Submission("digits", "python -m bigray run job.toml --set seed=1"))
    assert other.id != first.id
    server.jobs[first.id]["status"] = "FAILED"
    assert there.submit(SUBMISSION).id == f"{first.id}.2"
    assert len(server.submitted) == 3


def test_of_two_that_submit_the_same_at_once_one_starts_it(server: JobsServer) -> None:
    there = Jobs.at(server.url)
    first = there.submit(SUBMISSION)
    server.hides_jobs = True  # until the id is found to be taken

    assert there.submit(SUBMISSION).is_running
    assert [sent["submission_id"] for sent in server.submitted] == [first.id]


def test_an_id_that_is_taken_and_never_shown_ends_the_command(server: JobsServer) -> None:
    there = Jobs.at(server.url)
    there.submit(SUBMISSION)

    class Hidden(dict[str, Any]):
        def values(self) -> Any:
            return []

    server.jobs = Hidden(server.jobs)
    with pytest.raises(ClusterError, match="choose another with --id"):
        there.submit(SUBMISSION)


def test_the_address_given_wins_over_the_environment(server: JobsServer) -> None:
    os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"
    os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"

    assert Jobs.at(server.url).list() == []
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:6379"


def test_nothing_that_answers_is_told_at_once(server: JobsServer) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"

    with pytest.raises(ClusterError, match=r"nothing answers \(Connection refused\); start a cluster"):
        Jobs.at(address)


@pytest.mark.parametrize("theirs", ["2.59.1", "3.0.0"])
def test_a_cluster_of_another_version_is_refused(server: JobsServer, theirs: str) -> None:
    server.ray_version = theirs

    with pytest.raises(ClusterError, match=rf"runs Ray {theirs}, and here is Ray 2\.60\.\d+; install ray=={theirs}"):
        Jobs.at(server.url)


def test_a_patch_of_this_version_is_not_another(server: JobsServer) -> None:
    server.ray_version = "2.60.9"

    assert Jobs.at(server.url).list() == []


def test_a_wrong_token_and_none_are_told_apart_and_not_shown(server: JobsServer, tmp_path: Path) -> None:
    server.token = TOKEN
    with pytest.raises(ClusterError, match="asks for a token, and this user has none"):
        Jobs.at(server.url)
    file = use_token(tmp_path, "f" * 32)
    with pytest.raises(ClusterError) as refused:
        Jobs.at(server.url)

    assert f"refuses the token in {file}, which is not this cluster's" in str(refused.value)
    assert "f" * 32 not in str(refused.value)


def test_jobs_are_listed_the_newest_first_without_programs_that_joined(server: JobsServer) -> None:
    server.add(
        "old",
        "FAILED",
        message="Job entrypoint command failed with exit code 3, last available logs "
        "(truncated to 20,000 chars):\nerror: no\n",
        driver_exit_code=3,
        end_time=5_000,
    )
    server.add("new", runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    server.jobs["driver"] = {"type": "DRIVER", "job_id": "0100", "status": "RUNNING", "entrypoint": ""}

    new, old = Jobs.at(server.url).list()

    assert (new.id, new.stop_wait_s) == ("new", 60)
    assert (old.id, old.stop_wait_s, old.code, old.ended_s) == ("old", 3, 3, 5.0)
    assert old.reason == "Job entrypoint command failed with exit code 3"


def test_an_unknown_job_is_refused_with_the_nearest(server: JobsServer) -> None:
    there = Jobs.at(server.url)
    with pytest.raises(ClusterError, match="it knows none: a head that is started anew forgets them"):
        there.find("digits-1")
    server.add("digits-1a")

    with pytest.raises(ClusterError, match=r"digits-1: no such job at .*, did you mean 'digits-1a'\?"):
        there.find("digits-1")


def test_what_a_job_prints_is_passed_on_once_though_connections_drop(server: JobsServer) -> None:
    server.add("a")
    server.chunks = [f"line {number}\n" for number in range(20)]
    server.drops = [3, 0, 12]
    heard = Heard()

    ended = Jobs.at(server.url).follow("a", heard.watch)

    assert (ended.status, ended.exit_code) == ("SUCCEEDED", 0)
    assert heard.text == "".join(server.chunks)
    assert server.connections == 4


def test_a_head_that_is_away_for_a_while_is_waited_for(server: JobsServer) -> None:
    server.add("a")
    server.chunks = ["one\n", "two\n"]
    server.drops = [1]
    heard = Heard()
    there = Jobs.at(server.url)

    def on_write(text: str) -> None:
        heard.written.append(text)
        if text == "one\n":
            server.errors = 4

    ended = there.follow("a", Watch(on_write, heard.said.append))

    assert heard.text == "one\ntwo\n"
    assert ended.status == "SUCCEEDED"
    assert [said for said in heard.said if "answers with an error: RpcError: no GCS; the job may well go on" in said]
    assert heard.said[-1] == f"{server.url} answers again"


def test_a_head_that_stays_away_is_given_up_with_how_to_go_on(
    server: JobsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "LOST_S", 0.5)
    server.add("a")
    there = Jobs.at(server.url)
    server.errors = 1_000_000

    with pytest.raises(ClusterError, match="bigray resume RUN, goes on from storage on another"):
        there.follow("a", Heard().watch)


def test_a_head_that_was_started_anew_has_forgotten_the_job(server: JobsServer) -> None:
    server.add("a")
    server.chunks, server.drops = ["one\n"], [0]
    there = Jobs.at(server.url)
    server.jobs.clear()

    with pytest.raises(ClusterError, match=r"a: no such job at .*a head that is started anew forgets them"):
        there.follow("a", Heard().watch)


def test_a_connection_that_falls_silent_does_not_hide_the_end_of_the_job(server: JobsServer) -> None:
    server.add("a")
    server.chunks, server.ends_with = ["one\n"], {}
    heard = Heard()

    def end() -> None:
        server.chunks.append("last words\n")
        server.jobs["a"].update(status="FAILED", driver_exit_code=3)

    timer = threading.Timer(0.5, end)
    timer.start()
    ended = Jobs.at(server.url).follow("a", heard.watch)
    timer.join()

    assert (ended.status, ended.exit_code) == ("FAILED", 3)
    assert heard.text == "one\nlast words\n"


def test_a_job_that_waits_for_a_node_is_told_of_once(server: JobsServer) -> None:
    server.add("a", "PENDING")
    server.ends_with = {}
    heard = Heard()
    timer = threading.Timer(1.0, lambda: server.jobs["a"].update(status="SUCCEEDED"))
    timer.start()
    Jobs.at(server.url).follow("a", heard.watch)
    timer.join()

    assert heard.said == ["a waits: for its packages, or for a node with the resources of its own process"]


def test_stopping_waits_for_the_end_and_says_where_the_time_is_short(server: JobsServer) -> None:
    server.add("ours", runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    server.add("rays")
    there = Jobs.at(server.url)
    said: list[str] = []

    assert there.stop("ours", said.append).status == "STOPPED"
    assert said == ["ours is asked to end; a run makes a checkpoint first (60 s at most)"]
    there.stop("rays", said.append)
    assert "rays is killed after 3 s, which can be too short for a checkpoint" in said[1]
    there.stop("rays", said.append)
    assert said[-1] == "rays has ended already: STOPPED"


# the command line


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a job that needs nothing but bigray."""
    folder = tmp_path / "project"
    folder.mkdir()
    rows = "\n".join(f"{i},{i % 7},{i % 2}" for i in range(60))
    (folder / "rows.csv").write_text(f"a,b,y\n{rows}\n")
    (folder / "job.toml").write_text(
        f"""name = "small"
storage = "{tmp_path}/runs"
[data]
source = "rows.csv"
target = "y"
[models.m]
factory = "bigray.models:linear"
[training]
task = "classification"
epochs = 1
global_batch_size = 8
"""
    )
    monkeypatch.chdir(folder)
    return folder


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bigray(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app(arguments)
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_a_dry_run_shows_the_package_and_sends_nothing(project: Path, bigray: Command) -> None:
    (project / ".env").write_text("x")
    code, out, err = bigray("submit", "job.toml", "--dry-run")

    assert (code, out) == (0, "")
    assert re.search(r"2 files of .*project, 0\.0 MiB", err)
    assert "rows.csv" in err
    assert "not sent: .env: it holds secrets by its name" in err
    assert "would run: python -m bigray run job.toml --serve serve/local.yaml" in err


def test_a_dry_run_for_scripts_is_one_document(project: Path, bigray: Command) -> None:
    path = str(project / "job.toml")
    code, out, _ = bigray("submit", path, "--dry-run", "--json", "--entrypoint-memory", "1.5")

    document = json.loads(out)
    assert code == 0
    assert document["command"] == "python -m bigray run job.toml --serve serve/local.yaml"
    assert document["package"]["files"] == 2
    assert document["resources"]["memory"] == 3 * 2**29


REFUSED = {
    "a job file elsewhere": (["../job.toml"], r"JOB: \.\./job\.toml is outside of .*project"),
    "a serve file elsewhere": (["job.toml", "--serve", "../serve.yaml"], r"--serve: \.\./serve\.yaml is outside of"),
    "a relative storage": (["job.toml", "--set", "storage=runs"], r"storage: 'runs' is relative"),
    "a secret in an override": (
        ["job.toml", "--set", "models.m.params.api_token=planted"],
        r"--set: models\.m\.params\.api_token: holds a secret",
    ),
    "a secret in the storage": (["job.toml", "--set", "storage=s3://id:planted@b/runs"], "may hold no key and secret"),
    "an id of other letters": (["job.toml", "--id", "a.2"], r"--id: 'a\.2': use 1 to 80 letters"),
    "no constraints": (["job.toml", "--install"], r"--install: .*constraints\.txt: No such file"),
    "no such resource": (["job.toml", "--entrypoint-resource", "head"], "--entrypoint-resource: 'head'"),
    "two kinds of output": (["job.toml", "--json"], "--json: standard output is the job's; give --no-wait"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_run_there_is_refused_before_there_is_a_connection(
    case: str, project: Path, bigray: Command
) -> None:
    arguments, message = REFUSED[case]
    (project.parent / "job.toml").write_text((project / "job.toml").read_text())
    (project.parent / "serve.yaml").write_text((Path(cli.__file__).parents[2] / "serve/local.yaml").read_text())

    code, _, err = bigray("submit", *arguments, *([] if "--json" in arguments else ["--dry-run"]))

    assert code == 2
    assert re.search(message, err)
    assert "planted" not in err


def test_a_secret_in_the_job_file_is_refused_and_not_repeated(project: Path, bigray: Command) -> None:
    with (project / "job.toml").open("a") as file:
        file.write('# AKIAIOSFODNN7EXAMPLE\n[scaling]\nsecret_access_key = "planted"\n')

    code, _, err = bigray("submit", "job.toml", "--dry-run")

    assert code == 2
    assert "job.toml:12: holds an access key of AWS" in err
    assert "job.toml: scaling.secret_access_key: holds a secret" in err
    assert "planted" not in err
    assert "AKIA" not in err


def test_data_that_an_ignore_file_leaves_out_is_told(project: Path, bigray: Command) -> None:
    (project / ".gitignore").write_text("*.csv\n")

    code, _, err = bigray("submit", "job.toml", "--dry-run")

    assert code == 2
    assert "data.source: rows.csv is not sent: an ignore file names it" in err


def test_own_code_that_an_ignore_file_leaves_out_is_told(
    project: Path, bigray: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(project)
    (project / "own_model_of_a_job.py").write_text(
        "from bigray.models import linear\ndef build(shape, n):\n    return linear(shape, n)\n"
    )
    text = (project / "job.toml").read_text().replace("bigray.models:linear", "own_model_of_a_job:build")
    (project / "job.toml").write_text(text)
    (project / ".rayignore").write_text("own_*.py\n")

    code, _, err = bigray("submit", "job.toml", "--dry-run")

    assert code == 2
    assert "models.m.factory: own_model_of_a_job.py is not sent: an ignore file names it" in err


def test_a_folder_over_the_limit_is_refused_in_one_line(project: Path, bigray: Command) -> None:
    with (project / "video.bin").open("wb") as file:
        file.truncate(200 * 2**20)

    code, _, err = bigray("submit", "job.toml", "--dry-run")

    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "200 MiB to send, and a cluster takes 95; put /video.bin into .rayignore" in line


def test_submitting_follows_the_job_and_ends_with_its_code(server: JobsServer, project: Path, bigray: Command) -> None:
    server.chunks = ["hello\n"]
    server.ends_with = {"status": "FAILED", "driver_exit_code": 3, "message": "Job entrypoint command failed"}

    code, out, err = bigray("submit", "job.toml", "--address", server.url, "--id", "night")

    assert (code, out) == (3, "hello\n")
    assert f"submitted night to {server.url}: python -m bigray run job.toml" in err
    assert "error: night FAILED: Job entrypoint command failed" in err
    server.ends_with = {"status": "SUCCEEDED"}
    code, out, err = bigray("submit", "job.toml", "--address", server.url, "--id", "night")
    assert (code, out) == (0, "hello\n")
    assert "submitted night.2 (attempt 2) to" in err


def test_a_submission_that_is_not_waited_for_says_how_to_look_after_it(
    server: JobsServer, project: Path, bigray: Command
) -> None:
    code, _, err = bigray("submit", "job.toml", "--address", server.url, "--no-wait", "--id", "night")
    assert code == 0
    assert f"follow it with bigray logs night -f --address {server.url}" in err

    code, out, _ = bigray("submit", "job.toml", "--address", server.url, "--no-wait", "--id", "night", "--json")
    document = json.loads(out)
    assert (code, document["id"], document["is_running"]) == (0, "night", True)
    code, out, _ = bigray("jobs", "--address", server.url, "--json")
    assert [(job["id"], job["status"], job["exit_code"]) for job in json.loads(out)] == [("night", "RUNNING", None)]
    _, out, _ = bigray("jobs", "--address", server.url)
    assert "night" in out
    server.chunks = ["hello\n"]
    assert bigray("logs", "night", "--address", server.url)[:2] == (0, "hello\n")
    assert bigray("logs", "nigth", "--address", server.url)[0] == 5
    code, _, err = bigray("stop", "night", "--address", server.url)
    assert code == 0
    assert err.splitlines()[-1] == "night has ended: STOPPED"


def test_ctrl_c_leaves_the_job_and_says_how_to_end_it(server: JobsServer, tmp_path: Path) -> None:
    server.add("night")
    server.chunks, server.ends_with = ["hello\n"], {}
    command = [sys.executable, "-m", "bigray", "logs", "night", "-f", "--address", server.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "hello\n"
    time.sleep(0.2)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert f"night goes on; follow it with bigray logs night -f --address {server.url}, end it with" in err
    assert "Traceback" not in err
    assert server.jobs["night"]["status"] == "RUNNING"


def test_a_reader_that_goes_away_ends_the_command_quietly(server: JobsServer) -> None:
    server.add("night")
    server.chunks = ["x" * 10_000 + "\n"] * 50
    command = f"{shlex.quote(sys.executable)} -m bigray logs night -f --address {server.url} | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)

    assert (done.stdout, done.stderr) == ("xxxxx", "")


def _write_run(folder: Path, job_file: Path) -> Path:
    """A run that began and has not ended, as `train` leaves it."""
    from bigray.loading import load_job
    from bigray.training.request import make_request
    from bigray.training.runner import training_trials

    spec = load_job(job_file)
    request = make_request(spec, training_trials(spec))
    run = folder / request.run_id
    (run / "journal").mkdir(parents=True)
    document = {
        "run": request.run_id,
        "job": spec.model_dump(mode="json"),
        "search": None,
        "trials": [trial.model_dump(mode="json") for trial in request.trials],
        "data": {"fingerprint": request.dataset.fingerprint, "notes": []},
    }
    (run / "run.json").write_text(json.dumps(document))
    return run


def test_a_run_is_sent_to_another_cluster_without_its_job_file(
    server: JobsServer, project: Path, bigray: Command
) -> None:
    run = _write_run(project.parent / "runs", project / "job.toml")
    (project / "job.toml").unlink()

    code, _, err = bigray("resume", str(run), "--address", server.url, "--no-wait")

    assert code == 0, err
    (sent,) = server.submitted
    assert sent["entrypoint"] == f"python -m bigray resume {run} --here"
    assert sent["submission_id"].startswith(f"{run.name}-")
    assert server.packages, "its rows are in the folder"


def test_a_run_whose_files_are_all_on_storage_needs_no_folder(project: Path, bigray: Command) -> None:
    text = (project / "job.toml").read_text().replace("rows.csv", str(project / "rows.csv"))
    (project / "job.toml").write_text(text)
    run = _write_run(project.parent / "runs", project / "job.toml")

    code, out, _ = bigray("resume", str(run), "--dry-run", "--json")

    assert code == 0
    assert json.loads(out)["package"] is None


def test_what_cannot_be_resumed_is_refused(project: Path, bigray: Command) -> None:
    run = _write_run(project.parent / "runs", project / "job.toml")

    code, _, err = bigray("resume", f"../runs/{run.name}", "--dry-run")
    assert code == 2
    assert f"give {run} where it sees that, or --here" in err
    assert bigray("resume", str(run.parent / "none"), "--dry-run")[0] == 4
    code, _, err = bigray("resume", str(run), "--here", "--install")
    assert code == 2
    assert "--install: is for a job on a cluster; remove it, or --here" in err
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, "job": {"name": "small"}}))
    assert bigray("resume", str(run), "--dry-run")[0] == 2


def test_a_run_is_asked_for_as_it_was(project: Path) -> None:
    from bigray.workflow import recorded_request

    run = _write_run(project.parent / "runs", project / "job.toml")
    moved = run.parent / "moved" / run.name
    moved.parent.mkdir()
    run.rename(moved)

    request, search = recorded_request(str(moved))

    assert search is None
    assert request.run_name == moved.name == request.run_id
    assert request.job.storage == str(moved.parent)
    (project / "rows.csv").write_text((project / "rows.csv").read_text() + "61,1,1\n")
    with pytest.raises(SpecError, match=r"the rows of rows\.csv are not those it was trained on"):
        recorded_request(str(moved))


def test_a_job_of_bigrays_own_code_and_storage_needs_no_folder(project: Path) -> None:
    from bigray.cluster.submission import needs_folder
    from bigray.loading import load_job

    spec = load_job(project / "job.toml")

    def with_source(source: str) -> JobSpec:
        return spec.model_copy(update={"data": spec.data.model_copy(update={"source": source})})

    assert needs_folder(spec)
    assert needs_folder(with_source("own.data:load"))
    assert not needs_folder(with_source("s3://bucket/rows.parquet"))
    assert not needs_folder(with_source("/shared/rows.parquet"))
    assert JobFiles("job.toml", None, "serve/none.yaml").overrides == ()
