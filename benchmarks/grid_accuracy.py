"""Whether a sweep that ends most trials early finds as good a winner as the exhaustive grid: bigray with itself.

    python benchmarks/grid_accuracy.py [--size full|small] [--rounds 3]

The grid: every one of 50 learning rates x 4 batch sizes (small: 5 x 4), each trained for all 20 epochs. The sweep: as
many random trials of the same space under ASHA. An MLP on the digits, stacked where that is faster. Each round has
another seed, of the split and of the job.

Both winners are the best of many on one validation set, so their validation accuracy flatters them; the interval is the
binomial one (Wilson, 95 %) of the grid's best. Beside it stands what the exported bundles say of the sealed holdout.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import HERE, print_table, run_in_own_process, tell

LABELS = {"grid": "grid, every trial to its end", "asha": "random search under ASHA"}
NUM_LR = {"full": 50, "small": 5}
BATCHES = (32, 64, 128, 256)
LR = (1e-4, 1e-1)
EPOCHS = 20
Z_95 = 1.959964


@dataclass(frozen=True)
class Figures:
    """Of one search."""

    trials: int
    epochs: int
    """Over all trials."""
    wall_s: float
    """With the start of its Ray and the export."""
    accuracy: float
    """The winner's, on the validation rows."""
    rows: int
    """For validation."""
    holdout: float
    """The winner's accuracy there."""
    holdout_rows: int
    winner: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NUM_LR, default="full")
    parser.add_argument("--rounds", type=int, help="seeds; default: 3, with --size small 1")
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asdict(measure(arguments.peer, arguments.size, arguments.seed, Path(folder)))))
        return
    rounds: list[dict[str, Figures]] = []
    for seed in range(arguments.rounds or (1 if arguments.size == "small" else 3)):
        found = {}
        for peer in LABELS:
            own = ("--peer", peer, "--size", arguments.size, "--seed", str(seed))
            found[peer] = Figures(**run_in_own_process(__file__, *own))
            told = f"{found[peer].accuracy:.4f} ({found[peer].winner}), {found[peer].wall_s:.1f} s"
            tell(f"seed {seed}: {LABELS[peer]}: {told}")
        rounds.append(found)
    show(rounds)


def measure(peer: str, size: str, seed: int, folder: Path) -> Figures:
    import bigray
    from bigray.bundle import ModelBundle
    from bigray.inference import Predictor
    from bigray.specs import JobSpec, SearchSpec
    from bigray.training.request import make_request
    from bigray.tuning.space import search_trials

    sys.path.insert(0, str(HERE.parent))
    job = JobSpec.model_validate(
        {
            "name": "digits",
            "storage": str(folder / "runs"),
            "seed": seed,
            "data": {
                "source": "examples.digits.data:load",
                "target": "label",
                "normalize": "standard",
                "split": {"seed": seed},
            },
            "models": {"mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [128]}}},
            "training": {"task": "classification", "epochs": EPOCHS, "optimizer": "adamw"},
            "scaling": {"num_workers": 2},
        }
    )
    search = SearchSpec.model_validate(search_of(peer, NUM_LR[size]))
    began_s = time.monotonic()
    board = bigray.tune(job, search)
    wall_s = time.monotonic() - began_s
    dataset = make_request(job, search_trials(job, search)).dataset
    answers = Predictor(ModelBundle.load(board.bundle.uri)).run_table(dataset.holdout).labels or []
    right = [str(answer) == str(truth) for answer, truth in zip(answers, dataset.holdout_targets(), strict=True)]
    settings = board.winner.config
    return Figures(
        trials=len(board.trials),
        epochs=sum(trial.epochs for trial in board.trials),
        wall_s=wall_s,
        accuracy=board.winner.metrics["val_accuracy"],
        rows=dataset.num_rows["validation"],
        holdout=statistics.mean(right),
        holdout_rows=len(right),
        winner=f"lr {settings['lr']:g}, batch {settings['global_batch_size']}",
    )


def search_of(peer: str, num_lr: int) -> dict[str, Any]:
    if peer == "asha":
        space = {"lr": {"log_uniform": LR}, "global_batch_size": {"choice": BATCHES}}
        return {"trials": num_lr * len(BATCHES), "scheduler": "asha", "space": space}
    low, high = (math.log10(bound) for bound in LR)
    rates = [float(f"{10 ** (low + (high - low) * number / (num_lr - 1)):.4g}") for number in range(num_lr)]
    space = {"lr": {"choice": rates}, "global_batch_size": {"choice": BATCHES}}
    return {"search": "grid", "scheduler": "none", "space": space}


def wilson(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval of a share of `number` independent rows (Wilson 1927)."""
    square = Z_95**2 / number
    centre = (share + square / 2) / (1 + square)
    half = Z_95 * math.sqrt(share * (1 - share) / number + square / (4 * number)) / (1 + square)
    return centre - half, centre + half


def show(rounds: list[dict[str, Figures]]) -> None:
    rows = []
    num_within = 0
    for seed, found in enumerate(rounds):
        low, high = wilson(found["grid"].accuracy, found["grid"].rows)
        num_within += found["asha"].accuracy >= low
        for peer, one in found.items():
            beside = f"{low:.4f} to {high:.4f}" if peer == "grid" else within(one.accuracy, low, high)
            holdout = f"{one.holdout:.4f}"
            counts = (f"{one.trials:,}", f"{one.epochs:,}", f"{one.wall_s:.1f}")
            rows.append((f"{seed}: {LABELS[peer]}", *counts, f"{one.accuracy:.4f}", beside, holdout, one.winner))
    last = rounds[-1]["grid"]
    lead = [found["asha"].accuracy - found["grid"].accuracy for found in rounds]
    note = (
        f"{last.rows} validation rows, {last.holdout_rows} holdout rows; mean difference of the validation accuracy "
        f"{statistics.mean(lead):+.4f}\nASHA's winner is not below the grid's interval with {num_within} of "
        f"{len(rounds)} seeds"
    )
    columns = ("seed", "trials", "epochs", "s", "val_accuracy", "95 % interval", "holdout", "winner")
    print_table("the best of a sweep, and of the exhaustive grid", columns, rows, note)


def within(accuracy: float, low: float, high: float) -> str:
    return "below" if accuracy < low else "above" if accuracy > high else "within"


if __name__ == "__main__":
    main()
