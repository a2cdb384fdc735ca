"""Bad input as a user meets it: one line each, exit 2, no traceback, no Ray started."""

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Run, ray_processes

DIGITS = "examples/digits/job.toml"

BAD_SETTINGS = {
    "unknown key with a near miss": ("scaling.num_worker=2", "did you mean 'num_workers'?"),
    "wrong type": ("training.epochs=many", "training.epochs: should be a valid integer, got 'many'"),
    "learning rate nan": ("training.lr=nan", "training.lr: must be a finite number, got nan"),
    "learning rate 0": ("training.lr=0.0", "training.lr: should be greater than 0, got 0.0"),
    "learning rate negative": ("training.lr=-0.1", "training.lr: should be greater than 0, got -0.1"),
    "batch of 0": ("training.global_batch_size=0", "training.global_batch_size"),
    "batch above the training rows": ("training.global_batch_size=5000", "5000 is more than the 1259 training rows"),
    "more workers than fit": ("scaling.num_workers=1000", "the most that fits is num_workers ="),
    "missing file": ("data.source=nowhere.csv", "'nowhere.csv': no such file or folder"),
    "missing target": ("data.target=lable", "data.target: no column 'lable', did you mean 'label'?"),
    "absent factory": ("models.mlp.factory=bigray.models:mpl", "did you mean 'mlp'?"),
    "absent module": ("models.mlp.factory=no.such:thing", "cannot import 'no.such'"),
    "factory that makes no module": (
        "models.mlp={factory='tests.e2e.not_torch:build'}",
        "returned dict, expected a torch.nn.Module",
    ),
    "metric never reported": ("training.metric=auc", "metric 'auc' is never reported for classification"),
    "name with a slash": ("name=a/b", "name: use 1 to 64 letters"),
    "name that climbs": ("name=..", "name: use 1 to 64 letters"),
    "storage that cannot be written": ("storage=/proc/runs", "storage: /proc/runs: cannot write here"),
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_exit_2(bigray: Run, setting: str) -> None:
    override, expected = BAD_SETTINGS[setting]
    before = ray_processes()
    done = bigray("train", DIGITS, "--set", override)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]
    assert ray_processes() <= before


def test_an_empty_search_range_is_one_line_and_exit_2(bigray: Run, tmp_path: Path) -> None:
    search = tmp_path / "search.toml"
    search.write_text("trials = 4\n[space]\nlr = { log_uniform = [0.1, 0.001] }\n")
    done = bigray("tune", DIGITS, "--search", str(search))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("space.lr: empty range, low 0.1 must be less than high 0.001")


def test_faults_of_several_files_are_told_together(bigray: Run, tmp_path: Path) -> None:
    settings = ("--set", "training.lr=nan", "--set", "data.source=nowhere.csv", "--set", "modles={}")
    done = bigray("run", DIGITS, *settings, "--search", "nosearch.toml", "--serve", "noserve.yaml")
    text = done.stderr
    assert done.returncode == 2
    for expected in ("training.lr", "nowhere.csv", "did you mean 'models'?", "nosearch.toml", "noserve.yaml"):
        assert expected in text
    assert len(text.strip().splitlines()) == 5


def test_data_with_nan_is_refused_with_its_column(bigray: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.array([1.0, np.nan] * 20), label=np.arange(40) % 2)
    settings = ("--set", f"data.source={tmp_path}/rows.npz", "--set", "training.global_batch_size=4")
    done = bigray("train", DIGITS, *settings)
    assert done.returncode == 2
    assert "NaN" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_corrupted_bundle_is_refused_with_the_file_and_both_hashes(bigray: Run, tmp_path: Path) -> None:
    from bigray.serve.sample import write_sample_bundle
    from bigray.storage import sha256

    bundle = Path(write_sample_bundle(str(tmp_path), params={"hidden": [2]}, onnx=False))
    weights = bundle / "weights.safetensors"
    right = weights.read_bytes()
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    weights.write_bytes(wrong)
    done = bigray("deploy", str(bundle))
    assert done.returncode == 4
    assert "weights.safetensors" in done.stderr
    assert sha256(right) in done.stderr
    assert sha256(wrong) in done.stderr
    assert "Traceback" not in done.stderr
