"""Clusters that an allocating write is about to link: nobody else may allocate or hide them meanwhile.

    allocating write:   L2 lock: look up, claim | allocate, data, [flush] | L2 lock: link | give the claim up

So the data and the flush of writes to different clusters of one L2 table overlap.
I1. Claims do not overlap: they are made under the lock of the L2 table, after find().
I2. Who finds a claim waits for its end without any lock, and then looks up again.
"""

from __future__ import annotations

import threading

from .cluster import Kind


class Claim:
    """Guest clusters [first, end), which had no data when they were claimed: a run of `kind`."""

    def __init__(self, first: int, end: int, kind: Kind) -> None:
        self.first = first
        self.end = end
        self.kind = kind
        self._over = threading.Lock()
        self._over.acquire()

    def wait(self) -> None:
        with self._over:
            pass


class Claims:
    """All claims on one image.  The list is only changed and copied by single calls, atomic under the GIL."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []  # as many as there are threads that write, at most

    def find(self, first: int, end: int) -> Claim | None:
        """A claim that overlaps guest clusters [first, end).  L2 lock held."""
        for claim in self._claims.copy():
            if claim.first < end and first < claim.end:
                return claim
        return None

    def add(self, first: int, end: int, kind: Kind) -> Claim:
        """L2 lock held since find()."""
        claim = Claim(first, end, kind)
        self._claims.append(claim)
        return claim

    def give_up(self, claim: Claim) -> None:
        self._claims.remove(claim)
        claim._over.release()
