"""The house rules that no single function can hold: who imports whom, who prints, what the public surface is."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import bigray

PACKAGE = Path(bigray.__file__).parent

LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "errors",
            "specs",
            "s3",
            "storage",
            "storage_retry",
            "paths",
            "results",
            "presets",
            "termination",
            "host_memory",
        }
    ),
    frozenset(
        {
            "journal",
            "bundle",
            "data",
            "models",
            "ranking",
            "intervals",
            "cross_validation",
            "loading",
            "inference",
            "comparison",
            "rebuilding",
            "onnx_export",
            "explanation",
            "compression",
        }
    ),
    frozenset({"cluster", "prediction"}),
    frozenset({"training", "progress", "verification"}),
    frozenset({"tuning"}),
    frozenset({"workflow", "console", "report", "live", "deploy_view", "plan_view", "explaining", "cli", "__main__"}),
)
"""A module may import from its own layer and from those above it in this list."""

SERVE_MAY_IMPORT = frozenset(
    {
        "errors",
        "specs",
        "storage",
        "presets",
        "bundle",
        "data",
        "models",
        "loading",
        "inference",
        "rebuilding",
        "explanation",
        "cluster",
        "serve",
    }
)
MAY_PRINT = frozenset({"console"})


def _modules() -> dict[str, Path]:
    """Every module of bigray by its name below the package, but for the root, which only re-exports."""
    files = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(file.parts).removesuffix(".__init__"): PACKAGE / file.with_suffix(".py") for file in files}
    del names["__init__"]
    return {name: path for name, path in names.items() if not name.startswith("_presets")}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _parts_imported(path: Path) -> set[str]:
    """The parts of bigray (first name below the package) that a file imports."""
    return {name.split(".")[1] for name in _imports(path) if name.startswith("bigray.")}


def _layer(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def test_every_part_has_its_place() -> None:
    parts = {name.split(".")[0] for name in _modules()}

    assert parts == frozenset().union(*LAYERS) | {"serve"}


def test_the_guide_for_contributors_names_the_layers_as_they_are() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    chain, _, serve = text.partition("holds it:")[2].partition("; `serve`\n  knows ")
    layers = [set(names.split()) for names in re.findall(r"`([^`]+)`", chain)]

    assert layers == [layer - {"__main__"} for layer in LAYERS]
    assert set(serve.split("`")[1].split()) == SERVE_MAY_IMPORT - {"serve"}


@pytest.mark.parametrize("name", sorted(name for name in _modules() if not name.startswith("serve")))
def test_imports_run_one_way(name: str) -> None:
    part = name.split(".")[0]
    allowed = frozenset().union(*LAYERS[: _layer(part) + 1])
    if part in LAYERS[-1]:
        allowed |= {"serve"}

    assert _parts_imported(_modules()[name]) <= allowed


def test_nothing_of_training_or_tuning_crosses_to_serving() -> None:
    for name, path in _modules().items():
        if name.startswith("serve"):
            assert _parts_imported(path) <= SERVE_MAY_IMPORT, name


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = _modules()

    def imported_at_load(name: str) -> set[str]:
        found = set()
        for node in _tree(modules[name]).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bigray."):
                below = (node.module or "").removeprefix("bigray.")
                found |= {below} | {f"{below}.{alias.name}" for alias in node.names}
        return (found & set(modules)) - {name}

    remaining = {name: imported_at_load(name) for name in modules}
    while free := [name for name, needs in remaining.items() if not needs]:
        for name in free:
            del remaining[name]
        for needs in remaining.values():
            needs.difference_update(free)

    assert remaining == {}


def _prints(path: Path) -> bool:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write"):
            return True
    return False


def test_only_the_console_and_the_job_client_print() -> None:
    printing = {name for name, path in _modules().items() if _prints(path)}

    assert printing <= MAY_PRINT


def test_nothing_is_pickled() -> None:
    for name, path in _modules().items():
        assert not {found.split(".")[0] for found in _imports(path)} & {"pickle", "cloudpickle", "dill", "joblib"}, name
        calls = {ast.unparse(node.func) for node in ast.walk(_tree(path)) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "torch.save"}, name


def test_the_public_names_are_sorted_and_each_has_a_home() -> None:
    assert bigray.__all__ == sorted(bigray.__all__)
    assert set(bigray.__all__) == set(bigray._HOME)


@pytest.mark.parametrize("name", bigray.__all__)
def test_a_public_name_is_what_its_home_defines(name: str) -> None:
    home = importlib.import_module(f"bigray.{bigray._HOME[name]}")

    assert getattr(bigray, name) is getattr(home, name)
    assert getattr(bigray, name).__module__ == home.__name__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = bigray.tarin


LIGHT = ("bigray", "bigray.models", "bigray.loading", "bigray.cli", "bigray.cluster.plan", "bigray.tuning.space")


def test_reading_a_job_file_loads_neither_torch_nor_ray() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module(name)
    heavy = {{"torch", "ray", "onnxruntime"}} & set(sys.modules)
    assert not heavy, f"import {{name}} loads {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
