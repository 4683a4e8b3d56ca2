"""Which clusters of the file are free: a byte for each, kept only for regions where some are."""

from __future__ import annotations

from ..check.cluster_use import ClusterUse

CLEAN = 1  # free, and reads as zeros even after a crash
USED = 2  # free, and holds what was written there before

_CHUNK = 4096  # clusters
_FREE = bytes((CLEAN, USED))
_UNUSED = bytes((USED,)) + bytes(255)  # translates what ClusterUse.map says
_ALL_USED = bytes((USED,)) * _CHUNK  # shared by all such chunks: a sparse file may have any number of them


class FreeMap:
    """Not thread-safe: its owner has a lock.  Clusters are counted from the start of the file."""

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray | bytes] = {}  # number of a chunk -> its clusters: 0, CLEAN or USED
        self._lowest = 0  # no chunk below has anything free
        self.n = 0  # clusters that are free

    def add(self, cluster: int, n: int, state: int) -> None:
        """n clusters, which were not free, are now CLEAN or USED."""
        self.n += n
        self._lowest = min(self._lowest, cluster // _CHUNK)
        while n:
            number, start = divmod(cluster, _CHUNK)
            part = min(n, _CHUNK - start)
            if part == _CHUNK and state == USED:
                self._chunks[number] = _ALL_USED
            else:
                self._own(number)[start : start + part] = bytes((state,)) * part
            cluster += part
            n -= part

    def add_unused(self, use: ClusterUse) -> None:
        """The clusters that nobody uses, which were not free, are now USED."""
        for number in range(-(-use.mapped // _CHUNK)):
            marks = use.marks(number * _CHUNK, _CHUNK)
            unused = marks.count(0)
            if unused == _CHUNK:
                self._chunks[number] = _ALL_USED
            elif unused:
                chunk = self._own(number)
                both = int.from_bytes(chunk, "little") | int.from_bytes(marks.translate(_UNUSED), "little")
                chunk[:] = both.to_bytes(_CHUNK, "little")
            self.n += unused
        self._lowest = 0

    def take(self, n: int) -> tuple[int, int, int] | None:
        """The lowest free clusters, at most n and all in one state: (first, how many, state); None without any."""
        while self._chunks:
            chunk = self._chunks.get(self._lowest)
            if chunk is None:
                self._lowest = min(self._chunks)
                continue
            start = _CHUNK - len(chunk.lstrip(b"\0"))
            if start == _CHUNK:
                del self._chunks[self._lowest]
                continue
            state = chunk[start]
            wanted = chunk[start : start + n]
            taken = len(wanted) - len(wanted.lstrip(bytes((state,))))
            self._own(self._lowest)[start : start + taken] = bytes(taken)
            self.n -= taken
            return self._lowest * _CHUNK + start, taken, state
        return None

    def _own(self, number: int) -> bytearray:
        """The chunk, made if it is missing, which nothing else shares."""
        chunk = self._chunks.get(number, b"")
        if not isinstance(chunk, bytearray):
            chunk = self._chunks[number] = bytearray(chunk) if chunk else bytearray(_CHUNK)
        return chunk

    def end_of_used(self, end: int) -> int:
        """The end of the file without the free clusters before `end`, where it ends now."""
        while end:
            number, last = divmod(end - 1, _CHUNK)
            used = len(self._chunks.get(number, b"\0" * _CHUNK)[: last + 1].rstrip(_FREE))
            end = number * _CHUNK + used
            if used:
                break
        return end

    def cut(self, end: int) -> None:
        """The file ends here now: forget what came after."""
        number, start = divmod(end, _CHUNK)
        for later in [later for later in self._chunks if later >= number]:
            chunk = self._chunks.pop(later)
            kept = bytearray(chunk[:start]) if later == number else bytearray()
            self.n -= len(chunk) - len(kept) - chunk.count(0, len(kept))
            if any(kept):
                self._chunks[later] = kept + bytes(_CHUNK - start)

    def clear(self) -> None:
        self._chunks.clear()
        self.n = 0
