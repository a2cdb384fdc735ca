from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bigray.errors import SpecError
from bigray.loading import load_job, load_search
from bigray.specs import JobSpec

GOOD = """
name = "digits"
storage = "{folder}/runs"

[data]
source = "{folder}/rows.csv"
target = "label"

[models.net]
factory = "bigray.models:mlp"
params = {{ hidden = [8] }}

[training]
task = "classification"
epochs = 5
lr = 3e-3

[scaling]
num_workers = 2
"""

WriteJob = Callable[..., Path]


@pytest.fixture
def write_job(tmp_path: Path) -> WriteJob:
    """Write the good job file with replacements `(old, new)`; every old text must be in it."""
    (tmp_path / "rows.csv").write_text("a,label\n1,0\n2,1\n")

    def write(*replacements: tuple[str, str]) -> Path:
        text = GOOD.format(folder=tmp_path)
        for old, new in replacements:
            assert old in text, f"{old!r} is not in the good file"
            text = text.replace(old, new)
        path = tmp_path / "job.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def job(write_job: WriteJob) -> JobSpec:
    return load_job(write_job())


def _faults(path: Path, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        load_job(path, overrides)
    return caught.value.faults


def test_a_good_file_becomes_a_job(job: JobSpec, tmp_path: Path) -> None:
    assert job.name == "digits"
    assert job.storage == f"{tmp_path}/runs"
    assert job.models["net"].params == {"hidden": [8]}
    assert (job.training.epochs, job.training.lr, job.training.optimizer) == (5, 0.003, "adamw")
    assert job.scaling.num_workers == 2


def test_reading_a_job_makes_no_folder(job: JobSpec) -> None:
    assert not Path(job.storage).exists()


BAD = [
    ("unknown key at the top", ('name = "digits"', 'name = "d"\nsed = 1'), "sed: unknown key, did you mean 'seed'?"),
    (
        "unknown key in a table",
        ("num_workers", "num_worker"),
        "scaling.num_worker: unknown key, did you mean 'num_workers'?",
    ),
    (
        "unknown key in a model",
        ("factory =", "factroy ="),
        "models.net.factroy: unknown key, did you mean 'factory'?",
    ),
    (
        "unknown key deep inside",
        ('target = "label"', 'target = "label"\nsplit = { holdot = 0.1 }'),
        "data.split.holdot: unknown key, did you mean 'holdout'?",
    ),
    ("a string for a number", ("lr = 3e-3", 'lr = "3e-3"'), "training.lr: should be a valid number, got '3e-3'"),
    ("a float for an integer", ("epochs = 5", "epochs = 5.5"), "training.epochs: should be a valid integer, got 5.5"),
    ("a boolean for an integer", ("epochs = 5", "epochs = true"), "training.epochs: should be a valid integer, got"),
    ("lr nan", ("lr = 3e-3", "lr = nan"), "training.lr: must be a"),
    ("lr infinite", ("lr = 3e-3", "lr = inf"), "training.lr: must be a finite number, got inf"),
    ("lr zero", ("lr = 3e-3", "lr = 0"), "training.lr: should be greater than 0, got 0"),
    ("lr negative", ("lr = 3e-3", "lr = -0.1"), "training.lr: should be greater than 0, got -0.1"),
    (
        "an empty batch",
        ("lr = 3e-3", "global_batch_size = 0"),
        "training.global_batch_size: use a number from 1, or 'auto', got 0",
    ),
    ("a missing key", ('target = "label"', ""), "data.target: required, but missing"),
    ("a missing table", ("[training]", "[models.other]"), "training: required, but missing"),
    ("a name with a slash", ('"digits"', '"a/b"'), "name: use 1 to 64 letters"),
    ("a name with two dots", ('"digits"', '"a..b"'), "name: use 1 to 64 letters"),
    ("an empty name", ('"digits"', '""'), "name: use 1 to 64 letters"),
    ("a model name with a slash", ("[models.net]", '[models."../net"]'), "models.../net: use 1 to 64 letters"),
    ("a negative seed", ('name = "digits"', 'name = "d"\nseed = -1'), "seed: should be greater than or equal to 0"),
    (
        "a metric that is never reported",
        ("lr = 3e-3", 'metric = "val_acc"'),
        "training: metric 'val_acc' is never reported for classification; choose one of val_accuracy",
    ),
    (
        "a split that leaves nothing",
        ('target = "label"', 'target = "label"\nsplit = { validation = 0.5, holdout = 0.5 }'),
        "data.split: validation + holdout = 1 leaves no training rows",
    ),
    (
        "an unknown optimizer",
        ("lr = 3e-3", 'optimizer = "adamx"'),
        "training.optimizer: not an optimizer, did you mean 'adamax'?, got 'adamx'",
    ),
    ("an empty storage", ("storage = ", 'storage = "" #'), "storage: "),
]


@pytest.mark.parametrize(("change", "expected"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_fault_names_the_file_the_key_the_value_and_the_way_out(
    write_job: WriteJob, change: tuple[str, str], expected: str
) -> None:
    path = write_job(change)
    faults = _faults(path)

    assert any(fault.startswith(f"{path}: {expected}") for fault in faults), faults


def test_a_factory_that_its_module_lacks_is_told_with_a_near_match(write_job: WriteJob) -> None:
    path = write_job(("bigray.models:mlp", "bigray.models:mpl"))

    (fault,) = _faults(path)

    assert fault == f"{path}: models.net.factory: 'bigray.models:mpl': 'bigray.models' has no callable 'mpl', " + (
        "did you mean 'mlp'?"
    )


def test_a_factory_whose_module_is_absent_is_told(write_job: WriteJob) -> None:
    (fault,) = _faults(write_job(("bigray.models:mlp", "no_such_package.models:mlp")))

    assert "models.net.factory: 'no_such_package.models:mlp': cannot import" in fault


def test_a_task_and_a_loop_that_are_not_there_are_told_beside_other_faults(write_job: WriteJob) -> None:
    path = write_job(
        ('task = "classification"', 'task = "no_such_package:Task"\nloop = "bigray.models:trian"'),
        ("lr = 3e-3", "lr = -1"),
    )
    faults = [fault.removeprefix(f"{path}: ") for fault in _faults(path)]

    assert any(fault.startswith("training.lr: should be greater than 0") for fault in faults)
    assert any(fault.startswith("training.task: 'no_such_package:Task': cannot import") for fault in faults)
    assert any(
        fault.startswith("training.loop: 'bigray.models:trian': 'bigray.models' has no callable") for fault in faults
    )


@pytest.mark.parametrize("key", ["task", "loop"])
def test_a_task_or_loop_that_is_no_import_path_is_told_once(write_job: WriteJob, key: str) -> None:
    (fault,) = _faults(write_job(), (f"training.{key}=my_package.module",))

    assert f"job.toml: training.{key}: " in fault


def test_a_source_that_is_not_there_is_told(write_job: WriteJob) -> None:
    (fault,) = _faults(write_job(("rows.csv", "row.csv")))

    assert re.search(r"job\.toml: data\.source: '.*row\.csv': no such file or folder", fault)


def test_both_sources_of_a_given_split_that_are_not_there_are_told(write_job: WriteJob, tmp_path: Path) -> None:
    given = f'train = "{tmp_path}/trian.csv"\ntest = "{tmp_path}/rows.txe"'
    (tmp_path / "rows.txe").write_text("a,label\n1,0\n")
    first, second = _faults(write_job((f'source = "{tmp_path}/rows.csv"', given)))

    assert re.search(r"job\.toml: data\.train: '.*trian\.csv': no such file or folder", first)
    assert re.search(r"job\.toml: data\.test: '.*rows\.txe': unknown kind '\.txe'", second)


def test_storage_that_cannot_be_written_is_told(write_job: WriteJob, tmp_path: Path) -> None:
    (fault,) = _faults(write_job((f"{tmp_path}/runs", "/proc/runs")))

    assert "job.toml: storage: /proc/runs: cannot write here" in fault


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert _faults(tmp_path / "job.toml") == (f"{tmp_path}/job.toml: no such file",)


def test_a_folder_instead_of_a_file_is_told(tmp_path: Path) -> None:
    assert "cannot be read as text" in _faults(tmp_path)[0]


def test_broken_toml_is_told_with_its_line(write_job: WriteJob) -> None:
    (fault,) = _faults(write_job(("lr = 3e-3", "lr = ")))

    assert re.search(r"job\.toml: not valid TOML: .*line \d+", fault)


def test_all_faults_of_a_file_are_told_together(write_job: WriteJob) -> None:
    path = write_job(
        ("num_workers = 2", "num_worker = 2"),
        ("lr = 3e-3", "lr = -1"),
        ("epochs = 5", "epochs = 0"),
        ("bigray.models:mlp", "bigray.models:mpl"),
        ("rows.csv", "row.csv"),
    )
    keys = [fault.removeprefix(f"{path}: ").split(":")[0] for fault in _faults(path, ("seed",))]

    assert sorted(keys) == sorted(
        ["--set seed", "scaling.num_worker", "training.lr", "training.epochs", "models.net.factory", "data.source"]
    )


def test_overrides_are_typed_as_in_toml(write_job: WriteJob) -> None:
    overrides = ("training.lr=1e-2", "training.epochs = 7", "models.net.params.hidden=[4, 4]", 'name="other"')

    job = load_job(write_job(), overrides)

    assert (job.training.lr, job.training.epochs, job.name) == (0.01, 7, "other")
    assert job.models["net"].params == {"hidden": [4, 4]}


def test_a_string_needs_no_quotes_in_an_override(write_job: WriteJob) -> None:
    assert load_job(write_job(), ["training.optimizer=sgd"]).training.optimizer == "sgd"


def test_an_override_can_open_a_new_table(write_job: WriteJob) -> None:
    job = load_job(write_job(), ["data.split.seed=3", "models.small.factory=bigray.models:linear"])

    assert job.data.split.seed == 3
    assert list(job.models) == ["net", "small"]


def test_the_last_override_of_a_key_counts(write_job: WriteJob) -> None:
    assert load_job(write_job(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["training.lr", "=3", "training..lr=3", ".lr=1"])
def test_a_malformed_override_is_told_with_an_example(write_job: WriteJob, override: str) -> None:
    assert _faults(write_job(), (override,)) == (
        f"--set {override}: expected key.path=value, such as training.lr=1e-3",
    )


def test_an_override_cannot_go_through_a_value(write_job: WriteJob) -> None:
    assert _faults(write_job(), ("name.first=1",)) == ("--set name.first=1: 'name' is a value, not a table",)


def test_an_override_is_checked_like_the_file(write_job: WriteJob) -> None:
    assert any("training.lr: should be greater than 0" in fault for fault in _faults(write_job(), ("training.lr=0",)))


SEARCH = """
trials = 4
[space]
lr = { log_uniform = [1e-4, 1e-1] }
global_batch_size = { choice = [32, 64] }
"""


def _search_faults(tmp_path: Path, text: str, job: JobSpec | None) -> tuple[str, ...]:
    path = tmp_path / "search.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_search(path, job)
    assert all(fault.startswith(f"{path}: ") for fault in caught.value.faults)
    return tuple(fault.removeprefix(f"{path}: ") for fault in caught.value.faults)


def test_a_good_search_file_becomes_a_search(tmp_path: Path, job: JobSpec) -> None:
    path = tmp_path / "search.toml"
    path.write_text(SEARCH)

    search = load_search(path, job)

    assert search.trials == 4
    assert search.space["lr"].log_uniform == (1e-4, 1e-1)
    assert search.space["global_batch_size"].choice == (32, 64)


BAD_SEARCHES = [
    ("low above high", "trials = 1\nspace.lr = { uniform = [0.2, 0.1] }", "space.lr: empty range, low 0.2"),
    ("low equal to high", "trials = 1\nspace.lr = { uniform = [0.1, 0.1] }", "space.lr: empty range, low 0.1"),
    (
        "a logarithm of 0",
        "trials = 1\nspace.lr = { log_uniform = [0, 1] }",
        "space.lr: log_uniform needs a low above 0",
    ),
    ("an infinite range", "trials = 1\nspace.lr = { uniform = [0.1, inf] }", "space.lr: empty range"),
    ("an empty choice", "trials = 1\nspace.lr = { choice = [] }", "space.lr.choice: is empty, give at least one value"),
    ("an empty space", "trials = 1\nspace = {}", "space: "),
    ("an unknown kind", "trials = 1\nspace.lr = { log = [0.1, 1] }", "space.lr.log: unknown key"),
    (
        "a grid with a range",
        'search = "grid"\nspace.lr = { uniform = [0.1, 0.2] }',
        "space: a grid needs 'choice' for every key",
    ),
    (
        "a grid with trials",
        'search = "grid"\ntrials = 3\nspace.lr = { choice = [0.1] }',
        'trials: a grid runs its whole product; remove it, or use search = "random"',
    ),
    (
        "random without trials",
        "space.lr = { choice = [0.1] }",
        'trials: search = "random" needs a number of trials',
    ),
    (
        "tpe without trials",
        'search = "tpe"\nspace.lr = { choice = [0.1] }',
        'trials: search = "tpe" needs a number of trials',
    ),
    (
        "population based training with a grid",
        'search = "grid"\nscheduler = "pbt"\nspace.lr = { choice = [0.1] }',
        'search: pbt changes settings by itself: use "random" with it, not "grid"',
    ),
    (
        "population based training with tpe",
        'search = "tpe"\ntrials = 4\nscheduler = "pbt"\nspace.lr = { choice = [0.1] }',
        'search: pbt changes settings by itself: use "random" with it, not "tpe"',
    ),
    (
        "a scheduler misspelt",
        'trials = 1\nscheduler = "ahsa"\nspace.lr = { choice = [0.1] }',
        "scheduler: should be 'asha', 'median', 'pbt' or 'none', got 'ahsa'",
    ),
    (
        "a key that is no training setting",
        "trials = 1\nspace.learning_rat = { choice = [0.1] }",
        "space.learning_rat: not a training setting",
    ),
    (
        "a key that the trials of a run share",
        'trials = 1\nspace.loop = { choice = ["a:b"] }',
        "space.loop: not a training setting",
    ),
    (
        "a key close to a training setting",
        "trials = 1\nspace.global_batch = { choice = [8] }",
        "space.global_batch: not a training setting, did you mean 'global_batch_size'?",
    ),
    (
        "a choice that training refuses",
        "trials = 1\nspace.lr = { choice = [0.1, -1] }",
        "space.lr: should be greater than 0, got -1",
    ),
    (
        "a range for an integer",
        "trials = 1\nspace.global_batch_size = { uniform = [8, 64] }",
        "space.global_batch_size: takes whole numbers and a range draws fractions, use choice = [8, ..., 64]",
    ),
    (
        "a grace period beyond the last epoch",
        "trials = 1\nasha.grace_epochs = 6\nspace.lr = { choice = [0.1] }",
        "asha.grace_epochs: 6 is more than the job's 5 epochs",
    ),
    (
        "a metric that is never reported",
        'trials = 1\nmetric = "val_r2"\nspace.lr = { choice = [0.1] }',
        "metric: metric 'val_r2' is never reported for classification",
    ),
    (
        "a choice of the wrong type",
        'trials = 1\nspace.lr = { choice = [0.1, "0.2"] }',
        "space.lr: should be a valid number, got '0.2'",
    ),
    (
        "a batch size of the wrong type among good ones",
        "trials = 1\nspace.global_batch_size = { choice = [32, 64.5] }",
        "space.global_batch_size: use a number from 1, or 'auto', got 64.5",
    ),
    (
        "a space of a model that the job has not",
        "trials = 1\nspaces.nett.lr = { choice = [0.1] }",
        "spaces.nett: not a model of the job, did you mean 'net'?",
    ),
    (
        "a key of a model's space that is no training setting",
        "trials = 1\nspaces.net.lrs = { choice = [0.1] }",
        "spaces.net.lrs: not a training setting, did you mean 'lr'?",
    ),
    (
        "a value of a model's space that training refuses",
        "trials = 1\nspaces.net.momentum = { uniform = [0.5, 1.5] }",
        "spaces.net.momentum: should be less than 1, got 1.5",
    ),
    (
        "values that do not go together",
        'trials = 1\nspace.exact = { choice = [false, true] }\nspace.strategy = { choice = ["ddp", "fsdp"] }',
        "space: exact: cannot be combined with strategy = 'fsdp' (as in exact = True, strategy = 'fsdp')",
    ),
    (
        "a scaled rate for a batch that is yet to be found",
        'trials = 1\nspace.lr_scaling = { choice = ["linear"] }\nspace.global_batch_size = { choice = [32, "auto"] }',
        "space: lr_scaling: with global_batch_size = 'auto' it needs lr_batch_size",
    ),
    (
        "a grace period of the median rule beyond the last epoch",
        'trials = 1\nscheduler = "median"\nmedian.grace_epochs = 6\nspace.lr = { choice = [0.1] }',
        "median.grace_epochs: 6 is more than the job's 5 epochs",
    ),
    (
        "an interval beyond the last epoch",
        'trials = 4\nscheduler = "pbt"\npbt.interval_epochs = 6\nspace.lr = { choice = [0.1] }',
        "pbt.interval_epochs: 6 is more than the job's 5 epochs",
    ),
    (
        "more finalists than trials",
        "trials = 2\nfinalists = 3\nspace.lr = { choice = [0.1] }",
        "finalists: 3 is more than the 2 trials they are chosen from",
    ),
    (
        "more finalists than a grid has trials",
        'search = "grid"\nfinalists = 3\nspace.lr = { choice = [0.1, 0.2] }',
        "finalists: 3 is more than the 2 trials they are chosen from",
    ),
]


@pytest.mark.parametrize(("text", "expected"), [bad[1:] for bad in BAD_SEARCHES], ids=[bad[0] for bad in BAD_SEARCHES])
def test_a_fault_of_a_search_file_is_told(tmp_path: Path, job: JobSpec, text: str, expected: str) -> None:
    faults = _search_faults(tmp_path, text, job)

    assert any(fault.startswith(expected) for fault in faults), faults


def test_all_faults_of_a_search_file_are_told_together(tmp_path: Path, job: JobSpec) -> None:
    text = "trials = 1\nasha.grace_epochs = 6\nspace.lr = { choice = [-1] }\nspace.epoch = { choice = [2] }"

    assert len(_search_faults(tmp_path, text, job)) == 3


def test_a_fault_of_a_range_hides_no_fault_of_the_others(tmp_path: Path, job: JobSpec) -> None:
    text = """
    trials = 4
    schedular = "none"
    metric = "auc"
    [space]
    lr = { log_uniform = [0, 0.1] }
    [spaces.cnn]
    weight_decay = { uniform = [0, 0.1] }
    """
    places = [fault.split(":")[0] for fault in _search_faults(tmp_path, text, job)]

    assert sorted(places) == ["metric", "schedular", "space.lr", "spaces.cnn"]


def test_the_scheduler_may_wait_as_long_as_the_longest_trial_that_is_searched(tmp_path: Path, job: JobSpec) -> None:
    path = tmp_path / "search.toml"
    path.write_text("trials = 4\nasha.grace_epochs = 9\nspace.epochs = { choice = [5, 20] }")

    assert load_search(path, job).asha.grace_epochs == 9


def test_keys_that_only_go_together_may_be_searched_together(tmp_path: Path, job: JobSpec) -> None:
    path = tmp_path / "search.toml"
    path.write_text('trials = 4\nspace.lr_batch_size = { choice = [64] }\nspace.lr_scaling = { choice = ["linear"] }')

    assert set(load_search(path, job).space) == {"lr_batch_size", "lr_scaling"}


def test_a_number_of_trials_given_beside_the_file_takes_the_place_of_its_own(tmp_path: Path, job: JobSpec) -> None:
    path = tmp_path / "search.toml"
    path.write_text(SEARCH)

    assert load_search(path, job, trials=9).trials == 9
    path.write_text('search = "grid"\nspace.lr = { choice = [0.1] }')
    with pytest.raises(SpecError, match="trials: a grid runs its whole product"):
        load_search(path, job, trials=9)


def test_the_keys_of_a_search_are_checked_without_a_job_too(tmp_path: Path) -> None:
    (fault,) = _search_faults(tmp_path, "trials = 1\nspace.rate = { choice = [0.1] }", None)

    assert fault.startswith("space.rate: not a training setting")
