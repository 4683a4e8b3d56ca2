"""The engine's classes with trace events and fault points: the same steps, announced.

Each step that has an event is a method of a plain class; here it is overridden to announce itself and go on.
So tracing costs nothing when it is off: the plain classes know nothing of it and this module is not even loaded.
`ret` of an event is 0 or a negative errno, or the kind of a run.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import QEDError, StorageError
from ..format.geometry import SECTOR
from ..format.table import Table
from ..storage import ReadBuffer, Storage, Wrapper, WriteBuffer
from ..trace import FaultHook, Tracer
from .cluster_map import FOUND, ClusterMap, Kind
from .image import Parts
from .l2_cache import L2Cache
from .need_check import NeedCheckGate
from .read import Requests
from .reclaim import Extent
from .write import WritableRequests

_WRITE, _ZERO = 1, 2  # flags of qed_aio_setup


class Probe:
    """Where events and fault points go, and what is known of the request that this thread serves."""

    def __init__(self, trace: Tracer | None, fault: FaultHook | None, dialect: str) -> None:
        self._trace = trace or (lambda event, args: None)
        self._fault = fault or (lambda event: None)
        self.v5 = dialect == "2010"
        self._numbers = itertools.count(1)
        self._local = threading.local()  # .acb, .s: request and image; .entry: its L2 entry; .timer: to start

    def trace(self, event: str, *args: object) -> None:
        self._trace(event, args)

    def fault(self, event: str) -> None:
        try:
            self._fault(event)
        except OSError as error:
            raise StorageError(f"injected at {event}", error) from None

    @property
    def acb(self) -> int:
        """Number of this thread's request; 0 outside any."""
        return getattr(self._local, "acb", 0)

    def next_io(self, s: int, pos: int) -> None:
        """The thread's request goes on at pos, if it has one on image `s`: not in an image below."""
        if s == getattr(self._local, "s", 0):
            self.trace("qed_aio_next_io", s, self.acb, 0, pos)

    @contextmanager
    def request(self, s: int, pos: int, length: int, flags: int) -> Iterator[None]:
        self._local.s = s
        self._local.acb = acb = next(self._numbers)
        sectors = -(-(pos + length) // SECTOR) - pos // SECTOR
        self.trace("qed_aio_setup", s, acb, pos // SECTOR, sectors, 0, flags & 1 if self.v5 else flags)
        ret = 0
        try:
            yield
            self.next_io(s, pos + length)
        except QEDError as error:
            ret = -error.errno
            raise
        finally:
            self.trace("qed_aio_complete", s, acb, ret)
            self.use_entry(None)
            self._local.s = self._local.acb = 0
            self.start_timer(0)

    def start_timer(self, s: int) -> None:
        """The timer of image `s` starts when the thread's request is over; 0: it is."""
        pending: int = getattr(self._local, "timer", 0)
        if not s and pending:
            self.trace("qed_start_need_check_timer", pending)
        self._local.timer = s

    @property
    def entry(self) -> Entry | None:
        """The L2 cache entry that the thread's request uses."""
        return getattr(self._local, "entry", None)

    def use_entry(self, entry: Entry | None) -> None:
        """The thread's request lets go of its L2 cache entry and takes another."""
        old = self.entry
        if old is not None:
            old.ref -= 1
            self.trace("qed_unref_l2_cache_entry", id(old), old.ref)
        self._local.entry = entry


class Entry:
    """What QEMU's CachedL2Table is to the events: an identity and a count of references."""

    def __init__(self) -> None:
        self.ref = 1  # the cache's own


class _Probed:
    probe: Probe  # set by instrumented()


class TracedStorage(Wrapper):
    """A storage with the fault points of the generic layer; all else goes straight through."""

    def __init__(self, storage: Storage, probe: Probe) -> None:
        super().__init__(storage)
        self._probe = probe

    def flush(self) -> None:
        self._probe.fault("flush_to_os")
        self._probe.fault("flush_to_disk")
        self._inner.flush()


class TracedCache(_Probed, L2Cache):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entries: dict[int, Entry] = {}  # slice index -> Entry, for as long as the image is open

    def allocate(self, index: int) -> Entry:
        entry = self.entries[index] = Entry()
        self.probe.trace("qed_alloc_l2_cache_entry", id(self), id(entry))
        return entry

    def read(self, index: int, offset: int) -> Table:
        probe, s = self.probe, id(self._tables.storage)
        entry = self.allocate(index)
        probe.trace("qed_read_table", s, offset, id(entry))
        ret = 0
        try:
            probe.fault("l2_load")
            return super().read(index, offset)
        except QEDError as error:
            ret = -error.errno
            raise
        finally:
            probe.trace("qed_read_table_cb", s, id(entry), ret)


class TracedClusterMap(_Probed, ClusterMap):
    cache: TracedCache

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        self.probe.next_io(id(self.tables.storage), pos)
        return super().lookup(pos, length)

    def slice_at(self, pos: int) -> Table | None:
        probe = self.probe
        table = super().slice_at(pos)
        if table is None:
            probe.use_entry(None)
            return None
        geo = self.geometry
        self._find_entry(pos, self.l1[pos >> geo.l1_shift])
        return table

    def _find_entry(self, pos: int, l2_offset: int) -> None:
        probe, geo = self.probe, self.geometry
        entry = self.cache.entries[pos >> geo.slice_shift]
        probe.use_entry(entry)
        offset = l2_offset + geo.slice_offset(pos)
        probe.trace("qed_find_l2_cache_entry", id(self.cache), id(entry), offset, entry.ref)
        entry.ref += 1

    def write_new_table(self, pos: int, entries: Table, offset: int) -> Table:
        """One event for the whole table, as in QEMU, whichever parts of it are really written."""
        entry = self.cache.allocate(pos >> self.geometry.slice_shift)
        with self._writing("l2_update", offset, id(entry), 0, self.geometry.table_entries, flush=1):
            return super().write_new_table(pos, entries, offset)

    def link_table(self, pos: int, table: Table, offset: int) -> None:
        super().link_table(pos, table, offset)
        self._find_entry(pos, offset)

    def write_l2(self, offset: int, table: Table, index: int, entries: Table) -> None:
        with self._writing("l2_update", offset, id(self.probe.entry or table), index, len(entries)):
            super().write_l2(offset, table, index, entries)

    def write_l1(self, index: int, entries: Table) -> None:
        with self._writing("l1_update", self.l1_offset, id(self.l1), index, len(entries)):
            super().write_l1(index, entries)

    @contextmanager
    def _writing(self, fault: str, offset: int, table: int, index: int, n: int, flush: int = 0) -> Iterator[None]:
        probe, s = self.probe, id(self.tables.storage)
        probe.trace("qed_write_table", s, offset, table, index, n)
        ret = 0
        try:
            probe.fault(fault)
            yield
        except QEDError as error:
            ret = -error.errno
            raise
        finally:
            probe.trace("qed_write_table_cb", s, table, *(() if probe.v5 else (flush,)), ret)


class TracedGate(_Probed, NeedCheckGate):
    def __enter__(self) -> None:
        self.probe.trace("qed_cancel_need_check_timer", id(self._storage))
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        if not self.inside:
            self.probe.start_timer(id(self._storage))

    def clear(self, idle: float = 0.0) -> bool:
        if idle:
            self.probe.trace("qed_need_check_timer_cb", id(self._storage))
        return super().clear(idle)


class TracedRequests(_Probed, Requests):
    def pread_into(self, buf: WriteBuffer, pos: int) -> None:
        with self.probe.request(id(self._storage), pos, len(buf), 0), self._in_flight.request():
            self.read(buf, pos)

    def _cluster_offset(self, offset: int, pos: int) -> int:
        """The offset that the dialect gives for pos's byte at `offset`: 2010 left the intra-cluster part out."""
        return offset - (pos & self._cluster_mask) if self.probe.v5 and offset else offset

    def read_run(self, kind: Kind, offset: int, view: memoryview, pos: int) -> None:
        probe = self.probe
        shown = self._cluster_offset(offset, pos)
        probe.trace("qed_aio_read_data", id(self._storage), probe.acb, int(kind), shown, len(view))
        super().read_run(kind, offset, view, pos)

    def read_data(self, offset: int, view: memoryview) -> None:
        self.probe.fault("read_aio")
        super().read_data(offset, view)

    def read_backing(self, view: memoryview, pos: int) -> None:
        self.probe.fault("read_backing_aio")
        super().read_backing(view, pos)


class TracedWritableRequests(TracedRequests, WritableRequests):
    def pwrite(self, buf: ReadBuffer, pos: int) -> None:
        probe = self.probe
        with probe.request(id(self._storage), pos, len(buf), _WRITE), self._in_flight.request():
            probe.fault("pwritev")
            self.write(buf, pos)
            probe.fault("pwritev_done")

    def zero(self, pos: int, length: int, may_trim: bool = False) -> None:
        probe = self.probe
        with probe.request(id(self._storage), pos, length, _WRITE | _ZERO):
            probe.fault("pwritev_zero")
            super().zero(pos, length, may_trim)
            probe.fault("pwritev_done")

    def write_run(self, kind: Kind, offset: int, view: memoryview, pos: int) -> int:
        self._next_write(kind, offset, view, pos)
        return super().write_run(kind, offset, view, pos)

    def _next_write(self, kind: Kind, offset: int, view: memoryview, pos: int) -> None:
        probe = self.probe
        cluster = offset - (pos & self._cluster_mask) if kind is FOUND else 0
        probe.trace("qed_aio_write_data", id(self._storage), probe.acb, int(kind), cluster, len(view))

    def _allocating_write(self, kind: Kind, view: memoryview, pos: int) -> bool:
        self._next_write(kind, 0, view, pos)  # looked up again
        return super()._allocating_write(kind, view, pos)

    def surround(
        self, kind: Kind, view: memoryview, pos: int, into: int, rest: int, extents: list[Extent]
    ) -> tuple[ReadBuffer, ReadBuffer]:
        probe, s, last = self.probe, id(self._storage), extents[-1]
        probe.trace("qed_aio_write_prefill", s, probe.acb, pos - into, into, extents[0].offset)
        offset = last.offset + (last.n << self._l2_shift) - rest
        probe.trace("qed_aio_write_postfill", s, probe.acb, pos + len(view), rest, offset)
        return super().surround(kind, view, pos, into, rest, extents)

    def write_data(self, offset: int, view: memoryview) -> None:
        self._announce_write(offset, view)
        super().write_data(offset, view)

    def write_main(self, offset: int, head: ReadBuffer, view: memoryview, tail: ReadBuffer) -> None:
        if head or tail:
            self.probe.fault("cow_write")
        self._announce_write(offset, view)
        super().write_main(offset, head, view, tail)

    def _announce_write(self, offset: int, view: memoryview) -> None:
        probe = self.probe
        shown = offset & ~self._cluster_mask if probe.v5 else offset
        probe.trace("qed_aio_write_main", id(self._storage), probe.acb, 0, shown, len(view))
        probe.fault("write_aio")


def instrumented(trace: Tracer | None, fault: FaultHook | None, dialect: str) -> Parts:
    """Parts of an image that announce themselves to `trace` and `fault`."""
    probe = Probe(trace, fault, dialect)

    def probed(cls: type[Any]) -> type[Any]:
        return type(cls.__name__, (cls,), {"probe": probe})

    return Parts(
        storage=lambda storage: TracedStorage(storage, probe),
        cache=probed(TracedCache),
        clusters=probed(TracedClusterMap),
        gate=probed(TracedGate),
        requests=probed(TracedRequests),
        writable_requests=probed(TracedWritableRequests),
    )
