"""The commands that plan, train, search and verify: parse, call, print. What each does is in the module it calls.

Heavy modules are imported inside the commands, so that a fault in a job file is told in a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bigray.cli.app import (
    DEFAULT_SEARCH,
    Address,
    AsEvents,
    AsJson,
    BudgetText,
    JobFile,
    New,
    Output,
    Overrides,
    SearchFile,
    ServeFile,
    api_key,
    app,
    is_joining,
    raise_faults,
    serve_until_interrupted,
    show_deployment,
)
from bigray.errors import SpecError, TrainingFailed
from bigray.termination import EXIT_CODE, Terminated, terminated_by_signal

if TYPE_CHECKING:
    from bigray.live import RunView
    from bigray.results import Leaderboard
    from bigray.specs import SearchSpec
    from bigray.training.commands import Event
    from bigray.training.request import RunRequest
    from bigray.training.session import Listener
    from bigray.tuning.budget import Budget


@app.command(epilog="Example: bigray plan examples/digits/job.toml --search tuning/lr_batch.toml")
def plan(
    job: JobFile,
    search: SearchFile = None,
    serve: ServeFile = None,
    set_: Overrides = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job would start and whether it fits; start nothing."""
    from bigray import console
    from bigray.workflow import plan_request, read_files, request_of

    asked = read_files(job, set_ or (), search, serve)
    planned = plan_request(request_of(asked), asked.serve, address=address, measured=True)
    console.print_json(planned.to_json()) if as_json else console.print_plan(planned)


@dataclass(frozen=True)
class Asked:
    """One command that trains, read and checked; nothing has been started."""

    request: RunRequest
    search: SearchSpec | None
    address: str | None
    new: bool
    output: Output
    budget: Budget | None = None


@app.command(epilog="Example: bigray train examples/linear/job.toml --set training.lr=0.1")
def train(
    job: JobFile,
    set_: Overrides = None,
    address: Address = None,
    new: New = False,
    as_json: AsJson = False,
    as_events: AsEvents = False,
) -> None:
    """Train every model of a job. The same command again resumes."""
    from bigray.workflow import read_files, request_of

    output = Output(as_json, as_events)
    raise_faults(output.faults())
    train_or_tune(Asked(request_of(read_files(job, set_ or ())), None, address, new, output))


@app.command(
    epilog="Examples: bigray tune examples/digits/job.toml --search tuning/lr_batch.toml --budget 10m; "
    "bigray tune --extend runs/digits-1a2b3c --trials 20"
)
def tune(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="The job file; with --extend it can be left out.")
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", help="A search file.", show_default="tuning/lr_batch.toml")
    ] = None,
    set_: Overrides = None,
    budget: BudgetText = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", help="Trials in all, instead of the search file's; with --extend: so many more."),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option("--extend", metavar="RUN", help="Add --trials N more to a run of before, and repeat none of its."),
    ] = None,
    address: Address = None,
    new: New = False,
    as_json: AsJson = False,
    as_events: AsEvents = False,
) -> None:
    """Search learning rates, batch sizes and other settings for the models of a job. The same command again goes on."""
    output = Output(as_json, as_events)
    faults = [*output.faults(), *_tune_faults(job, trials, extend, new)]
    limit = _read_budget(budget, faults)
    raise_faults(faults)
    spec: SearchSpec | None
    if extend is not None:
        from bigray.workflow import extend_request

        assert trials is not None, "--extend without --trials is a fault"
        request, spec = extend_request(extend, trials, job, search, set_ or ())
    else:
        from bigray.workflow import read_files, request_of

        assert job is not None, "no job is a fault"
        asked = read_files(job, set_ or (), search or DEFAULT_SEARCH, trials=trials)
        request, spec = request_of(asked), asked.search
    train_or_tune(Asked(request, spec, address, new, output, limit))


@app.command(epilog="Example: bigray show runs/digits-1a2b3c --top 50")
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Trials to show, best first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show how a run stands, its trials and where their time went. Reads the folder only: no Ray is started."""
    from bigray import console
    from bigray.report import read_report

    report = read_report(run)
    console.print_json(report.to_json()) if as_json else console.print_report(report, top)


@app.command(
    epilog="Example: bigray verify examples/digits/job.toml --set training.exact=true --set training.epochs=300"
)
def verify(
    job: JobFile,
    set_: Overrides = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this model; default: every one.")] = None,
    kills: Annotated[int, typer.Option(min=0, help="Workers to end with SIGKILL, for each model.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the steps and ranks that are struck.")] = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Train twice, once with killed workers and a resize, and compare weights, metrics and samples (exit code 3: they
    differ). Nothing of the job's own runs is touched."""
    from bigray import console
    from bigray.cluster.connect import connect, prepare_environment
    from bigray.live import run_view
    from bigray.training.groups import preload
    from bigray.training.request import make_request
    from bigray.training.runner import training_trials
    from bigray.verification import only_models, verify_request
    from bigray.workflow import plan_request, read_files

    chosen = only_models(read_files(job, set_ or ()).job, model or ())
    request = make_request(chosen, training_trials(chosen))
    if not is_joining(address):
        plan_request(request)  # says no before Ray starts
    prepare_environment(joining=is_joining(address))
    preload()
    with _starting_anew(), connect(address), run_view(quiet=as_json) as view, terminated_by_signal():
        found = verify_request(request, kills=kills, seed=seed, address=address, listener=view)
    console.print_json(found.to_json()) if as_json else console.print_verification(found)
    if not found.is_same:
        raise TrainingFailed(found.describe_differences())


