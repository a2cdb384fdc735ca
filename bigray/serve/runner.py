"""Deploy, look at and delete endpoints (driver). Every function expects that Ray is connected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigray.bundle import ModelBundle
from bigray.errors import ClusterError, DeployError
from bigray.inference import check_factory
from bigray.serve.channels import Applied, channel_of, other_name, running_replicas, status_word, take_down
from bigray.serve.client import Client, fetch_json
from bigray.serve.config import ServeSpec
from bigray.serve.failures import first_error_line
from bigray.serve.ingress import free_port
from bigray.serve.instance import controller_environment, root_url, running_client, shutdown, start_serve
from bigray.serve.protect.exposure import check_exposure, check_grpc_exposure
from bigray.serve.release.gate import GateReport, GateSettings, run_gate
from bigray.serve.release.record import ChannelState, Release, ReplicaReport, in_no_replica
from bigray.serve.rollout import Channel, Mode, Watch
from bigray.serve.turn import Turn

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient

__all__ = [
    "Deployment",
    "EndpointStatus",
    "delete",
    "deploy",
    "known_versions",
    "resolved_config",
    "rollback",
    "shutdown",
    "status",
    "versions",
]

POLL_S = 0.1
"""How often Serve is asked how far it is."""


@dataclass(frozen=True)
class Deployment:
    """A live endpoint."""

    name: str
    """The application's name in Serve; what `delete` takes."""
    model: str
    """The model's name in `/v2/models/{name}`."""
    version: str
    """The bundle's version: the first 12 hex digits of the weights' SHA-256."""
    url: str
    """Root of its routes, without a slash at the end."""
    why: str = ""
    """What was decided about this version, in one line."""

    def predict(self, records: Sequence[Mapping[str, Any]], *, key: str | None = None) -> list[dict[str, Any]]:
        """Ask the endpoint over HTTP: one prediction for each record, in order."""
        with Client(self.url, key=key) as client:
            return client.predict(records)


@dataclass(frozen=True)
class EndpointStatus:
    """One row of `bigray status`."""

    name: str
    url: str
    state: str
    """Serve's own word: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, DELETING."""
    replicas_running: int
    replicas_target: int
    bundle: str
    """Of the live version."""
    message: str
    """What is wrong, in one line; empty when all is well."""
    version: str = ""
    """The live one; empty where bigray knows of none."""
    rollout: str = ""
    """A candidate that is under way: `canary 10% of 0123456789ab`."""


@dataclass(frozen=True)
class DeployWatch:
    """Whom to tell how far a deployment is; each may be called many times."""

    on_check: Callable[[str, str], None] = lambda name, state: None
    """A check of the gate: its name, and `running`, `passed`, `failed`, `forced` or `skipped`."""
    on_gate: Callable[[GateReport], None] = lambda report: None
    """The gate has let the version through."""
    on_progress: Watch = lambda progress: None
    """A version is loaded, watched or switched to."""


def deploy(
    bundle: str,
    spec: ServeSpec,
    *,
    mode: Mode | None = None,
    force: bool = False,
    is_open: bool = False,
    timeout_s: float = 90.0,
    watch: DeployWatch | None = None,
) -> Deployment:
    """Serve a bundle as the file says, beside what the cluster serves already; returns when it answers over HTTP.

    The gate comes first: a bundle that fails it gets no traffic. Where an application of this name serves already, the
    new version is loaded beside the old one in each replica and takes over at once, or by way of a canary or a shadow
    (`mode`). Where any of that fails, what served before goes on.

    Raises:
        SpecError: it would be reachable from other machines without a key, or a further model has this one's name.
        CorruptFile: a file of the bundle differs from its manifest; nothing has been started.
        StorageError: there is no bundle at this location.
        DeployError: the gate refused it, the port is taken, or no replica came up in time.
    """
    watch, args = watch or DeployWatch(), spec.application.args
    check_exposure(spec.http_options.host, args.keys is not None, is_open or args.open)
    if spec.grpc_options is not None:
        check_grpc_exposure(args.keys is not None, is_open or args.open)
    spec = _with_absolute_places(spec.with_args(open=True) if is_open else spec)
    location = absolute_location(bundle)
    loaded = ModelBundle.load(location)
    args.check_own_name(loaded.manifest.name)
    check_factory(loaded, args.allow_factories)
    name = spec.application.name
    state = _state_of(name)
    if state is None and mode is not None and mode.kind != "load":
        raise DeployError(f"application '{name}': nothing is live yet that a {mode.kind} could be compared with")
    gate = run_gate(location, None if state is None else state.live.bundle, _gate_settings(spec, force), watch.on_check)
    watch.on_gate(gate)
    release = Release(version=gate.version, bundle=location)
    client = start_serve(spec)
    spec = spec.with_port(client.http_config.port)
    _check_unchanged(name, state)
    change = _Change(client, spec, release, gate, timeout_s)
    chosen = _within_slo(mode or Mode(), args.slo_ms)
    why = change.begin() if state is None else change.replace(state, chosen, watch.on_progress)
    live = _state_of(name)
    return Deployment(name, gate.model, live.live.version if live else release.version, change.url, why)


