"""What a channel serves, as documents in the cluster's store, and the pure steps from one state to the next.

    initial -> propose -> promote     the candidate is live, what was live is the previous version
                       -> abort       the candidate is gone
                       -> finish      a shadow has been compared; the live version stays
    roll_back                         the previous version is live again
    bring_back                        so is the one that was live before a surge, in replicas of its own

The driver and the replicas both read these; only `registry.py` stores them. No clock is read here: times are handed in.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from hashlib import blake2b
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bigray.errors import DeployError

HISTORY_LENGTH = 200
"""Entries that a state keeps, so that it stays small however long an endpoint lives."""

_FASTEST_S, _SLOWEST_S, _NUM_BOUNDS = 0.00025, 30.0, 60
LATENCY_BOUNDS_S: tuple[float, ...] = tuple(
    round(_FASTEST_S * (_SLOWEST_S / _FASTEST_S) ** (number / (_NUM_BOUNDS - 1)), 9) for number in range(_NUM_BOUNDS)
)
"""Upper bounds of the latency buckets, 22 % apart: a ratio of two quantiles, each read within one bucket, has to be
well below the ratio (1.5) at which a candidate is given up. One more bucket holds what is slower than the last."""

STALE_S = 15.0
"""A rollout whose driver has not been heard for so long is given up: replicas give its candidate no traffic any more,
and the next deployer ends it."""

RolloutKind = Literal["load", "canary", "shadow"]
Action = Literal["deployed", "promoted", "rolled back", "refused", "forced", "compared"]
CandidateState = Literal["none", "loading", "ready", "failed"]

Count = Annotated[int, Field(ge=0)]
_NO_COUNTS = (0,) * (len(LATENCY_BOUNDS_S) + 1)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        """As JSON, for the store."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The other way; raises `ValueError` where it is no such document."""
        return cls.model_validate_json(data)


class Release(_Document):
    """A version, and where its bundle lies."""

    version: str
    """First 12 hex digits of the weights' SHA-256."""
    bundle: str
    """Folder or URI, as a replica can open it."""


class Rollout(_Document):
    """A release that is on its way: held ready, tried on a share of the requests, or shown copies of them."""

    kind: RolloutKind
    """load = held in memory, without traffic; canary = answers a share of it; shadow = its answers are not sent."""
    release: Release
    share: float = Field(default=0.0, ge=0, le=1)
    """Of the sticky keys, for a canary; of the requests that are copied, for a shadow."""
    beat: Count = 0
    """Counted up by the driver while it watches: a rollout that nobody watches any more can be told by it."""
    id: str = ""
    """Drawn by its deployer: one that was ended must not be taken for another of the same version. Older ones have
    none."""

    @model_validator(mode="after")
    def _a_canary_has_a_share(self) -> Rollout:
        if self.kind == "canary" and self.share == 0:
            raise ValueError("a canary needs a share above 0")
        return self


class HistoryEntry(_Document):
    """One line of who served when."""

    at: str
    """ISO time, UTC."""
    version: str
    """The version that the action was done to: the one taken out where it says rolled back."""
    action: Action
    why: str


class ChannelState(_Document):
    """What every replica of a channel is to serve."""

    revision: Annotated[int, Field(ge=1)]
    live: Release
    previous: Release | None = None
    """What `roll_back` returns to; held in memory for it."""
    replaced: Release | None = None
    """What was live before in replicas of its own, since memory does not hold two versions."""
    rollout: Rollout | None = None
    history: tuple[HistoryEntry, ...] = ()
    """Oldest first, the last `HISTORY_LENGTH`."""


