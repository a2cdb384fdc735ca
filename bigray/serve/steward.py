"""Keeps a replica at what its channel says: loads versions beside the live one, switches, reports (its own thread).

`bigray deploy` writes the channel's state; a replica never does, except the first of a channel that has none. A
candidate is loaded, warmed up and checked here, while the event loop goes on answering with the live version.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bigray.errors import BigrayError, last_line
from bigray.serve.clock import utc_now
from bigray.serve.compare import SideBySide
from bigray.serve.loaded import LoadedModel
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.release.record import (
    STALE_S,
    ChannelState,
    Release,
    ReplicaReport,
    Rollout,
    initial,
    is_same,
    what_to_hold,
)
from bigray.serve.release.registry import Registry
from bigray.serve.store import ModelStore, View

POLL_S = 0.25
REPORT_S = 1.0
KEYS_S = 2.0
SILENT_S = 10.0
"""A replica that has not reported for so long is gone."""
RETRY_S = 10.0
"""After which a live version that could not be loaded is tried again."""
FORGOTTEN_S, REPORTS_BEFORE_FORGETTING = 600.0, 60

_logger = logging.getLogger("ray.serve")

Load = Callable[[str], LoadedModel]


@dataclass(frozen=True)
class Identity:
    """Who this replica is, in its reports."""

    replica: str
    node: str
    pid: int


class Steward:
    """Runs beside the event loop of one replica until `stop`."""

    def __init__(
        self,
        registry: Registry,
        store: ModelStore,
        load: Load,
        *,
        identity: Identity,
        telemetry: Telemetry,
        guard: Guard,
    ) -> None:
        self._registry, self._store, self._load = registry, store, load
        self._identity, self._telemetry, self._guard = identity, telemetry, guard
        self._state: ChannelState | None = None
        self._failed: dict[str, str] = {}  # why a version could not be loaded, by version
        self._loading = ""
        self._tried_at = 0.0
        self._heartbeat = _Heartbeat()
        self._sequence = 0
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_state, name="bigray-steward", daemon=True),
            threading.Thread(target=self._keep_reporting, name="bigray-reports", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _keep_state(self) -> None:
        while not self._stopped.wait(POLL_S):
            self.look(time.monotonic())

    def _keep_reporting(self) -> None:
        checked_keys = 0.0
        while not self._stopped.wait(REPORT_S):
            is_due = time.monotonic() - checked_keys > KEYS_S
            if is_due:
                checked_keys = time.monotonic()
                self._guard.reload()  # needs no cluster: a revoked key is refused though nothing can be reported
            try:
                self.report()
                if is_due:
                    self._share_rates()
                if self._sequence % REPORTS_BEFORE_FORGETTING == 0:
                    self._forget_the_gone()
            except Exception as error:  # as above
                _logger.warning("bigray: a report could not be written: %s", last_line(error))

    def _forget_the_gone(self) -> None:
        """Remove what replicas reported that are gone for long."""
        for report in self._registry.reports():
            if report.at < time.time() - FORGOTTEN_S:
                self._registry.forget(report.replica)

    def _share_rates(self) -> None:
        """Each key's rate is granted by all replicas together."""
        if not self._guard.is_open:
            recent = time.time() - SILENT_S
            self._guard.set_replicas(max(1, sum(report.at > recent for report in self._registry.reports())))

    def look(self, now: float) -> None:
        """Take a step; where the store of states is away for a while, the live version goes on."""
        try:
            self.step(now)
        except Exception as error:
            _logger.warning("bigray: the channel's state could not be read: %s", last_line(error))
            if self._state is not None:  # a canary does not go on unwatched because nothing can be read
                self._show(self._state, self._heartbeat.hears(self._state.rollout, now))

    def step(self, now: float) -> None:
        """Look at the channel's state once and do what it asks for."""
        if self._state is not None and self._registry.revision() == self._state.revision:
            self._try_live_again(self._state, now)
            self._show(self._state, self._heartbeat.hears(self._state.rollout, now))
            return
        state = self._registry.read()
        if state is None and self._state is not None:
            return  # cleared under us: the application is being deleted
        if state is None:
            live = self._store.view.live
            self._registry.write(initial(Release(version=live.version, bundle=live.bundle), utc_now()))
            return
        self._hold(state)
        self._state = state
        self._show(state, self._heartbeat.hears(state.rollout, now))
        self.report()

    def report(self) -> None:
        """Write down what this replica does, for whoever deploys, scales or looks."""
        state, view = self._state, self._store.view
        candidate, why = self._candidate_state(state, view)
        beside = view.side_by_side
        self._sequence += 1
        self._registry.report(
            ReplicaReport(
                replica=self._identity.replica,
                node=self._identity.node,
                pid=self._identity.pid,
                sequence=self._sequence,
                at=time.time(),
                revision=state.revision if state is not None else 0,
                live=view.live.version,
                loaded=tuple(view.held),
                candidate=candidate,
                why=why,
                telemetry=self._telemetry.snapshot(),
                comparison=beside.comparison() if beside is not None else None,
            )
        )

    def _hold(self, state: ChannelState) -> None:
        """Have in memory what the state wants, the live version first; a failure is remembered and told."""
        for release in what_to_hold(state):
            held = self._store.view.held
            if release.version in held or release.version in self._failed:
                continue
            self._loading = release.version
            self.report()
            try:
                model = self._load(release.bundle)
                if model.version != release.version:
                    raise BigrayError(f"{release.bundle}: holds version {model.version} now, not {release.version}")
                self._keep(model)
            except Exception as error:  # whatever a user's factory raises
                self._failed[release.version] = last_line(error)
                _logger.warning("bigray: version %s could not be loaded: %s", release.version, last_line(error))
            finally:
                self._loading = ""

    def _try_live_again(self, state: ChannelState, now: float) -> None:
        """A replica that could not load what is live everywhere else must not stay behind for a passing fault."""
        if state.live.version not in self._failed:
            self._tried_at = now
        elif now - self._tried_at >= RETRY_S:
            self._tried_at = now
            del self._failed[state.live.version]
            self._hold(state)

    def _keep(self, model: LoadedModel) -> None:
        view = self._store.view
        self._store.set_view(View(view.live, {**view.held, model.version: model}, view.rollout, view.side_by_side))

    def _show(self, state: ChannelState, is_fresh: bool) -> None:
        """Switch to what the state says, as far as it is in memory; let go of the rest."""
        view = self._store.view
        live = view.held.get(state.live.version, view.live)
        wanted = {release.version for release in what_to_hold(state)} | {live.version}
        held = {version: model for version, model in view.held.items() if version in wanted}
        for version in set(self._failed) - wanted:
            del self._failed[version]  # asked for again, it is tried again
        rollout, beside = self._beside(state.rollout if is_fresh else None, live, held, view)
        shown = View(live, held, rollout, beside)
        if (shown.live, dict(shown.held), shown.rollout, shown.side_by_side) != (
            view.live,
            dict(view.held),
            view.rollout,
            view.side_by_side,
        ):
            self._store.set_view(shown)
            self._tell_versions(state, shown)

    def _beside(
        self, rollout: Rollout | None, live: LoadedModel, held: Mapping[str, LoadedModel], view: View
    ) -> tuple[Rollout | None, SideBySide | None]:
        """The pair that a canary or shadow compares; the same one as before while it is the same rollout."""
        if rollout is None or rollout.kind == "load":
            return None, None
        candidate = held.get(rollout.release.version)
        if candidate is None or candidate is live:
            return None, None
        before = view.side_by_side if is_same(view.rollout, rollout) else None
        if before is not None and before.live is live and before.candidate is candidate:
            return rollout, before
        return rollout, SideBySide(rollout.kind, live, candidate)

    def _candidate_state(self, state: ChannelState | None, view: View) -> tuple[str, str]:
        if self._loading:
            return "loading", ""
        if state is None or state.rollout is None:
            return "none", ""
        version = state.rollout.release.version
        if version in view.held:
            return "ready", ""
        if version in self._failed:
            return "failed", self._failed[version]
        return "loading", ""

    def _tell_versions(self, state: ChannelState, view: View) -> None:
        rollout = view.rollout
        self._telemetry.set_versions(
            view.live.name,
            view.live.version,
            previous=state.previous.version if state.previous is not None else None,
            candidate=rollout.release.version if rollout is not None else None,
            kind=rollout.kind if rollout is not None else None,
            share=rollout.share if rollout is not None else 0.0,
        )


class _Heartbeat:
    """Whether a rollout's watcher is alive: it counts `beat` up. Compares with this machine's own clock only."""

    def __init__(self) -> None:
        self._last: tuple[str, str, int] | None = None
        self._heard_at = 0.0
        self._is_first_look = True

    def hears(self, rollout: Rollout | None, now: float) -> bool:
        is_first_look, self._is_first_look = self._is_first_look, False
        if rollout is None:
            self._last = None
            return True
        beat = (rollout.id, rollout.release.version, rollout.beat)
        if beat != self._last:
            # what a replica finds when it starts may be there for long: it waits for the next beat, a second
            self._last, self._heard_at = beat, now - STALE_S if is_first_look else now
        return now - self._heard_at < STALE_S
