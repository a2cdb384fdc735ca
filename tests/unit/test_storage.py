from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from bigray.errors import CorruptFile, DiskFull, StorageError
from bigray.storage import (
    MANIFEST,
    Content,
    Storage,
    Written,
    _without_secrets,
    commit_folder,
    open_storage,
    read_folder,
    read_manifest,
    remove_leftovers,
    sha256,
)

FILES = {"weights.bin": bytes(range(256)) * 4, "optimizer.bin": b"m" * 512, "progress.json": b"{}"}


@pytest.fixture
def committed(storage: Storage) -> Storage:
    commit_folder(storage, "ckpt", FILES, {"step": 7})
    return storage


def _path(storage: Storage, name: str) -> Path:
    return Path(storage.root) / "ckpt" / name


def test_a_committed_folder_is_read_back_whole(committed: Storage) -> None:
    folder = read_folder(committed, "ckpt")

    assert folder.files == FILES
    assert folder.manifest["step"] == 7
    assert folder.manifest["files"]["weights.bin"] == {"sha256": sha256(FILES["weights.bin"]), "size": 1024}


def test_a_folder_without_its_manifest_is_not_there(committed: Storage) -> None:
    _path(committed, MANIFEST).unlink()

    with pytest.raises(StorageError, match=r"ckpt/manifest\.json: cannot read"):
        read_folder(committed, "ckpt")


def _flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zero_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[512:] = bytes(len(data) - 512)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_flip_one_bit, _zero_page])
def test_changed_bytes_are_told_with_the_file_and_both_hashes(
    committed: Storage, damage: Callable[[Path], None]
) -> None:
    path = _path(committed, "weights.bin")
    damage(path)

    with pytest.raises(CorruptFile) as caught:
        read_folder(committed, "ckpt")

    message = str(caught.value)
    assert "ckpt/weights.bin" in message
    assert sha256(FILES["weights.bin"]) in message
    assert sha256(path.read_bytes()) in message


@pytest.mark.parametrize(("damage", "found"), [(_truncate, 1023), (_empty, 0)])
def test_a_file_cut_short_is_told_with_both_sizes(
    committed: Storage, damage: Callable[[Path], None], found: int
) -> None:
    damage(_path(committed, "weights.bin"))

    with pytest.raises(CorruptFile, match=rf"ckpt/weights\.bin: corrupt, expected size 1024, found {found}$"):
        read_folder(committed, "ckpt")


def test_two_files_in_each_others_place_are_told_apart(committed: Storage) -> None:
    first, second = _path(committed, "optimizer.bin"), _path(committed, "weights.bin")
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)

    with pytest.raises(CorruptFile, match=r"ckpt/(optimizer|weights)\.bin") as caught:
        read_folder(committed, "ckpt")

    assert {caught.value.expected, caught.value.actual} == {"512", "1024"}


def test_a_deleted_file_is_named(committed: Storage) -> None:
    _path(committed, "optimizer.bin").unlink()

    with pytest.raises(CorruptFile, match=r"ckpt/optimizer\.bin: corrupt, expected size 512, found no file"):
        read_folder(committed, "ckpt")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"a": "b"}}',
        "[" * 100_000,
        '{"files": {"a": {"size": 1}}}',
    ],
)
def test_a_manifest_that_is_not_one_is_named(committed: Storage, text: str) -> None:
    _path(committed, MANIFEST).write_text(text)

    with pytest.raises(StorageError, match=r"ckpt/manifest\.json: not a manifest"):
        read_folder(committed, "ckpt")


def test_a_manifest_cut_in_half_is_named(committed: Storage) -> None:
    path = _path(committed, MANIFEST)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(StorageError, match=r"ckpt/manifest\.json: not a manifest"):
        read_folder(committed, "ckpt")


