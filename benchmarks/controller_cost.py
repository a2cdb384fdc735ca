"""What a sweep's driver does for each result, as trials grow: bigray's parts, and Ray Tune's controller.

    python benchmarks/controller_cost.py [--size full|small] [--rounds 3]

A result is the report of one epoch of one trial. Figures are microseconds of the driver's processor time for each, over
a whole sweep by ASHA; the slope is that of their logarithm over the logarithm of the number of trials: 0 is flat.

SIMULATED: bigray's sweeps train nothing, a formula says what a trial reaches. What is timed is the driver's own code,
fed as in a run: `LegSearcher` and `Sweep` (the decisions), then for the events of each leg the journal, which writes
real files, `Housekeeping` and `RunProgress`; at the end the journal is read and ranked. Housekeeping finds no
checkpoints to delete, and no table is drawn.

Ray Tune is not simulated: no-op trials of one step, one result each, with `reuse_actors=True` on a Ray of its own; the
processor time is that of the process which calls `fit`, the wall time that of `fit`. bigray hands its legs to the same
controller. A stack's leg holds many results, a trial's alone a few: the last rows add what Tune costs for so many legs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import TUNE_TUNED, print_table, run_in_own_process, tell

SIZES = {"full": (100, 1_000, 10_000), "small": (100, 1_000)}
TUNE_SIZES = {"full": (100, 1_000), "small": (100,)}
LABELS = {
    "stacked": "bigray, stacks of up to 64",
    "alone": "bigray, each trial alone",
    "tune": "Ray Tune, reuse_actors=True, one step a trial",
    "tune tuned": "the same, loggers off",
}
PARTS = {
    "drawing": "trials drawn, files begun",
    "decisions": "decisions: searcher, sweep, ASHA",
    "journal": "journal",
    "housekeeping": "housekeeping",
    "progress": "progress",
    "ranking": "journal read and ranked, at the end",
}
EPOCHS = 20
SLOTS = 2
LEDGER: dict[str, Any] = {"start_s": 0.001, "data_s": 0.002, "compute_s": 0.03, "evaluation_s": 0.004, "cpu_s": 0.05}

Figures = dict[str, dict[str, float]]
"""By number of trials: microseconds a result of each part, and counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, help="default: 3, with --size small 1")
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.peer, arguments.size, Path(folder))))
        return
    rounds: dict[str, list[Figures]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds or (1 if arguments.size == "small" else 3)):
        for peer in arguments.peers:
            more = TUNE_TUNED if peer == "tune tuned" else {}
            found = run_in_own_process(__file__, "--peer", peer, "--size", arguments.size, **more)
            rounds[peer].append(found)
            told = ", ".join(f"{trials} trials {total(figures):,.0f}" for trials, figures in found.items())
            tell(f"round {number + 1}: {LABELS[peer]}: us a result: {told}")
    show({peer: middle(found) for peer, found in rounds.items()}, SIZES[arguments.size])


def measure(peer: str, size: str, folder: Path) -> Figures:
    if peer.startswith("tune"):
        return of_tune(TUNE_SIZES[size], folder)
    is_stacked = peer == "stacked"
    SimulatedDriver(100, is_stacked, folder / "first").run()  # imports, and what Python does once
    return {
        str(trials): SimulatedDriver(trials, is_stacked, folder / str(trials)).run().figures for trials in SIZES[size]
    }


