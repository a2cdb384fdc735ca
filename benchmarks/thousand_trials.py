"""A thousand trials tuned and the best one served, from the command line: bigray, plain Tune, Tune + TorchTrainer.

    python benchmarks/thousand_trials.py [--size full|small] [--rounds 2] [--grace 2]

The search: an MLP on the digits (64 -> 128 -> 10, AdamW), learning rate x batch size, 1,000 random trials under ASHA,
20 epochs at most, a third of the trials promoted. `--size small` is 100 trials for everybody.

bigray: `bigray run JOB --search FILE --serve FILE --exit`, from the start of the command to the first HTTP answer that
equals what the exported bundle says offline, asked for by this script again and again. Its phases are told by the
command's events: start (imports, data, Ray), groups (two workers, the first probe), trials, export, serve (until that
answer). Trials a second are those of the phase of that name, in which the processes are counted too.

Plain Tune, the strong peer, does less: a trial is a class Trainable in a warm process (`reuse_actors=True`), two at a
time, without DDP, checkpoints, a holdout, an export or an endpoint. It trains the same model by the same steps on
tensors in memory. With Tune's defaults, without its loggers, and reporting at the rungs only. Its trials a second are
those from the start of the first trial to the end of the last; its wall is that of the whole script.

The recipe is Tune + TorchTrainer as documented, two DDP workers a trial, one trial at a time. Only its first trials are
run, 16 (small: 4), and their mean is EXTRAPOLATED to all. No scheduler stops them: each trains for 6 epochs, about the
mean of a trial under ASHA.

Tune's ASHA stops a trial at a rung or lets it go on, bigray's pauses and promotes: the epochs differ, and are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measuring import (
    HERE,
    TUNE_TUNED,
    TUNED,
    clean_environment,
    free_port,
    print_table,
    run_in_own_process,
    spread,
    tell,
    wait_for,
)

ROOT = HERE.parent
COUNT_EVERY_S = 0.5
LABELS = {
    "bigray": "bigray run, 2 workers, and served",
    "plain": "plain Tune, reuse_actors=True",
    "plain tuned": "the same, loggers off",
    "plain rungs": "the same, loggers off, a step a rung",
    "recipe": "Tune + TorchTrainer as documented",
    "recipe tuned": "the same, fast poll, no preemption watcher",
}
SETTINGS = {"plain tuned": TUNE_TUNED, "plain rungs": TUNE_TUNED, "recipe": {}, "recipe tuned": TUNED}
TRIALS = {"full": 1_000, "small": 100}
RECIPE_TRIALS = {"full": 16, "small": 4}
EPOCHS, FACTOR = 20, 3
LR, BATCHES = (1e-4, 1e-1), (32, 64, 128)
RECIPE_EPOCHS = 6
PHASES = ("start", "groups", "trials", "export", "serve")


@dataclass(frozen=True)
class Figures:
    """Of one sweep."""

    trials: int
    """That were run."""
    rate: float
    """Trials a second."""
    wall_s: float
    """From the start of the process; bigray's to the first answer."""
    epochs: int
    """Over all trials."""
    best: float
    """Validation accuracy."""
    phases: dict[str, float] = field(default_factory=dict)
    holdout: float | None = None
    """Accuracy of the winner, over HTTP."""
    processes: tuple[int, ...] = ()
    """Of the command, in the first and in the last quarter of the trials' phase: the most there were."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TRIALS, default="full")
    parser.add_argument("--rounds", type=int, help="default: 2, with --size small 1")
    parser.add_argument("--grace", type=int, default=2, help="epochs that every trial gets; default: 2")
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asdict(of_tune(arguments.peer, arguments.size, arguments.grace, Path(folder)))))
        return
    figures: dict[str, list[Figures]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds or (1 if arguments.size == "small" else 2)):
        for peer in arguments.peers:
            found = measure(peer, arguments.size, arguments.grace)
            figures[peer].append(found)
            told = f"{found.trials} trials, {found.rate:.2f} trials/s, {found.wall_s:.1f} s in all"
            tell(f"round {number + 1}: {LABELS[peer]}: {told}")
    show(figures, TRIALS[arguments.size])


def measure(peer: str, size: str, grace: int) -> Figures:
    if peer == "bigray":
        with tempfile.TemporaryDirectory() as folder:
            return of_bigray(TRIALS[size], grace, Path(folder))
    own = ("--peer", peer, "--size", size, "--grace", str(grace))
    began_s = time.monotonic()
    found = run_in_own_process(__file__, *own, **SETTINGS.get(peer, {}))
    return Figures(**{**found, "wall_s": time.monotonic() - began_s})


def of_bigray(trials: int, grace: int, folder: Path) -> Figures:
    import onnxruntime  # noqa: F401  # before the clock starts

    from bigray.bundle import ModelBundle
    from bigray.inference import Predictor

    port = free_port()
    command = ["run", *write_files(trials, grace, port, folder), "--exit", "--events"]
    began_s = time.monotonic()
    with running(command) as events:
        bundle = ModelBundle.load(str(events.wait_for("bundle")["uri"]))
        row = bundle.manifest.example
        offline = Predictor(bundle).run(bundle.manifest.inputs.from_records([row])).to_records()
        wait_for(lambda: answers_like(offline, port, row), "a correct answer", events.is_running)
        answered_s = time.monotonic()
        result = events.wait_for("result")
    assert result["holdout"]["all_equal"], "an answer of the endpoint is not the bundle's"
    begun = min(events.first("probe"), events.first("started"))
    ends = (events.first("groups"), begun, events.first("exporting"), events.first("bundle"), answered_s)
    counts = events.processes_between(begun, events.first("exporting"))
    phases = {name: end - start for name, start, end in zip(PHASES, (began_s, *ends), ends, strict=False)}
    board = result["leaderboard"]
    assert len(board["trials"]) == trials, f"{len(board['trials'])} of {trials} trials"
    return Figures(
        trials=trials,
        rate=trials / phases["trials"],
        wall_s=answered_s - began_s,
        epochs=sum(trial["epochs"] for trial in board["trials"]),
        best=board["winner"]["metrics"]["val_accuracy"],
        phases=phases,
        holdout=result["holdout"]["metrics"]["accuracy"],
        processes=(max(counts[: len(counts) // 4 + 1]), max(counts[-len(counts) // 4 :])),
    )


def write_files(trials: int, grace: int, port: int, folder: Path) -> list[str]:
    """The job, search and serve file of the command, as its arguments: the examples, for one model and a free port."""
    (folder / "job.toml").write_text(f"""