def rollback(name: str, *, why: str = "asked for", timeout_s: float = 90.0, watch: Watch | None = None) -> ChannelState:
    """Return to the version before, or end a rollout that is under way; returns when every replica has switched.

    After a surge no replica holds the version before: it is deployed again, in replicas beside those that answer.

    Raises:
        DeployError: no such application, there is no version to go back to, or it did not come up; what serves goes on.
        CorruptFile, StorageError: its bundle cannot be read any more.
    """
    channel = _known_channel(name)
    state = channel.state()
    if state is not None and (gone := in_no_replica(state)) is not None:
        return _bring_back(name, state, gone, why, timeout_s)
    return channel.go_back(why, timeout_s, watch or DeployWatch().on_progress)


def versions(name: str) -> tuple[ChannelState, tuple[ReplicaReport, ...]]:
    """Who serves, who served when, and what each replica holds.

    Raises:
        DeployError: no such application, or it was deployed without bigray.
    """
    channel = _known_channel(name)
    state = channel.state()
    assert state is not None, "a known channel has a state"
    return state, channel.reports()


def known_versions() -> dict[str, str]:
    """Version -> bundle location, of what the applications of this cluster serve or served before."""
    known: dict[str, str] = {}
    for name in _application_names():
        state = _state_of(name)
        rollout = state.rollout if state is not None else None
        candidate = rollout.release if rollout is not None else None
        releases = (state.live, state.previous, state.replaced, candidate) if state is not None else ()
        known |= {release.version: release.bundle for release in releases if release is not None}
    return known


def resolved_config(bundle: str, spec: ServeSpec) -> dict[str, Any]:
    """The native file with the bundle, a port and the fast path's settings filled in, for `serve run` and Git."""
    port = spec.http_options.port or free_port(0)
    document = _with_absolute_places(spec.with_bundle(absolute_location(bundle)).with_port(port)).to_native()
    document["controller_options"] = {"runtime_env": {"env_vars": controller_environment(spec, port)}}
    return document


def status() -> tuple[EndpointStatus, ...]:
    """All applications that Serve runs on this cluster; empty where Serve does not run."""
    client = running_client()
    if client is None:
        return ()
    root = root_url(client)
    applications = client.get_serve_details()["applications"].values()
    return tuple(_describe(application, root) for application in applications)


def delete(name: str) -> None:
    """Take an application down; with the last one Serve itself ends, and its port is free.

    Raises:
        DeployError: no application has this name.
    """
    client = running_client()
    names = _application_names()
    if client is None or name not in names:
        raise _unknown(name, names)
    from ray.exceptions import ActorDiedError

    try:
        take_down(client, name)
        with Turn():  # somebody else may have deployed another one meanwhile
            if not _application_names():
                shutdown()
    except ActorDiedError:
        return  # somebody else has deleted the last one, and ended Serve
    except TimeoutError:
        raise DeployError(f"application '{name}': still on its way out after a minute; see `bigray status`") from None


def absolute_location(bundle: str) -> str:
    """The bundle's location as a replica can open it: replicas do not run in the user's folder."""
    return bundle if "://" in bundle else str(Path(bundle).expanduser().absolute())


