"""Every example's job file loads, its data is prepared, and its models take what comes out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from bigray.data.dataset import Dataset, prepare_dataset
from bigray.data.inspection import DataReport
from bigray.data.overview import TableReport, look_at
from bigray.loading import load_job
from bigray.models.resolve import build_model
from bigray.specs import JobSpec

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HERE_ALREADY = ("accelerate", "binary_digit", "digits", "linear", "messy_csv", "mnist_cnn", "own_loop")
"""Examples whose data comes with them, or with a package."""


def _script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _draw_shapes(folder: Path) -> list[str]:
    _script("image_folder/make_images.py").main(folder / "images", of_each=10)
    return [f"data.source={folder / 'images'}"]


def _write_photographs(folder: Path) -> list[str]:
    """As CIFAR-10 is given: the bytes of files, and names of classes as a dictionary."""
    script, generator = _script("image_folder/make_images.py"), np.random.default_rng(0)
    for part in ("train", "test"):
        shapes = [shape for shape in script.SHAPES for _ in range(20)]
        for number, shape in enumerate(shapes):
            script.draw_shape(shape, generator).save(folder / f"{number}.jpg", quality=95)
        files = [(folder / f"{number}.jpg").read_bytes() for number in range(len(shapes))]
        table = pa.table({"image": files, "label": pa.array(shapes).dictionary_encode()})
        parquet.write_table(table, folder / f"{part}.parquet")
    return [f"data.{part}={folder / part}.parquet" for part in ("train", "test")]


def _write_text(folder: Path) -> list[str]:
    (folder / "input.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    return [f"data.source={folder / 'input.txt'}"]


STAND_INS: dict[str, Callable[[Path], list[str]]] = {
    "image_folder": _draw_shapes,
    "cifar10": _write_photographs,
    "shakespeare": _write_text,
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def load_example(name: str, folder: Path) -> JobSpec:
    overrides = STAND_INS[name](folder) if name in STAND_INS else []
    return load_job(EXAMPLES / name / "job.toml", [*overrides, f"storage={folder}"])


def _prepare(job: JobSpec) -> Dataset:
    return prepare_dataset(job.data, job.training.target_kind, job.training.positive)


@pytest.mark.parametrize("name", [*HERE_ALREADY, *STAND_INS])
def test_an_example_loads_and_its_models_take_its_rows(name: str, tmp_path: Path) -> None:
    job = load_example(name, tmp_path)
    dataset = _prepare(job)
    rows = torch.from_numpy(dataset.arrays.x_train[:2])

    assert all(dataset.num_rows.values())
    assert np.isfinite(dataset.arrays.x_train).all()
    for model in job.models.values():
        module = build_model(model.factory, model.params, dataset.model_input_shape, dataset.outputs.num_outputs)
        places = dataset.arrays.y_train.shape[1:] if job.training.task == "language" else ()
        assert module.eval()(rows).shape == (2, *places, dataset.outputs.num_outputs)


def test_every_example_is_tried_here_and_has_a_row_in_their_readme() -> None:
    table = (EXAMPLES / "README.md").read_text()
    names = sorted(job.parent.name for job in EXAMPLES.glob("*/job.toml"))

    assert names == sorted([*HERE_ALREADY, *STAND_INS])
    assert [name for name in names if f"| [{name}](" not in table] == []


def test_the_messy_table_is_what_its_script_writes(tmp_path: Path) -> None:
    _script("messy_csv/make_csv.py").main(tmp_path / "customers.csv")

    assert (tmp_path / "customers.csv").read_bytes() == (EXAMPLES / "messy_csv/customers.csv").read_bytes()


def _look(name: str, folder: Path) -> DataReport:
    job = load_example(name, folder)
    found = look_at(job.data, job.training.target_kind, job.training.positive)
    assert isinstance(found, TableReport)
    return found.report


def test_the_messy_table_has_the_faults_that_it_is_there_for(tmp_path: Path) -> None:
    columns = {column.name: column for column in _look("messy_csv", tmp_path).columns}

    assert {name: column.kind for name, column in columns.items()} == {
        "signup": "date",
        "age": "number",
        "income": "number",
        "plan": "category",
        "city": "category",
        "visits": "number",
    }
    assert [name for name, column in columns.items() if column.missing] == ["age", "income", "plan", "visits"]
    assert columns["income"].outliers > 10


def test_some_towns_of_the_messy_table_are_in_no_training_row(tmp_path: Path) -> None:
    dataset = _prepare(load_example("messy_csv", tmp_path))
    (city,) = (column for column in dataset.inputs.columns if column.name == "city")

    assert set(dataset.holdout.column("city").to_pylist()) - set(city.categories)


def test_the_shapes_are_the_same_pictures_each_time_and_fairly_mixed(tmp_path: Path) -> None:
    script = _script("image_folder/make_images.py")
    for folder in ("a", "b"):
        script.main(tmp_path / folder, of_each=3)
    first, second = (sorted((tmp_path / folder).rglob("*.png")) for folder in ("a", "b"))

    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert {file.parent.name for file in first} == {"circle", "square", "triangle"}
