"""Bring a version into replicas that are serving another one, without a dropped request (driver).

The replicas do the work (`steward.py`); here the channel's state is moved from step to step as they report:

    load      held ready in every replica, then live everywhere at once
    canary    answers a share of the requests, until it is promoted or rolled back by what is seen
    shadow    is asked beside the live version, and its answers are only compared
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bigray.errors import DeployError
from bigray.serve.clock import utc_now
from bigray.serve.release.judge import JudgeLimits, Verdict, judge
from bigray.serve.release.record import (
    STALE_S,
    ChannelState,
    Comparison,
    Release,
    ReplicaReport,
    Rollout,
    abort,
    beat,
    bring_back,
    finish,
    initial,
    is_same,
    promote,
    propose,
    take_over,
    withdraw,
)
from bigray.serve.release.registry import Registry, update

POLL_S = 0.1
BEAT_S = 1.0
TAKE_BACK_S = 3.0
"""How long is waited for the replicas to let a candidate go; they do it by themselves, sooner or later."""
STOOD_STILL_S = 3.0
"""A look at the state that took longer: this process may have stood still, and the other deployer with it."""

Replicas = Callable[[], frozenset[str]]
"""Ids of the replicas that Serve has running now."""


@dataclass(frozen=True)
class Mode:
    """How a version is let in."""

    kind: Literal["load", "canary", "shadow"] = "load"
    share: float = 0.0
    limits: JudgeLimits = field(default_factory=JudgeLimits)


@dataclass(frozen=True)
class Progress:
    """How far a rollout is, for a screen."""

    stage: Literal["loading", "watching", "switching"]
    ready: int
    replicas: int
    comparison: Comparison | None = None
    elapsed_s: float = 0.0


Watch = Callable[[Progress], None]


class Channel:
    """One application's channel as its deployer sees it (driver)."""

    def __init__(self, registry: Registry, replicas: Replicas) -> None:
        self._registry, self._replicas = registry, replicas
        self._last_beat = 0.0

    def state(self) -> ChannelState | None:
        return self._registry.read()

    def reports(self) -> tuple[ReplicaReport, ...]:
        """Of the replicas that run now."""
        running = self._replicas()
        return tuple(report for report in self._registry.reports() if report.replica in running)

    def begin(self, release: Release, why: str) -> None:
        """The first version of an application; what an earlier one of this name left is forgotten."""
        self._registry.clear()
        self._write_first(initial(release, utc_now(), why))

    def succeed(self, before: ChannelState, release: Release, why: str, *, is_forced: bool) -> None:
        """Go on with the history of a channel whose replicas are replaced by others, each with one version."""
        rollout = Rollout(kind="load", release=release)
        after = promote(propose(before, rollout), utc_now(), why, is_forced=is_forced)
        self._write_next(after.model_copy(update={"previous": None, "replaced": before.live}))

    def return_to_replaced(self, before: ChannelState, why: str) -> None:
        """The other way: go on with the history of a channel that replaced this one's replicas."""
        self._write_next(bring_back(before, utc_now(), why))

    def forget(self) -> None:
        """Remove all that is stored of it."""
        self._registry.clear()

    def clear_the_way(self, release: Release, watch: Watch) -> ChannelState:
        """The state without a rollout: one whose deployer is not heard for `STALE_S` is ended for `release`.

        It is waited for its next beat, a second where its deployer lives: clocks of two machines are not compared.

        Raises:
            DeployError: another deployer's rollout is under way.
        """
        looked_at = time.monotonic()
        deadline = looked_at + STALE_S
        state = self._known_state()
        silent = state.rollout
        why = f"its deployer was not heard for {STALE_S:g} s; taken over by the deployment of {release.version}"
        while state.rollout is not None and silent is not None:
            if state.rollout != silent:
                return propose(state, Rollout(kind="load", release=release))  # which is refused, with the reason
            watch(Progress("loading", 0, len(self._replicas())))
            now = time.monotonic()
            if now - looked_at > STOOD_STILL_S:
                deadline = now + STALE_S
            looked_at = now
            if now > deadline:
                state = update(self._registry, lambda state: take_over(state, silent, utc_now(), why))
            else:
                time.sleep(POLL_S)
                state = self._known_state()
        return state

    def bring_in(
        self, release: Release, mode: Mode, *, why: str, is_forced: bool, timeout_s: float, watch: Watch
    ) -> str:
        """Load, try and switch; whatever goes wrong, Ctrl-C included, the version that was live goes on.

        Returns:
            What was decided, in one line.

        Raises:
            DeployError: a replica could not load it, or what was seen of it was not good enough.
        """
        rollout = Rollout(kind=mode.kind, release=release, share=mode.share, id=uuid.uuid4().hex)
        proposed = update(self._registry, lambda state: propose(state, rollout))
        try:
            self._wait_until_ready(proposed, rollout, timeout_s, watch)
            verdict = Verdict(action="promote", why=why)
            if mode.kind != "load":
                verdict = self._watch_traffic(rollout, mode, watch)
            if verdict.action == "roll back":
                self._take_back(rollout, verdict.why)
                raise DeployError(f"version {release.version}: {verdict.why}; rolled back, the live version went on")
            self._settle(rollout, verdict, is_forced)
        except BaseException as error:
            self._take_back(rollout, str(error) if isinstance(error, Exception) else "interrupted")
            raise
        if verdict.action == "promote":
            self._wait_until_live(release, timeout_s, watch)
        return verdict.why

    def go_back(self, why: str, timeout_s: float, watch: Watch) -> ChannelState:
        """End a rollout that is under way, else make the previous version live again, everywhere."""
        state = update(self._registry, lambda state: withdraw(state, utc_now(), why))
        self._wait_until_live(state.live, timeout_s, watch)
        return state

    def _known_state(self) -> ChannelState:
        """As `state`; raises `DeployError` where there is none."""
        return update(self._registry, lambda state: state)

    def _write_first(self, state: ChannelState) -> None:
        if not self._registry.write(state):
            raise DeployError(f"application '{self._registry.app}': another deployment of it was faster; try again")

    def _write_next(self, state: ChannelState) -> None:
        """As `_write_first`, after whatever an earlier time of the same replicas' bundle has left."""
        self._write_first(state.model_copy(update={"revision": self._registry.revision() + 1}))

    def _settle(self, rollout: Rollout, verdict: Verdict, is_forced: bool) -> None:
        def end(state: ChannelState) -> ChannelState:
            _check_ours(state, rollout)
            if verdict.action == "promote":
                return promote(state, utc_now(), verdict.why, is_forced=is_forced)
            return finish(state, utc_now(), verdict.why)

        update(self._registry, end)

    def _take_back(self, rollout: Rollout, why: str) -> None:
        """End the rollout; where it is over already, nothing is changed."""

        def end(state: ChannelState) -> ChannelState:
            return abort(state, utc_now(), why) if is_same(state.rollout, rollout) else state

        ended = update(self._registry, end)
        deadline = time.monotonic() + TAKE_BACK_S
        while time.monotonic() < deadline and any(one.revision < ended.revision for one in self.reports()):
            time.sleep(POLL_S)

    def _wait_until_ready(self, proposed: ChannelState, rollout: Rollout, timeout_s: float, watch: Watch) -> None:
        release, deadline = rollout.release, time.monotonic() + timeout_s
        while True:
            running = self._replicas()
            reports = [report for report in self.reports() if report.revision >= proposed.revision]
            if failed := next((one for one in reports if one.candidate == "failed"), None):
                raise DeployError(f"version {release.version}: replica {failed.replica} cannot load it: {failed.why}")
            ready = {report.replica for report in reports if release.version in report.loaded}
            watch(Progress("loading", len(ready), len(running)))
            if running and ready >= running:
                return
            _check(deadline, f"version {release.version}: {len(ready)} of {len(running)} replicas have loaded it")
            self._beat(rollout)
            time.sleep(POLL_S)

    def _watch_traffic(self, rollout: Rollout, mode: Mode, watch: Watch) -> Verdict:
        assert mode.kind != "load", "only a canary or a shadow sees traffic before it is decided on"
        started = time.monotonic()
        while True:
            elapsed_s = time.monotonic() - started
            reports = self.reports()
            comparison = total(reports)
            watch(Progress("watching", len(reports), len(reports), comparison, elapsed_s))
            verdict = judge(mode.kind, comparison, mode.limits, elapsed_s)
            if verdict.action != "wait":
                return verdict
            self._beat(rollout)
            time.sleep(POLL_S)

    def _wait_until_live(self, release: Release, timeout_s: float, watch: Watch) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            running, reports = self._replicas(), self.reports()
            switched = {report.replica for report in reports if report.live == release.version}
            watch(Progress("switching", len(switched), len(running)))
            if switched >= running:  # of none too: a replica that starts later reads the state first
                return
            _check(deadline, f"version {release.version}: live in {len(switched)} of {len(running)} replicas")
            time.sleep(POLL_S)

    def _beat(self, rollout: Rollout) -> None:
        """Tell the replicas, now and then, that the rollout is watched; `DeployError` where somebody has ended it."""

        def step(state: ChannelState) -> ChannelState:
            _check_ours(state, rollout)
            return beat(state)

        if time.monotonic() - self._last_beat > BEAT_S:
            self._last_beat = time.monotonic()
            update(self._registry, step)


def total(reports: Sequence[ReplicaReport]) -> Comparison:
    """What all replicas have seen of a canary or shadow."""
    combined = Comparison()
    for report in reports:
        if report.comparison is not None:
            combined = combined.plus(report.comparison)
    return combined


def _check_ours(state: ChannelState, rollout: Rollout) -> None:
    """Another rollout may have begun since ours was ended; it is not ours to go on with."""
    if state.rollout is not None and not is_same(state.rollout, rollout):
        ours, other = rollout.release.version, state.rollout.release.version
        raise DeployError(f"version {ours}: its rollout was ended from elsewhere; {other} is on its way now")


def _check(deadline: float, text: str) -> None:
    if time.monotonic() > deadline:
        raise DeployError(f"{text}, not in time; see the replicas' logs under /tmp/ray/session_latest/logs/serve")
