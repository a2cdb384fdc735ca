"""What a run does to its storage, without the training, in a process of its own.

    python storage_process.py run|check <storage> <megabytes of a checkpoint>

`run` goes on where an earlier process ended, and prints by how many MB the process has grown. Where there is an error
it is printed; exits as bigray does.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator

from bigray import storage as storages
from bigray.errors import BigrayError
from bigray.journal import Journal, read_journal
from bigray.paths import RUN_FILE, RunPaths
from bigray.storage import Content, commit_folder, open_storage, read_folder, read_manifest, remove_leftovers

STEPS = (1, 2, 3)
MB = 1 << 20


class Pieces:
    """The bytes of a checkpoint of a step, a megabyte at a time; can be walked again."""

    def __init__(self, step: int, megabytes: int) -> None:
        self.step, self.megabytes = step, megabytes

    def __iter__(self) -> Iterator[bytes]:
        return (bytes([self.step + number % 100]) * MB for number in range(self.megabytes))


def paths_of(uri: str) -> RunPaths:
    return RunPaths(open_storage(uri).child("run"), "run")


def folder_of(step: int) -> str:
    return RunPaths.checkpoint("0-net", step)


def is_done(paths: RunPaths, step: int) -> bool:
    return paths.storage.exists(f"{folder_of(step)}/{storages.MANIFEST}")


def run(uri: str, megabytes: int) -> None:
    """A journal, and a checkpoint for each step that has none."""
    paths = paths_of(uri)
    paths.storage.check_writable()
    paths.storage.write_bytes(RUN_FILE, json.dumps({"run": "run"}).encode())
    journal = Journal.open(paths)
    journal.append("attempt")
    for step in STEPS:
        if is_done(paths, step):
            continue
        files: dict[str, Content] = {"model.bin": Pieces(step, megabytes), "progress.json": b"{}"}
        token = f"{journal.attempt:04d}"
        commit_folder(paths.storage, folder_of(step), files, {"step": step}, token=token, before_commit=lambda: None)
        remove_leftovers(paths.storage, folder_of(step), read_manifest(paths.storage, folder_of(step)))
        journal.append("checkpoint", "0-net", step=step)
        journal.flush(force=True)


def check(uri: str, megabytes: int) -> None:
    """Everything is there, whole, and nothing else is."""
    paths = paths_of(uri)
    for step in STEPS:
        folder = read_folder(paths.storage, folder_of(step))
        assert folder.files["model.bin"] == b"".join(Pieces(step, megabytes))
        named = {entry["stored"] for entry in folder.manifest["files"].values()}
        assert set(paths.storage.list_names(folder_of(step))) == {*named, storages.MANIFEST}
    steps = {event["step"] for event in read_journal(paths) if event["kind"] == "checkpoint"}
    assert steps == set(STEPS)


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(action: str, uri: str, megabytes: str) -> None:
    if action == "check":
        check(uri, int(megabytes))
        return
    open_storage(uri).exists("anything")  # the client's own memory is no matter of how much is written
    before = peak_mb()
    run(uri, int(megabytes))
    print(peak_mb() - before)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BigrayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
