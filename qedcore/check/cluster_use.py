"""A map with one byte for every cluster of the file: who uses it.

    | METADATA | 0 | DATA | DATA ... |     memory: pages touched only
      header, tables ^ leak

The map ends at a limit, whatever the size of the file.  No lock: one thread claims, or several where somebody
compares the sum of their claims with count() in the end.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

from ..errors import UnsupportedError

# What a byte of the map says of its cluster
METADATA = 1  # the header area, the L1 table or an L2 table
DATA = 2  # a data cluster
READ = 4  # an L2 table that the scan has come to
SHARED = 8  # used more than once

_USE = METADATA | DATA

MAX_CLUSTERS = 1 << 30  # in the map, which takes a byte for each
MAX_RUN = 1 << 20  # clusters claimed at once
_STEP = 1 << 16  # clusters of the map looked at at once: they stay in the processor's cache
_NOBODY = bytes(MAX_RUN)


class ClusterUse:
    """One byte for each whole cluster of the file, up to `limit`: METADATA, DATA, READ and SHARED, or 0.

    Clusters from `limit` on have no byte: they are counted when they are claimed, and seem to be unused.
    """

    def __init__(self, clusters: int, limit: int = MAX_CLUSTERS) -> None:
        self.clusters = clusters
        self.mapped = min(clusters, limit)
        self.unmapped = 0  # claims of clusters without a byte
        try:
            # Anonymous memory: pages that are not written cost nothing.
            self.map = mmap.mmap(-1, max(self.mapped, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._view = memoryview(self.map)
        except OSError as error:
            raise UnsupportedError(f"no memory for a map of {self.mapped} clusters: {error.strerror}") from None

    def expect(self, n: int) -> None:
        """About n clusters will be claimed: if they may be most of the map, then large pages make that faster."""
        if 2 * n > self.mapped and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without them
                self.map.madvise(mmap.MADV_HUGEPAGE)

    def marks(self, cluster: int, n: int = 1) -> bytes:
        """The bytes of n clusters, as far as they have one."""
        return self.map[cluster : min(cluster + n, self.mapped)]

    def claim(self, cluster: int, use: int) -> bool:
        """Note a use; False, and SHARED, if there is one already."""
        if cluster >= self.mapped:
            self.unmapped += 1
            return True
        before = self.map[cluster]
        if before & _USE:
            self.map[cluster] = before | use | SHARED
            return False
        self.map[cluster] = before | use
        return True

    def claim_free(self, cluster: int, use: int) -> bool:
        """Note a use if there is none yet; False if there is, or nobody knows."""
        return cluster < self.mapped and not self.map[cluster] & _USE and self.claim(cluster, use)

    def claim_run(self, cluster: int, n: int, use: int) -> bool:
        """Claim n clusters, MAX_RUN at most, if all of them have nothing but 0."""
        if cluster + n > self.mapped:
            return False
        view = self._view[cluster : cluster + n]
        if not _NOBODY.startswith(view):  # compares without copying
            return False
        view[:] = bytes((use,)) * n
        return True

    def next_free(self, cluster: int) -> int:
        """The first unused cluster from `cluster` on; `clusters` if there is none."""
        found = self.map.find(b"\0", cluster, self.mapped)
        return found if found >= 0 else min(max(cluster, self.mapped), self.clusters)

    def next_used(self, cluster: int) -> int:
        """The first cluster in use from `cluster` on; `clusters` if there is none."""
        for start in range(cluster, self.mapped, _STEP):
            part = self.marks(start, _STEP)
            if not _NOBODY.startswith(part):
                return start + len(part) - len(part.lstrip(b"\0"))
        return self.clusters

    def count(self) -> int:
        """Clusters in use."""
        n = 0
        for at in range(0, self.mapped, _STEP):
            part = self.marks(at, _STEP)
            if 0 not in part:
                n += len(part)
            elif not _NOBODY.startswith(part):
                n += len(part) - part.count(0)
        return n

    def last(self) -> int:
        """The number after the last cluster in use."""
        end = self.mapped
        while end:
            start = max(0, end - _STEP)
            part = self.map[start:end]
            if not _NOBODY.startswith(part):
                return start + len(part.rstrip(b"\0"))
            end = start
        return 0
