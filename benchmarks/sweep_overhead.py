"""What a trial costs beside its training: bigray, plain Tune, and the documented Tune + TorchTrainer recipe.

    python benchmarks/sweep_overhead.py [--size full|small] [--rounds 2]

Every trial does next to nothing: one optimizer step of a linear model. So all of its time is overhead. Each peer runs
in a process and on a Ray of its own, in turns. The figure is the time from the end of the first leg (bigray) or trial
(the others) to the end of the last, for each trial in between: starting Ray and the first workers is not in it, for
anyone. bigray's first row trains each trial alone, over both workers; the second lets it stack them.

Plain Tune trains in the trial's own process, without DDP: it is the strong peer, and does less than the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import TUNE_TUNED, TUNED, print_table, run_in_own_process, spread, tell

ROWS, FEATURES, CLASSES = 64, 64, 10
LABELS = {
    "bigray": "bigray, 2 DDP workers, each trial alone",
    "bigray stacked": "bigray, 2 workers, stacks of up to 64",
    "plain": "plain Tune, reuse_actors=True, no DDP",
    "plain tuned": "the same, loggers off",
    "recipe": "Tune + TorchTrainer as documented, 2 DDP workers",
    "recipe tuned": "the same, fast poll, no preemption watcher",
}
TRIALS = {
    "full": {"bigray": 100, "bigray stacked": 512, "plain": 100, "plain tuned": 100, "recipe": 3, "recipe tuned": 3},
    "small": {"bigray": 12, "bigray stacked": 192, "plain": 12, "plain tuned": 12, "recipe": 2, "recipe tuned": 2},
}
SETTINGS = {"plain tuned": TUNE_TUNED, "recipe tuned": TUNED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TRIALS, default="full")
    parser.add_argument("--rounds", type=int, help="default: 2, with --size small 1")
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.peer, TRIALS[arguments.size][arguments.peer], Path(folder))))
        return
    figures: dict[str, list[float]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds or (1 if arguments.size == "small" else 2)):
        for peer in arguments.peers:
            more = SETTINGS.get(peer, {})
            seconds = float(run_in_own_process(__file__, "--peer", peer, "--size", arguments.size, **more))
            figures[peer].append(seconds)
            tell(f"round {number + 1}: {LABELS[peer]}: {seconds * 1e3:,.1f} ms a trial")
    show(figures, TRIALS[arguments.size])


def measure(peer: str, trials: int, folder: Path) -> float:
    """Seconds a trial, after the first."""
    if peer.startswith("bigray"):
        return a_trial_of_bigray(trials, folder, stack="auto" if peer == "bigray stacked" else "off")
    ends = (trial_ends_plain if peer.startswith("plain") else trial_ends_recipe)(trials, str(folder))
    assert len(ends) == trials, f"{len(ends)} of {trials} trials ended"
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def make_rows(rows: int) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    return generator.normal(size=(rows, FEATURES)).astype(np.float32), generator.integers(0, CLASSES, rows)


def a_trial_of_bigray(trials: int, folder: Path, stack: str) -> float:
    import numpy as np

    import bigray
    from bigray.specs import JobSpec, SearchSpec
    from bigray.training.commands import Event

    x, y = make_rows(2 * ROWS)
    np.savez(folder / "rows.npz", x=x, y=y)
    data = {"source": str(folder / "rows.npz"), "target": "y", "split": {"validation": 0.25, "holdout": 0.25}}
    job = JobSpec.model_validate(
        {
            "name": "overhead",
            "storage": str(folder / "runs"),
            "data": data,
            "models": {"linear": {"factory": "bigray.models:linear"}},
            "training": {"task": "classification", "epochs": 1, "global_batch_size": ROWS, "optimizer": "sgd"},
            "scaling": {"num_workers": 2},
        }
    )
    space = {"lr": {"log_uniform": [1e-3, 1e-1]}}
    search = SearchSpec.model_validate({"trials": trials, "scheduler": "none", "stack": stack, "space": space})
    legs: list[tuple[float, int]] = []
    """When each ended, and how many trials it was of; probes are part of what they precede."""

    def listen(event: Event) -> None:
        if event.kind == "leg" and event.values["outcomes"]:
            legs.append((time.monotonic(), len(event.values["outcomes"])))

    bigray.tune(job, search, listener=listen)
    assert sum(number for _, number in legs) == trials, f"not {trials} trials in {len(legs)} legs"
    return (legs[-1][0] - legs[0][0]) / sum(number for _, number in legs[1:])


def step(lr: float, rank: int, world_size: int, wrap: Any) -> None:
    """The same step, for the peers."""
    import torch

    torch.set_num_threads(1)
    x, y = (torch.from_numpy(array) for array in make_rows(ROWS))
    model = wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(FEATURES, CLASSES)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rows = slice(rank, None, world_size)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()


def trial_ends_plain(trials: int, folder: str) -> list[float]:
    import ray
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        step(config["lr"], 0, 1, lambda model: model)
        tune.report({"loss": 0.0, "ended": time.time()})

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    return fit(tune, trial, folder, trials, reuse_actors=True)


def trial_ends_recipe(trials: int, folder: str) -> list[float]:
    import ray
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer, prepare_model
    from ray.tune.integration.ray_train import TuneReportCallback

    def worker(config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        step(config["lr"], context.get_world_rank(), context.get_world_size(), prepare_model)
        ray.train.report({"loss": 0.0, "ended": time.time()})

    def trial(config: dict[str, Any]) -> None:
        trial_id = tune.get_context().get_trial_id()
        TorchTrainer(
            worker,
            train_loop_config={"lr": config["lr"]},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(
                name=f"train-{trial_id}", storage_path=folder, callbacks=[TuneReportCallback()]
            ),
        ).fit()

    # one logical CPU more than the others: the recipe's trial driver holds one while its two workers train
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    return fit(tune, trial, folder, trials, reuse_actors=False)


def fit(tune: Any, trial: Any, folder: str, trials: int, *, reuse_actors: bool) -> list[float]:
    results = tune.Tuner(
        trial,
        param_space={"lr": tune.loguniform(1e-3, 1e-1)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=1, reuse_actors=reuse_actors),
        run_config=tune.RunConfig(storage_path=folder, name="sweep", verbose=0),
    ).fit()
    if results.errors:
        raise results.errors[0]
    return sorted(result.metrics["ended"] for result in results)


def show(figures: dict[str, list[float]], trials: dict[str, int]) -> None:
    middles = {peer: statistics.median(values) for peer, values in figures.items()}
    beside = [ours for ours in ("bigray", "bigray stacked") if ours in figures]
    rows = []
    for peer, values in figures.items():
        ratios = (f"{middles[peer] / middles[ours]:,.1f}x" for ours in beside)
        milliseconds = spread([value * 1e3 for value in values], "{:,.1f}")
        rows.append((LABELS[peer], str(trials[peer]), *milliseconds, *ratios))
    columns = ("peer", "trials a round", "ms a trial", "least", "most", *(f"beside {ours}" for ours in beside))
    print_table("milliseconds a no-op trial, after the first", columns, rows)


if __name__ == "__main__":
    main()