def _with_absolute_places(spec: ServeSpec) -> ServeSpec:
    """Files that the replicas read and write, as they find them: they do not run in the user's folder."""
    args = spec.application.args
    places = {name: absolute_location(place) for name in ("keys", "access_log") if (place := getattr(args, name))}
    models = [entry.model_copy(update={"bundle": absolute_location(entry.bundle)}) for entry in args.models]
    others = {"models": [entry.model_dump() for entry in models]} if models else {}
    return spec.with_args(**places, **others) if places or others else spec


@dataclass(frozen=True)
class _Change:
    """One deployment under way: Serve's application and the channel's state are brought to where the file says."""

    client: ServeControllerClient
    spec: ServeSpec
    release: Release
    gate: GateReport
    timeout_s: float

    @property
    def url(self) -> str:
        return _public_url(self.client, self.spec)

    @property
    def why(self) -> str:
        forced = f"forced past: {', '.join(self.gate.forced)}" if self.gate.forced else ""
        return forced or f"the gate's {len(self.gate.checks)} checks passed"

    def begin(self) -> str:
        """The first version of an application."""

        def write(channel: Channel) -> None:
            _check_unchanged(self.spec.application.name, None)
            channel.begin(self.release, self.why)

        started = time.monotonic()
        with self._applied(self.release.bundle, write):
            self._wait_until_up(self.release.version)
        scaling = self.spec.deployment.autoscaling_config
        if scaling is None or scaling.min_replicas > 0:
            return self.why
        return f"{self.why}; from zero replicas the first answer takes about {time.monotonic() - started:.1f} s"

    def replace(self, state: ChannelState, mode: Mode, watch: Watch) -> str:
        """Another version, where one is live."""
        if state.live.version == self.release.version:
            self._apply_options(state)
            return "this version was live already; the file's settings are applied"
        if mode.kind != "load" and "schema" in self.gate.forced:
            raise DeployError(
                f"version {self.release.version}: a {mode.kind} needs the live version's inputs and outputs"
            )
        if self._needs_surge(state):
            if mode.kind != "load":
                raise DeployError(
                    f"version {self.release.version}: a {mode.kind} needs both versions in one replica, and memory "
                    f"does not hold them; deploy it without, or say `swap: in_place` in the file's args"
                )
            return self._surge(self._clear_the_way(state, watch))
        self._apply_options(self._clear_the_way(state, watch))
        return self._channel().bring_in(
            self.release, mode, why=self.why, is_forced=bool(self.gate.forced), timeout_s=self.timeout_s, watch=watch
        )

    def _applied(self, base: str, write: Callable[[Channel], object]) -> Applied:
        return Applied(self.client, self.spec.with_bundle(base).to_native(), write)

    def _channel(self) -> Channel:
        channel = channel_of(self.client, self.spec.application.name)
        if channel is None:
            raise self._deleted()
        return channel

    def _deleted(self) -> DeployError:
        name = self.spec.application.name
        return DeployError(f"application '{name}': it has been deleted meanwhile; deploy again")

    def _clear_the_way(self, state: ChannelState, watch: Watch) -> ChannelState:
        """The state without a rollout that a dead deployer has left."""
        now = self._channel().clear_the_way(self.release, watch)
        _check_live(self.spec.application.name, now, state)
        return now

    def _still(self, state: ChannelState) -> ChannelState:
        """The state by now; raises `DeployError` where another version is live in it, or none."""
        now = _state_of(self.spec.application.name)
        if now is None:
            raise self._deleted()
        _check_live(self.spec.application.name, now, state)
        return now

    def _base(self) -> str:
        """The bundle that Serve was given, which the running replicas' channel goes by."""
        deployed = Applied.deployed(self.client).get(self.spec.application.name)
        if deployed is None:
            raise self._deleted()
        base: str = deployed["args"]["bundle"]
        return base

    def _apply_options(self, state: ChannelState) -> None:
        """What the file says beside the bundle, where it has changed; Serve replaces the replicas if it has to."""
        with self._applied(self._base(), lambda channel: self._still(state)):
            self._wait_until_up(state.live.version)

    def _needs_surge(self, state: ChannelState) -> bool:
        swap = self.spec.application.args.swap
        if swap != "auto":
            return swap == "surge"
        return not fits_in_place(state.live.bundle, self.release.bundle, self.spec)

    def _surge(self, state: ChannelState) -> str:
        """Replicas of the new version beside those of the old one; Serve ends the old ones once the new ones answer."""

        def write(channel: Channel) -> None:
            channel.succeed(self._still(state), self.release, self.why, is_forced=bool(self.gate.forced))

        with self._applied(_new_base(self.release.bundle, self._base()), write):
            self._wait_until_up(self.release.version)
        return f"{self.why}; in replicas of its own, since memory does not hold both versions"

    def _wait_until_up(self, version: str) -> None:
        _wait_until_up(self.client, self.spec.application.name, self.url, version, self.timeout_s)


