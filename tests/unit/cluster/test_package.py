"""What is sent of a folder: what ignore files leave, no secrets, nothing that cannot be read, and not too much."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigray.cluster.package import (
    LIMIT_BYTES,
    MIB,
    Package,
    files_of_job,
    find_package,
    missing_faults,
    read_pins,
    relative_to_folder,
    size_fault,
    to_ignore,
    write_zip,
)
from bigray.cluster.secrets import is_secret_path, secrets_in_document, secrets_in_text
from bigray.cluster.submission import Wishes, make_resubmission
from bigray.errors import SpecError
from bigray.specs import JobSpec

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def sent(package: Package) -> list[str]:
    return [file.path for file in package.files]


def left_out(package: Package) -> dict[str, str]:
    return {left.path: left.why for left in package.left_out}


def test_what_ignore_files_of_any_folder_name_is_left_out_without_a_word(folder: Path) -> None:
    write(
        folder,
        {
            "job.toml": "",
            ".gitignore": "*.log\nruns/\n!keep.log\n",
            ".rayignore": "/big\n",
            "a.log": "",
            "keep.log": "",
            "runs/x/ckpt": "",
            "big/file": "",
            "sub/.gitignore": "inner.txt\n",
            "sub/inner.txt": "",
            "sub/big/file": "",
            "inner.txt": "",
        },
    )

    package = find_package(folder)

    expected = [".gitignore", ".rayignore", "inner.txt", "job.toml", "keep.log", "sub/.gitignore", "sub/big/file"]
    assert sent(package) == expected
    assert not package.left_out


def test_folders_that_no_job_reads_are_left_out_without_an_ignore_file(folder: Path) -> None:
    write(folder, {".git/config": "", ".venv/bin": "", "src/__pycache__/a": "", "src/venv/b": "", "src/a.py": ""})

    assert sent(find_package(folder)) == ["src/a.py"]


SECRETS = [
    *(".env", ".env.local", "deploy/tls.pem", "server.key", "id_rsa", "sub/id_ed25519", ".netrc", ".pypirc"),
    *("auth_token", "gcp-Credentials.json", ".git-credentials", ".envrc", "prod.env", "infra/prod.tfvars", ".npmrc"),
    *("terraform.tfstate.backup", "app/secrets.toml", "kubeconfig"),
]
SECRET_FOLDERS = [".aws/credentials", ".ssh/config", "home/.kube/config", ".ray/other"]
NO_SECRETS = ["environment.py", "id_columns.csv", "keys.py", "src/identity", "credentials.py", "pem.txt"]


def test_secrets_are_never_sent_and_always_named(folder: Path) -> None:
    for path in [*SECRETS, *SECRET_FOLDERS, *NO_SECRETS]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    (folder / ".gitignore").write_text(".env\n")  # an ignore file makes no secret of a secret
    (folder / "deploy_key").write_text(KEY)
    (folder / "service.json").write_text('{"private_key": "' + KEY.replace("\n", "\\n") + '"}')

    package = find_package(folder)

    assert sorted(sent(package)) == sorted([".gitignore", *NO_SECRETS])
    named = {*SECRETS, ".aws", ".ssh", "home/.kube", ".ray", "deploy_key", "service.json"}
    assert set(left_out(package)) == named
    assert all(why in ("it holds secrets by its name", "it holds a private key") for why in left_out(package).values())


def test_a_link_that_goes_round_in_a_circle_is_named_and_nothing_breaks(folder: Path) -> None:
    (folder / "round").symlink_to("round")

    assert left_out(find_package(folder)) == {"round": "a link that leads nowhere"}


def test_a_folder_is_no_ssh_key_by_its_name() -> None:
    assert is_secret_path("id_rsa", is_folder=False)
    assert not is_secret_path("id_maps", is_folder=True)


def test_sockets_pipes_and_links_to_elsewhere_are_named_and_links_within_are_followed(folder: Path) -> None:
    write(folder, {"data/a.csv": "1", ".env": "secret"})
    (folder.parent / "outside").mkdir()
    os.mkfifo(folder / "pipe")
    links = {"out": folder.parent / "outside", "nowhere": folder / "gone", "loop": folder, "innocent": folder / ".env"}
    for name, target in {**links, "link.csv": folder / "data/a.csv", "also": folder / "data"}.items():
        (folder / name).symlink_to(target)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):  # a socket's path must be short
        listener.bind("agent.sock")
        package = find_package(folder)

    assert sent(package) == ["also/a.csv", "data/a.csv", "link.csv"]
    reasons = left_out(package)
    del reasons[".env"]
    assert reasons == {
        "agent.sock": "a socket",
        "pipe": "a named pipe",
        "out": "a link that leads out of the folder",
        "nowhere": "a link that leads nowhere",
        "loop": "a link to a folder that it is in",
        "innocent": "a link to what is never sent",
    }


@contextlib.contextmanager
def _someone() -> Iterator[None]:
    """Root may read everything: be someone who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_read_is_told_all_at_once() -> None:
    import ray._private.runtime_env.packaging  # noqa: F401  # loaded while everything may still be read

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        write(folder, {"a": "", "b/c": "", "readable": ""})
        (folder / "a").chmod(0)
        (folder / "b").chmod(0)
        with _someone(), pytest.raises(SpecError) as refused:
            find_package(folder)
        (folder / "b").chmod(0o700)

    told = refused.value.faults
    assert [fault.partition(":")[0] for fault in told] == ["a", "b"]
    assert all("Permission denied" in fault and ".rayignore" in fault for fault in told)


