"""Pictures are decoded beside the event loop, so that other requests go on meanwhile (replica)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bigray.serve.http import TRY_AGAIN, Refusal

T = TypeVar("T")

MOST_WAITING = 128
"""A picture of a few kB can take a quarter of a second, and it is decoded long after its body has been counted."""


def is_picture(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a body is said to be one; a JSON body costs less to decode than to hand over."""
    return b"image/" in headers.get(b"content-type", b"").lower()


class PictureDesk:
    """One thread, one picture after the other: what a decoder takes of memory, it takes once (event loop)."""

    def __init__(self) -> None:
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigray-pictures")

    def check_room(self) -> None:
        """Raise a 503 where a picture would wait too long; asked before its body is read."""
        if self._num_waiting >= MOST_WAITING:
            raise Refusal(
                503, f"overloaded: {self._num_waiting} pictures wait to be decoded; try again later", TRY_AGAIN
            )

    async def run(self, decode: Callable[..., T], *arguments: object) -> T:
        """`decode(*arguments)` in the thread.

        Raises:
            Refusal: 503, too many wait already.
        """
        self.check_room()
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, decode, *arguments)
        finally:
            self._num_waiting -= 1
