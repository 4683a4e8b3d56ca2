"""Which requests are running: a freed cluster must not be used again under one that has looked it up before.

    request:   running[thread] = epoch; look up; read or write; del running[thread]
    free:      unlink; publish; epoch += 1        safe once no request of an earlier epoch is running

No locks: each step is one call, atomic under the interpreter's lock.  A request that notes its start after the
check was made looks up after it, and finds the cluster unlinked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident


class InFlight:
    """Running requests of one image, or of all the openings of one image."""

    def __init__(self) -> None:
        self.epoch = 0
        self.running: dict[int, int] = {}  # thread -> epoch in which its request started

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request; the fast paths do the same in place.  A thread has one request at a time."""
        self.running[get_ident()] = self.epoch
        try:
            yield
        finally:
            del self.running[get_ident()]

    def advance(self) -> int:
        """Something was freed: the epoch from which on no request can know it.  One caller at a time."""
        self.epoch += 1
        return self.epoch

    def oldest(self) -> int:
        """The epoch of the oldest running request; the present one without any."""
        return min(self.running.copy().values(), default=self.epoch)