name = "digits"
storage = "{folder / "runs"}"

[data]
source = "examples.digits.data:load"
target = "label"
split = {{ validation = 0.15, holdout = 0.15 }}
normalize = "standard"

[models.mlp]
factory = "bigray.models:mlp"
params = {{ hidden = [128] }}

[training]
task = "classification"
epochs = {EPOCHS}
optimizer = "adamw"

[scaling]
num_workers = 2
""")
    (folder / "search.toml").write_text(f"""
search = "random"
trials = {trials}
scheduler = "asha"

[space]
lr = {{ log_uniform = {list(LR)} }}
global_batch_size = {{ choice = {list(BATCHES)} }}

[asha]
grace_epochs = {grace}
reduction_factor = {FACTOR}
""")
    serve = (ROOT / "serve" / "local.yaml").read_text()
    assert "port: 8000" in serve, "the port to put another in the place of"
    (folder / "serve.yaml").write_text(serve.replace("port: 8000", f"port: {port}"))
    return [str(folder / "job.toml"), "--search", str(folder / "search.toml"), "--serve", str(folder / "serve.yaml")]


class Events:
    """What a command prints with `--events`, line by line as it comes, and how many processes it has (two threads)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._firsts: dict[str, tuple[float, str]] = {}
        """By kind: when the first of it came, and its line."""
        self._counts: list[tuple[float, int]] = []
        """When, and how many processes there were."""
        for work in (self._read, self._count):
            threading.Thread(target=work, daemon=True).start()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def first(self, kind: str) -> float:
        """When the first of a kind came, by `time.monotonic()`; later than anything where none did."""
        return self._firsts[kind][0] if kind in self._firsts else float("inf")

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The first of a kind."""
        wait_for(lambda: kind in self._firsts, f"{kind} of bigray", lambda: kind in self._firsts or self.is_running())
        found: dict[str, Any] = json.loads(self._firsts[kind][1])
        return found

    def processes_between(self, first_s: float, last_s: float) -> list[int]:
        return [count for at_s, count in self._counts if first_s <= at_s <= last_s]

    def _count(self) -> None:
        while self.is_running():
            self._counts.append((time.monotonic(), num_processes(self._process.pid)))
            time.sleep(COUNT_EVERY_S)

    def _read(self) -> None:
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:
            came_s = time.monotonic()
            kind = line.partition('"kind": "')[2].partition('"')[0]  # parsed later: this competes with the training
            self._firsts.setdefault(kind, (came_s, line))


@contextmanager
def running(command: list[str]) -> Iterator[Events]:
    """`bigray` as a command, from the folder of the examples; ended with the block."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bigray", *command],
            env=clean_environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Events(process)
            assert process.wait(60) == 0, "bigray ended with an error"
        except BaseException:
            process.terminate()
            process.wait()
            errors.seek(0)
            print(errors.read()[-4000:], file=sys.stderr)
            raise