class SimulatedDriver:
    """The driver of one sweep, without groups; `SLOTS` legs are under way, and end in the order of their start."""

    def __init__(self, trials: int, is_stacked: bool, folder: Path) -> None:
        from bigray.journal import Journal
        from bigray.paths import RunPaths
        from bigray.progress import RunProgress
        from bigray.specs import JobSpec, SearchSpec
        from bigray.storage import open_storage
        from bigray.training.commands import Event
        from bigray.training.housekeeping import Housekeeping
        from bigray.tuning.policies import make_policy
        from bigray.tuning.proposals import make_proposer
        from bigray.tuning.searcher import LegSearcher
        from bigray.tuning.space import search_trials
        from bigray.tuning.sweep import Sweep

        self._is_stacked = is_stacked
        self._cpu_s: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._num_results, self._num_legs = 0, 0
        self._epochs: Counter[str] = Counter()
        """Of each trial so far."""
        self._legs: deque[tuple[str, Any]] = deque()
        self._news: list[Event] = []
        self._offered: Any = None
        job = JobSpec.model_validate(
            {
                "name": "digits",
                "data": {"source": "rows.npz", "target": "label"},
                "models": {"mlp": {"factory": "bigray.models:mlp"}},
                "training": {"task": "classification", "epochs": EPOCHS},
            }
        )
        space = {"lr": {"log_uniform": [1e-4, 1e-1]}, "global_batch_size": {"choice": [32, 64, 128]}}
        search = SearchSpec.model_validate({"trials": trials, "space": space})
        with self._timed("drawing"):
            self._trials = search_trials(job, search)
            self._paths = RunPaths(open_storage(folder), "run")
            self._journal = Journal.open(self._paths)
            self._housekeeping = Housekeeping(self._paths, self._trials, self._journal.attempt, 1, ())
            self._progress = RunProgress()
            self._progress.update(Event("starting", "", {"run": "run", "trials": self._trials, "total": trials}))
            policy = make_policy(search, "max", job.seed)
            proposer = make_proposer(job, search, "max")
            sweep = Sweep(search, "max", proposer, policy, slots=SLOTS, can_stack=is_stacked)
            self._searcher = LegSearcher(
                sweep, [], offer=self._take_offer, tell=self._news.extend, must_stop=lambda: False
            )

    def run(self) -> SimulatedDriver:
        while self._suggest() or self._legs:
            if len(self._legs) == SLOTS or self._offered is None:
                self._end_leg(*self._legs.popleft())
        self._rank()
        return self

    @property
    def figures(self) -> dict[str, float]:
        parts = {part: seconds * 1e6 / self._num_results for part, seconds in self._cpu_s.items()}
        return {**parts, "results": self._num_results, "legs": self._num_legs}

    def _suggest(self) -> bool:
        """Whether there was another leg."""
        self._offered, name = None, str(self._num_legs)
        with self._timed("decisions"):
            answer = self._searcher.suggest(name)
        if not isinstance(answer, dict):
            return False
        self._num_legs += 1
        self._legs.append((name, self._offered))
        return True

    def _take_offer(self, leg: Any) -> None:
        self._offered = leg

    def _end_leg(self, name: str, leg: Any) -> None:
        from bigray.training.commands import Event

        result, events = self._carry_out(leg)
        self._num_results += sum(event.kind == "epoch" for event in events)
        told = {"kind_of_leg": leg.kind, "epoch": leg.epoch, **result.to_json()}
        events = [*self._news, *events, Event("leg", "", told)]
        self._news.clear()
        passed_on = {"result": json.dumps(result.to_json())}
        with self._timed("journal"):
            self._journal.append_all(events)
        with self._timed("progress"):
            for event in events:
                self._progress.update(event)
        with self._timed("housekeeping"):
            self._housekeeping.note(events)
        with self._timed("decisions"):
            self._searcher.on_trial_complete(name, passed_on)

    def _carry_out(self, leg: Any) -> tuple[Any, list[Any]]:
        """As the workers and Tune's actor do, which is not the driver's work."""
        from bigray.tuning.leg import LegResult, Outcome

        if leg.kind == "probe":
            return LegResult(leg.number, (), self._is_stacked), []
        outcomes, events = [], []
        for trial in leg.trials:
            told, state = self._train(trial, leg.epoch, has_folder=leg.kind == "alone")
            events += told
            outcomes.append(Outcome.of_state(trial, leg.epoch, state, leg.name if leg.kind == "stacked" else None))
        return LegResult(leg.number, tuple(outcomes)), events

    def _train(self, trial: Any, epoch: int, *, has_folder: bool) -> tuple[list[Any], Any]:
        from bigray.results import Ledger
        from bigray.training.commands import Event, TrialState

        name, first = trial.trial_id, self._epochs[trial.trial_id]
        self._epochs[name] = epoch
        events = [Event("started", name, {"group": 0})]
        events += [Event("epoch", name, report_of(trial, number)) for number in range(first + 1, epoch + 1)]
        if has_folder:
            events.append(Event("checkpoint", name, {"step": epoch * 20}))
        metrics = report_of(trial, epoch)["metrics"]
        state = TrialState(
            epoch=epoch,
            step=epoch * 20,
            ended="finished" if epoch == EPOCHS else None,
            metrics=metrics,
            best_epoch=epoch,
            best_step=epoch * 20,
            best_metrics=metrics,
            improvements=tuple((number, value_of(trial, number)) for number in range(1, epoch + 1)),
            num_parameters=9610,
            ledger=Ledger(**LEDGER),
        )
        return [*events, Event.of_state(name, state)], state

    def _rank(self) -> None:
        from bigray.journal import read_journal
        from bigray.ranking import rank, training_wall_s, trial_results

        with self._timed("ranking"):
            self._housekeeping.finish()
            events = list(read_journal(self._paths))
            training_wall_s(events)
            board = rank(trial_results(self._trials, events), "val_accuracy", "max")
        assert len(board) == len(self._trials), f"{len(board)} of {len(self._trials)} trials were run"

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self._cpu_s[part] += time.process_time() - began


