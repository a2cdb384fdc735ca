"""Storage on an object store that is busy, loses answers, stalls or goes for a while: a real S3 server behind faults.

What a run does to its storage, without Ray: `storage_process`. With Ray: `test_s3_training`.
"""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from pyarrow import fs

import bigray.s3
import bigray.storage
from bigray.bundle import ModelBundle
from bigray.errors import StorageError
from bigray.serve.sample import write_sample_bundle
from bigray.storage import MANIFEST, Storage, commit_folder, open_storage
from bigray.storage_retry import Patience
from tests.integration import storage_process as process
from tests.integration.s3_faults import FaultyProxy, moto_server

SECRET = "planted/Secret+Key0123456789abcdefghij"
KEY = "PLANTEDKEY0123456789"
STALL_TIMEOUT_S = 3.0
NAMES = itertools.count()
MANY_MB, GROWN_MB = 64, 40
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    with moto_server() as upstream, FaultyProxy(upstream) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _environment(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setitem(bigray.s3._FIXED, "request_timeout", STALL_TIMEOUT_S)
    monkeypatch.setattr(bigray.s3, "ATTEMPTS", 2)  # so that more is left to bigray's own
    yield
    proxy.heal()


@pytest.fixture
def uri(proxy: FaultyProxy) -> str:
    return f"s3://bucket/runs-{next(NAMES)}{proxy.options}"


def _busy(proxy: FaultyProxy) -> None:
    proxy.faults.busy_share = 0.2


def _lossy(proxy: FaultyProxy) -> None:
    proxy.faults.lost_share = 0.1


def _cutting(proxy: FaultyProxy) -> None:
    proxy.faults.cut_share = 0.2


def _stalled(proxy: FaultyProxy) -> None:
    proxy.faults.stall(8.0)


def _gone(proxy: FaultyProxy) -> None:
    proxy.outage(6.0)


def _slow(proxy: FaultyProxy) -> None:
    proxy.faults.bytes_per_s = 20e6


@pytest.mark.parametrize("fault", [_busy, _lossy, _cutting, _stalled, _gone, _slow])
def test_a_run_goes_on_through_what_passes(proxy: FaultyProxy, uri: str, fault: Callable[[FaultyProxy], None]) -> None:
    open_storage(uri).check_writable()
    fault(proxy)

    process.run(uri, 12)  # of two parts
    process.check(uri, 12)


def test_a_bundle_is_written_and_read_through_a_busy_store(proxy: FaultyProxy, uri: str) -> None:
    proxy.faults.busy_share, proxy.faults.cut_share = 0.2, 0.2
    location = write_sample_bundle(uri, name="bundle")

    assert location.endswith("/bundle" + proxy.options)
    assert ModelBundle.load(location) == ModelBundle.load(open_storage(uri).child("bundle"))


def test_an_outage_that_does_not_end_is_told_in_one_line_and_the_run_goes_on_later(
    proxy: FaultyProxy, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(uri)
    process.run(uri, 1)
    storage.child("run").delete_folder(process.folder_of(3))
    monkeypatch.setattr(bigray.storage, "PATIENCE", Patience(2.0))
    journal_and_all = _objects(storage)
    proxy.down()

    with pytest.raises(StorageError) as caught:
        commit_folder(open_storage(uri), "run/late", {"a.bin": b"a"}, {})

    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{open_storage(uri).uri_of('run/late/a.bin')}: cannot write: ")
    assert message.endswith("; once it answers again, run the same command")
    proxy.up()
    assert _objects(storage) == journal_and_all
    process.run(uri, 1)
    process.check(uri, 1)


@pytest.mark.parametrize("size", [1, 12 << 20], ids=["one request", "parts"])
def test_what_was_there_stays_whole_when_the_store_goes_while_it_is_replaced(
    proxy: FaultyProxy, uri: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigray.storage, "PATIENCE", Patience(0.5))
    storage = open_storage(uri)
    storage.write_bytes("a", b"old")

    def pieces() -> Iterator[bytes]:
        yield bytes(size)
        proxy.down()
        yield bytes(size)

    with pytest.raises(StorageError, match="cannot write"):
        storage.write_file("a", pieces())
    proxy.up()
    assert storage.read_bytes("a") == b"old"


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("megabytes", [1, 12])
def test_content_that_breaks_off_leaves_no_part_of_itself(uri: str, megabytes: int) -> None:
    storage = open_storage(uri)

    def pieces() -> Iterator[bytes]:
        yield bytes(megabytes << 20)
        raise Interrupted

    with pytest.raises(Interrupted):
        commit_folder(storage, "ckpt", {"a.bin": pieces()}, {})

    assert not storage.exists("ckpt/a.bin")
    assert not storage.exists(f"ckpt/{MANIFEST}")


def test_an_iterator_is_not_walked_twice(proxy: FaultyProxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it would be taken for the whole."""
    storage = open_storage(uri)
    proxy.down()

    with pytest.raises(StorageError, match="cannot write"):
        storage.write_file("a", iter([b"first", b"second"]))


def test_a_folder_is_deleted_though_the_answers_get_lost(proxy: FaultyProxy, uri: str) -> None:
    storage = open_storage(uri)
    for number in range(4):
        commit_folder(storage, f"ckpt-{number}", {"a.bin": b"a"}, {})
    proxy.faults.lost_share = 0.3

    for number in range(4):
        storage.delete_folder(f"ckpt-{number}")

    proxy.heal()
    assert _objects(storage) == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("s3://nowhere-at-all/runs", "cannot write: .*(NO_SUCH_BUCKET|does not exist|not found|404)"),
        ("s3://bucket/", ""),
    ],
)
def test_what_no_waiting_mends_is_told_at_once(proxy: FaultyProxy, place: str, text: str) -> None:
    storage = open_storage(place + proxy.options)
    if not text:
        storage.check_writable()
        with pytest.raises(StorageError, match=r"no-such-file.*cannot read"):
            storage.read_bytes("no-such-file")
        return
    before = proxy.num_requests

    with pytest.raises(StorageError, match=text):
        storage.check_writable()

    assert proxy.num_requests - before < 5


def test_memory_stays_bounded_while_much_is_written_to_a_store_that_is_slow(proxy: FaultyProxy, uri: str) -> None:
    proxy.faults.bytes_per_s, proxy.faults.busy_share = 20e6, 0.1
    done = _in_a_process("run", uri, MANY_MB)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < GROWN_MB
    assert _in_a_process("check", uri, MANY_MB).returncode == 0


def test_a_process_that_cannot_write_exits_as_for_storage(proxy: FaultyProxy, uri: str) -> None:
    uri = uri.replace("bucket/", "no-such-bucket/")
    done = _in_a_process("run", uri, 1)

    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_endpoint_of_the_environment_is_used(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage = open_storage("s3://bucket/from-environment")
    storage.write_bytes("a", b"1")

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert open_storage("s3://bucket/from-environment" + proxy.options).read_bytes("a") == b"1"
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


def test_no_key_gets_into_what_is_stored_or_handed_to_workers(uri: str) -> None:
    storage = open_storage(uri)
    process.run(uri, 1)
    write_sample_bundle(uri, name="bundle")

    held = [pickle.dumps(storage), pickle.dumps(process.paths_of(uri))]
    held += [storage.filesystem.open_input_stream(path).read() for path in _objects(storage)]
    assert len(held) > 10
    for secret in (KEY, SECRET):
        assert not any(secret.encode() in data for data in held)


def test_a_pickled_storage_has_the_same_place_and_patience(uri: str) -> None:
    storage = Storage(open_storage(uri).filesystem, "bucket/x", uri, Patience(3.0))
    storage.write_bytes("a", b"1")

    again = pickle.loads(pickle.dumps(storage))

    assert (again.root, again.uri, again.patience) == (storage.root, storage.uri, storage.patience)
    assert again.read_bytes("a") == b"1"


def _objects(storage: Storage) -> list[str]:
    found = storage.filesystem.get_file_info(fs.FileSelector(storage.root, allow_not_found=True, recursive=True))
    return sorted(info.path for info in found if info.type == fs.FileType.File)


def _in_a_process(action: str, uri: str, megabytes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, process.__file__, action, uri, str(megabytes)]
    return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=200, check=False)
