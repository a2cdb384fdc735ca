from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from bigray.bundle import ModelBundle, OutputSchema
from bigray.data.features import Column
from bigray.errors import SpecError, StorageError
from bigray.serve.sample import write_sample_bundle
from bigray.workflow import curl_command, extended_total, find_bundle, label_metrics, read_files


def _sample(folder: Path, column: str = "width") -> str:
    return write_sample_bundle(
        str(folder), name="bundle", columns=(Column(name=column),), params={"hidden": [2]}, onnx=False
    )


def test_the_bundle_of_a_run_is_found_from_the_run_and_from_itself(tmp_path: Path) -> None:
    location = _sample(tmp_path / "digits-1")

    assert find_bundle(tmp_path / "digits-1") == location
    assert find_bundle(location) == location


def test_a_run_named_without_its_number_is_suggested(tmp_path: Path) -> None:
    _sample(tmp_path / "digits-1a2b3c")

    with pytest.raises(StorageError, match=r"digits: no bundle here; did you mean .*/digits-1a2b3c\?"):
        find_bundle(tmp_path / "digits")


def test_a_folder_without_a_bundle_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing: no bundle here$"):
        find_bundle(tmp_path / "nothing")


@pytest.mark.parametrize("column", ["width", "the owner's height", 'quoted "name"', "größe $HOME"])
def test_the_curl_command_can_be_pasted_into_a_shell(tmp_path: Path, column: str) -> None:
    manifest = ModelBundle.load(_sample(tmp_path, column)).manifest

    words = shlex.split(curl_command("http://127.0.0.1:8000", manifest))

    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/predict"]
    assert words[-2] == "-d"
    assert json.loads(words[-1]) == {"records": [manifest.example]}


def test_the_faults_of_all_files_of_a_command_are_told_together(tmp_path: Path) -> None:
    for name in ("job.toml", "search.toml"):
        (tmp_path / name).write_text("unknown = 1\n")
    (tmp_path / "serve.yaml").write_text("unknown: 1\n")

    with pytest.raises(SpecError) as caught:
        read_files(tmp_path / "job.toml", (), tmp_path / "search.toml", tmp_path / "serve.yaml")

    for name in ("job.toml", "search.toml", "serve.yaml"):
        assert any(name in fault for fault in caught.value.faults), caught.value.faults


@pytest.mark.parametrize(
    ("events", "total"),
    [
        ([], 8),
        ([{"kind": "completed", "whole": True, "trials": 5}], 8),
        ([{"kind": "completed", "whole": True, "trials": 5}, {"kind": "extended", "trials": 8}], 8),
        (
            [
                {"kind": "completed", "whole": True, "trials": 5},
                {"kind": "extended", "trials": 8},
                {"kind": "completed", "whole": True, "trials": 8},
            ],
            11,
        ),
    ],
    ids=["not complete", "complete", "extension under way", "extended"],
)
def test_an_extension_that_was_cut_off_goes_on_and_one_that_has_ended_is_followed_by_another(
    events: list[dict[str, Any]], total: int
) -> None:
    assert extended_total(5, 3, events) == total


def test_the_labels_of_a_holdout_are_measured_by_the_task() -> None:
    binary = OutputSchema(task="binary", num_outputs=1, target="y", class_names=(0, 1))
    classes = OutputSchema(task="classification", num_outputs=2, target="y", class_names=("a", "b"))
    labels = OutputSchema(task="multilabel", num_outputs=2, target="y", class_names=("a", "b"))

    found = label_metrics([1, 1, 0, 0], [1, 0, 1, 1], binary)
    assert found == {"accuracy": 0.25, "precision": 0.5, "recall": pytest.approx(1 / 3)}
    assert label_metrics([0], [0], binary) == {"accuracy": 1.0, "precision": 0.0, "recall": 0.0}
    assert label_metrics(["a", "b"], ["a", "a"], classes) == {"accuracy": 0.5}
    assert label_metrics([["a"], ["a", "b"], []], [["a"], ["b"], []], labels) == {
        "exact_match": pytest.approx(2 / 3),
        "micro_f1": 0.8,
    }
