from __future__ import annotations

import json
import math
from typing import Any

import pytest

from bigray.console import (
    print_deployment,
    print_event,
    print_json,
    print_leaderboard,
    print_status,
    print_text,
    print_verification,
    status_line,
)
from bigray.deploy_view import describe_progress, watching
from bigray.results import (
    CrossValidation,
    Finalist,
    Kill,
    Leaderboard,
    Ledger,
    MetricDifference,
    ModelVerification,
    Resize,
    SampleCounts,
    TrialResult,
    Verification,
    WeightDifference,
)
from bigray.serve.release.gate import Check, GateReport
from bigray.serve.release.record import Comparison, VersionStats
from bigray.serve.rollout import Progress
from bigray.serve.runner import Deployment, EndpointStatus
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import Storage


def _result(trial_id: str, value: float, **changes: Any) -> TrialResult:
    config = {"lr": 0.01, "global_batch_size": 32}
    values: dict[str, Any] = {"config": config, "status": "finished", "epochs": 9, "best_epoch": 9, "best_step": 90}
    values |= {"metrics": {"val_accuracy": value}, "ledger": Ledger(compute_s=1.0), **changes}
    return TrialResult(trial_id=trial_id, model_name="mlp", **values)


def _printed(board: Leaderboard, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_leaderboard(board)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_leaderboard_of_many_shows_the_best_and_counts_the_rest(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = tuple(_result(f"{number:03d}", 0.9 - number / 1000) for number in range(40))
    failed = _result("100", 0.0, status="failed", metrics={}, error="ValueError: boom")
    board = Leaderboard("run", "runs/run", "val_accuracy", "max", (*trials, failed), storage, 3.0)
    lines = _printed(board, capsys)

    assert sum(line.startswith("0") for line in lines) == 20
    assert "and 21 more (20 finished, 1 failed); bigray show runs/run --top 41 shows all" in lines
    assert "100 failed: ValueError: boom" in lines


def test_a_leaderboard_marks_what_ran_out_of_memory_and_tells_the_efficiency(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = (_result("0", 0.9, micro_batch_size=16), _result("1", 0.8))
    board = Leaderboard("run", "runs/run", "val_accuracy", "max", trials, storage, 3.0, slots=2, training_wall_s=2.0)
    lines = _printed(board, capsys)

    assert "0 0.01 32 finished (micro-batch 16: out of memory) 9 9 0.9000" in lines
    assert any(line.startswith("efficiency 50%: 2.0 s of training steps in 2.0 s x 2 groups") for line in lines)


def test_finalists_are_shown_with_their_interval_their_ties_and_what_decided(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = tuple(_result(name, 0.9) for name in ("0", "1", "2", "0-seed1", "1-seed1", "2-seed1"))
    finalists = (
        Finalist("1", (0.9, 0.92), 0.91, 0.90, 0.92, 500, None, is_tied=True, best_seed_trial="1-seed1"),
        Finalist("0", (0.91, 0.93), 0.92, 0.91, 0.93, 800, None, is_tied=True, best_seed_trial="0-seed1"),
        Finalist("2", (0.5, 0.6), 0.55, 0.5, 0.6, 100, None, is_tied=False, best_seed_trial="2-seed1"),
    )
    board = Leaderboard("run", "runs/run", "val_accuracy", "max", trials, storage, 3.0, finalists=finalists)
    lines = _printed(board, capsys)

    assert "1 2 0.9100 ± 0.0100 0.9000 to 0.9200 tie 500 -" in lines
    assert "2 2 0.5500 ± 0.0500 0.5000 to 0.6000 100 -" in lines
    assert any(line.startswith("why: 1: tied with 0 on val_accuracy") for line in lines)
    assert any(line.startswith("winner: mlp, trial 1-seed1") for line in lines)


def test_models_over_folds_are_shown_with_mean_deviation_and_interval_and_what_is_exported(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    folds = tuple(_result(f"mlp-fold{number + 1}", 0.9, fold=number) for number in range(3))
    models = (
        CrossValidation("mlp", (0.9, 0.91, 0.92), 3, 0.91, 0.01, 0.8852, 0.9348, 850, "mlp"),
        CrossValidation("linear", (0.8,), 3, 0.8, math.nan, 0.8, 0.8, 50, "linear"),
    )
    trials = (*folds, _result("mlp", 0.7))
    board = Leaderboard("run", "runs/run", "val_accuracy", "max", trials, storage, 3.0, cross_validation=models)
    lines = _printed(board, capsys)

    assert "mlp 3 0.9100 0.0100 0.8852 to 0.9348 850" in lines
    assert "linear 1 of 3 0.8000 - - 50" in lines
    assert "mlp has the best mean; exported is its trial mlp on the usual split" in lines
    assert any(line.startswith("winner: mlp, trial mlp,") for line in lines)


def test_an_event_is_one_line_of_json_with_trials_as_ids(capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelSpec(factory="bigray.models:mlp")
    trial = TrialSpec(
        trial_id="0-mlp", model_name="mlp", model=model, training=TrainingSpec(task="classification"), seed=0
    )
    print_event("starting", "", {"trials": (trial,), "total": 1})
    print_event("epoch", "0-mlp", {"train_loss": float("nan"), "metrics": {"val_loss": float("inf")}, "epoch": 1})
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())

    assert first == {"kind": "starting", "trials": ["0-mlp"], "total": 1}
    assert second == {"kind": "epoch", "trial": "0-mlp", "train_loss": None, "metrics": {"val_loss": None}, "epoch": 1}


def test_a_document_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"mean": float("nan"), "values": [1.0]})

    assert json.loads(capsys.readouterr().out) == {"mean": None, "values": [1.0]}


def test_a_verification_shows_the_faults_in_their_order_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    kills = (
        Kill(1, 70, "10.0.0.1", step=900, recovery_s=1.25, went_on_at_step=890, went_on_from="memory"),
        Kill(0, 71, "10.0.0.1", step=2100),
    )
    none = SampleCounts(0, 0)
    model = ModelVerification(
        model_name="mlp",
        kills=kills,
        kills_planned=2,
        resize=Resize(step=1500, workers_before=2, workers_after=1),
        weights=WeightDifference(False, 3e-4, "0.bias"),
        metrics=MetricDifference(20, 0.0, ()),
        samples=none,
        reference_samples=none,
        verdict="DIFFERENT",
        reasons=("weights are not bit-equal",),
    )
    print_verification(Verification("digits", "runs/verify-1a2b3c-1", exact=True, models=(model,), wall_s=9.0))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    assert [line for line in lines if line.startswith(("SIGKILL", "resize"))] == [
        "SIGKILL 1 ~900 890 memory 1.2 s",
        "resize 2 -> 1 workers - 1,500 1,500 storage -",
        "SIGKILL 0 ~2,100 - - -",
    ]
    assert "weights relative difference 3.0e-04, most in '0.bias'" in lines
    assert "metrics 20 epochs, all equal" in lines
    assert "verdict mlp: DIFFERENT" in lines


def _status(**changes: Any) -> EndpointStatus:
    values: dict[str, Any] = {"name": "model", "url": "http://127.0.0.1:8000", "state": "RUNNING", "message": ""}
    values |= {"replicas_running": 1, "replicas_target": 2, "bundle": "/runs/a/bundle", "version": "a" * 12, **changes}
    return EndpointStatus(**values)


def test_a_status_shows_the_version_and_what_is_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    print_status((_status(rollout="canary 10% of bbbbbbbbbbbb"), _status(name="other", message="[red]it died[/]")))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    assert any("model" in line and "1 of 2" in line and "a" * 12 in line for line in lines)
    assert lines[-2:] == ["model: canary 10% of bbbbbbbbbbbb is under way", "other: [red]it died[/]"]


def test_where_nothing_is_served_the_status_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(())

    assert capsys.readouterr().out == "nothing is served on this cluster\n"


def test_a_deployment_is_told_with_its_reason_and_how_to_ask_it(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:8000"
    print_deployment(Deployment("model", "digits", "a" * 12, url, "forced past: [holdout]"), f"curl {url} {'x' * 300}")

    assert capsys.readouterr().out.splitlines() == [
        "",
        f"serving digits version {'a' * 12} at {url}",
        "why: forced past: [holdout]",
        f"curl {url} {'x' * 300}",
    ]


def test_a_text_for_scripts_stays_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("[bold]" + "x" * 500)

    assert capsys.readouterr().out == "[bold]" + "x" * 500 + "\n"


def test_in_a_file_a_line_that_is_written_over_is_told_only_where_it_is_to_stay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with status_line() as line:
        line.show("loading")
        line.show("[1] of 2 seen", log=True)
        line.clear()

    assert capsys.readouterr() == ("", "[1] of 2 seen\n")


def _seen(requests: int) -> Comparison:
    return Comparison(live=VersionStats(requests=9), candidate=VersionStats(requests=requests))


def test_a_deployment_in_a_file_is_the_gates_table_and_a_canary_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    checks = (Check("files", True, "3 files", 0.1), Check("holdout", False, "worse", 0.2))
    with watching(quiet=False) as watch:
        watch.on_check("files", "running")
        watch.on_gate(GateReport("a" * 12, "digits", checks, ("holdout",), 0.3))
        watch.on_progress(Progress("loading", 1, 2))
        for elapsed_s in range(12):
            watch.on_progress(Progress("watching", 2, 2, _seen(elapsed_s), float(elapsed_s)))
    printed = capsys.readouterr()

    assert printed.out == ""
    assert "3 files" in printed.err
    told = [line.split(",")[0] for line in printed.err.splitlines() if " s: " in line]
    assert told == ["5 s: 5 requests", "10 s: 10 requests"]


def test_a_quiet_deployment_tells_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=True) as watch:
        watch.on_check("files", "running")
        watch.on_gate(GateReport("a" * 12, "digits", (), (), 0.3))
        watch.on_progress(Progress("watching", 2, 2, _seen(5), 60.0))

    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (Progress("loading", 1, 2), "1 of 2 replicas have loaded it"),
        (Progress("switching", 2, 2), "2 of 2 replicas have switched to it"),
        (Progress("watching", 2, 2), "2 of 2 replicas are watched"),
        (Progress("watching", 2, 2, _seen(5), 61.4), "61 s: 5 requests, errors 0.00% (live 0.00%)"),
    ],
)
def test_progress_is_one_line(progress: Progress, expected: str) -> None:
    assert describe_progress(progress) == expected
