"""An object store that is overloaded, restarted or out of reach for a while: the same call again, for a bounded time.

The client of S3 (`bigray.s3`) tries each request a few times by itself, within seconds. This is for what lasts longer,
and for whole files: an upload that broke off is begun anew.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_STATUS = r"\(HTTP status (?:408|429|5\d\d)\)"
_TRANSIENT = re.compile(
    # an upload is not there any more where it was completed and the answer got lost; then it is begun anew
    r"AWS Error (?:NETWORK_CONNECTION|REQUEST_TIMEOUT|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING"
    r"|NO_SUCH_UPLOAD"
    rf"|[A-Z_]+ {_STATUS})"
)
_CERTIFICATE = re.compile(r"curlCode: (?:51|53|54|58|59|60|66|77|80|82|83|91),")
"""Of libcurl's errors (https://curl.se/libcurl/c/libcurl-errors.html), those of TLS that no waiting mends."""


@dataclass(frozen=True)
class Patience:
    """How long a call is tried again."""

    total_s: float
    """From the first failure on; what is under way when it ends is the last attempt."""
    first_wait_s: float = 0.5
    longest_wait_s: float = 10.0


PATIENCE = Patience(120.0)
"""Well below `training.hang_timeout_s`: a worker that waits for its checkpoint is not to be taken for a hanging one."""
AT_THE_START = Patience(10.0)
"""Where nothing is lost yet, and somebody may have misspelled the address."""


def is_transient(error: OSError) -> bool:
    """Whether the same call may well work later. What is denied, or not there, stays so."""
    text = str(error)
    return _TRANSIENT.search(text) is not None and _CERTIFICATE.search(text) is None


def waits_s(patience: Patience) -> Iterator[float]:
    """The longest time before each next attempt, without end: each twice the last, up to a limit."""
    wait = patience.first_wait_s
    while True:
        yield wait
        wait = min(2 * wait, patience.longest_wait_s)


def keep_trying(
    call: Callable[[], T],
    patience: Patience,
    on_first_failure: Callable[[OSError], None] = lambda error: None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The first answer. Waits are drawn from the upper half of their length, so that workers do not come all at once.

    Raises:
        OSError: what the last attempt failed with, or the first one that no waiting would mend.
    """
    failed_at: float | None = None
    for longest_s in waits_s(patience):
        try:
            return call()
        except OSError as error:
            if not is_transient(error):
                raise
            if failed_at is None:
                failed_at = clock()
                on_first_failure(error)
            wait_s = longest_s * random.uniform(0.5, 1.0)
            if clock() + wait_s > failed_at + patience.total_s:
                raise
        sleep(wait_s)
    raise AssertionError("the waits have no end")
