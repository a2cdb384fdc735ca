from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bigray.errors import SpecError
from bigray.presets import preset_root
from bigray.serve.config import load_serve

SHIPPED = sorted((preset_root() / "serve").glob("*.yaml"))
GOOD = """
http_options: {port: 8100}
applications:
  - name: model
    import_path: bigray.serve.app:build
    args: {bundle: somewhere}
    deployments:
      - name: Model
        num_replicas: 2
        ray_actor_options: {num_cpus: 0.5}
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_load_and_start_with_their_command(file: Path):
    spec = load_serve(file)
    assert spec.needs().min_replicas >= 1
    assert file.read_text().startswith(f"# bigray deploy runs/digits-1a2b3c --config serve/{file.name}\n")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_ray_accepts_shipped_files_with_the_same_meaning(file: Path):
    from ray.serve.schema import ServeDeploySchema

    ours = ServeDeploySchema.model_validate(load_serve(file).to_native())
    assert ours == ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))


def test_needs_follow_from_replicas_and_resources(tmp_path):
    needs = load_serve(write(tmp_path, GOOD)).needs()
    assert (needs.min_replicas, needs.max_replicas, needs.cpus_per_replica, needs.gpus_per_replica) == (2, 2, 0.5, 0)


def test_autoscaling_gives_a_floor_and_a_ceiling(tmp_path):
    text = GOOD.replace("num_replicas: 2", "autoscaling_config: {min_replicas: 1, max_replicas: 4}")
    needs = load_serve(write(tmp_path, text)).needs()
    assert (needs.min_replicas, needs.max_replicas) == (1, 4)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("bundle: somewhere", "bundel: x", "applications.0.args.bundel: unknown key, did you mean 'bundle'?"),
        ("num_replicas: 2", "num_replica: 2", "deployments.0.num_replica: unknown key, did you mean 'num_replicas'?"),
        ("num_cpus: 0.5", "num_cpu: 0.5", "ray_actor_options.num_cpu: unknown key, did you mean 'num_cpus'?"),
        ("port: 8100", "prot: 8100", "http_options.prot: unknown key, did you mean 'port'?"),
        ("port: 8100", "port: 81000", "http_options.port:"),
        ("num_replicas: 2", "num_replicas: 0", "num_replicas must be at least 1"),
        ("app:build", "app:built", "applications.0.import_path: should be 'bigray.serve.app:build'"),
        ("name: Model", "name: Modell", "deployments.0.name: should be 'Model'"),
        ("args: {bundle: somewhere}", "args: {}", "args.bundle: required, but missing"),
        ("num_replicas: 2", "autoscaling_config: {min_replicas: 3, max_replicas: 2}", "more than max_replicas 2"),
        ("num_replicas: 2", "{num_replicas: 2", "not valid YAML"),
    ],
)
def test_a_fault_names_file_place_and_way_out(tmp_path, old, new, fault):
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(SpecError) as caught:
        load_serve(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert fault in str(caught.value)


def test_all_faults_are_reported_together_and_nothing_else(tmp_path):
    file = write(tmp_path, GOOD.replace("bundle:", "bundel:").replace("port:", "prot:"))
    with pytest.raises(SpecError) as caught:
        load_serve(file)
    assert sorted(line.split(": ")[1] for line in caught.value.faults) == [
        "applications.0.args.bundel",
        "applications.0.args.bundle",
        "http_options.prot",
    ]


@pytest.mark.parametrize("text", ["", "- 1", "applications: []", GOOD + GOOD.split("applications:")[1]])
def test_exactly_one_application_is_expected(tmp_path, text):
    with pytest.raises(SpecError, match="application"):
        load_serve(write(tmp_path, text))


def test_a_missing_file_is_a_fault():
    with pytest.raises(SpecError, match="no such file"):
        load_serve("nowhere.yaml")


def test_reading_a_serve_file_imports_no_ray():
    code = "import sys, bigray.serve.config; print([m for m in ('ray', 'torch', 'onnxruntime') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