def test_the_manifest_is_written_after_every_file_it_names(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    write_file = Storage.write_file

    def recording(self: Storage, path: str, content: Content) -> Written:
        names.append(path)
        return write_file(self, path, content)

    monkeypatch.setattr(Storage, "write_file", recording)
    commit_folder(storage, "ckpt", FILES, {})

    assert names[-1] == f"ckpt/{MANIFEST}"
    assert set(names[:-1]) == {f"ckpt/{name}" for name in FILES}


def _fail(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_failing_write_leaves_the_old_content_and_nothing_else(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes("notes/a.txt", b"old")
    monkeypatch.setattr(os, "fsync", _fail)

    with pytest.raises(StorageError, match=r"notes/a\.txt: cannot write: .*No space left"):
        storage.write_bytes("notes/a.txt", b"new")

    assert storage.read_bytes("notes/a.txt") == b"old"
    assert storage.list_names("notes") == ["a.txt"]


def test_content_in_pieces_is_one_file_hashed_on_the_way(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigray.storage.CHUNK_BYTES", 3)

    written = storage.write_file("a", iter([b"01234567", memoryview(b"89"), b""]))

    assert storage.read_bytes("a") == b"0123456789"
    assert written == Written(10, sha256(b"0123456789"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_of_its_own_with_the_way_out(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(DiskFull, match=r"/a: cannot write: .*; free some, then run the same command again$"):
        storage.write_bytes("a", b"new")


def _tokens(storage: Storage) -> set[str]:
    return set(storage.list_names("ckpt")) - {MANIFEST}


def test_a_folder_committed_again_is_the_old_one_until_its_manifest_is_replaced(storage: Storage) -> None:
    commit_folder(storage, "ckpt", {"a.bin": b"old"}, {}, token="1")
    seen: list[bytes] = []

    def look() -> None:
        seen.append(read_folder(storage, "ckpt").files["a.bin"])

    commit_folder(storage, "ckpt", {"a.bin": b"new"}, {}, token="2", before_commit=look)

    assert seen == [b"old"]
    assert read_folder(storage, "ckpt").files == {"a.bin": b"new"}
    assert _tokens(storage) == {"a-1.bin", "a-2.bin"}


def test_what_the_manifest_does_not_name_is_removed_as_left_over(storage: Storage) -> None:
    commit_folder(storage, "ckpt", {"a.bin": b"old"}, {}, token="1")
    commit_folder(storage, "ckpt", {"a.bin": b"new"}, {}, token="2")
    storage.write_bytes("ckpt/.a.bin.77.tmp", b"half")

    remove_leftovers(storage, "ckpt", read_manifest(storage, "ckpt"))

    assert _tokens(storage) == {"a-2.bin"}
    assert read_folder(storage, "ckpt").files == {"a.bin": b"new"}


def test_who_may_not_commit_leaves_the_folder_as_it_was(storage: Storage) -> None:
    commit_folder(storage, "ckpt", {"a.bin": b"old"}, {}, token="1")

    def refuse() -> None:
        raise StorageError("attempt 3 has taken over")

    with pytest.raises(StorageError, match="taken over"):
        commit_folder(storage, "ckpt", {"a.bin": b"new"}, {}, token="2", before_commit=refuse)

    assert read_folder(storage, "ckpt").files == {"a.bin": b"old"}


def test_a_commit_for_which_the_disk_is_too_small_gives_its_space_back(
    storage: Storage,
) -> None:
    commit_folder(storage, "ckpt", {"a.bin": b"old"}, {}, token="1")

    def too_much() -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match=r"ckpt/b-2\.bin"):
        commit_folder(storage, "ckpt", {"a.bin": b"new", "b.bin": too_much()}, {}, token="2")

    assert _tokens(storage) == {"a-1.bin"}


@pytest.mark.parametrize("number", range(1, 7))
def test_a_disk_that_is_full_at_any_sync_leaves_the_old_folder_or_the_new_one(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Syncing the folder comes after the rename: the manifest can be in place though the write of it has failed."""
    commit_folder(storage, "ckpt", {"a.bin": b"old", "b.bin": b"old"}, {}, token="1")
    calls: list[int] = []

    def fail_once(_: int) -> None:
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(DiskFull):
        commit_folder(storage, "ckpt", {"a.bin": b"new", "b.bin": b"new"}, {}, token="2")

    assert set(read_folder(storage, "ckpt").files.values()) == ({b"new"} if number == 6 else {b"old"})


def test_who_is_reading_a_file_while_it_is_written_again_sees_the_old_content_whole(storage: Storage) -> None:
    storage.write_bytes("a.txt", b"old content")
    with (Path(storage.root) / "a.txt").open("rb") as reader:
        storage.write_bytes("a.txt", b"new")

        assert reader.read() == b"old content"
    assert storage.read_bytes("a.txt") == b"new"


def test_checking_that_a_new_folder_is_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    open_storage(tmp_path / "a" / "b").check_writable()

    assert list(tmp_path.iterdir()) == []


def test_checking_a_filesystem_that_is_no_local_one_leaves_nothing_behind(tmp_path: Path) -> None:
    remote = Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run", "mock://run")
    remote.filesystem.create_dir("run")

    remote.check_writable()

    assert remote.list_names() == []


def test_proc_is_refused_as_storage() -> None:
    with pytest.raises(StorageError, match="/proc/runs: cannot write here"):
        open_storage("/proc/runs").check_writable()


def test_a_path_below_a_file_is_refused_as_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="cannot write here"):
        open_storage(tmp_path / "file" / "runs").check_writable()


class _Broken:
    """A filesystem whose every call fails, as one behind a network that is down."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        def fail(*_: object, **__: object) -> object:
            raise OSError("network is down")

        return fail


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (lambda storage: storage.exists("a"), "s3://b/run/a: cannot look up"),
        (lambda storage: storage.exists(), "s3://b/run: cannot look up"),
        (lambda storage: storage.list_names("a"), "s3://b/run/a: cannot list"),
        (lambda storage: storage.delete_folder("a"), "s3://b/run/a/manifest.json: cannot look up"),
        (lambda storage: storage.create("a"), "s3://b/run/a: cannot look up"),
        (lambda storage: storage.check_writable(), "s3://b/run/.bigray-probe: cannot write"),
    ],
    ids=["exists", "root exists", "list_names", "delete_folder", "create", "check_writable"],
)
def test_what_a_filesystem_raises_is_told_with_the_place(call: Callable[[Storage], object], place: str) -> None:
    with pytest.raises(StorageError, match=f"^{place}: network is down"):
        call(Storage(_Broken(), "b/run", "s3://b/run"))


def test_a_probe_that_cannot_be_deleted_is_told(tmp_path: Path) -> None:
    class KeepsEverything(_Broken):
        def open_output_stream(self, _: str) -> object:
            return (tmp_path / "probe").open("wb")

    with pytest.raises(StorageError, match="bigray-probe: cannot delete: network is down"):
        Storage(KeepsEverything(), "b/run", "s3://b/run").check_writable()


def test_listing_a_file_is_a_storage_error(storage: Storage) -> None:
    storage.write_bytes("a", b"")

    with pytest.raises(StorageError, match="/a: cannot list"):
        storage.list_names("a")


def test_a_root_that_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"x: cannot write here: .*too long"):
        open_storage(tmp_path / ("x" * 300)).check_writable()


def test_a_file_is_created_once(storage: Storage) -> None:
    assert storage.create("new/a")
    assert not storage.create("new/a")
    assert storage.read_bytes("new/a") == b""


def test_a_manifest_that_stores_a_file_outside_its_folder_is_refused(committed: Storage) -> None:
    committed.write_bytes("secret", b"s")
    document = {"files": {"a": {"sha256": sha256(b"s"), "size": 1, "stored": "../secret"}}}
    _path(committed, MANIFEST).write_text(json.dumps(document))

    with pytest.raises(StorageError, match=r"ckpt/manifest\.json: names a file outside its folder"):
        read_folder(committed, "ckpt")


@pytest.mark.parametrize("name", ["../secret", "..", "a/b", "/etc/hostname", "..\\secret"])
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(committed: Storage, name: str) -> None:
    committed.write_bytes("secret", b"s")
    document = {"files": {name: {"sha256": sha256(b"s"), "size": 1}}}
    _path(committed, MANIFEST).write_text(json.dumps(document))

    with pytest.raises(StorageError, match=r"ckpt/manifest\.json: names a file outside its folder"):
        read_folder(committed, "ckpt")


@pytest.mark.parametrize("uri", ["s3://AKEY:se%2Fcret@bucket/runs?region=eu-west-1", "abfs://:secret@host/runs"])
def test_a_secret_in_a_uri_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(StorageError, match=r"^\w+://\*\*\*@.*AWS_SECRET_ACCESS_KEY") as caught:
        open_storage(uri)
    assert "cret" not in str(caught.value).replace("secret;", "")
    assert "AKEY" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKEY:cret/hidden@bucket/x", "s3://***@bucket/x"),
        ("s3://AKEY:cret@hidden@bucket/x", "s3://***@bucket/x"),
        ("abfs://AKEY:hidden/+==@cont", "abfs://***@cont"),
        ("hdfs://AKEY:hidden@host:8020/x", "hdfs://***@host:8020/x"),
        (
            "s3://bucket/x?region=a&secret_key=hidden/+==&scheme=http",
            "s3://bucket/x?region=a&secret_key=***&scheme=http",
        ),
        ("s3://bucket/x?Access_Key=AKEY", "s3://bucket/x?Access_Key=***"),
        ("s3://AKEY:hid/den@bucket?secret_key=hidden", "s3://***@bucket?secret_key=***"),
    ],
)
def test_no_part_of_a_secret_is_shown(uri: str, shown: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_storage(uri)
    assert str(caught.value).startswith(f"{shown}: a URI may hold no key and secret")
    assert not any(part in str(caught.value) for part in ("AKEY", "hid", "den", "cret@", "cret/"))


def test_what_may_be_a_secret_is_not_shown_where_a_uri_cannot_be_read() -> None:
    with pytest.raises(StorageError, match=r"^nowhere://\*\*\*@bucket/x: cannot open storage: ") as caught:
        open_storage("nowhere://AKEY/1:hid/den@bucket/x")
    assert not any(part in str(caught.value) for part in ("AKEY", "hid", "den"))


def test_a_port_is_no_secret() -> None:
    with pytest.raises(StorageError, match=r"^nowhere://host:8020/user/x: cannot open storage"):
        open_storage("nowhere://host:8020/user/x")
    assert _without_secrets("hdfs://host:8020/user@home") == "hdfs://host:8020/user@home"
    assert _without_secrets("s3://bucket/a:b@c?region=eu") == "s3://bucket/a:b@c?region=eu"


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StorageError, match="nowhere://x: cannot open storage"):
        open_storage("nowhere://x")


def test_a_deleted_folder_is_gone_and_deleting_it_again_is_no_error(committed: Storage) -> None:
    committed.delete_folder("ckpt")
    committed.delete_folder("ckpt")

    assert not committed.exists("ckpt")


def test_the_manifest_is_the_first_to_go_when_a_folder_is_deleted(committed: Storage) -> None:
    local = fs.LocalFileSystem()

    class FailsToDeleteFolders:
        def __getattr__(self, name: str) -> object:
            return getattr(local, name)

        def delete_dir(self, path: str) -> None:
            raise OSError("killed here")

    half_done = Storage(FailsToDeleteFolders(), committed.root, committed.uri)
    with pytest.raises(StorageError, match="ckpt: cannot delete: killed here"):
        half_done.delete_folder("ckpt")

    assert committed.list_names("ckpt") == sorted(FILES)


def test_a_child_is_rooted_one_level_down(storage: Storage) -> None:
    storage.child("run", "bundle").write_bytes("a", b"1")

    assert storage.read_bytes("run/bundle/a") == b"1"


def test_names_under_an_absent_folder_are_none(storage: Storage) -> None:
    assert storage.list_names("nowhere") == []


def test_a_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert open_storage("~/runs").root == str(tmp_path / "runs")
