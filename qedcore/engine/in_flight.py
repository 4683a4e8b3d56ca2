"""Which requests are running: a freed cluster must not be used again under one that has looked it up before.

    request:   enter the epoch of now; look up; read or write; leave
    free:      unlink; publish; begin an epoch       safe once the earlier epochs are empty

No locks: each step is one call or store, atomic under the interpreter's lock.  A request enters, then makes sure that
the epoch was not over by then, and tries again if it was.  So whoever begins an epoch and then finds an earlier one
empty knows that all who enter later look up later, and find the cluster unlinked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Epoch(list[None]):
    """An item per request that is running since this epoch."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class InFlight:
    """Running requests of one image, or of all the openings of one image."""

    def __init__(self) -> None:
        self.now = Epoch(0)
        self._earlier: deque[Epoch] = deque()  # oldest first

    # Requests that must be fast do the first two steps of enter() themselves.
    def enter(self) -> Epoch:
        """A request begins; `pop()` of what is returned ends it."""
        epoch = self.now
        epoch.append(None)
        return epoch if epoch is self.now else self.enter_again(epoch)

    def enter_again(self, epoch: Epoch) -> Epoch:
        """It entered `epoch` when that was over."""
        epoch.pop()
        return self.enter()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request."""
        epoch = self.enter()
        try:
            yield
        finally:
            epoch.pop()

    def advance(self) -> int:
        """Something was freed: the epoch from which on no request can know it.  One caller at a time."""
        self._earlier.append(self.now)
        self.now = Epoch(self.now.number + 1)
        self.oldest()
        return self.now.number

    def oldest(self) -> int:
        """The epoch of the oldest running request; the present one without any.  One caller at a time."""
        earlier = self._earlier
        while earlier and not earlier[0]:
            earlier.popleft()
        return earlier[0].number if earlier else self.now.number
