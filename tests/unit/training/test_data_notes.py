"""What was left out of the data is told where a run begins, in its record, in its result and by `bigray show`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bigray.console import print_report
from bigray.journal import Journal
from bigray.live import PlainView
from bigray.paths import RUN_FILE, RunPaths
from bigray.report import board_document, make_report
from bigray.specs import JobSpec
from bigray.storage import open_storage
from bigray.training import session
from bigray.training.request import make_request
from bigray.training.runner import training_trials

NOTE = "data.missing: left out 9 rows with empty values"


def test_rows_left_out_are_told_once_at_the_start_and_stay_in_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = np.where(np.arange(90) % 10 == 0, np.nan, np.arange(90.0))
    np.savez(tmp_path / "rows.npz", a=a, label=np.arange(90) % 3)
    job = JobSpec.model_validate(
        {
            "name": "job",
            "storage": str(tmp_path),
            "data": {"source": str(tmp_path / "rows.npz"), "target": "label", "missing": "drop"},
            "models": {"linear": {"factory": "bigray.models:linear"}},
            "training": {"task": "classification", "epochs": 1, "lr": 0.1, "global_batch_size": 8},
        }
    )
    request, paths = make_request(job, training_trials(job)), RunPaths(open_storage(tmp_path / "run"), "run")
    view = PlainView()
    session._tell_start(request, paths, [], view)
    document = json.loads(json.dumps(session._run_document(request, paths)))
    paths.storage.write_bytes(RUN_FILE, json.dumps(document).encode())
    told = capsys.readouterr().err.splitlines()

    assert told[1:] == [f"note: {NOTE}"]
    assert document["data"]["notes"] == [NOTE]
    assert Journal.open(paths).attempt == 1
    report = make_report(paths, document, [])
    print_report(report, top=5)
    assert report.to_json()["notes"] == [NOTE]
    assert capsys.readouterr().out.splitlines().count(f"note {NOTE}") == 1


def test_the_result_of_a_run_tells_them_too() -> None:
    from bigray.results import Leaderboard, TrialResult

    trial = TrialResult("0", "mlp", {}, "finished", 1, 1, 1, {"val_loss": 0.5})
    board = Leaderboard("run", "runs/run", "val_loss", "min", (trial,), open_storage("runs"), 1.0, notes=(NOTE,))

    assert board_document(board)["notes"] == [NOTE]
