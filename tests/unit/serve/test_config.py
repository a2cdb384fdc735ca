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
def test_ray_accepts_shipped_files_with_the_same_meaning_but_for_how_replicas_are_replaced(file: Path):
    from ray.serve.schema import ServeDeploySchema

    ours = ServeDeploySchema.model_validate(load_serve(file).to_native())
    native = yaml.safe_load(file.read_text())
    native["applications"][0]["deployments"][0]["max_surge_percent"] = 100
    assert ours == ServeDeploySchema.model_validate(native)


def test_replicas_go_once_those_that_replace_them_answer_if_the_file_says_nothing_else(tmp_path):
    spec = load_serve(write(tmp_path, GOOD))
    assert spec.application_document()["deployments"][0]["max_surge_percent"] == 100
    says = GOOD.replace("num_replicas: 2", "num_replicas: 2\n        max_surge_percent: 50")
    spec = load_serve(write(tmp_path, says))
    assert spec.application_document()["deployments"][0]["max_surge_percent"] == 50
    none = GOOD[: GOOD.index("    deployments:")]
    spec = load_serve(write(tmp_path, none))
    assert spec.to_native()["applications"][0]["deployments"] == [{"name": "Model", "max_surge_percent": 100}]


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
        ("num_cpus: 0.5", "num_gpus: 1.5", "ray_actor_options.num_gpus: more than one GPU must be whole ones; use 2"),
        ("port: 8100", "prot: 8100", "http_options.prot: unknown key, did you mean 'port'?"),
        ("port: 8100", "port: 81000", "http_options.port:"),
        ("num_replicas: 2", "num_replicas: 0", "num_replicas must be at least 1"),
        ("app:build", "app:built", "applications.0.import_path: should be 'bigray.serve.app:build'"),
        ("name: Model", "name: Modell", "deployments.0.name: should be 'Model'"),
        ("args: {bundle: somewhere}", "args: {}", "args.bundle: required, but missing"),
        ("num_replicas: 2", "autoscaling_config: {min_replicas: 3, max_replicas: 2}", "more than max_replicas 2"),
        ("num_replicas: 2", "{num_replicas: 2", "not valid YAML"),
        ("bundle: somewhere", "bundle: b, swap: never", "args.swap: should be 'auto', 'in_place' or 'surge'"),
        ("bundle: somewhere", "bundle: b, slo_ms: 0", "args.slo_ms: "),
        ("bundle: somewhere", "bundle: b, max_queue_s: -1", "args.max_queue_s: "),
        ("bundle: somewhere", "bundle: b, keyes: keys.json", "args.keyes: unknown key, did you mean 'keys'?"),
        ("bundle: somewhere", "bundle: b, models: [{name: a/b, bundle: c}]", "args.models.0.name: "),
        ("bundle: somewhere", "bundle: b, models: [{name: a}]", "args.models.0.bundle: required, but missing"),
        (
            "bundle: somewhere",
            "bundle: b, models: [{name: a, bundle: c}, {name: a, bundle: d}]",
            "models: 'a' is there twice",
        ),
        (
            "num_replicas: 2",
            "max_ongoing_requests: 5",
            "0.max_ongoing_requests: Serve's own limit does not hold here; use args.max_queued_requests, got 5",
        ),
        ("num_replicas: 2", "max_queued_requests: -1", "deployments.0.max_queued_requests: Serve's own limit does not"),
        (
            "num_replicas: 2",
            "backpressure_config: {status_code: 429}",
            "deployments.0.backpressure_config: Serve's own",
        ),
        (
            "port: 8100",
            "request_timeout_s: 3",
            "http_options.request_timeout_s: Serve's own limit does not hold here; use",
        ),
        ("port: 8100}", "port: 8100}\ngrpc_options: {prot: 9}", "grpc_options.prot: unknown key, did you mean 'port'?"),
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


def test_other_arguments_are_checked_like_those_of_the_file(tmp_path):
    spec = load_serve(write(tmp_path, GOOD))
    changed = spec.with_args(models=[{"name": "other", "bundle": "c"}], slo_ms=5)
    assert changed.application.args.models[0].name == "other"
    assert changed.application.args.bundle == "somewhere"
    assert spec.application.args.models == ()
    assert spec.with_bundle("elsewhere").application.args.bundle == "elsewhere"
    with pytest.raises(ValueError, match="slo_ms"):
        spec.with_args(slo_ms=-5)


def test_what_was_not_written_is_left_to_ray(tmp_path):
    document = load_serve(write(tmp_path, GOOD)).with_args(slo_ms=5).to_native()
    assert document["applications"][0]["args"] == {"bundle": "somewhere", "slo_ms": 5}
    assert document["http_options"] == {"host": "127.0.0.1", "port": 8100}
    assert "grpc_options" not in document


def test_grpc_is_offered_where_the_file_has_a_section_for_it(tmp_path):
    from ray.serve.schema import ServeDeploySchema

    document = load_serve(write(tmp_path, GOOD + "grpc_options: {port: 9100}\n")).to_native()
    assert document["grpc_options"] == {
        "port": 9100,
        "grpc_servicer_functions": ["bigray.serve.wire.grpc_service.add_inference_service"],
    }
    assert ServeDeploySchema.model_validate(document).grpc_options.port == 9100


def test_limits_that_do_hold_are_taken(tmp_path):
    text = GOOD.replace("{bundle: somewhere}", "{bundle: b, max_queued_requests: 9, request_timeout_s: 3}")
    spec = load_serve(write(tmp_path, text + "grpc_options: {request_timeout_s: 4}\n"))
    assert (spec.application.args.max_queued_requests, spec.application.args.request_timeout_s) == (9, 3)
    assert spec.to_native()["grpc_options"]["request_timeout_s"] == 4
    assert load_serve(write(tmp_path, GOOD.replace("num_replicas: 2", "max_queued_requests: null")))


def test_the_policys_settings_come_from_the_file(tmp_path):
    settings = load_serve("serve/autoscale.yaml").scaling_settings("serve/autoscale.yaml")
    assert (settings.min_replicas, settings.max_replicas, settings.target_utilisation) == (1, 2, 0.7)
    with pytest.raises(SpecError, match=r"here: autoscaling_config: has no policy .* see serve/autoscale.yaml"):
        load_serve(write(tmp_path, GOOD)).scaling_settings("here")
