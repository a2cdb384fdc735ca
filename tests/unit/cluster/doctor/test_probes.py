"""What a probe measures where it runs: here, in this process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bigray.cluster.doctor.examine import named
from bigray.cluster.doctor.facts import NodeInRay
from bigray.cluster.doctor.probes import (
    Probe,
    interface_addresses,
    interface_of,
    node_facts,
    read_file,
    token_facts,
    versions,
)
from bigray.errors import StorageError
from bigray.storage import open_storage, sha256

INTERFACES = {"lo": ("127.0.0.1", "::1"), "eth0": ("10.0.0.1", "fe80::1"), "eth1": ("192.168.0.7",)}


@pytest.mark.parametrize(
    ("ip", "interface"),
    [("10.0.0.1", "eth0"), ("192.168.0.7", "eth1"), ("127.0.1.1", "lo"), ("::1", "lo"), ("10.0.0.9", "")],
)
def test_an_address_belongs_to_an_interface(ip: str, interface: str) -> None:
    assert interface_of(ip, INTERFACES) == interface


def test_the_interfaces_of_this_machine_have_loopback() -> None:
    assert interface_of("127.0.0.1", interface_addresses()) in {name for _, name in socket.if_nameindex()}


def test_a_node_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    facts = node_facts("127.0.0.1")

    assert facts.versions == versions()
    assert set(facts.versions) == {"python", "ray", "torch", "bigray"}
    assert 0 < facts.disk_free_bytes <= facts.disk_total_bytes
    assert (facts.gloo_interface, facts.gloo_setting) == ("eth7", "eth7")
    assert facts.interface == interface_of("127.0.0.1", interface_addresses())


def test_the_token_is_found_by_its_place_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o640)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    by_file = token_facts()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")

    assert (by_file.place, by_file.file_mode) == (str(file), 0o640)
    assert (token_facts().place, token_facts().file_mode) == ("RAY_AUTH_TOKEN", None)
    assert "secret" not in f"{by_file} {token_facts()}"


def test_a_file_written_is_read_and_nothing_of_it_stays(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "not" / "there")
    probe = Probe("10.0.0.1", "127.0.0.1")

    assert probe.write(storage, "probe", b"abc") == sha256(b"abc") == probe.read(storage, "probe")
    probe.remove(storage, "probe")
    assert os.listdir(tmp_path) == []


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    storage = open_storage(tmp_path / "runs")
    probe = Probe("10.0.0.1", "127.0.0.1")
    probe.write(storage, "probe", b"abc")
    probe.remove(storage, "probe")

    assert os.listdir(tmp_path) == ["runs"]


def test_folders_of_a_write_that_failed_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    storage = open_storage(tmp_path / "file" / "runs")
    probe = Probe("10.0.0.1", "127.0.0.1")

    with pytest.raises(StorageError, match="cannot write"):
        probe.write(storage, "probe", b"abc")
    with pytest.raises(StorageError):
        probe.remove(storage, "probe")
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_no_one_wrote_here_has_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigray.cluster.shared_storage.SHOWN_AFTER_S", 0.0)

    assert read_file(open_storage(tmp_path), "probe") is None


def test_nodes_that_share_an_address_are_told_apart() -> None:
    nodes = [NodeInRay("a" * 56, "10.0.0.1"), NodeInRay("b" * 56, "10.0.0.1"), NodeInRay("c" * 56, "10.0.0.2")]

    assert list(named(nodes)) == ["10.0.0.1 (aaaaaa)", "10.0.0.1 (bbbbbb)", "10.0.0.2"]