class VersionStats(_Document):
    """What became of the requests that one version answered; adds up over replicas."""

    requests: Count = 0
    errors: Count = 0
    """Of the requests, those that failed in the model."""
    rows: Count = 0
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Of all requests together."""
    latency: tuple[Count, ...] = _NO_COUNTS
    """Requests in each bucket of `LATENCY_BOUNDS_S`, and one for those above."""

    @model_validator(mode="after")
    def _there_is_a_count_for_each_bucket(self) -> VersionStats:
        if len(self.latency) != len(_NO_COUNTS):
            raise ValueError(f"latency needs {len(_NO_COUNTS)} counts, got {len(self.latency)}")
        return self

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def quantile(self, q: float) -> float | None:
        """Seconds within which a share `q` of the requests was answered; None where there were none."""
        total = sum(self.latency)
        if not total:
            return None
        rank, below = q * total, 0
        for bucket, count in enumerate(self.latency):
            if count and below + count >= rank:
                return _inside(bucket, (rank - below) / count)
            below += count
        return LATENCY_BOUNDS_S[-1]

    def plus(self, other: VersionStats) -> VersionStats:
        return VersionStats(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            rows=self.rows + other.rows,
            seconds=self.seconds + other.seconds,
            latency=tuple(a + b for a, b in zip(self.latency, other.latency, strict=True)),
        )

    def minus(self, other: VersionStats) -> VersionStats:
        """What came since `other`; never below nothing, since a replica that was replaced counts from 0 again."""
        return VersionStats(
            requests=max(self.requests - other.requests, 0),
            errors=max(self.errors - other.errors, 0),
            rows=max(self.rows - other.rows, 0),
            seconds=max(self.seconds - other.seconds, 0.0),
            latency=tuple(max(a - b, 0) for a, b in zip(self.latency, other.latency, strict=True)),
        )


class Comparison(_Document):
    """A candidate beside the live version, over the same time; adds up over replicas."""

    live: VersionStats = VersionStats()
    candidate: VersionStats = VersionStats()
    compared_rows: Count = 0
    """Rows that both have answered."""
    disagreeing_rows: Count = 0

    def plus(self, other: Comparison) -> Comparison:
        return Comparison(
            live=self.live.plus(other.live),
            candidate=self.candidate.plus(other.candidate),
            compared_rows=self.compared_rows + other.compared_rows,
            disagreeing_rows=self.disagreeing_rows + other.disagreeing_rows,
        )

    def minus(self, other: Comparison) -> Comparison:
        return Comparison(
            live=self.live.minus(other.live),
            candidate=self.candidate.minus(other.candidate),
            compared_rows=max(self.compared_rows - other.compared_rows, 0),
            disagreeing_rows=max(self.disagreeing_rows - other.disagreeing_rows, 0),
        )


class ReplicaReport(_Document):
    """What a replica says of itself, a few times a second."""

    replica: str
    node: str
    pid: int
    sequence: Count
    """Counted up with each report."""
    at: float
    """Unix time of the replica's clock."""
    revision: Count
    """Of the state that it serves now; 0 before the first."""
    live: str
    """Version that answers."""
    loaded: tuple[str, ...] = ()
    """Versions in memory."""
    candidate: CandidateState = "none"
    why: str = ""
    """Why the candidate failed, in one line."""
    telemetry: dict[str, Any] = {}
    comparison: Comparison | None = None


def latency_bucket(seconds: float) -> int:
    """Which count of `VersionStats.latency` a request belongs to."""
    return bisect_left(LATENCY_BOUNDS_S, seconds)


def initial(release: Release, at: str, why: str = "first version") -> ChannelState:
    """The state of a channel that serves its first release."""
    return ChannelState(revision=1, live=release, history=(_entry(at, release, "deployed", why),))


def is_live(state: ChannelState, version: str) -> bool:
    """Whether there is nothing to deploy."""
    return state.live.version == version


def propose(state: ChannelState, rollout: Rollout) -> ChannelState:
    """Begin a rollout.

    Raises:
        DeployError: another one is under way, or this version is live already.
    """
    version = rollout.release.version
    if is_live(state, version):
        raise DeployError(f"version {version} is live already: there is nothing to deploy")
    if (other := state.rollout) is not None:
        raise DeployError(
            f"version {version}: another rollout is under way, {other.kind} of version {other.release.version}; "
            "wait for its end, or end it with `bigray rollback`"
        )
    return _next(state, rollout=rollout)


def beat(state: ChannelState) -> ChannelState:
    """The driver still watches the rollout; `DeployError` where somebody else has ended it."""
    if (rollout := state.rollout) is None:
        raise DeployError(f"the rollout was ended from elsewhere; version {state.live.version} is live")
    return _next(state, rollout=rollout.model_copy(update={"beat": rollout.beat + 1}))


def is_same(one: Rollout | None, other: Rollout) -> bool:
    """Whether it is the same rollout, however often it was heard of."""
    return one is not None and one.model_copy(update={"beat": other.beat}) == other


def promote(state: ChannelState, at: str, why: str, *, is_forced: bool = False) -> ChannelState:
    """The rollout's release is live from now on, and what was live is held as the previous one.

    `is_forced`: it was refused by a check, and deployed all the same; the history says so.
    """
    rollout = _under_way(state, "promote")
    action: Action = "forced" if is_forced else "deployed" if rollout.kind == "load" else "promoted"
    entry = _entry(at, rollout.release, action, why)
    return _next(state, entry, live=rollout.release, previous=state.live, replaced=None, rollout=None)


