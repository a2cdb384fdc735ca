from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pyarrow import fs
from rich.console import Console

from bigray.errors import SpecError, StorageError
from bigray.serve.protect import keys
from bigray.serve.protect.keys import (
    KeyFile,
    KeyRing,
    create_key,
    keys_table,
    list_keys,
    load_ring,
    open_key_file,
    revoke_key,
    secret_id,
)
from bigray.storage import Storage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "keys.json"


def test_a_new_key_opens_the_ring(file):
    secret = create_key(file, "anna")
    key = load_ring(file).authenticate(secret)
    assert (key.name, key.scopes, key.rate_per_s, key.revoked) == ("anna", {"predict"}, None, None)


def test_a_secret_holds_its_id_and_32_random_bytes(file):
    secret = create_key(file, "anna")
    (key,) = list_keys(file)
    assert secret.startswith(f"bgr_{key.id}_")
    assert len(secret) == len("bgr_") + 8 + 1 + 43


def test_a_secret_is_not_kept_anywhere(file):
    secret = create_key(file, "anna")
    random_part = secret[len("bgr_12345678_") :]
    assert hashlib.sha256(secret.encode()).hexdigest() in file.read_text()
    assert all(random_part not in path.read_text() for path in file.parent.iterdir())
    ring = load_ring(file)
    ring.authenticate(secret)
    assert random_part not in repr(vars(ring))


def test_a_printed_key_does_not_show_its_hash(file):
    create_key(file, "anna")
    (key,) = list_keys(file)
    assert key.sha256 not in repr(key)


@pytest.mark.parametrize(
    "change",
    [
        lambda secret: secret[:-1],
        lambda secret: secret + "x",
        lambda secret: secret[:-1] + ("A" if secret[-1] != "A" else "B"),
        lambda secret: secret.upper(),
        lambda secret: f"bgr_00000000_{secret.split('_', 2)[2]}",
        lambda secret: secret.removeprefix("bgr_"),
        lambda secret: f" {secret}",
        lambda secret: "",
        lambda secret: "bgr_",
        lambda secret: "bgr__",
        lambda secret: "\x00" * 56,
        lambda secret: "\xff\ud800",
        lambda secret: "x" * 1_000_000,
    ],
)
def test_anything_but_the_secret_is_refused(file, change):
    secret = create_key(file, "anna")
    ring = load_ring(file)
    assert ring.authenticate(change(secret)) is None
    assert ring.authenticate(secret) is not None
    assert ring.authenticate(change(secret)) is None


def test_each_of_several_keys_is_told_apart(file):
    secrets = {name: create_key(file, name) for name in ("anna", "ben", "cara")}
    ring = load_ring(file)
    for _ in range(2):  # looked up, then remembered
        assert {name: ring.authenticate(secret).name for name, secret in secrets.items()} == {n: n for n in secrets}


def test_only_right_secrets_are_remembered(file):
    secret = create_key(file, "anna")
    ring = load_ring(file)
    for number in range(100):
        ring.authenticate(f"{secret[:-3]}{number:03}")
    assert len(ring._verified) <= 1
    ring.authenticate(secret)
    assert list(ring._verified) == [hashlib.sha256(secret.encode()).digest()]


def test_a_key_that_was_revoked_is_refused(file):
    anna, ben = create_key(file, "anna"), create_key(file, "ben")
    assert revoke_key(file, "anna").name == "anna"
    ring = load_ring(file)
    assert ring.authenticate(anna) is None
    assert ring.authenticate(ben) is not None
    assert [key.name for key in ring.live] == ["ben"]
    assert [key.name for key in ring.keys] == ["anna", "ben"]


def test_a_key_can_be_revoked_by_its_id(file):
    secret = create_key(file, "anna")
    revoke_key(file, secret_id(secret))
    assert load_ring(file).authenticate(secret) is None