def num_processes(pid: int) -> int:
    """A process and all that descend from it (Linux)."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = file.read_text().rpartition(")")[2].split()  # a name may hold spaces
            children.setdefault(int(fields[1]), []).append(int(file.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return len(found)


def answers_like(offline: list[dict[str, Any]], port: int, row: dict[str, Any]) -> bool:
    """Whether the endpoint says of a row what the bundle says."""
    from bigray.errors import DeployError
    from bigray.serve.client import Client

    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            online = client.predict([row])
    except DeployError:
        return False
    differences = [abs(a - b) for a, b in zip(online[0]["probabilities"], offline[0]["probabilities"], strict=True)]
    return bool(online[0]["label"] == offline[0]["label"] and max(differences) <= 1e-6)


def of_tune(peer: str, size: str, grace: int, folder: Path) -> Figures:
    if peer.startswith("plain"):
        results = plain_trials(TRIALS[size], grace, folder, rung_steps=peer == "plain rungs")
    else:
        results = recipe_trials(RECIPE_TRIALS[size], folder)
    if results.errors:
        raise results.errors[0]
    last = [result.metrics for result in results]
    span_s = max(one["at"] for one in last) - min(one["began"] for one in last)
    return Figures(
        trials=len(last),
        rate=len(last) / span_s,
        wall_s=0.0,
        epochs=sum(one["epoch"] for one in last),
        best=max(one["best_accuracy"] for one in last),
    )


def plain_trials(trials: int, grace: int, folder: Path, *, rung_steps: bool) -> Any:
    import ray
    from ray import tune

    class DigitsTrial(tune.Trainable):  # type: ignore[misc]
        """One step is an epoch, or trains to the next rung."""

        def setup(self, config: dict[str, Any], arrays: Any) -> None:
            import torch
            from training_peers.digits import load_tensors

            torch.set_num_threads(1)
            self._tensors = load_tensors(arrays)
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            from training_peers.digits import DigitsTraining

            self._began = time.time()
            self._training = DigitsTraining(self._tensors, new_config["lr"], new_config["batch"])
            return True

        def step(self) -> dict[str, Any]:
            training = self._training
            training.train_epoch()
            metrics = training.measure()
            while rung_steps and training.epoch not in rungs:
                training.train_epoch()
                metrics = training.measure()
            return {**metrics, "began": self._began, "at": time.time()}

    rungs = [epoch for epoch in (grace * FACTOR**number for number in range(EPOCHS)) if epoch < EPOCHS] + [EPOCHS]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    trainable = tune.with_resources(tune.with_parameters(DigitsTrial, arrays=digits().arrays), {"cpu": 1})
    return fit(trainable, trials, grace, folder, reuse_actors=True)


def recipe_trials(trials: int, folder: Path) -> Any:
    import ray
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer, prepare_model
    from ray.tune.integration.ray_train import TuneReportCallback

    def worker(config: dict[str, Any]) -> None:
        import torch
        from training_peers.digits import DigitsTraining, load_tensors

        torch.set_num_threads(1)
        context = ray.train.get_context()
        place = (context.get_world_rank(), context.get_world_size())
        training = DigitsTraining(load_tensors(ray.get(arrays)), config["lr"], config["batch"], *place, prepare_model)
        while training.epoch < RECIPE_EPOCHS:
            training.train_epoch()
            ray.train.report({**training.measure(), "began": config["began"], "at": time.time()})

    def trial(config: dict[str, Any]) -> None:
        TorchTrainer(
            worker,
            train_loop_config={**config, "began": time.time()},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(
                name=f"train-{tune.get_context().get_trial_id()}",
                storage_path=str(folder),
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    # one logical CPU more than the others: the recipe's trial driver holds one while its two workers train
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    arrays = ray.put(digits().arrays)
    return fit(trial, trials, None, folder, reuse_actors=False, max_concurrent_trials=1)


def digits() -> Any:
    """The rows as bigray's job has them: the same split, standardised."""
    from bigray.data.dataset import prepare_dataset
    from bigray.specs import DataSpec

    sys.path.insert(0, str(ROOT))
    spec = DataSpec.model_validate({"source": "examples.digits.data:load", "target": "label", "normalize": "standard"})
    return prepare_dataset(spec, "classification")


