"""The commands around an endpoint: parse, call, print. What each does is in `bigray.serve` and `bigray.workflow`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bigray.cli.app import (
    KEY_VARIABLE,
    Address,
    AsJson,
    Output,
    api_key,
    app,
    existing_cluster,
    raise_faults,
    serve_until_interrupted,
    show_deployment,
)
from bigray.errors import SpecError

if TYPE_CHECKING:
    from bigray.serve.rollout import Mode

Name = Annotated[str, typer.Argument(help="The application's name, as `bigray status` shows it.")]
Url = Annotated[str, typer.Argument(help="Root of the endpoint, such as http://127.0.0.1:8000.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--key", help=f"API key; better in the environment. [env: {KEY_VARIABLE}]", show_default=False),
]
KeysFile = Annotated[str, typer.Option("--file", help="The key file, as `keys` of the serve file's args names it.")]

keys_app = typer.Typer(help="API keys of an endpoint: make, list, revoke.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")


@app.command(
    epilog="Examples: bigray deploy runs/digits-1a2b3c --config serve/autoscale.yaml; "
    "bigray deploy runs/digits-4d5e6f --canary 10%"
)
def deploy(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a bundle folder.")],
    config: Annotated[str, typer.Option("--config", help="A serve file.")] = "serve/local.yaml",
    address: Address = None,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Let it answer this share of the requests, such as 10%; then promote it, or roll it back.",
        ),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Ask it beside the live version, report how they differ, switch nothing.")
    ] = False,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Answers of a canary or shadow after which it is decided on.", show_default="200"),
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="After which a canary or shadow ends in any case.", show_default="10")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Past a worse holdout, a slower answer or another schema; it is recorded.")
    ] = False,
    open_: Annotated[bool, typer.Option("--open", help="Let anybody ask, though other machines reach it.")] = False,
    write_config: Annotated[
        Path | None,
        typer.Option(help="Only write the native file with the run's bundle filled in, for Ray's `serve deploy`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve the winner of a run. Where a version serves already, this one takes over without a dropped request.

    On a joined cluster it stays up; a local Ray serves until Ctrl-C.
    """
    from bigray.serve.config import load_serve
    from bigray.workflow import find_bundle

    mode = _read_mode(canary, shadow, requests, max_minutes, is_only_written=write_config is not None)
    spec = load_serve(config)
    bundle = find_bundle(run)
    if write_config is not None:
        _write_native_config(bundle, spec, write_config)
        return
    from bigray.cluster.connect import connect
    from bigray.deploy_view import watching
    from bigray.serve.runner import deploy as deploy_bundle

    with connect(address) as connection:
        with watching(quiet=as_json) as watch:
            deployment = deploy_bundle(bundle, spec, mode=mode, force=force, is_open=open_, watch=watch)
        output = Output(as_json, as_events=False)
        output.print(show_deployment(deployment, bundle, output))
        if connection.embedded:
            serve_until_interrupted()


@app.command(epilog="Example: bigray rollback model")
def rollback(name: Name, address: Address = None, as_json: AsJson = False) -> None:
    """Return to the version before, or end a canary or shadow that is under way."""
    from bigray import console
    from bigray.cluster.connect import connect
    from bigray.deploy_view import watching
    from bigray.serve.runner import rollback as roll_back

    with connect(existing_cluster(address)), watching(quiet=as_json) as watch:
        state = roll_back(name, watch=watch.on_progress)
    if as_json:
        console.print_json({"live": state.live.version, "previous": state.previous and state.previous.version})
    else:
        console.say(f"{name}: version {state.live.version} is live")


@app.command(epilog="Example: bigray versions model")
def versions(name: Name, address: Address = None, as_json: AsJson = False) -> None:
    """Show who serves, and who served when and why."""
    from bigray import console
    from bigray.cluster.connect import connect
    from bigray.serve.release.tables import history_document, versions_table
    from bigray.serve.runner import versions as read_versions

    with connect(existing_cluster(address)):
        state, reports = read_versions(name)
    console.print_json(history_document(state)) if as_json else console.print_table(versions_table(state, reports))


