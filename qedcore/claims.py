"""Clusters that somebody is about to give data or hide: nobody else may do so meanwhile.

    claim | look up again | allocate, data, [flush] | L2 lock: link | give the claim up

So the data and the flush of writes to different clusters of one L2 table overlap.
I1. Claims do not overlap.  An entry that is not FOUND is changed only under a claim, so what a look-up under it
    finds stays as it is, except that a missing L2 table may be made.
I2. Who wants what another has claimed waits for the end of that claim, holding neither locks nor a claim.
"""

from __future__ import annotations

import threading

Claim = tuple[int, int]  # guest clusters [first, end)


class Claims:
    """All claims on one image.  The lock protects what is below it: a leaf, never held while waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up = threading.Condition(self._lock)
        self._waiting = 0  # threads
        self._claims: list[Claim] = []  # as many as there are threads that write, at most

    def take(self, first: int, end: int) -> Claim:
        """Claim guest clusters [first, end), waiting until they are free."""
        claim = first, end
        with self._lock:
            while True:
                for start, stop in self._claims:
                    if start < end and first < stop:
                        break
                else:
                    self._claims.append(claim)
                    return claim
                self._wait()

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self._given_up.wait()
        finally:
            self._waiting -= 1

    def give_up(self, claim: Claim) -> None:
        with self._lock:
            self._claims.remove(claim)
            if self._waiting:
                self._given_up.notify_all()
