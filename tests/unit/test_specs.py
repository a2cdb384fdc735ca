from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from bigray.specs import METRICS, JobSpec, ModelSpec, RangeSpec, SearchSpec, TrainingSpec, TrialSpec, digest

DOCUMENT: dict[str, Any] = {
    "name": "digits",
    "data": {"source": "rows.csv", "target": "label"},
    "models": {"mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [8]}}},
    "training": {"task": "classification", "lr": 0.01},
}


def _job(**changes: Any) -> JobSpec:
    return JobSpec.model_validate({**DOCUMENT, **changes})


def _trial(**changes: Any) -> TrialSpec:
    values = {
        "trial_id": "0-mlp",
        "model_name": "mlp",
        "model": ModelSpec(factory="bigray.models:mlp"),
        "training": TrainingSpec(task="classification"),
        "seed": 0,
    }
    return TrialSpec(**{**values, **changes})


def test_a_spec_cannot_be_changed() -> None:
    job = _job()

    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        job.training.lr = 1.0


def test_equal_documents_have_equal_digests_whatever_the_order_of_their_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_another_process_computes_the_same_digest() -> None:
    code = "from bigray.specs import digest; print(digest({'lr': 0.1, 'names': ['a', 'b']}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

    assert done.stdout.strip() == digest({"lr": 0.1, "names": ["a", "b"]})


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"task": "classification", "lr": 0.02}},
        {"seed": 1},
        {"data": {"source": "other.csv", "target": "label"}},
        {"data": {"source": "rows.csv", "target": "label", "split": {"seed": 1}}},
        {"models": {"mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [16]}}}},
    ],
)
def test_what_decides_the_result_changes_the_fixed_part(changes: dict[str, Any]) -> None:
    assert _job(**changes).fixed_by() != _job().fixed_by()


@pytest.mark.parametrize("changes", [{"storage": "/elsewhere"}, {"scaling": {"num_workers": 4}}])
def test_where_and_by_how_many_workers_does_not_change_the_fixed_part(changes: dict[str, Any]) -> None:
    assert _job(**changes).fixed_by() == _job().fixed_by()


def test_the_config_hash_is_of_the_settings_and_not_of_the_trials_number() -> None:
    assert _trial(trial_id="7-mlp").config_hash == _trial().config_hash
    assert _trial(seed=1).config_hash != _trial().config_hash
    assert _trial(training=TrainingSpec(task="classification", lr=0.5)).config_hash != _trial().config_hash


@pytest.mark.parametrize(
    ("settings", "metric", "mode"),
    [
        ({"task": "classification"}, "val_accuracy", "max"),
        ({"task": "regression"}, "val_mse", "min"),
        ({"task": "regression", "metric": "val_r2"}, "val_r2", "max"),
        ({"task": "classification", "metric": "val_loss"}, "val_loss", "min"),
        ({"task": "binary"}, "val_f1", "max"),
        ({"task": "multilabel"}, "val_macro_f1", "max"),
        ({"task": "language"}, "val_loss", "min"),
        ({"task": "language", "metric": "val_perplexity"}, "val_perplexity", "min"),
    ],
)
def test_the_winner_is_picked_by_the_named_metric_or_the_tasks_first(
    settings: dict[str, Any], metric: str, mode: str
) -> None:
    spec = TrainingSpec.model_validate(settings)

    assert (spec.selection_metric, spec.selection_mode) == (metric, mode)


@pytest.mark.parametrize("threshold", ["f1", 0.25, 1, {"recall": 0.99}])
def test_a_threshold_is_a_rule_or_a_number_and_survives_json(threshold: Any) -> None:
    spec = TrainingSpec.model_validate({"task": "multilabel", "threshold": threshold})

    assert spec.threshold == threshold
    assert TrainingSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"threshold": "best"}, "use 'f1', a number from 0 to 1, or"),
        ({"threshold": 1.5}, "use 'f1', a number from 0 to 1, or"),
        ({"threshold": True}, "use 'f1', a number from 0 to 1, or"),
        ({"threshold": {"recall": 0}}, "use 'f1', a number from 0 to 1, or"),
        ({"threshold": {"recall": 0.9, "f1": 1}}, "use 'f1', a number from 0 to 1, or"),
        ({"positive": 1.5}, "use the class as text or as a whole number"),
        ({"task": "classification", "positive": "a"}, "positive: is for binary, and the task is classification"),
        ({"task": "language", "threshold": 0.3}, "threshold: is for binary and multilabel"),
        ({"task": "multilabel", "class_weights": "balanced"}, "are for classification and binary"),
        ({"task": "binary", "metric": "val_macro_f1"}, "never reported for binary; choose one of val_f1"),
    ],
)
def test_settings_of_another_task_are_told(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingSpec.model_validate({"task": "binary", **settings})
    assert len(caught.value.errors()) == 1
    assert fault in str(caught.value)


def test_every_task_can_be_ranked_by_its_loss() -> None:
    assert all(metrics["val_loss"] == "min" for metrics in METRICS.values())


@pytest.mark.parametrize("range_", [{}, {"uniform": [0, 1], "choice": [1]}, {"choice": []}, {"uniform": ["0", "1"]}])
def test_a_range_is_exactly_one_kind_of_numbers_or_choices(range_: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RangeSpec.model_validate(range_)


def test_a_search_survives_its_way_through_json() -> None:
    search = SearchSpec.model_validate({"space": {"lr": {"log_uniform": [1e-4, 0.1]}}, "trials": 4})

    assert SearchSpec.model_validate(search.model_dump(mode="json")) == search


@pytest.mark.parametrize("setting", [{"exact": True}, {"strategy": "fsdp"}])
def test_what_bigrays_own_loop_promises_cannot_be_asked_of_another(setting: dict[str, Any]) -> None:
    own = {"task": "classification", "loop": "my.mod:train", "metric": "val_f1", "metric_mode": "max"}
    TrainingSpec.model_validate(own)

    with pytest.raises(ValidationError, match="are of bigray's own loop; remove them, or loop"):
        TrainingSpec.model_validate({**own, **setting})
