from __future__ import annotations

import json

import pytest
from rich.console import Console

from bigray.live import LiveView, PlainView, run_view
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.training.commands import Event, TrialState


def _trial(trial_id: str) -> TrialSpec:
    own = TrainingSpec(task="classification", loop="my.mod:train", metric="val_f1", metric_mode="max", epochs=5)
    model = ModelSpec(factory="bigray.models:mlp")
    return TrialSpec(trial_id=trial_id, model_name="mlp", model=model, training=own, seed=0)


def _starting(count: int) -> Event:
    trials = tuple(_trial(f"{number}-mlp") for number in range(count))
    return Event("starting", "", {"run": "r", "folder": "runs/r", "trials": trials, "total": count})


def _epoch(trial_id: str, epoch: int, value: float) -> Event:
    values = {"epoch": epoch, "train_loss": None, "metrics": {"val_f1": value}, "best_metrics": {"val_f1": value}}
    return Event("epoch", trial_id, {**values, "samples_per_s": None, "epoch_s": 2.0})


def _state(trial_id: str, epoch: int, value: float, ended: str | None) -> Event:
    state = TrialState(epoch, epoch * 5, ended, {}, epoch, epoch * 5, {"val_f1": value})
    return Event.of_state(trial_id, state)


def _text(view: LiveView, width: int) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view.render(width))
    return console.export_text()


def test_an_epoch_line_has_a_dash_for_what_a_loop_does_not_report(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    view(_starting(1))
    capsys.readouterr()
    view(_epoch("0-mlp", 2, 0.5))

    assert capsys.readouterr().err == "0-mlp: epoch 2/5, loss -, val_f1 0.5000, - samples/s, 6 s left\n"


def test_a_log_of_a_large_sweep_has_a_line_every_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    view = PlainView(lambda: now)
    view(_starting(100))
    for number in range(24):
        now += 0.5
        view(_epoch(f"{number}-mlp", 1, number / 100))
        view(_state(f"{number}-mlp", 5, number / 100, "finished"))
    lines = capsys.readouterr().err.splitlines()

    assert lines[0] == "starting r: 100 trials, in runs/r"
    assert len(lines) == 1 + 3
    assert lines[-1] == (
        "20 of 100 trials ended, 1 running, best val_f1 0.2000 (20-mlp), 2.0 trials/s, about 40 s left"
    )


def test_what_happens_to_many_trials_of_a_large_sweep_is_told_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(lambda: 0.0)
    view(_starting(100))
    for number in range(60):
        view(Event("failed", f"{number}-mlp", {"error": "boom"}))
    lines = [line for line in capsys.readouterr().err.splitlines() if "failed: boom" in line]

    assert len(lines) == 20
    assert lines[-1].endswith("(more lines like this are left out; bigray show r has all)")


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_live_view_fits_the_terminal_and_cuts_nothing(width: int) -> None:
    view = LiveView()
    view(_starting(1000))
    for number in range(70):
        view(_epoch(f"{number}-mlp", 1, number / 100))
    for number in range(30):
        view(_state(f"{number}-mlp", 2, number / 100, "diverged" if number == 29 else None))
    view(Event("promoted", "28-mlp", {"epoch": 5}))
    text = _text(view, width)

    assert "1 of 1,000 trials ended" in text
    assert "40 running · 28 paused · 1 promoted · 930 waiting · 1 diverged" in " ".join(text.split())
    assert "best val_f1 0.6900 (69-mlp, lr 0.001, batch 64)" in text
    assert "…" not in text
    assert len(text.splitlines()) < 20


def test_a_probe_and_a_split_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    view(_starting(1))
    times = {"alone_step_s": 1e-3, "stacked_step_s": 1e-4}
    view(Event("probe", "", {"model": "mlp", "batch": 64, **times, "is_stacked": True, "why_not": None}))
    view(Event("retried", "0-mlp", {"error": "no memory", "micro_batch_size": 16}))
    lines = capsys.readouterr().err.splitlines()

    assert lines[1] == "mlp, batch 64: trained stacked (a step of one trial: alone 1 ms, stacked 0.1 ms)"
    assert lines[2].startswith("0-mlp: out of memory (no memory); goes on with micro-batches of 16 rows")


def test_what_the_folds_came_to_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    view(_starting(1))
    view(Event("cross_validated", "", {"model_name": "mlp", "values": [0.9] * 3, "mean": 0.9, "low": 0.8, "high": 1.0}))
    view(Event("finalists", "", {"trials": ["0-mlp"], "folds": 3}))
    lines = capsys.readouterr().err.splitlines()

    assert lines[1:] == [
        "mlp has the best mean over 3 folds, 0.9000 ± 0.1000; training it on the usual split",
        "training the best 1 again on each of 3 folds: 0-mlp",
    ]


def test_events_are_lines_of_json_and_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with run_view(events=True) as view:
        view(_starting(2))
        view(_epoch("1-mlp", 1, 0.5))
        view(Event("ranked", "1-mlp", {"board": object()}))
    captured = capsys.readouterr()
    documents = [json.loads(line) for line in captured.out.splitlines()]

    assert [document["kind"] for document in documents] == ["starting", "epoch"]
    assert documents[0]["trials"] == ["0-mlp", "1-mlp"]
    assert captured.err == ""
    assert view.progress.leader is view.progress.trials["1-mlp"]


def test_a_quiet_view_still_knows_how_the_run_stands(capsys: pytest.CaptureFixture[str]) -> None:
    with run_view(quiet=True) as view:
        view(_starting(2))
        view(Event("budget", "", {"text": "10m"}))

    assert capsys.readouterr() == ("", "")
    assert view.progress.budget == "10m"
