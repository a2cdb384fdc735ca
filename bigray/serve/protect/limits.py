"""How often a key may ask: a token bucket for each key, in each replica.

Each of n replicas grants 1/n of a key's rate, so that all of them together grant the rate without talking to each
other. Requests that one replica happens to get more of than the others are refused a little early. One request takes
one token, however many rows it has.
"""

from __future__ import annotations

from collections.abc import Iterable

from bigray.serve.protect.keys import Key

_ROUNDING = 1e-9


class TokenBucket:
    """Allows `rate_per_s` on average and `max(1, rate_per_s)` at once. Starts full; times are a monotonic clock's."""

    def __init__(self, rate_per_s: float, now: float) -> None:
        self.rate_per_s = rate_per_s
        self._tokens, self._counted_at = self._burst, now

    @property
    def _burst(self) -> float:
        return max(1.0, self.rate_per_s)

    def take(self, now: float) -> float:
        """0.0 and one token less, or the seconds until there is a token."""
        self._fill(now)
        if self._tokens >= 1.0 - _ROUNDING:
            self._tokens = max(0.0, self._tokens - 1.0)
            return 0.0
        return (1.0 - self._tokens) / self.rate_per_s

    def set_rate(self, rate_per_s: float, now: float) -> None:
        """What has been used stays used."""
        self._fill(now)
        self.rate_per_s = rate_per_s
        self._tokens = min(self._tokens, self._burst)

    def _fill(self, now: float) -> None:
        elapsed = max(0.0, now - self._counted_at)
        self._tokens = min(self._burst, self._tokens + elapsed * self.rate_per_s)
        self._counted_at = now


class RateLimits:
    """The buckets of one replica. `take` is called on the event loop, the rest may be called in other threads."""

    def __init__(self, replicas: int = 1) -> None:
        self._buckets: dict[str, TokenBucket] = {}
        self._replicas = replicas

    def take(self, key: Key, now: float) -> float:
        """0.0 where the key may ask now, else the seconds until it may."""
        if key.rate_per_s is None:
            return 0.0
        share = key.rate_per_s / self._replicas
        bucket = self._buckets.get(key.id)
        if bucket is None:
            bucket = self._buckets[key.id] = TokenBucket(share, now)
        elif bucket.rate_per_s != share:
            bucket.set_rate(share, now)
        return bucket.take(now)

    def set_replicas(self, replicas: int) -> None:
        """How many replicas share each key's rate from now on."""
        self._replicas = max(1, replicas)

    def keep(self, key_ids: Iterable[str]) -> None:
        """Drop the buckets of all other keys."""
        kept = frozenset(key_ids)
        for key_id in list(self._buckets):  # a copy: the event loop may add one meanwhile
            if key_id not in kept:
                self._buckets.pop(key_id, None)
