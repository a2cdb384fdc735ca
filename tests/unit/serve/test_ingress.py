from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from bigray.errors import DeployError
from bigray.serve import ingress
from bigray.serve.ingress import claim_folder, claim_node_folder, end_orphans, haproxy_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_folder_is_this_users_alone():
    claim_folder(8000)
    assert haproxy_folder(8000).stat().st_mode & 0o777 == 0o700
    assert str(os.getuid()) in haproxy_folder(8000).name


def test_an_own_folder_that_is_there_is_closed_to_others():
    haproxy_folder(8000).mkdir(mode=0o755)
    claim_folder(8000)
    assert haproxy_folder(8000).stat().st_mode & 0o777 == 0o700


def test_a_link_is_refused(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    haproxy_folder(8000).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeployError, match="not a folder of this user") as caught:
        claim_folder(8000)
    assert "\n" not in str(caught.value)


def test_somebody_elses_folder_is_refused(monkeypatch: pytest.MonkeyPatch):
    # the folder stays ours and the process claims to be another user: only root could give it away
    folder = haproxy_folder(8000)
    folder.mkdir()
    monkeypatch.setattr(ingress, "haproxy_folder", lambda port: folder)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(DeployError, match="not a folder of this user"):
        claim_folder(8000)


def test_socket_paths_stay_within_what_haproxy_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setattr(os, "getuid", lambda: 2**32 - 1)
    names = [name for name in ingress._FILES.values() if name.endswith(".sock")]
    assert names
    assert all(len(str(haproxy_folder(65535) / ("0" * 56) / name)) <= 97 for name in names)


def test_no_process_of_a_port_nobody_used_is_ended():
    assert end_orphans(8000) == []


def test_on_a_node_the_folder_that_serve_puts_between_is_this_users_alone(tmp_path: Path):
    socket_path = str(tmp_path / "haproxy-serve" / "admin.sock")
    (tmp_path / "haproxy-serve" / "node").mkdir(parents=True, mode=0o755)
    for node_id in ("node", "another"):
        claim_node_folder(socket_path, node_id)
        assert (tmp_path / "haproxy-serve" / node_id).stat().st_mode & 0o777 == 0o700


def test_on_a_node_neither_a_link_nor_a_folder_in_somebody_elses_is_taken(tmp_path: Path, monkeypatch):
    (tmp_path / "node").symlink_to(tmp_path)
    with pytest.raises(DeployError, match="not a folder of this user; remove it, or set RAY_SERVE_HAPROXY_SOCKET_PATH"):
        claim_node_folder(str(tmp_path / "admin.sock"), "node")
    (tmp_path / "open").mkdir()
    owner = (tmp_path / "open").stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(DeployError, match="not a folder of this user"):
        claim_node_folder(str(tmp_path / "open" / "admin.sock"), "node")
