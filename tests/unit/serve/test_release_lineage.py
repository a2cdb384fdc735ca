from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigray.bundle import WEIGHTS
from bigray.errors import SpecError, StorageError
from bigray.serve.release.lineage import Lineage, find_lineage, parse_version
from bigray.storage import MANIFEST

DIGESTS = {"one": "a1b2c3d4e5f6" + "0" * 52, "two": "a1b2c3ffffff" + "1" * 52, "three": "0123456789ab" + "2" * 52}
ONE, TWO, THREE = (digest[:12] for digest in DIGESTS.values())


def manifest(run: str, digest: str) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": "digits",
        "origin": {
            "run": run,
            "trial": "cnn-7",
            "model": "cnn",
            "step": 1200,
            "epoch": 4,
            "metrics": {"accuracy": 0.98},
            "config": {"lr": 0.01, "global_batch_size": 64},
            "seeds": {"seed": 3},
            "data_fingerprint": "f1f2",
            "git": "deadbeef",
            "versions": {"torch": "2.13.0"},
        },
        "inputs": {"columns": [{"name": "image", "shape": [8, 8]}]},
        "outputs": {"task": "classification", "num_outputs": 10, "target": "label"},
        "factory": {"factory": "bigray.models:cnn", "params": {}},
        "files": {WEIGHTS: {"size": 4, "sha256": digest}, "model.onnx": {"size": 2, "sha256": "9" * 64}},
    }


