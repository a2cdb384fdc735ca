"""What the examples reach on rows that were held out, over several seeds: each seed is another split and other weights.

    python benchmarks/example_figures.py [--examples digits mnist_cnn binary_digit] [--seeds 3]

Each run is `bigray.train` with the example's job file; the winner of the validation rows reads its holdout once.
`digits` is asked for its `mlp` alone and holds out 20 % of its rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass

from measuring import print_table, tell

import bigray
from bigray.training.request import make_request
from bigray.training.runner import training_trials


@dataclass(frozen=True)
class Example:
    """What is set beside its job file; default of the seeds; the class whose recall and precision count, if any."""

    overrides: tuple[str, ...] = ()
    seeds: int = 3
    positive: str | None = None


EXAMPLES = {
    "digits": Example(("data.split={ validation = 0.1, holdout = 0.2 }",), seeds=10),
    "mnist_cnn": Example(),
    "binary_digit": Example(positive="zero"),
}
Scores = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    parser.add_argument("--seeds", type=int, help="default: 10 of digits, 3 of the others")
    arguments = parser.parse_args()
    found: dict[str, list[Scores]] = {}
    with tempfile.TemporaryDirectory() as folder, bigray.connect():
        for name in arguments.examples:
            seeds = range(arguments.seeds or EXAMPLES[name].seeds)
            found[name] = [of_seed(name, EXAMPLES[name], seed, folder) for seed in seeds]
    rows = [row for name, scores in found.items() for row in rows_of(name, scores)]
    print_table("on rows that were held out", ("example", "score", "seeds", "mean", "least", "most"), rows)


def of_seed(name: str, example: Example, seed: int, folder: str) -> Scores:
    overrides = [f"seed={seed}", f"storage='{folder}'", *example.overrides, f"data.split.seed={seed}"]
    job = bigray.load_job(f"examples/{name}/job.toml", overrides)
    if name == "digits":
        job = job.model_copy(update={"models": {"mlp": job.models["mlp"]}})
    board = bigray.train(job)
    dataset = make_request(job, training_trials(job)).dataset
    labels = bigray.Predictor(bigray.ModelBundle.load(board.bundle)).run_table(dataset.holdout).labels
    assert labels is not None, "each of them has classes"
    scores = scores_of(list(labels), dataset.holdout_targets(), example.positive)
    told = ", ".join(f"{score} {value:.4f}" for score, value in scores.items())
    tell(f"{name}, seed {seed}: {told}, {len(labels)} rows, trained in {board.wall_s:.1f} s")
    return scores | {"training, s": board.wall_s}


def scores_of(given: list[object], truth: list[object], positive: str | None) -> Scores:
    pairs = list(zip(given, truth, strict=True))
    scores = {"accuracy": sum(one == other for one, other in pairs) / len(pairs)}
    if positive is not None:
        right = sum(one == other == positive for one, other in pairs)
        scores["recall"] = right / sum(other == positive for _, other in pairs)
        scores["precision"] = right / max(1, sum(one == positive for one, _ in pairs))
    return scores


def rows_of(name: str, scores: list[Scores]) -> list[tuple[str, ...]]:
    rows = []
    for score in scores[0]:
        values = [each[score] for each in scores]
        of_all = (statistics.mean(values), min(values), max(values))
        rows.append((name, score, str(len(values)), *(f"{value:.4f}" for value in of_all)))
    return rows


if __name__ == "__main__":
    main()