def _bring_back(name: str, state: ChannelState, gone: Release, why: str, timeout_s: float) -> ChannelState:
    """The surge back: the application's own config, with the bundle that it served before."""
    client = running_client()
    config = Applied.deployed(client).get(name) if client is not None else None
    if client is None or config is None:
        raise _unknown(name, _application_names())
    found = ModelBundle.load(gone.bundle).version
    if found != gone.version:
        raise DeployError(f"version {gone.version}: {gone.bundle} holds version {found} now; deploy another bundle")
    base = _new_base(gone.bundle, config["args"]["bundle"])
    application = config | {"args": config["args"] | {"bundle": base}}
    capacity = {"target_capacity": client.get_serve_details().get("target_capacity")}

    def write(channel: Channel) -> None:
        now = _state_of(name)
        if now is None or now.live != state.live:
            raise DeployError(
                f"application '{name}': it was deployed or deleted meanwhile; see `bigray versions {name}`"
            )
        channel.return_to_replaced(now, why)

    with Applied(client, {"applications": [application], **capacity}, write) as applied:
        url = root_url(client) + (config.get("route_prefix") or "/").rstrip("/")
        _wait_until_up(client, name, url, gone.version, timeout_s)
    after = applied.channel.state()
    assert after is not None, "it has just been written"
    return after


def _new_base(bundle: str, running: str) -> str:
    """What replicas of their own are started with: never what those beside them were, whose channel they would share.

    A version may come from there all the same: it was the first, and is brought back; or its folder was written anew.
    """
    return other_name(bundle) if bundle == running else bundle


def fits_in_place(live: str, candidate: str, spec: ServeSpec) -> bool:
    """Whether a replica can hold the live version, the candidate and the one before at once.

    A model takes about three times its files in memory. It is compared with what the file gives a replica (`memory`),
    else with half of the smallest node.
    """
    import ray

    needed = 3 * (_bundle_bytes(candidate) + 2 * _bundle_bytes(live))
    memory = spec.deployment.ray_actor_options.memory
    nodes = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    allowed = memory if memory else 0.5 * min((size for size in nodes if size), default=float("inf"))
    return needed <= allowed


def _bundle_bytes(location: str) -> int:
    try:
        bundle = ModelBundle.load(location)
    except Exception:  # the live version's folder may be gone; its weights are in memory, and no larger than others
        return 0
    return len(bundle.weights) + len(bundle.onnx or b"")


def _gate_settings(spec: ServeSpec, force: bool) -> GateSettings:
    args = spec.application.args
    memory = spec.deployment.ray_actor_options.memory
    return GateSettings(
        allow_factories=args.allow_factories,
        num_threads=args.num_threads or max(1, int(spec.deployment.ray_actor_options.num_cpus)),
        slo_ms=args.slo_ms,
        memory_mb=None if memory is None else int(memory / 2**20),
        force=force,
    )


def _check_unchanged(name: str, before: ChannelState | None) -> None:
    """The gate takes seconds, in which somebody else may have deployed, promoted or rolled back."""
    _check_live(name, _state_of(name), before)


def _check_live(name: str, now: ChannelState | None, before: ChannelState | None) -> None:
    if (now and now.live) != (before and before.live):
        raise DeployError(f"application '{name}': another version became live while the gate ran; deploy again")