def test_an_ignore_file_that_is_not_text_is_named(folder: Path) -> None:
    (folder / ".gitignore").write_bytes(b"\xff\xfe*.log")

    with pytest.raises(SpecError, match=r"\.gitignore: not a file of patterns"):
        find_package(folder)


@pytest.mark.parametrize("name", [b"bad\xff.txt", b"two\nlines"])
def test_a_name_that_no_package_can_hold_is_refused(folder: Path, name: bytes) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_text("")

    with pytest.raises(SpecError, match="no package can hold such a name"):
        find_package(folder)


def sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def test_a_package_over_the_limit_is_refused_with_what_to_ignore(folder: Path) -> None:
    write(folder, {"src/job.toml": "x", "src/small.py": "x"})
    sparse(folder / "src/huge.bin", 100 * MIB)
    sparse(folder / "data/images/a", 60 * MIB)
    sparse(folder / "data/images/b", 30 * MIB)
    sparse(folder / "notes/video", 10 * MIB)
    package = find_package(folder)

    fault = size_fault(package, ["src/job.toml"])

    assert fault is not None
    assert "200 MiB to send, and a cluster takes 95; put /src/huge.bin, /data/ into .rayignore" in fault
    (folder / ".rayignore").write_text("/src/huge.bin\n/data/\n")
    assert size_fault(find_package(folder), ["src/job.toml"]) is None
    assert [file.path for file in package.largest(2)] == ["src/huge.bin", "data/images/a"]


def test_what_the_job_needs_is_never_to_be_ignored(folder: Path) -> None:
    sparse(folder / "data/rows.npz", LIMIT_BYTES + 1)

    fault = size_fault(find_package(folder), ["data/rows.npz"])

    assert fault is not None
    assert "send a smaller folder" in fault


def test_the_limit_itself_is_not_over_it(folder: Path) -> None:
    sparse(folder / "a", LIMIT_BYTES)

    assert size_fault(find_package(folder)) is None


def test_equal_folders_make_equal_packages_and_others_others(folder: Path, tmp_path: Path) -> None:
    write(folder, {"a/b.py": "print(1)", "c": "2"})
    (folder / "c").chmod(0o755)
    first, again, changed = (tmp_path / name for name in ("1.zip", "2.zip", "3.zip"))

    made = write_zip(find_package(folder), first)
    os.utime(folder / "c", (1, 1))

    assert write_zip(find_package(folder), again) == made
    assert first.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.read("a/b.py") == b"print(1)"
        assert [info.external_attr >> 16 & 0o777 for info in archive.infolist()] == [0o644, 0o755]
    write(folder, {"c": "3"})
    assert write_zip(find_package(folder), changed) != made


def test_ray_unpacks_what_was_packed(folder: Path, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import unzip_package

    write(folder, {"a/b.py": "print(1)", "c": "2"})
    write_zip(find_package(folder), tmp_path / "package.zip")
    unzip_package(str(tmp_path / "package.zip"), str(tmp_path / "there"), False, unlink_zip=False)

    assert (tmp_path / "there/a/b.py").read_text() == "print(1)"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["a", "c"]


def test_a_file_of_the_command_is_named_as_the_job_finds_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"sub/job.toml": ""})
    monkeypatch.chdir(folder)

    assert relative_to_folder(folder, "JOB", "sub/../sub/job.toml") == "sub/job.toml"
    assert relative_to_folder(folder, "JOB", str(folder / "sub/job.toml")) == "sub/job.toml"
    with pytest.raises(SpecError, match=r"JOB: \.\./job\.toml is outside of .*project, which is what the job gets"):
        relative_to_folder(folder, "JOB", "../job.toml")


def job_with(**data: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "pictures",
            "data": {"target": "label", **data},
            "models": {"cnn": {"factory": "bigray.models:cnn"}},
            "training": {"task": "classification"},
        }
    )


def test_what_the_job_reads_and_would_not_find_is_told(folder: Path) -> None:
    write(folder, {".gitignore": "*.csv\n", "rows.csv": "", "data/a.parquet": "", "id_rsa": ""})
    needed = [("data.source", "rows.csv"), ("data.train", "data"), ("--serve", "id_rsa")]

    faults = missing_faults(find_package(folder), needed)

    assert [fault.split(";")[0] for fault in faults] == [
        "data.source: rows.csv is not sent: an ignore file names it",
        "--serve: id_rsa is not sent: it holds secrets by its name",
    ]