def write(folder: Path, document: object) -> Path:
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(document if isinstance(document, str) else json.dumps(document))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A storage of three runs, of which each has a bundle."""
    for name, digest in DIGESTS.items():
        write(tmp_path / "runs" / f"digits-{name}" / "bundle", manifest(f"digits-{name}", digest))
    (tmp_path / "runs" / "digits-unfinished").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("a file")
    return tmp_path / "runs"


def change(folder: Path, by: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    by(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def test_a_version_leads_to_the_training_that_made_it(runs: Path) -> None:
    assert find_lineage(ONE, [str(runs)], {}) == Lineage(
        version=ONE,
        bundle=f"{runs}/digits-one/bundle",
        schema_version=1,
        name="digits",
        weights_sha256=DIGESTS["one"],
        files=("model.onnx", WEIGHTS),
        task="classification",
        target="label",
        inputs=("image",),
        run="digits-one",
        trial="cnn-7",
        model="cnn",
        factory="bigray.models:cnn",
        step=1200,
        epoch=4,
        metrics={"accuracy": 0.98},
        config={"lr": 0.01, "global_batch_size": 64},
        seeds={"seed": 3},
        data_fingerprint="f1f2",
        git="deadbeef",
        versions={"torch": "2.13.0"},
    )


@pytest.mark.parametrize(
    "what",
    [
        ONE,
        ONE.upper(),
        ONE[:7],
        DIGESTS["one"],
        f"x-bigray-version: {ONE}",
        f"< X-Bigray-Version: {ONE}\r\n",
        f'x-bigray-version:"{ONE}"',
    ],
)
def test_a_version_is_taken_as_it_is_pasted(runs: Path, what: str) -> None:
    assert find_lineage(what, [str(runs)], {}).run == "digits-one"


@pytest.mark.parametrize("what", ["", "a1b2c", "digits-one", "x-bigray-version:", "a1b2c3d4e5f6 and more", "g" * 12])
def test_what_is_no_version_is_refused(what: str) -> None:
    with pytest.raises(SpecError, match="no version; it has 12 hex digits"):
        parse_version(what)


def test_a_beginning_of_several_versions_is_refused_with_their_names(runs: Path) -> None:
    with pytest.raises(StorageError, match=f"'a1b2c3' is the beginning of 2 versions: {ONE}, {TWO}; give more digits"):
        find_lineage("a1b2c3", [str(runs)], {})


def test_a_beginning_counts_versions_whose_bundle_is_gone(runs: Path) -> None:
    shutil.rmtree(runs / "digits-two")

    with pytest.raises(StorageError, match="beginning of 2 versions"):
        find_lineage("a1b2c3", [str(runs)], {TWO: str(runs / "digits-two" / "bundle")})


def test_a_version_that_was_served_is_found_without_a_folder_to_search(runs: Path) -> None:
    found = find_lineage(THREE, [], {THREE: str(runs / "digits-three" / "bundle")})

    assert (found.run, found.bundle) == ("digits-three", str(runs / "digits-three" / "bundle"))
    assert find_lineage(THREE[:6], [], {THREE: found.bundle}) == found


def test_a_served_bundle_that_was_moved_is_found_in_the_folders(runs: Path) -> None:
    known = {ONE: "/nowhere/bundle", TWO: "unknownscheme://bucket/bundle"}

    assert find_lineage(ONE, [str(runs)], known).bundle == f"{runs}/digits-one/bundle"


def test_a_served_bundle_that_is_gone_is_told(runs: Path) -> None:
    with pytest.raises(StorageError, match=r"version b{12} was served from /nowhere/bundle, but that bundle is gone"):
        find_lineage("b" * 12, [str(runs)], {"b" * 12: "/nowhere/bundle"})


def test_a_place_that_holds_another_version_now_does_not_pass_for_the_one_asked_for(runs: Path) -> None:
    place = str(runs / "digits-one" / "bundle")

    with pytest.raises(StorageError, match=f"served from {place}, but that bundle holds version {ONE} now"):
        find_lineage("b" * 12, [], {"b" * 12: place})


def test_an_unknown_version_is_told_with_the_nearest_and_what_was_searched(runs: Path) -> None:
    with pytest.raises(StorageError, match=rf"version a1b2c3d4e5f7: .* 3 bundles below {runs}; nearest: {ONE}, {TWO}"):
        find_lineage("a1b2c3d4e5f7", [str(runs)], {})


def test_a_search_in_no_folder_says_so() -> None:
    with pytest.raises(StorageError, match="not served here, and not in 0 bundles below no folder; give the storage"):
        find_lineage(ONE, [], {})


@pytest.mark.parametrize("place", ["digits-one", "digits-one/bundle"])
def test_a_run_or_a_bundle_can_be_searched_itself(runs: Path, place: str) -> None:
    assert find_lineage(ONE, [str(runs / place)], {}).run == "digits-one"


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path, runs: Path) -> None:
    assert find_lineage(ONE, [str(tmp_path / "nowhere"), str(runs)], {}).run == "digits-one"


def test_a_uri_is_searched_as_a_folder_is(runs: Path) -> None:
    assert find_lineage(ONE, [f"file://{runs}"], {}).bundle == f"file://{runs}/digits-one/bundle"


def test_the_same_weights_elsewhere_are_named_as_copies(runs: Path) -> None:
    shutil.copytree(runs / "digits-one", runs / "digits-one-again")

    found = find_lineage(ONE, [str(runs)], {})

    assert (found.bundle, found.copies) == (f"{runs}/digits-one/bundle", (f"{runs}/digits-one-again/bundle",))


def test_one_place_written_in_two_ways_is_no_copy(runs: Path) -> None:
    assert find_lineage(ONE, [str(runs), os.path.relpath(runs)], {}).copies == ()


@pytest.mark.parametrize(
    "document",
    ["", "not json", "[]", "{}", {"files": {}}, {"files": {WEIGHTS: {"sha256": 5}}}, "[" * 100_000],
    ids=["empty", "no json", "a list", "nothing", "no weights", "no hash", "deep"],
)
def test_a_broken_manifest_beside_it_ends_no_search(runs: Path, document: object) -> None:
    write(runs / "digits-broken" / "bundle", document)

    assert find_lineage(ONE, [str(runs)], {}).run == "digits-one"


def test_a_manifest_of_a_newer_schema_is_told_with_what_is_new(runs: Path) -> None:
    def renew(document: dict[str, Any]) -> None:
        document.update(schema_version=7, golden={"rows": 3})
        document["origin"]["command"] = "bigray tune"

    change(runs / "digits-one" / "bundle", renew)
    found = find_lineage(ONE, [str(runs)], {})

    assert (found.schema_version, found.run, found.more) == (7, "digits-one", {"command": "bigray tune"})


def test_a_manifest_that_says_little_is_told_with_what_there_is(runs: Path) -> None:
    write(runs / "old" / "bundle", {"files": {WEIGHTS: {"sha256": "c" * 64}}, "origin": {"run": "old"}, "outputs": []})
    found = find_lineage("c" * 12, [str(runs)], {})

    assert (found.run, found.step, found.metrics, found.schema_version) == ("old", None, {}, None)


def test_a_lineage_is_plain_json(runs: Path) -> None:
    document = json.loads(json.dumps(find_lineage(ONE, [str(runs)], {}).to_json()))

    assert (document["version"], document["metrics"]) == (ONE, {"accuracy": 0.98})