def _within_slo(mode: Mode, slo_ms: float | None) -> Mode:
    """A canary or shadow is held to the file's SLO, unless it was given another."""
    if mode.limits.slo_ms is not None or slo_ms is None:
        return mode
    return replace(mode, limits=replace(mode.limits, slo_ms=slo_ms))


def _state_of(name: str) -> ChannelState | None:
    """What an application serves; None where Serve runs no such one, or bigray knows nothing of it."""
    client = running_client()
    channel = None if client is None else channel_of(client, name)
    return None if channel is None else channel.state()


def _known_channel(name: str) -> Channel:
    client = running_client()
    channel = None if client is None else channel_of(client, name)
    if channel is None:
        raise _unknown(name, _application_names())
    if channel.state() is None:
        raise DeployError(f"application '{name}': it has not reported yet, or was deployed without bigray")
    return channel


def _application_names() -> list[str]:
    client = running_client()
    return [] if client is None else list(client.get_serve_details()["applications"])


def _unknown(name: str, names: Sequence[str]) -> DeployError:
    known = f"; there are: {', '.join(names)}" if names else "; nothing is served on this cluster"
    return DeployError(f"no application named '{name}'{known}")


def _wait_until_up(client: ServeControllerClient, name: str, url: str, version: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    _wait_until_running(client, name, deadline)
    _wait_until_answering(name, url, version, deadline)


def _wait_until_running(client: ServeControllerClient, name: str, deadline: float) -> None:
    while True:
        application = client.get_serve_details()["applications"].get(name, {})
        state = status_word(application)
        message = _message(application)
        if state == "RUNNING":
            return
        if state == "DELETING":
            raise DeployError(f"application '{name}': it was deleted while it started")
        if state in ("DEPLOY_FAILED", "UNHEALTHY") or "Traceback" in message:
            raise DeployError(f"application '{name}': {first_error_line(message)}")
        if time.monotonic() > deadline:
            reason = first_error_line(message) or f"still {state}"
            raise DeployError(f"application '{name}': not running in time: {reason}")
        time.sleep(POLL_S)


def _wait_until_answering(name: str, url: str, version: str, deadline: float) -> None:
    """Over real HTTP, and with this version: after a replacement the old replicas answer for a moment."""
    while True:
        try:
            found = fetch_version(url)
            if found == version:
                return
            problem = f"{url} still serves version {found}, not {version}"
        except DeployError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise DeployError(f"application '{name}': running, but not reachable in time: {problem}")
        time.sleep(POLL_S)


def fetch_version(url: str) -> str:
    """The version that answers at an endpoint; needs no key."""
    # the endpoint that was just started: its certificate is for the name that others know it by
    version: str = fetch_json(f"{url}/", verify=False)["version"]
    return version


def _describe(application: dict[str, Any], root: str) -> EndpointStatus:
    deployments = application["deployments"].values()
    config = application.get("deployed_app_config") or {}
    try:
        state = _state_of(application["name"])
    except (ClusterError, DeployError):
        state = None  # what Serve knows is told all the same
    return EndpointStatus(
        name=application["name"],
        url=root + (application["route_prefix"] or "").rstrip("/"),
        state=status_word(application),
        replicas_running=len(running_replicas(application)),
        replicas_target=sum(deployment["target_num_replicas"] for deployment in deployments),
        bundle=state.live.bundle if state is not None else config.get("args", {}).get("bundle", ""),
        message=first_error_line(_message(application)),
        version=state.live.version if state is not None else "",
        rollout=_describe_rollout(state),
    )


def _describe_rollout(state: ChannelState | None) -> str:
    if state is None or state.rollout is None:
        return ""
    rollout = state.rollout
    share = f" {rollout.share:.0%}" if rollout.kind == "canary" else ""
    return f"{rollout.kind}{share} of {rollout.release.version}"


def _message(application: dict[str, Any]) -> str:
    deployments = application.get("deployments", {}).values()
    texts = [str(application.get("message") or ""), *(str(one.get("message") or "") for one in deployments)]
    return max(texts, key=len)


def _public_url(client: ServeControllerClient, spec: ServeSpec) -> str:
    return root_url(client) + spec.application.route_prefix.rstrip("/")