@app.command(
    epilog="Example: bigray run examples/digits/job.toml --search tuning/lr_batch.toml --serve serve/local.yaml --exit"
)
def run(
    job: JobFile,
    search: SearchFile = None,
    serve: Annotated[str, typer.Option("--serve", help="A serve file.")] = "serve/local.yaml",
    set_: Overrides = None,
    address: Address = None,
    new: New = False,
    budget: BudgetText = None,
    exit_: Annotated[bool, typer.Option("--exit", help="End the endpoint after the check, and leave nothing.")] = False,
    as_json: AsJson = False,
    as_events: AsEvents = False,
) -> None:
    """Train or tune, deploy the winner, and check it over HTTP on the sealed holdout."""
    from bigray.cluster.connect import connect, prepare_environment
    from bigray.serve.runner import delete as delete_application
    from bigray.serve.runner import deploy as deploy_bundle
    from bigray.training.groups import preload
    from bigray.workflow import check_holdout, plan_request, read_files, request_of, serve_ahead

    output = Output(as_json, as_events)
    faults = output.faults()
    limit = _read_budget(budget, faults)
    if budget is not None and search is None:
        faults.append("--budget: is for sweeps; give a --search file, or remove it")
    raise_faults(faults)
    files = read_files(job, set_ or (), search, serve)
    assert files.serve is not None, "read_files loads the serve file it is given"
    request = request_of(files)
    asked = Asked(request, files.search, address, new, output, limit)
    raise_faults(_budget_faults(asked))
    if not is_joining(address):
        plan_request(request, files.serve)  # says no before Ray starts
    prepare_environment(joining=is_joining(address))
    preload()
    with connect(address) as connection:
        plan_request(request, files.serve, address=address)
        with serve_ahead(files.serve) as on_event:
            board, view = _execute(asked, on_event)
            document = _show_board(board, view, output)
        deployment = deploy_bundle(board.bundle.uri, files.serve)
        document |= show_deployment(deployment, board.bundle.uri, output)
        check = check_holdout(board.bundle.uri, request.dataset, deployment.url, files.serve, api_key())
        if check is not None:
            document |= _show_check(check, output)
        output.print(document)
        if exit_:
            delete_application(deployment.name)
        elif connection.embedded:
            serve_until_interrupted()
    if check is not None and not check.all_equal:
        raise typer.Exit(6)


def train_or_tune(asked: Asked) -> None:
    from bigray.cluster.connect import connect, prepare_environment
    from bigray.training.groups import preload
    from bigray.workflow import plan_request

    raise_faults(_budget_faults(asked))
    if not is_joining(asked.address):
        plan_request(asked.request)  # says no before Ray starts
    prepare_environment(joining=is_joining(asked.address))
    preload()
    with connect(asked.address):
        board, view = _execute(asked)
    asked.output.print(_show_board(board, view, asked.output))


def _execute(asked: Asked, on_event: Listener | None = None) -> tuple[Leaderboard, RunView]:
    from bigray.live import run_view
    from bigray.training.runner import train_request
    from bigray.tuning.runner import tune_request

    address, new = asked.address, asked.new
    output = asked.output
    with run_view(quiet=output.as_json, events=output.as_events) as view, terminated_by_signal():

        def listen(event: Event) -> None:
            view(event)
            if on_event is not None:
                on_event(event)

        if asked.search is None:
            return train_request(asked.request, address=address, listener=listen, new=new), view
        return (
            tune_request(asked.request, asked.search, address=address, listener=listen, new=new, budget=asked.budget),
            view,
        )


def _tune_faults(job: str | None, trials: int | None, extend: str | None, new: bool) -> Iterator[str]:
    """What is wrong with the options of `tune` among themselves."""
    if job is None and extend is None:
        yield "JOB: required, such as examples/digits/job.toml; only with --extend RUN it can be left out"
    if extend is not None and trials is None:
        yield f"--extend {extend}: say how many trials more, such as --trials 20"
    if extend is not None and new:
        yield "--extend: goes on with a run, --new starts one; give one of the two"
    if trials is not None and trials < 1:
        yield f"--trials: use a number from 1, got {trials}"


def _read_budget(text: str | None, faults: list[str]) -> Budget | None:
    from bigray.tuning.budget import parse_budget

    try:
        return None if text is None else parse_budget(text)
    except SpecError as error:
        faults.extend(f"--{fault}" for fault in error.faults)
        return None


def _budget_faults(asked: Asked) -> list[str]:
    from bigray.tuning.budget import budget_faults

    if asked.budget is None:
        return []
    return [f"--{fault}" for fault in budget_faults(asked.budget, asked.request.job.scaling)]


def _show_board(board: Leaderboard, view: RunView, output: Output) -> dict[str, Any]:
    from bigray import console
    from bigray.report import board_document

    progress = view.progress
    if output.is_for_people:
        console.print_leaderboard(board)
    if progress.budget is None:
        return {"leaderboard": board_document(board)}
    if output.is_for_people:
        console.print_budget(progress.budget, progress.num_ended, progress.num_trials)
    reached = {"trials_ended": progress.num_ended, "trials": progress.num_trials}
    return {"leaderboard": board_document(board), "budget_used_up": {"budget": progress.budget, **reached}}


@contextlib.contextmanager
def _starting_anew() -> Iterator[None]:
    """For a command that does not go on where it was interrupted."""
    from bigray import console

    try:
        yield
    except (KeyboardInterrupt, Terminated) as ending:
        console.say("interrupted; the same command starts anew, in a folder of its own")
        raise typer.Exit(EXIT_CODE if isinstance(ending, Terminated) else 130) from None


def _show_check(check: Any, output: Output) -> dict[str, Any]:
    from dataclasses import asdict

    from bigray import console

    if output.is_for_people:
        console.print_holdout(check)
    return {"holdout": {**asdict(check), "all_equal": check.all_equal}}