@app.command(epilog="Examples: bigray trace 0123456789ab; bigray trace 'x-bigray-version: 0123456789ab'")
def trace(
    version: Annotated[str, typer.Argument(help="A version, or the header line of an answer.")],
    storage: Annotated[list[str] | None, typer.Option("--storage", help="Where runs lie.", show_default="runs")] = None,
    address: Annotated[str | None, typer.Option("--address", help="A cluster that serves it, asked as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a version comes from: run, trial, step, settings, seeds, data, code, metrics."""
    from bigray import console
    from bigray.serve.release.lineage import find_lineage
    from bigray.serve.release.tables import lineage_table

    lineage = find_lineage(version, storage or ["runs"], _known_versions(address))
    console.print_json(lineage.to_json()) if as_json else console.print_table(lineage_table(lineage))


@app.command(epilog="Example: bigray status")
def status(address: Address = None, as_json: AsJson = False) -> None:
    """Show what is served, and by how many replicas, on a cluster ('auto' when no address is given)."""
    from bigray import console
    from bigray.cluster.connect import connect
    from bigray.serve.runner import status as read_status

    with connect(existing_cluster(address)):
        rows = read_status()
    console.print_json([asdict(row) for row in rows]) if as_json else console.print_status(rows)


@app.command(epilog="Example: bigray top http://127.0.0.1:8000")
def top(
    url: Url,
    key: ApiKey = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Watch an endpoint: rate, latency, queue and versions of each replica. Ctrl-C ends it."""
    from bigray import console
    from bigray.serve.client import Client
    from bigray.serve.observe.top import watch

    with Client(url, key=api_key(key), timeout_s=5.0) as client:
        if as_json:
            console.print_json(client.stats())
            return
        watch(url, lambda _: client.stats(), interval, console.out)


@app.command(
    epilog="Examples: bigray autoscale runs/digits-1a2b3c --trace step --rate 200; "
    "bigray autoscale runs/digits-1a2b3c --trace access.jsonl --price 0.05"
)
def autoscale(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a bundle folder.")],
    trace: Annotated[
        str,
        typer.Option("--trace", help="A CSV of times or rates, an access log, or one of: step, day, bursts."),
    ] = "step",
    config: Annotated[str, typer.Option("--config", help="A serve file with autoscaling.")] = "serve/autoscale.yaml",
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second at the start of a built-in trace.")] = 50.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the arrivals.")] = 0,
    price: Annotated[float | None, typer.Option(min=0, help="Of a replica for an hour, for the cost.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a request trace against the autoscaling policy: replicas, latency, cost. Starts no Ray.

    The policy is the code that runs in the cluster; the time a request takes is measured here, on this machine.
    """
    from bigray import console
    from bigray.workflow import replay_trace

    result = replay_trace(run, trace, config, rate_per_s=rate, seed=seed, price_per_hour=price)
    console.print_json(result.to_json()) if as_json else console.print_simulation(result)


@app.command(epilog="Example: bigray delete model")
def delete(name: Name, address: Address = None) -> None:
    """Take an endpoint down."""
    from bigray import console
    from bigray.cluster.connect import connect
    from bigray.serve.runner import delete as delete_application

    with connect(existing_cluster(address)):
        delete_application(name)
    console.say(f"deleted {name}")


@keys_app.command("add", epilog="Example: bigray keys add web --scope predict --rate 50 --file keys.json")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scope: Annotated[list[str] | None, typer.Option(help="predict or admin.", show_default="predict")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second it may send; no limit if not given.")] = None,
    file: KeysFile = "keys.json",
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once, and only its hash is kept."""
    from bigray import console
    from bigray.serve.protect.keys import create_key

    secret = create_key(file, name, tuple(scope or ("predict",)), rate)
    if as_json:
        console.print_json({"name": name, "key": secret, "file": file})
        return
    console.print_text(secret)
    console.say(f"this is the only time it is shown; {file} holds its hash")


@keys_app.command("list", epilog="Example: bigray keys list --file keys.json")
def keys_list(file: KeysFile = "keys.json", as_json: AsJson = False) -> None:
    """Show the keys of a file; the secrets are not in it."""
    from bigray import console
    from bigray.serve.protect.keys import keys_table, load_ring

    ring = load_ring(file)
    if as_json:
        console.print_json([key.model_dump(mode="json", exclude={"sha256"}) for key in ring.keys])
    else:
        console.print_table(keys_table(ring))


@keys_app.command("revoke", epilog="Example: bigray keys revoke web --file keys.json")
def keys_revoke(key: Annotated[str, typer.Argument(help="Its id or its name.")], file: KeysFile = "keys.json") -> None:
    """Take a key out of use; endpoints refuse it within seconds."""
    from bigray import console
    from bigray.serve.protect.keys import revoke_key

    revoked = revoke_key(file, key)
    console.say(f"revoked {revoked.id} ({revoked.name})")


def _read_mode(
    canary: str | None, shadow: bool, requests: int | None, max_minutes: float | None, *, is_only_written: bool
) -> Mode | None:
    faults = []
    if canary is not None and shadow:
        faults.append("--canary: answers requests, --shadow answers none; give one of the two")
    share = _read_share(canary, faults) if canary is not None else 0.0
    if max_minutes is not None and not max_minutes > 0:  # nor NaN
        faults.append(f"--max-minutes: use a number above 0, got {max_minutes:g}")
    is_tried = canary is not None or shadow
    if is_only_written and is_tried:
        faults.append("--write-config: deploys nothing that could be tried; remove --canary or --shadow")
    for option, value in (("--requests", requests), ("--max-minutes", max_minutes)):
        if value is not None and not is_tried:
            faults.append(f"{option}: is for a candidate that is tried; give --canary or --shadow, or remove it")
    raise_faults(faults)
    if not is_tried:
        return None
    from bigray.serve.release.judge import JudgeLimits
    from bigray.serve.rollout import Mode

    kind: Literal["canary", "shadow"] = "shadow" if shadow else "canary"
    limits = JudgeLimits()
    if requests is not None:
        limits = replace(limits, min_requests=requests)
    if max_minutes is not None:
        limits = replace(limits, max_seconds=60 * max_minutes)
    return Mode(kind, share, limits)


def _read_share(text: str, faults: list[str]) -> float:
    """`10%` or `0.1` as a share."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        faults.append(f"--canary: '{text}': use a share above 0 and up to 100%, such as 10%")
        return 0.0
    return share


def _known_versions(address: str | None) -> dict[str, str]:
    from bigray.cluster.connect import connect, resolve_address

    if resolve_address(address) is None:
        return {}
    from bigray.serve.runner import known_versions

    with connect(address):
        return known_versions()


def _write_native_config(bundle: str, spec: Any, path: Path) -> None:
    import yaml

    from bigray import console
    from bigray.serve.runner import resolved_config

    if not path.parent.is_dir():
        raise SpecError(f"--write-config: {path.parent}: no such folder")
    path.write_text(yaml.safe_dump(resolved_config(bundle, spec), sort_keys=False))
    console.say(f"wrote {path}; serve it with: serve run {path}")