def fit(trainable: Any, trials: int, grace: int | None, folder: Path, *, reuse_actors: bool, **config: Any) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    asha = {"time_attr": "epoch", "grace_period": grace, "reduction_factor": FACTOR, "max_t": EPOCHS}
    return tune.Tuner(
        trainable,
        param_space={"lr": tune.loguniform(*LR), "batch": tune.choice(BATCHES)},
        tune_config=tune.TuneConfig(
            metric="best_accuracy",
            mode="max",
            num_samples=trials,
            scheduler=ASHAScheduler(**asha) if grace is not None else None,
            reuse_actors=reuse_actors,
            **config,
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            name="sweep",
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    ).fit()


def show(figures: dict[str, list[Figures]], trials: int) -> None:
    middles = {peer: statistics.median(one.rate for one in of_peer) for peer, of_peer in figures.items()}
    rows = []
    for peer, of_peer in figures.items():
        is_recipe = peer.startswith("recipe")
        wall_s = statistics.median(one.wall_s for one in of_peer)
        wall = f"EXTRAPOLATED {trials / middles[peer]:,.0f}" if is_recipe else f"{wall_s:,.1f}"
        epochs = statistics.median(one.epochs / one.trials for one in of_peer)
        best = statistics.median(one.best for one in of_peer)
        beside = f"{middles['bigray'] / middles[peer]:,.1f}x" if "bigray" in middles else ""
        rate = spread([one.rate for one in of_peer], "{:.3f}" if is_recipe else "{:.1f}")
        rows.append((LABELS[peer], f"{of_peer[0].trials:,}", *rate, wall, f"{epochs:.1f}", f"{best:.4f}", beside))
    columns = ("peer", "trials run", "trials/s", "least", "most", "wall s", "epochs each", "best", "bigray / peer")
    print_table(f"{trials:,} trials of an MLP on the digits by ASHA", columns, rows, note=phases_note(figures))


def phases_note(figures: dict[str, list[Figures]]) -> str:
    of_bigray = figures.get("bigray", [])
    if not of_bigray:
        return ""
    parts = [f"{name} {statistics.median(one.phases[name] for one in of_bigray):.1f}" for name in PHASES]
    wall = ", ".join(f"{one.wall_s:.1f}" for one in of_bigray)
    holdout = ", ".join(f"{one.holdout:.4f}" for one in of_bigray)
    early, late = (max(one.processes[place] for one in of_bigray) for place in (0, -1))
    return (
        f"bigray, command to first correct HTTP answer, each round: {wall} s\n"
        f"its phases, median seconds: {', '.join(parts)}; accuracy of the winner on the holdout over HTTP: {holdout}\n"
        f"its processes at most, in the first quarter of the trials {early}, in the last {late}"
    )


if __name__ == "__main__":
    main()