def abort(state: ChannelState, at: str, why: str) -> ChannelState:
    """The rollout is over and its release gone: refused before it saw a request, rolled back after."""
    rollout = _under_way(state, "abort")
    action: Action = "refused" if rollout.kind == "load" else "rolled back"
    return _next(state, _entry(at, rollout.release, action, why), rollout=None)


def take_over(state: ChannelState, silent: Rollout, at: str, why: str) -> ChannelState:
    """End a rollout whose driver has not been heard since it was seen as `silent`; else nothing is changed."""
    return abort(state, at, why) if state.rollout == silent else state


def finish(state: ChannelState, at: str, why: str) -> ChannelState:
    """A shadow has been compared as asked: it is over, and nothing is held against its release."""
    rollout = _under_way(state, "finish")
    if rollout.kind != "shadow":
        raise DeployError(
            f"version {rollout.release.version} is a {rollout.kind}: only a shadow ends without a decision"
        )
    return _next(state, _entry(at, rollout.release, "compared", why), rollout=None)


def roll_back(state: ChannelState, at: str, why: str) -> ChannelState:
    """The previous version is live again; what was live is the previous one, so that a second call returns to it.

    Raises:
        DeployError: there is no previous version, or a rollout is under way, of which it must be said first what
            becomes of it (`withdraw` does).
    """
    if (rollout := state.rollout) is not None:
        raise DeployError(
            f"a rollout is under way, {rollout.kind} of version {rollout.release.version}: end it before going back"
        )
    if (previous := state.previous) is None:
        if (gone := state.replaced) is not None:
            raise DeployError(f"version {gone.version} is not in memory any more; deploy it again: {gone.bundle}")
        raise DeployError(f"there is no version before {state.live.version} to go back to; deploy another one instead")
    return _next(state, _entry(at, state.live, "rolled back", why), live=previous, previous=state.live)


def in_no_replica(state: ChannelState) -> Release | None:
    """The version to go back to, where no replica holds it: after a surge. None where there is another way back."""
    return state.replaced if state.rollout is None and state.previous is None else None


def bring_back(state: ChannelState, at: str, why: str) -> ChannelState:
    """The version from before a surge is live again, in replicas of its own; a second call returns."""
    gone = in_no_replica(state)
    if gone is None:
        raise DeployError(f"version {state.live.version} has not replaced one by a surge; there is none to bring back")
    return _next(state, _entry(at, state.live, "rolled back", why), live=gone, previous=None, replaced=state.live)


def withdraw(state: ChannelState, at: str, why: str) -> ChannelState:
    """What an operator means by going back: a rollout that is under way ends; else the previous version returns."""
    return abort(state, at, why) if state.rollout is not None else roll_back(state, at, why)


def what_to_hold(state: ChannelState) -> tuple[Release, ...]:
    """What a replica keeps in memory, the most needed first: live, candidate, previous."""
    candidate = state.rollout.release if state.rollout else None
    held: dict[str, Release] = {}
    for release in (state.live, candidate, state.previous):
        if release is not None:
            held.setdefault(release.version, release)
    return tuple(held.values())


def routes_to_candidate(rollout: Rollout | None, sticky: str) -> bool:
    """Whether the canary answers this caller: the same callers in every replica, others for another version."""
    if rollout is None or rollout.kind != "canary":
        return False
    return fraction_of(rollout.release.version, sticky) < rollout.share


def fraction_of(version: str, sticky: str) -> float:
    """A number in [0, 1) that is spread evenly over callers and the same on every machine."""
    digest = blake2b(f"{version}\n{sticky}".encode(errors="backslashreplace"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48  # no more bits than a double holds: it stays below 1


def _inside(bucket: int, share: float) -> float:
    """A place within a bucket: even on a logarithmic scale, as the bounds are."""
    if bucket == len(LATENCY_BOUNDS_S):
        return LATENCY_BOUNDS_S[-1]
    high = LATENCY_BOUNDS_S[bucket]
    low = LATENCY_BOUNDS_S[bucket - 1] if bucket else high / 2
    return low * math.pow(high / low, min(max(share, 0.0), 1.0))


def _under_way(state: ChannelState, action: str) -> Rollout:
    if state.rollout is None:
        raise DeployError(f"there is no rollout to {action}; version {state.live.version} is live")
    return state.rollout


def _entry(at: str, release: Release, action: Action, why: str) -> HistoryEntry:
    return HistoryEntry(at=at, version=release.version, action=action, why=why)


def _next(state: ChannelState, *entries: HistoryEntry, **changes: Any) -> ChannelState:
    history = (*state.history, *entries)[-HISTORY_LENGTH:]
    return state.model_copy(update={**changes, "revision": state.revision + 1, "history": history})
