"""What a trial costs beside its training: bigray, plain Tune, and the documented Tune + TorchTrainer recipe.

    python benchmarks/sweep_overhead.py [--rounds 2]

Every trial does the same work, eight optimizer steps of a linear model, so nearly all of its time is overhead. Each
peer runs in a process and on a Ray of its own, in turns. The figure is the time from the end of the first trial to the
end of the last, for each trial in between: starting Ray and the first workers is not in it, for anyone.

Plain Tune trains in the trial's own process, without DDP: it is the strong peer, and does less than the other three.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS, FEATURES, CLASSES, BATCH, EPOCHS = 256, 64, 10, 64, 2
TRIALS = {"bigray": 24, "plain": 24, "recipe": 3, "recipe tuned": 3}
LABELS = {
    "bigray": "bigray, 2 DDP workers, warm group",
    "plain": "plain Tune, reuse_actors=True, no DDP",
    "recipe": "Tune + TorchTrainer as documented, 2 DDP workers",
    "recipe tuned": "the same, fast poll, no preemption watcher",
}
TUNED = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", choices=sorted(TRIALS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(measure(arguments.peer)))
        return
    figures: dict[str, list[float]] = {peer: [] for peer in TRIALS}
    for number in range(arguments.rounds):
        for peer in TRIALS:
            seconds = run_in_own_process(peer)
            figures[peer].append(seconds)
            print(f"round {number + 1}: {LABELS[peer]}: {seconds:.3f} s a trial", file=sys.stderr)
    print_table(figures)


def run_in_own_process(peer: str) -> float:
    environment = {**os.environ, "RAY_AUTH_MODE": "token", **(TUNED if peer == "recipe tuned" else {})}
    command = [sys.executable, __file__, "--peer", peer]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{peer} failed:\n{done.stderr[-4000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(peer: str) -> float:
    """Seconds a trial, after the first."""
    with tempfile.TemporaryDirectory() as folder:
        match peer:
            case "bigray":
                ends = trial_ends_bigray(Path(folder))
            case "plain":
                ends = trial_ends_plain(folder)
            case _:
                ends = trial_ends_recipe(folder)
    assert len(ends) == TRIALS[peer], f"{len(ends)} of {TRIALS[peer]} trials ended"
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def make_rows() -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    return generator.normal(size=(ROWS, FEATURES)).astype(np.float32), generator.integers(0, CLASSES, ROWS)


def trial_ends_bigray(folder: Path) -> list[float]:
    import numpy as np

    import bigray
    from bigray.specs import JobSpec, SearchSpec

    x, y = make_rows()
    np.savez(folder / "rows.npz", x=np.repeat(x, 2, axis=0) + np.arange(2 * ROWS)[:, None] * 1e-6, y=np.repeat(y, 2))
    job = JobSpec.model_validate(
        {
            "name": "overhead",
            "storage": str(folder / "runs"),
            "data": {
                "source": str(folder / "rows.npz"),
                "target": "y",
                "split": {"validation": 0.25, "holdout": 0.25},
            },
            "models": {"linear": {"factory": "bigray.models:linear"}},
            "training": {"task": "classification", "epochs": EPOCHS, "global_batch_size": BATCH, "optimizer": "sgd"},
            "scaling": {"num_workers": 2},
        }
    )
    search = SearchSpec.model_validate(
        {"trials": TRIALS["bigray"], "scheduler": "none", "space": {"lr": {"log_uniform": [1e-3, 1e-1]}}}
    )
    ends: list[float] = []
    bigray.tune(job, search, listener=lambda event: ends.append(time.time()) if event.kind == "state" else None)
    return ends


def steps(lr: float, rank: int, world_size: int, wrap: Any) -> None:
    """The same eight steps, for the peers."""
    import torch

    torch.set_num_threads(1)
    x, y = (torch.from_numpy(array) for array in make_rows())
    model = wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(FEATURES, CLASSES)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(EPOCHS):
        for start in range(0, ROWS, BATCH):
            rows = slice(start + rank, start + BATCH, world_size)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def trial_ends_plain(folder: str) -> list[float]:
    import ray
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        steps(config["lr"], 0, 1, lambda model: model)
        tune.report({"loss": 0.0, "ended": time.time()})

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    return fit(tune, trial, folder, TRIALS["plain"], reuse_actors=True)


def trial_ends_recipe(folder: str) -> list[float]:
    import ray
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer, prepare_model
    from ray.tune.integration.ray_train import TuneReportCallback

    def worker(config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        steps(config["lr"], context.get_world_rank(), context.get_world_size(), prepare_model)
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
    return fit(tune, trial, folder, TRIALS["recipe"], reuse_actors=False)


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


def print_table(figures: dict[str, list[float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    ours = statistics.median(figures["bigray"])
    table = Table(title="seconds a trial, after the first (median, least, most)")
    for name in ("peer", "trials a round", "s a trial", "least", "most", "beside bigray"):
        table.add_column(name, justify="left" if name == "peer" else "right")
    for peer, values in figures.items():
        middle = statistics.median(values)
        row = (f"{middle:.3f}", f"{min(values):.3f}", f"{max(values):.3f}", f"{middle / ours:.1f}x")
        table.add_row(LABELS[peer], str(TRIALS[peer]), *row)
    console = Console(width=120)
    console.print(table)
    versions = ", ".join(f"{name} {version(name)}" for name in ("bigray", "ray", "torch", "numpy"))
    console.print(f"{versions}, Python {platform.python_version()}; {os.cpu_count()} CPUs, {platform.platform()}")


if __name__ == "__main__":
    main()
