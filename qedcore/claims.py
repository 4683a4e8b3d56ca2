"""Clusters that somebody is about to give data or hide: nobody else may do so meanwhile.

    claim | look up again | allocate, data, [flush] | L2 lock: link | give the claim up

So the data and the flush of writes to different clusters of one L2 table overlap.
I1. Claims do not overlap.  An entry that is not FOUND is changed only under a claim, so what a look-up under it
    finds stays as it is, except that a missing L2 table may be made.
I2. Who wants what another has claimed waits for the end of that claim, holding neither locks nor a claim.
"""

from __future__ import annotations

import threading


class Claim:
    """Guest clusters [first, end)."""

    __slots__ = ("_over", "end", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self._over = threading.Lock()
        self._over.acquire()

    def wait(self) -> None:
        with self._over:
            pass


class Claims:
    """All claims on one image.  The lock protects the list: a leaf, never held while waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: list[Claim] = []  # as many as there are threads that write, at most

    def take(self, first: int, end: int) -> Claim:
        """Claim guest clusters [first, end), waiting until they are free."""
        mine = Claim(first, end)
        while True:
            with self._lock:
                other = self.find(first, end)
                if other is None:
                    self._claims.append(mine)
                    return mine
            other.wait()

    def find(self, first: int, end: int) -> Claim | None:
        """A claim that overlaps [first, end).  The lock is held."""
        for claim in self._claims:
            if claim.first < end and first < claim.end:
                return claim
        return None

    def give_up(self, claim: Claim) -> None:
        with self._lock:
            self._claims.remove(claim)
        claim._over.release()