def value_of(trial: Any, epoch: int) -> float:
    """Best at a learning rate of 0.01, better with every epoch; no two trials are equal."""
    distance = abs(math.log10(trial.training.lr) + 2)
    return 1.0 - 0.3 * distance - 0.2 / epoch - trial.training.batch_size * 1e-6


def report_of(trial: Any, epoch: int) -> dict[str, Any]:
    """What rank 0 tells after an epoch."""
    value = value_of(trial, epoch)
    metrics = {"val_loss": 1 - value, "val_accuracy": value, "val_macro_recall": value, "val_macro_f1": value}
    return {
        "epoch": epoch,
        "step": epoch * 20,
        "train_loss": 1 - value,
        "samples_per_s": 50_000.0,
        "epoch_s": 0.02,
        "metrics": metrics,
        "best_epoch": epoch,
        "best_metrics": metrics,
        "samples_lost": 0,
        "samples_repeated": 0,
        "ended": "finished" if epoch == EPOCHS else None,
        "reason": None,
    }


def of_tune(sizes: Sequence[int], folder: Path) -> Figures:
    import ray
    from ray import tune

    class NoOp(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            pass

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            return {"loss": 0.0, "done": True}

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    found: Figures = {}
    for trials in (20, *sizes):  # the first starts the actors
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        results = tune.Tuner(
            tune.with_resources(NoOp, {"cpu": 1}),
            param_space={"lr": tune.loguniform(1e-4, 1e-1)},
            tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=str(folder),
                name=f"sweep-{trials}",
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
        cpu_s, wall_s = time.process_time() - began_cpu_s, time.monotonic() - began_s
        assert len(results) == trials, "every trial gives one result"
        if trials in sizes:
            found[str(trials)] = {"cpu": cpu_s * 1e6 / trials, "wall": wall_s * 1e6 / trials, "results": trials}
    ray.shutdown()
    return found


def total(figures: dict[str, float]) -> float:
    """Microseconds a result, over all parts."""
    return figures["cpu"] if "cpu" in figures else sum(figures.get(part, 0.0) for part in PARTS)


def middle(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure."""
    return {
        trials: {name: statistics.median(one[trials][name] for one in rounds) for name in figures}
        for trials, figures in rounds[0].items()
    }


def show(figures: dict[str, Figures], sizes: Sequence[int]) -> None:
    names = [str(trials) for trials in sizes]
    rows: list[tuple[str, ...]] = []
    for peer, of_peer in figures.items():
        if peer.startswith("tune"):
            rows.append(row_of(f"{LABELS[peer]}: processor", [value_at(of_peer, name, "cpu") for name in names]))
            rows.append(row_of(f"{LABELS[peer]}: wall", [value_at(of_peer, name, "wall") for name in names]))
            continue
        legs = [f"{of_peer[name]['legs']:,.0f} / {of_peer[name]['results']:,.0f}" for name in names]
        rows.append((f"{LABELS[peer]}: legs / results", *legs, ""))
        for part, label in PARTS.items():
            rows.append(row_of(f"  {label}", [value_at(of_peer, name, part) for name in names]))
        rows.append(row_of(f"{LABELS[peer]}: all", [total(of_peer[name]) for name in names]))
    if "tune tuned" in figures:
        leg_us = list(figures["tune tuned"].values())[-1]["cpu"]
        for peer in [peer for peer in figures if not peer.startswith("tune")]:
            of_sizes = [figures[peer][name] for name in names]
            values = [total(one) + leg_us * one["legs"] / one["results"] for one in of_sizes]
            rows.append(row_of(f"{LABELS[peer]}: all, and Tune for the legs", values))
    title = "microseconds of the driver's processor time a result, by the number of trials (bigray: SIMULATED)"
    print_table(title, ("", *(f"{trials:,} trials" for trials in sizes), "slope"), rows)


def value_at(figures: Figures, trials: str, name: str) -> float | None:
    return figures[trials].get(name) if trials in figures else None


def row_of(label: str, values: Sequence[float | None]) -> tuple[str, ...]:
    cells = ["" if value is None else f"{value:,.1f}" for value in values]
    return (label, *cells, slope_cell(values))


def slope_cell(values: Sequence[float | None]) -> str:
    """Of the figures' logarithm over that of the number of trials, which is ten times larger in each column."""
    known = [(number, math.log10(value)) for number, value in enumerate(values) if value]
    if len(known) < 2:
        return ""
    return f"{statistics.linear_regression(*zip(*known, strict=True)).slope:+.2f}"


if __name__ == "__main__":
    main()
