"""Clusters that somebody is about to give data: nobody else may do so meanwhile.

    claim | look up again | allocate, data, [flush] | L2 lock: link | give the claim up

So the data and the flush of writes to different clusters of one L2 table overlap.
I1. A guest cluster has one claim at most.  An entry gets data only under a claim, so a cluster that is found without
    data under its claim stays without.  It may become a zero cluster, and a missing L2 table may be made.
I2. Who wants what another has claimed waits until that is given up, holding neither locks nor a claim.
I3. Only who waits, or wakes others, takes the lock.  A claim is made by one call on `claimed`, atomic under the
    interpreter's lock, and given up by its owner alone.  Who waits notes itself in `waiting`, then looks at
    `claimed`; who gives a claim up does so, then looks at `waiting`.  So one of them sees the other.
"""

from __future__ import annotations

import threading
from itertools import repeat
from threading import get_ident


class Claims:
    """All claims on one image.  A thread has one run of guest clusters at most."""

    def __init__(self) -> None:
        self.claimed: dict[int, int] = {}  # guest cluster -> identifier of the thread that has it
        self.waiting = 0  # threads; _lock
        self._lock = threading.Lock()
        self._given_up = threading.Condition(self._lock)

    def take(self, first: int, end: int) -> None:
        """Claim guest clusters [first, end), waiting until they are free.  After any error give_up() all of them."""
        clusters, me = range(first, end), get_ident()
        while True:
            owners = list(map(self.claimed.setdefault, clusters, repeat(me)))
            if owners.count(me) == len(owners):
                return
            self.give_up(first, end)
            self._wait(next(cluster for cluster, owner in zip(clusters, owners) if owner != me))

    def _wait(self, cluster: int) -> None:
        with self._lock:
            self.waiting += 1
            try:
                while cluster in self.claimed:
                    self._given_up.wait()
            finally:
                self.waiting -= 1

    def give_up(self, first: int, end: int) -> None:
        """The calling thread's claim on guest clusters [first, end) ends, as far as it has one."""
        claimed, me = self.claimed, get_ident()
        for cluster in range(first, end):
            if claimed.get(cluster) == me:
                del claimed[cluster]
        if self.waiting:
            self.wake()

    def wake(self) -> None:
        """Claims were given up while others wait."""
        with self._lock:
            self._given_up.notify_all()
