"""Holdout accuracy of the digits winner over several seeds: each seed gives another split, other weights, other trials.

    python benchmarks/holdout_accuracy.py [--seeds 5]

The holdout of each seed is read once, by the winner that the validation rows chose.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from importlib.metadata import version

import bigray
from bigray.training.request import make_request
from bigray.training.runner import training_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder, bigray.connect():
        accuracies = [winner_accuracy(seed, folder) for seed in range(seeds)]
    print(f"mean {statistics.mean(accuracies):.4f}, least {min(accuracies):.4f}, most {max(accuracies):.4f}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("bigray", "ray", "torch"))
    print(f"{versions}, Python {platform.python_version()}; {os.cpu_count()} CPUs, {platform.platform()}")


def winner_accuracy(seed: int, folder: str) -> float:
    overrides = [f"seed={seed}", f"data.split.seed={seed}", f"storage='{folder}'"]
    job = bigray.load_job("examples/digits/job.toml", overrides)
    board = bigray.tune(job, bigray.load_search("tuning/lr_batch.toml", job))
    dataset = make_request(job, training_trials(job)).dataset
    labels = bigray.Predictor(bigray.ModelBundle.load(board.bundle)).run_table(dataset.holdout).labels
    assert labels is not None, "digits is a classification"
    pairs = list(zip(labels, dataset.holdout_targets(), strict=True))
    accuracy = sum(label == truth for label, truth in pairs) / len(pairs)
    print(
        f"seed {seed}: {board.winner.trial_id} {accuracy:.4f} on {len(pairs)} rows, in {board.wall_s:.1f} s", flush=True
    )
    return accuracy


if __name__ == "__main__":
    main()
