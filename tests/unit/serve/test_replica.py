from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray.serve._private import constants

from bigray.errors import DeployError
from bigray.serve.replica import claim_socket_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Serve's settings put the socket of node 'n1'."""
    monkeypatch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", True)
    monkeypatch.setattr(constants, "RAY_SERVE_HAPROXY_SOCKET_PATH", str(tmp_path / "endpoint" / "admin.sock"))
    return tmp_path / "endpoint" / "n1"


@pytest.mark.parametrize("is_there", [False, True], ids=["before HAProxy", "after HAProxy"])
def test_the_folder_of_the_admin_socket_is_this_users_alone_on_each_node(folder: Path, is_there: bool):
    if is_there:
        (folder / "of haproxy").mkdir(parents=True, mode=0o755)
    claim_socket_folder("n1")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.listdir(folder) == ["of haproxy"] * is_there


def test_a_replica_does_not_start_over_somebody_elses_link(folder: Path, tmp_path: Path):
    folder.parent.mkdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(DeployError, match="not a folder of this user"):
        claim_socket_folder("n1")


def test_where_haproxy_does_not_run_nothing_is_made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", False)
    claim_socket_folder("n1")
    assert list(tmp_path.iterdir()) == []
