"""The commands for a finished bundle: parse, call, print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigray.cli.app import KEY_VARIABLE, Address, AsJson, Overrides, api_key, app, is_joining, raise_faults
from bigray.errors import SpecError, StorageError

if TYPE_CHECKING:
    from bigray.compression.compressing import Method
    from bigray.compression.fine_tuning import FineTuning, Train
    from bigray.data.dataset import Dataset
    from bigray.specs import JobSpec

Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="A run folder, or a bundle folder.")]
AllowFactories = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-factory",
        metavar="PATTERN",
        help="A factory whose code may run here, such as 'mine.models:*'.",
        show_default="bigray.models:*",
    ),
]


@app.command(
    epilog="Examples: bigray compress runs/mnist-1a2b3c --int8; bigray compress runs/mnist-1a2b3c --prune 0.5 "
    "--max-drop 0.01; bigray compress runs/digits-1a2b3c --prune 0.8 --fine-tune examples/digits/job.toml --epochs 3"
)
def compress(
    bundle: Bundle,
    int8: Annotated[bool, typer.Option("--int8", help="Weights and activations of eight bits.")] = False,
    prune: Annotated[float | None, typer.Option(metavar="SHARE", help="Set this share of the weights to zero.")] = None,
    low_rank: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Factor the layers to this share of their weights.")
    ] = None,
    fine_tune: Annotated[
        str | None,
        typer.Option(metavar="JOB", help="With --prune: train on by this job file, on Ray; zeros stay zeros."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of --fine-tune.", show_default="the job's, else the bundle's")
    ] = None,
    set_: Overrides = None,
    max_drop: Annotated[float, typer.Option(help="Refuse it where the metric drops by more.")] = 0.005,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where the new bundle goes.", show_default="beside the old one")
    ] = None,
    address: Address = None,
    allow_factory: AllowFactories = None,
    as_json: AsJson = False,
) -> None:
    """Make a bundle smaller: a new one, beside the old one in bytes, time and metric. Starts Ray for --fine-tune alone.

    With --fine-tune the bundle's model is trained on by `bigray train`, on the bundle's own rows. Each key of the job
    file's training section counts (--set overrides one); the others are as the bundle was trained with.
    """
    method = _read_method(int8, prune, low_rank)
    fine_tuning = _read_fine_tuning(fine_tune, epochs, set_, _train_on_ray(address, quiet=as_json))
    from bigray import console
    from bigray.compression.compressing import compress as compress_bundle
    from bigray.workflow import find_bundle

    made = compress_bundle(
        find_bundle(bundle),
        method,
        max_drop=max_drop,
        out=out,
        allow_factories=_allowed(allow_factory),
        fine_tuning=fine_tuning,
    )
    console.print_json(made.to_json()) if as_json else console.print_compression(made)


@app.command(
    epilog="Examples: bigray explain runs/mnist-1a2b3c seven.png --out why.png; "
    "bigray explain runs/titanic-1a2b3c rows.csv --row 3"
)
def explain(
    bundle: Bundle,
    file: Annotated[str, typer.Argument(help="A .png or .jpg, JSON records, or any source that a job can have.")],
    row: Annotated[int | None, typer.Option(min=0, help="Only this row, from 0.", show_default="all")] = None,
    baseline: Annotated[
        int | None,
        typer.Option(min=0, help="Compare with this row of the file.", show_default="what preprocessing makes zero"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Write a picture of the row: red for the answer, blue against.")
    ] = None,
    allow_factory: AllowFactories = None,
    as_json: AsJson = False,
) -> None:
    """Show what each column or pixel adds to an answer, by integrated gradients. Starts no Ray."""
    from bigray import console
    from bigray.explaining import explain_file
    from bigray.workflow import find_bundle

    if out is not None and not out.parent.is_dir():
        raise SpecError(f"--out: {out.parent}: no such folder")
    found = explain_file(
        find_bundle(bundle), file, row=row, baseline_row=baseline, allow_factories=_allowed(allow_factory)
    )
    if out is not None:
        if len(found.rows) > 1:
            raise SpecError(f"--out: {file} has {len(found.rows):,} rows; choose one by --row")
        _write_picture(out, found.picture())
    if as_json:
        console.print_json(found.to_json())
        return
    console.print_explanations(found)
    if out is not None:
        console.say(f"wrote {out}")


def _write_picture(out: Path, picture: bytes) -> None:
    try:
        out.write_bytes(picture)
    except OSError as error:
        raise StorageError(f"--out: {out}: cannot be written: {error.strerror}") from error


@app.command(
    epilog="Examples: bigray predict http://127.0.0.1:8000 rows.csv; "
    "bigray predict runs/digits-1a2b3c rows.parquet --out predictions.parquet"
)
def predict(
    target: Annotated[str, typer.Argument(metavar="URL|BUNDLE", help="An endpoint's root; or a run or bundle folder.")],
    data: Annotated[
        str, typer.Argument(help="Rows as .json, .csv, .parquet or .arrow; with --out any source that a job can have.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Of an endpoint: only the first rows.")] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help=f"API key; better in the environment. [env: {KEY_VARIABLE}]", show_default=False),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Of a bundle: a .parquet file to write, or a folder for many of them."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of a bundle: rows of one forward pass.")] = 256,
    here: Annotated[bool, typer.Option("--here", help="Of a bundle: in this process, without Ray.")] = False,
    address: Address = None,
    allow_factory: AllowFactories = None,
    as_json: AsJson = False,
) -> None:
    """Predict the rows of a file: ask an endpoint, one JSON object a row; or spread a bundle over the cluster.

    With --out the rows are answered by a bundle, in their order, into Parquet that says where it comes from. The same
    command goes on where one was interrupted.
    """
    from bigray import console

    if out is None:
        from bigray.serve.client import predict_file

        _check_endpoint(target, here)
        console.print_predictions(predict_file(target, data, limit, api_key(key)))
        return
    _check_bundle(target)
    _predict_offline(target, data, out, batch_size, here, address, allow_factory, as_json)


def _predict_offline(
    bundle: str,
    data: str,
    out: str,
    batch_size: int,
    here: bool,
    address: str | None,
    allow_factory: list[str] | None,
    as_json: bool,
) -> None:
    import contextlib

    from bigray import console
    from bigray.cluster.connect import connect
    from bigray.prediction.predicting import answer_here, predict_source, spread_over_ray
    from bigray.workflow import find_bundle

    location = find_bundle(bundle)
    with contextlib.nullcontext() if here else connect(address), console.status_line() as line:
        result = predict_source(
            location,
            data,
            out,
            batch_size=batch_size,
            allow_factories=_allowed(allow_factory),
            spread=answer_here if here else spread_over_ray,
            on_part=lambda done, total: line.show(f"{done:,} of {total:,} parts"),
        )
    console.print_json(result.to_json()) if as_json else console.print_prediction_result(result)


def _check_endpoint(target: str, here: bool) -> None:
    if here or Path(target).is_dir():
        raise SpecError(f"--out: say where the predictions of {target} go, such as --out predictions.parquet")


def _check_bundle(target: str) -> None:
    if target.startswith(("http://", "https://")):
        raise SpecError(
            f"--out: is for a bundle, and {target} is an endpoint; print its answers with > predictions.jsonl"
        )


def _read_method(int8: bool, prune: float | None, low_rank: float | None) -> Method:
    from bigray.compression.compressing import Method

    chosen = [Method("int8")] if int8 else []
    chosen += [Method("prune", prune)] if prune is not None else []
    chosen += [Method("low_rank", low_rank)] if low_rank is not None else []
    if len(chosen) != 1:
        raise SpecError("give one of --int8, --prune SHARE and --low-rank SHARE")
    raise_faults(chosen[0].faults())
    return chosen[0]


def _read_fine_tuning(
    job: str | None, epochs: int | None, overrides: list[str] | None, train: Train
) -> FineTuning | None:
    if job is None:
        options = {"--epochs": epochs, "--set": overrides}
        raise_faults([f"{option}: is for --fine-tune JOB" for option, value in options.items() if value])
        return None
    from bigray.compression.fine_tuning import FineTuning
    from bigray.loading import load_job

    return FineTuning(load_job(job, overrides or ()), train, epochs)


def _train_on_ray(address: str | None, *, quiet: bool) -> Train:
    """The way of `bigray train`, with its view on standard error."""

    def train(job: JobSpec, check: Callable[[Dataset], None]) -> str:
        from bigray.cluster.connect import connect, prepare_environment
        from bigray.live import run_view
        from bigray.termination import terminated_by_signal
        from bigray.training.groups import preload
        from bigray.training.request import make_request
        from bigray.training.runner import train_request, training_trials
        from bigray.workflow import plan_request

        request = make_request(job, training_trials(job))
        check(request.dataset)
        if not is_joining(address):
            plan_request(request)  # says no before Ray starts
        prepare_environment(joining=is_joining(address))
        preload()
        with connect(address), run_view(quiet=quiet) as view, terminated_by_signal():
            return train_request(request, address=address, listener=view).bundle.uri

    return train


def _allowed(patterns: list[str] | None) -> list[str]:
    """bigray's own factories, and those that were named."""
    from bigray.inference import BUILT_IN_FACTORIES

    return [*BUILT_IN_FACTORIES, *(patterns or [])]