def test_a_revoked_keys_name_is_free_again(file):
    old = create_key(file, "anna")
    revoke_key(file, "anna")
    new = create_key(file, "anna")
    assert load_ring(file).authenticate(new) is not None
    assert load_ring(file).authenticate(old) is None
    revoke_key(file, "anna")
    assert load_ring(file).authenticate(new) is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ana", "no key with the id or name 'ana', did you mean 'anna'?"),
        ("ben", "key 'ben' is revoked already"),
    ],
)
def test_revoking_a_key_that_is_not_there_says_so(file, word, message):
    create_key(file, "anna")
    create_key(file, "ben")
    revoke_key(file, "ben")
    with pytest.raises(SpecError) as caught:
        revoke_key(file, word)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_revoking_in_a_file_that_is_not_there_makes_none(file):
    with pytest.raises(StorageError, match="no key file here; make one with `bigray keys add NAME"):
        revoke_key(file, "anna")
    assert not file.exists()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", "x" * 65, "ä", "a\nb", "a\x00", "[red]", "a\n"])
def test_a_name_that_is_none_is_refused(file, name):
    with pytest.raises(SpecError, match="name: ") as caught:
        create_key(file, name)
    assert "\n" not in str(caught.value)
    assert not file.exists()


def test_all_faults_of_a_request_are_told_together(file):
    with pytest.raises(SpecError) as caught:
        create_key(file, "a b", scopes=("predicts", "admin"), rate_per_s=float("nan"))
    assert len(caught.value.faults) == 3
    assert "did you mean 'predict'?" in str(caught.value)


def test_two_live_keys_cannot_share_a_name(file):
    create_key(file, "anna")
    with pytest.raises(SpecError, match="there is a live key named 'anna'"):
        create_key(file, "anna")
    assert len(list_keys(file)) == 1


def test_admin_includes_predict_and_not_the_other_way_round(file):
    ring = KeyRing([])
    assert ring.live == ()
    create_key(file, "anna", scopes=("admin",), rate_per_s=2.5)
    create_key(file, "ben")
    anna, ben = list_keys(file)
    assert (anna.allows("predict"), anna.allows("admin"), anna.rate_per_s) == (True, True, 2.5)
    assert (ben.allows("predict"), ben.allows("admin")) == (True, False)


def test_the_file_is_its_owners_alone(file):
    mask = os.umask(0)
    try:
        create_key(file, "anna")
        file.chmod(0o644)
        create_key(file, "ben")
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()} == {0o600}


def test_what_a_dead_process_left_does_not_stop_the_next(file):
    create_key(file, "anna")
    leftover = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    leftover.write_text("half")
    create_key(file, "ben")
    assert not leftover.exists()
    assert len(list_keys(file)) == 2


def test_a_place_that_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/keys\.json") as caught:
        create_key(tmp_path / "file" / "keys.json", "anna")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["folder/", ".", "..", "a/..", ""])
def test_a_folder_is_no_key_file(location):
    with pytest.raises(SpecError, match="expected a key file"):
        open_key_file(location)


@pytest.mark.parametrize(
    ("location", "root", "name"),
    [
        ("keys.json", str(Path.cwd()), "keys.json"),
        ("/keys.json", "/", "keys.json"),
        ("~/keys.json", str(Path.home()), "keys.json"),
        ("file:///data/keys.json", "/data", "keys.json"),
        ("s3://bucket/team/keys.json?region=eu-west-1", "bucket/team", "keys.json"),
    ],
)
def test_a_location_is_a_path_or_a_uri(location, root, name):
    file = open_key_file(location)
    assert (file.storage.root, file.name, file.place) == (root, name, location)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b"null",
        b"[" * 100_000,
        b"{}",
        b'{"format": 2, "keys": []}',
        b'{"format": "' + b"x" * 10_000 + b'"}',
        b'{"format": 1, "keys": {}}',
        b'{"format": 1, "keys": [], "more": 1}',
        b'{"format": 1, "keys": [{"id": "x"}]}',
        b'{"format": 1, "keys": [], "a\\nb": 1}',
    ],
)
def test_a_broken_file_is_told_in_one_line_that_names_it(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    for ask in (load_ring, lambda place: create_key(place, "anna"), lambda place: revoke_key(place, "anna")):
        with pytest.raises(StorageError) as caught:
            ask(file)
        text = str(caught.value)
        assert text.startswith(f"{file}: not a key file")
        assert "\n" not in text
        assert len(text) < 300 + len(str(file))
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"rate_per_s": 0},
        {"rate_per_s": float("inf")},
        {"sha256": "00"},
        {"name": "a b"},
        {"id": "../../x"},
        {"revoked": False},
        {"note": ""},
    ],
)
def test_a_key_that_was_edited_wrongly_breaks_the_file(file, change):
    create_key(file, "anna")
    document = json.loads(file.read_text())
    document["keys"][0] |= change
    file.write_text(json.dumps(document))
    with pytest.raises(StorageError, match=r"not a key file: keys\.0") as caught:
        load_ring(file)
    assert "\n" not in str(caught.value)


