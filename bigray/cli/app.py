"""What the commands have in common: the application, how a fault becomes one line, shared options, kinds of output."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bigray.errors import BigrayError, ClusterError, SpecError, last_line
from bigray.termination import EXIT_CODE, Terminated

if TYPE_CHECKING:
    from bigray.serve.runner import Deployment


GOES_ON = frozenset({"train", "tune", "run", "predict", "resume", "compress"})
"""Commands that leave on storage what they have done, for the next time."""


class _Commands(TyperGroup):
    """Turns what a command raises into one line for each fault, and an exit code by kind."""

    def invoke(self, ctx: Any) -> Any:
        from bigray import console

        try:
            return super().invoke(ctx)
        except BigrayError as error:
            console.print_error(error)
            sys.exit(error.exit_code)
        except Exception as error:
            if not _is_rays(error):
                raise
            console.print_error(
                ClusterError(f"Ray failed: {last_line(error)}; its logs are in /tmp/ray/session_latest")
            )
            sys.exit(ClusterError.exit_code)
        except KeyboardInterrupt:
            console.say(f"interrupted{_how_to_go_on(ctx)}")
            sys.exit(130)
        except Terminated:
            console.say(f"told to end (SIGTERM){_how_to_go_on(ctx)}")
            sys.exit(EXIT_CODE)


def _how_to_go_on(ctx: typer.Context) -> str:
    return "; the same command goes on where it stopped" if ctx.invoked_subcommand in GOES_ON else ""


def _is_rays(error: Exception) -> bool:
    """Whether Ray itself raised this: an actor or a node went away, or the cluster was lost. Imports no Ray."""
    return type(error).__module__.startswith("ray.")


app = typer.Typer(
    name="bigray",
    cls=_Commands,
    help="Train a PyTorch model on a Ray cluster, search its learning rate and batch size, and serve the winner.",
    epilog="Try it: bigray run examples/digits/job.toml --search tuning/lr_batch.toml --serve serve/local.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="The job file, such as examples/digits/job.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set training.lr=1e-3.")
]
KEY_VARIABLE = "BIGRAY_API_KEY"
DEFAULT_SEARCH = "tuning/lr_batch.toml"
SearchFile = Annotated[str | None, typer.Option("--search", help="A search file, such as tuning/lr_batch.toml.")]
ServeFile = Annotated[str | None, typer.Option("--serve", help="A serve file, such as serve/local.yaml.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Cluster to join ('auto': the one on this machine). [env: RAY_ADDRESS]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
AsEvents = Annotated[
    bool,
    typer.Option("--events", help="Print each event as a line of JSON as it happens; the last line is the result."),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="TEXT",
        help="End a sweep after this much time (90s, 10m, 2h) or time of GPUs (3gpuh), with nothing lost.",
    ),
]
New = Annotated[bool, typer.Option("--new", help="Start afresh beside an earlier run of the same settings.")]


@dataclass(frozen=True)
class Output:
    """What goes to standard output: tables, or one document, or events and then the document."""

    as_json: bool
    as_events: bool

    @property
    def is_for_people(self) -> bool:
        return not (self.as_json or self.as_events)

    def faults(self) -> list[str]:
        if self.as_json and self.as_events:
            return ["--events: its last line is the document of --json; give one of the two"]
        return []

    def print(self, document: dict[str, Any]) -> None:
        from bigray import console

        if self.as_events:
            console.print_event("result", "", document)
        elif self.as_json:
            console.print_json(document)


def raise_faults(faults: Sequence[str]) -> None:
    if faults:
        raise SpecError(faults)


def api_key(option: str | None = None) -> str | None:
    """Of an endpoint that asks for one: an option, else the environment."""
    return option or os.environ.get(KEY_VARIABLE) or None


def is_joining(address: str | None) -> bool:
    from bigray.cluster.connect import resolve_address

    return resolve_address(address) is not None


def existing_cluster(address: str | None) -> str:
    from bigray.cluster.connect import resolve_address

    return resolve_address(address) or "auto"


def show_deployment(deployment: Deployment, bundle: str, output: Output) -> dict[str, Any]:
    from dataclasses import asdict

    from bigray import console
    from bigray.bundle import ModelBundle
    from bigray.workflow import curl_command

    curl = curl_command(deployment.url, ModelBundle.load(bundle).manifest)
    if output.is_for_people:
        console.print_deployment(deployment, curl)
    return {"deployment": {**asdict(deployment), "curl": curl}}


def serve_until_interrupted() -> None:
    from bigray import console

    console.say("serving until Ctrl-C")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.say("stopping the endpoint")
