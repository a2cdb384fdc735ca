"""Reports a second that reach the driver, and what they cost the loop: bigray, and `ray.train.report`.

    python benchmarks/reporting.py [--size full|small] [--rounds 2]

A loop of the user's own, on two workers, reports two numbers again and again: without a pause, and with 1 ms of work in
between. The rate is the number of reports over the time from the start of the loop to the last one's arrival, at the
listener of `bigray.train`, and at a callback of `TorchTrainer`. The cost is the share of the loop's time that was spent
in `report`. Of bigray's, all are counted in the journal after the run. bigray's loops run for some seconds;
`ray.train.report` is called a fixed number of times, since it waits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import TUNED, print_table, run_in_own_process, spread, tell

LABELS = {
    "bigray 0": "bigray, nothing in between",
    "bigray 1": "bigray, 1 ms in between",
    "ray 0": "ray.train.report, nothing in between",
    "ray 1": "ray.train.report, 1 ms in between",
    "ray tuned 0": "ray.train.report, tuned, nothing in between",
    "ray tuned 1": "ray.train.report, tuned, 1 ms in between",
}
SECONDS = {"full": 6.0, "small": 2.0}
RAY_REPORTS = {"full": {"ray": 10, "ray tuned": 100}, "small": {"ray": 5, "ray tuned": 20}}


@dataclass(frozen=True)
class Figures:
    """Of one loop."""

    reports: int
    rate: float
    """Reports a second, until the last one arrived."""
    share: float
    """Of the loop's time that was spent in `report`."""
    in_journal: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SECONDS, default="full")
    parser.add_argument("--rounds", type=int, help="default: 2, with --size small 1")
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        kind, _, pause_ms = arguments.peer.rpartition(" ")
        with tempfile.TemporaryDirectory() as folder:
            config = {"path": f"{folder}/figures.json", "compute_s": float(pause_ms) / 1e3}
            of_peer = of_bigray if kind == "bigray" else of_ray
            print(json.dumps(asdict(of_peer(Path(folder), kind, arguments.size, config))))
        return
    figures: dict[str, list[Figures]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds or (1 if arguments.size == "small" else 2)):
        for peer in arguments.peers:
            more = TUNED if "tuned" in peer else {}
            found = Figures(**run_in_own_process(__file__, "--peer", peer, "--size", arguments.size, **more))
            figures[peer].append(found)
            tell(f"round {number + 1}: {LABELS[peer]}: {found.rate:,.1f} reports/s, {found.share:.2%} of the loop")
    show(figures)


def of_bigray(folder: Path, _: str, size: str, config: dict[str, Any]) -> Figures:
    import numpy as np

    import bigray
    from bigray.journal import read_journal
    from bigray.paths import RunPaths
    from bigray.specs import JobSpec
    from bigray.storage import open_storage

    generator = np.random.default_rng(0)
    np.savez(folder / "rows.npz", x=generator.normal(size=(512, 4)), y=generator.integers(0, 3, 512))
    job = JobSpec.model_validate(
        {
            "name": "reporting",
            "storage": str(folder / "runs"),
            "data": {"source": str(folder / "rows.npz"), "target": "y"},
            "models": {"linear": {"factory": "bigray.models:linear"}},
            "training": {
                "task": "classification",
                "epochs": 1,
                "loop": "training_peers.reporting_loops:train",
                "loop_params": {**config, "seconds": SECONDS[size]},
                "metric": "val_loss",
                "metric_mode": "min",
            },
            "scaling": {"num_workers": 2},
        }
    )
    arrived: list[float] = []
    board = bigray.train(job, listener=lambda e: arrived.append(time.monotonic()) if e.kind == "epoch" else None)
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    numbers = [event["metrics"]["number"] for event in read_journal(paths) if event["kind"] == "epoch"]
    found = json.loads(Path(config["path"]).read_text())
    # -1 is the report that hands over the weights, before the loop
    assert numbers == [float(number) for number in range(-1, found["reports"])], "a report is missing in the journal"
    return _figures(found, arrived[-1], len(numbers) - 1)


def of_ray(folder: Path, kind: str, size: str, config: dict[str, Any]) -> Figures:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer
    from training_peers.reporting_loops import train_under_ray
    from training_peers.torch_trainer import start_ray

    class Arrivals(ray.train.UserCallback):
        """Runs where reports arrive."""

        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            with open(folder / "arrivals", "a") as file:
                file.write(f"{time.monotonic()}\n")

    start_ray()
    TorchTrainer(
        train_under_ray,
        train_loop_config={**config, "seconds": 0.0, "most": RAY_REPORTS[size][kind]},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="reporting", storage_path=str(folder / "runs"), callbacks=[Arrivals()]),
    ).fit()
    ray.shutdown()
    arrived = [float(line) for line in (folder / "arrivals").read_text().splitlines()]
    found = json.loads(Path(config["path"]).read_text())
    assert len(arrived) == found["reports"]
    return _figures(found, arrived[-1])


def _figures(found: dict[str, Any], last_at: float, in_journal: int | None = None) -> Figures:
    rate = found["reports"] / (last_at - found["began_at_s"])
    return Figures(found["reports"], rate, found["in_report_s"] / found["loop_s"], in_journal)


def show(figures: dict[str, list[Figures]]) -> None:
    rates = {peer: statistics.median(one.rate for one in of_peer) for peer, of_peer in figures.items()}
    rows = []
    for peer, of_peer in figures.items():
        share = statistics.median(one.share for one in of_peer)
        journal = sum(one.in_journal for one in of_peer if one.in_journal is not None)
        ours = rates.get(f"bigray {peer[-1]}")
        beside = f"{ours / rates[peer]:,.0f}x" if ours and not peer.startswith("bigray") else ""
        number = sum(one.reports for one in of_peer)
        in_journal = f"{journal:,}" if journal else ""
        rate = spread([one.rate for one in of_peer], "{:,.1f}")
        rows.append((LABELS[peer], f"{number:,}", in_journal, *rate, f"{share:.2%}", beside))
    columns = ("peer", "reports", "in the journal", "reports/s", "least", "most", "of the loop", "bigray / peer")
    print_table("reports that reach the driver, 2 workers", columns, rows)


if __name__ == "__main__":
    main()
