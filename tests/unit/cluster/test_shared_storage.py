"""What is made of the nodes' answers; real nodes are asked in tests/hosts/test_storage_not_shared.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from bigray.cluster import shared_storage
from bigray.cluster.shared_storage import check_shared, sees
from bigray.errors import ClusterError
from bigray.storage import open_storage

NODES = {f"host{number} (abc)": f"id{number}" for number in range(5)}


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Nodes that see nothing; all others look at this machine's files."""
    names: set[str] = set()

    def look(path: str, nodes: Mapping[str, str]) -> dict[str, bool]:
        return {name: sees(path) and name not in names for name in nodes}

    monkeypatch.setattr(shared_storage, "_other_nodes", lambda: NODES)
    monkeypatch.setattr(shared_storage, "_look", look)
    return names


def test_a_folder_that_all_nodes_see_passes_and_nothing_is_left_of_the_question(
    blind: set[str], tmp_path: Path
) -> None:
    check_shared(open_storage(str(tmp_path / "shared" / "runs")))

    assert list(tmp_path.iterdir()) == []


def test_nodes_that_do_not_see_it_are_named_in_one_line_with_the_way_out(blind: set[str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    blind |= {"host1 (abc)"}
    with pytest.raises(ClusterError) as one:
        check_shared(open_storage(str(tmp_path / "runs")))
    blind |= set(NODES)
    with pytest.raises(ClusterError, match=r"host0 \(abc\), host1 \(abc\), host2 \(abc\) and 2 more; name a folder"):
        check_shared(open_storage(str(tmp_path / "runs")))

    assert str(one.value) == (
        f"storage: {tmp_path}/runs: what is written here is not seen from host1 (abc); name a folder that all nodes "
        "mount at the same path, or s3://bucket/prefix"
    )
    assert list((tmp_path / "runs").iterdir()) == []


def test_one_node_alone_is_asked_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_storage, "_other_nodes", dict[str, str])

    check_shared(open_storage(str(tmp_path / "runs")))


def test_a_file_that_shows_late_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_storage.time, "sleep", lambda _: (tmp_path / "late").touch())

    assert sees(str(tmp_path / "late"))
