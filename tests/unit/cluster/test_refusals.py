"""Why a cluster cannot be joined, in one line: no Ray is started."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from bigray.cluster.connect import keep_token_private
from bigray.cluster.refusals import check_before_joining, explain
from bigray.errors import ClusterError

ADDRESS = "10.0.0.1:6379"
ELSEWHERE = "ray://10.0.0.1:10001"
"""Ray's own client goes there: nothing is asked before."""
MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.59.0
    Python: 3.11.2
This process on node 10.0.0.7 was started with:
    Ray: 2.60.0
    Python: 3.12.1
"""


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a home folder of its own."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def unauthenticated() -> Exception:
    """As Ray raises it: the reason is in the cause."""
    cause = RuntimeError(
        "Failed to connect to GCS. Last connection error: Traceback\nRpcError: InvalidAuthToken: is wrong"
    )
    error = ConnectionError(f"Failed to connect to Ray cluster at {ADDRESS}")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (RuntimeError(MISMATCH), ("Ray 2.59.0 and Python 3.11.2, this is Ray 2.60.0 and Python 3.12.1", "pip install")),
        (
            ConnectionError("Could not find any running Ray instance. Please"),
            ("no Ray runs on this machine", "ray start --head"),
        ),
        (
            RuntimeError("No node info found matching attributes: 'x'"),
            (f"ray start --address={ADDRESS}", "bigray submit"),
        ),
        (ConnectionError(f"Failed to connect to Ray cluster at {ADDRESS}"), ("nothing answers there", "ray status")),
        (ValueError("something\nelse"), ("something",)),
        (unauthenticated(), ("asks for a token, and this user has none", "auth_token")),
    ],
)
def test_what_ray_says_is_told_in_one_line_with_the_next_command(error: Exception, parts: tuple[str, ...]) -> None:
    told = explain(error, ADDRESS)

    assert told.startswith(f"{ADDRESS}: cannot connect to Ray: ")
    assert "\n" not in told
    assert [part for part in parts if part not in told] == []


def test_a_token_that_is_refused_is_told_by_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("wrong-secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    told = explain(unauthenticated(), ADDRESS)

    assert f"refuses the token of {file}" in told
    assert "wrong-secret" not in told


def test_a_token_that_is_kept_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    assert "unset RAY_AUTH_MODE" in explain(unauthenticated(), ADDRESS)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot be read (No such file or directory)"), (" \n", "is empty")]
)
def test_a_token_file_without_a_token_is_told_before_ray_ends_the_process(
    content: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")

    with pytest.raises(ClusterError, match="the token file .* " + reason.replace("(", r"\(").replace(")", r"\)")):
        check_before_joining(ADDRESS, 0)


def test_token_mode_without_a_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")

    with pytest.raises(ClusterError, match="RAY_AUTH_MODE asks for a token, and this user has none"):
        check_before_joining(ADDRESS, 0)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
def test_a_token_that_others_can_read_is_refused_and_the_doctor_takes_it(
    mode: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")

    with pytest.raises(ClusterError, match=rf"\(mode {mode:04o}\): chmod 600 {file}"):
        check_before_joining(ELSEWHERE, 0)
    check_before_joining(ELSEWHERE, 0, is_lenient=True)
    file.chmod(0o600)
    check_before_joining(ELSEWHERE, 0)


@pytest.mark.parametrize(("mode", "then"), [(0o644, 0o600), (0o400, 0o400)])
def test_the_token_that_ray_wrote_is_left_to_its_owner(mode: int, then: int, tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(mode)
    keep_token_private()

    assert stat.S_IMODE(file.stat().st_mode) == then


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # held, and not listened at
        address = f"127.0.0.1:{held.getsockname()[1]}"

        with pytest.raises(
            ClusterError, match=rf"{address}: .*nothing answers there \(connection refused\): .*ray start"
        ):
            check_before_joining(address, 0)


@pytest.mark.parametrize("address", ["local", ELSEWHERE, "http://10.0.0.1:8265"])
def test_addresses_of_another_kind_are_left_to_ray(address: str) -> None:
    check_before_joining(address, 0)