def test_one_key_twice_breaks_the_file(file):
    create_key(file, "anna")
    document = json.loads(file.read_text())
    document["keys"] *= 2
    file.write_text(json.dumps(document))
    with pytest.raises(StorageError, match="two keys have the same id"):
        load_ring(file)


def test_no_key_is_lost_among_processes_that_write_at_once(file):
    code = (
        "import sys; from bigray.serve.protect.keys import create_key, revoke_key\n"
        "for n in range(10): create_key(sys.argv[1], f'{sys.argv[2]}{n}')\n"
        "revoke_key(sys.argv[1], f'{sys.argv[2]}0')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    expected = {f"{name}{number}" for name in "ab" for number in range(10)}
    assert {key.name for key in list_keys(file)} == expected
    assert {key.name for key in load_ring(file).live} == expected - {"a0", "b0"}


def test_no_key_is_lost_among_threads_that_write_at_once(file):
    threads = [threading.Thread(target=create_key, args=(file, f"key{number}")) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list_keys(file)) == 20


def remote_file(tmp_path: Path) -> KeyFile:
    """A key file as in an object store: no lock to hold."""
    return KeyFile(Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "", "store://"), "keys.json", "k")


def test_a_key_that_came_between_is_kept_where_there_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "open_key_file", lambda location: remote_file(tmp_path))
    now, others = keys._now, ["ben"]

    def change_meanwhile(held, key, place):
        if others:
            create_key("k", others.pop())
        return with_key(held, key, place)

    with_key = keys._with_key
    monkeypatch.setattr(keys, "_with_key", change_meanwhile)
    create_key("k", "anna")
    assert {key.name for key in list_keys("k")} == {"anna", "ben"}
    assert now() >= list_keys("k")[0].created


def test_a_file_that_others_never_stop_changing_is_given_up(tmp_path, monkeypatch):
    file = remote_file(tmp_path)
    count = iter(range(100))
    monkeypatch.setattr(KeyFile, "read", lambda self: b'{"format": 1}' + b" " * next(count))
    monkeypatch.setattr(keys, "open_key_file", lambda location: file)
    with pytest.raises(StorageError, match="others keep changing it"):
        create_key("k", "anna")


def test_the_table_shows_every_key_and_no_secret(file):
    secret = create_key(file, "anna", scopes=("predict", "admin"), rate_per_s=20)
    create_key(file, "ben")
    revoke_key(file, "ben")
    console = Console(width=160)
    with console.capture() as captured:
        console.print(keys_table(load_ring(file)))
    text = captured.get()
    (anna,) = [line for line in text.splitlines() if "anna" in line]
    (ben,) = [line for line in text.splitlines() if "ben" in line]
    assert [secret_id(secret) in anna, "admin, predict" in anna, "20/s" in anna, "live" in anna] == [True] * 4
    assert "revoked 20" in ben
    assert secret not in text
    assert not any(key.sha256[:8] in text for key in list_keys(file))