def test_a_folder_of_data_that_an_ignore_file_thins_out_is_told_once(folder: Path) -> None:
    pictures = {f"pictures/{kind}/{number}.png": "" for kind in "ab" for number in range(3)}
    write(folder, {".gitignore": "pictures/b/\n*.tmp\n", "pictures/a/old.tmp": "", "pictures/.cache": "", **pictures})
    job = job_with(train="pictures/a", test="pictures")

    faults = missing_faults(find_package(folder), files_of_job(job, folder))

    assert [fault.split(";")[0] for fault in faults] == [
        "data.test: pictures/b/0.png and 2 more are not sent: an ignore file names them"
    ]


def test_a_folder_that_data_is_in_is_not_named_as_one_to_leave_out(folder: Path) -> None:
    write(folder, {"pictures/a/0.png": "x" * 50, "pictures/a/1.png": "x" * 50, "notes/b.txt": "x" * 20})
    job = job_with(source="pictures")
    needed = frozenset(path for _, path in files_of_job(job, folder))

    assert to_ignore(find_package(folder), needed, 10) == ["/notes/"]
    assert to_ignore(find_package(folder), needed, 60) == []


def test_pins_are_read_and_ray_is_left_to_the_cluster(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(
        "# what it was tested with\nnumpy==2.1.0  # small\n\nray==2.60.0\nuvloop==0.21; python_version > '3'\n"
    )

    assert read_pins(file) == ("numpy==2.1.0", "uvloop==0.21; python_version > '3'")


@pytest.mark.parametrize(
    "line", ["numpy", "numpy>=2", "-r other.txt", "--index-url https://me:pw@host", "a @ http://x/a"]
)
def test_a_constraint_that_pins_nothing_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(f"torch==2.9.0\n{line}\n")

    with pytest.raises(SpecError) as refused:
        read_pins(file)
    assert str(refused.value) == f"--install: {file}:2: not of the form name==version"


def test_install_without_a_file_says_what_it_would_hold(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"constraints\.txt: No such file or directory; it holds what to install"):
        read_pins(tmp_path / "constraints.txt")


PLANTED = {
    "aws": ("# AKIAIOSFODNN7EXAMPLE", "an access key of AWS"),
    "github": ("x = 'ghp_" + "a" * 36 + "'", "a token of GitHub"),
    "key": (KEY.splitlines()[0], "a private key"),
    "hugging face": ("hf_" + "b" * 34, "a token of Hugging Face"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_secret_by_its_form_is_found_in_a_comment_too_and_never_repeated(case: str) -> None:
    line, what = PLANTED[case]

    (fault,) = secrets_in_text("job.toml", f"name = 'a'\n{line}\n")

    assert fault.startswith(f"job.toml:2: holds {what}; ")
    assert not any(len(word) > 12 and word in fault for word in line.split())


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"data": {"aws_secret_access_key": "abc"}}, "data.aws_secret_access_key"),
        ({"models": {"a": {"params": {"hf_token": "abc"}}}}, "models.a.params.hf_token"),
        ({"env": [{"DB_PASSWORD": "abc"}]}, "env.DB_PASSWORD"),
        ({"training.api_key": "abc"}, "training.api_key"),
        ({"storage": "s3://name:pass/word@bucket/runs"}, "storage"),
        ({"data": {"source": "https://host/rows.csv?X-Amz-Signature=abc&x=1"}}, "data.source"),
    ],
)
def test_a_secret_by_its_name_or_in_a_uri_is_found(document: object, place: str) -> None:
    (fault,) = secrets_in_document("job.toml", document)

    assert fault.startswith(f"job.toml: {place}: ")
    assert "abc" not in fault
    assert "pass/word" not in fault


def test_settings_that_are_no_secrets_are_let_through() -> None:
    root = Path(__file__).parents[3]
    import tomllib

    import yaml

    for path in [*root.glob("examples/*/*.toml"), *root.glob("tuning/*.toml"), *root.glob("serve/*.yaml")]:
        text = path.read_text()
        document = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
        assert not [*secrets_in_text(str(path), text), *secrets_in_document(str(path), document)]
    assert not [*secrets_in_document("job.toml", {"data": {"tokens": "byte", "keys": "s3://b/keys.json", "token": ""}})]
    assert not [*secrets_in_document("job.toml", {"params": {"pad_token": "<pad>", "eos_token": "<eos>"}})]


def test_a_run_whose_weights_were_in_the_folder_of_its_job_is_not_sent_to_where_they_are_not() -> None:
    weights = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1a/start.safetensors"
    job = JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "s3://bucket/rows.parquet", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp", "weights": weights}},
            "training": {"task": "classification"},
        }
    )
    with pytest.raises(SpecError, match=r"models\.mlp\.weights: .*start\.safetensors: .* keep such a file on storage"):
        make_resubmission("s3://bucket/runs/digits-1", "digits-1", job, None, Wishes())
