"""QEDImage: the parts of one image put together, and its life from open to close.  No I/O logic.

I1. Nothing in the file changes before start(): opening only reads.
I2. No request is in flight during start() or close(); the caller sees to it (nbdkit does).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Callable, NamedTuple

from ..check.recovery import MAP_LIMIT, repair_after_crash
from ..errors import (
    CorruptImageError,
    ForeignWriterError,
    ImageFormatError,
    QEDError,
    ReadOnlyError,
    ShutdownError,
    StorageError,
    UnreachableError,
    UnsupportedError,
)
from ..format.geometry import Bounds, Geometry
from ..format.header import Header, HeaderUpdater, read_backing_name, read_header
from ..format.table import TableIO
from ..locks import Rank, ranked_lock
from ..storage import ReadBuffer, Storage, WriteBuffer, close_all, make_zeros
from ..units import MiB
from .allocator import Allocator
from .census import Census
from .cluster_map import FOUND, ClusterMap, Kind
from .in_flight import InFlight
from .l2_cache import L2Cache
from .need_check import NeedCheckGate
from .read import ClosedRequests, Requests
from .reclaim import Reclaimer
from .source import Source, layers
from .write import WritableRequests

DEFAULT_L2_CACHE = 8 * MiB  # bytes: the tables of 64 GiB at the default geometry


class Parts(NamedTuple):
    """The classes an image is made of; traced.py has traced ones."""

    storage: Callable[[Storage], Storage] = lambda storage: storage
    cache: type[L2Cache] = L2Cache
    clusters: type[ClusterMap] = ClusterMap
    gate: type[NeedCheckGate] = NeedCheckGate
    requests: type[Requests] = Requests
    writable_requests: type[WritableRequests] = WritableRequests


class Metadata(NamedTuple):
    """What maintenance changes, behind the back of requests (QEDImage.maintenance)."""

    storage: Storage
    geometry: Geometry
    bounds: Bounds
    header: HeaderUpdater
    tables: TableIO
    clusters: ClusterMap
    requests: WritableRequests
    allocator: Allocator | None = None  # of an open image

    def reload(self) -> None:
        """The tables have changed on disk, or the device's size has: read them again."""
        self.clusters.reload(self.header.header.l1_table_offset, self.requests.size)


class QEDImage:
    """An open image.  It owns `storage` and closes it with itself, also when opening fails.

    Any number of threads may use it at once.  Every method raises QEDError or a child of it.
    `l2_cache` is in bytes, `clock` counts seconds, `log` takes one-line notices.  `in_flight` is shared by all
    openings of one image whose requests may run at the same time.
    """

    def __init__(
        self,
        storage: Storage,
        writable: bool,
        *,
        writethrough: bool = False,
        l2_cache: int = DEFAULT_L2_CACHE,
        parts: Parts = Parts(),
        clock: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] = lambda line: None,
        in_flight: InFlight | None = None,
    ) -> None:
        in_flight = in_flight or InFlight()
        self.storage = storage = parts.storage(storage)
        self.writable = writable
        self.backing: Source | None = None
        self.tidy: Callable[[QEDImage], object] | None = None  # called by close(), before it refuses requests
        self._writethrough = writethrough
        self._log = log
        self._lifecycle = ranked_lock(Rank.LIFECYCLE)  # protects _closed
        self._closed = False
        self._census: Census | None = None  # that self._counting, a thread, is counting
        self._counting: threading.Thread | None = None
        self._half_screened = False  # an attempt to take the census has failed; protected by the gate
        try:
            header, self.geometry, self._bounds = read_header(storage)
            self.backing_name = read_backing_name(storage, header)
            self._header = HeaderUpdater(storage, header)
            self._tables = TableIO(storage)
            cache = parts.cache(self._tables, self.geometry.slice_entries, l2_cache)
            self._clusters = parts.clusters(
                self._tables, cache, self.geometry, self._bounds, header.l1_table_offset, header.image_size
            )
            self.size = header.image_size  # bytes
            self._requests: Requests
            self._gate: NeedCheckGate | None = None
            if writable:
                if header.l1_table_offset == 0:
                    raise ImageFormatError("the L1 table at 0x0 overlaps the header: such an image is read-only")
                self._reclaimer = Reclaimer(
                    storage, self.geometry, self._bounds, in_flight, lambda line: self._log(line)
                )
                self._allocator = Allocator(storage, self.geometry, self._bounds, self._reclaimer)
                self._gate = parts.gate(storage, self._header, self._allocator, self._reclaimer, clock)
                self._requests = parts.writable_requests(
                    storage, self._clusters, self.size, in_flight, self._allocator, self._reclaimer, self._gate
                )
            else:
                self._requests = parts.requests(storage, self._clusters, self.size, in_flight)
        except BaseException:
            storage.close()
            raise

    @property
    def header(self) -> Header:
        return self._header.header

    def start(self, backing: Source | None = None) -> None:
        """Begin to serve: attach the backing file; if writable, clear stale autoclear bits and repair."""
        self.backing = self._requests.backing = backing
        if self._gate is None:
            return
        if self._header.clear_unknown_autoclear():
            self._log(f"{self.storage.name}: cleared autoclear features of another program")
        if not (self.header.need_check and self._recover(self._gate)):
            self._gate.expect_census(self._take_census)

    def _recover(self, gate: NeedCheckGate) -> bool:
        """Repair after a crash; True if that leaves nothing for a census to find."""
        done = repair_after_crash(self.storage, self._header, self._tables, self.geometry, self._bounds)
        self._clusters.reload(self.header.l1_table_offset, self.size)
        name = self.storage.name
        self._log(f"{name}: was not closed cleanly: checked, findings: {done.findings or 'none'}")
        for line in done.lines:
            self._log(f"{name}: {line}")
        if done.whole:
            gate.settled()
        else:
            gate.fail()
            self._log(f"{name}: damage may be left: shared clusters change together; check the image")
        if done.use is None:
            return False
        self._reclaimer.adopt(done.use)
        return True

    def _take_census(self) -> None:
        """Before the first allocation.  Requests that change no table go on meanwhile."""
        census = Census(
            self._tables, self.geometry, self._bounds, self.header.l1_table_offset, map_limit=MAP_LIMIT, log=self._log
        )
        # An attempt that fails may have marked entries on disk, where the next one does not find them any more.
        again, self._half_screened = self._half_screened, True
        if census.screen(again):
            self._clusters.mark(census)
        self._half_screened = False
        if census.counted:
            self._count(census)
            return
        self._census = census
        self._counting = threading.Thread(
            target=self._count_in_background, args=(census,), name="census", daemon=True
        )
        try:
            self._counting.start()
        except RuntimeError:  # no more threads
            self._counting = None
            self._count(census)

    def _count(self, census: Census) -> None:
        """Let the clusters that nothing refers to be used if each other one has one user.  Raises StorageError."""
        use = None
        try:
            use = census.count()
            why = "shared clusters, or other damage: check the image" if census.damaged else "the file is too large"
        except (QEDError, MemoryError) as error:
            why = str(error) or "out of memory"
        if use is None:
            self._reclaimer.give_up("" if census.stopped else why)
            return
        if census.leaks:
            # What the tables say now, before anything is written where they lead no more: another server, which was
            # killed, may have unlinked it, and a crash of the machine would link it again.
            self.storage.flush()
        self._reclaimer.adopt(use)

    def _count_in_background(self, census: Census) -> None:
        why = "the count ended early"
        try:
            self._count(census)
        except (QEDError, MemoryError) as error:
            why = str(error) or "out of memory"
        finally:
            if not self._reclaimer.decided:  # whatever has happened: somebody may wait for it
                self._reclaimer.give_up(why)

    def metadata(self) -> Metadata:
        """What maintenance changes, to look at it first."""
        self._check_open()
        if self._gate is None or not isinstance(self._requests, WritableRequests):
            raise ReadOnlyError(f"{self.storage.name} was opened read-only")
        return Metadata(
            self.storage,
            self.geometry,
            self._bounds,
            self._header,
            self._tables,
            self._clusters,
            self._requests,
            self._allocator,
        )

    @contextmanager
    def maintenance(self) -> Iterator[Metadata]:
        """A dirty period in which the caller changes metadata by itself; no other request may be in flight.

        NEED_CHECK is durable before and stays after an error, so that the next writable open repairs; but not for
        damage that was there before (CorruptImageError): that repair drops what might still be salvaged.  After any
        other error nobody knows where things are: there are no more requests in this opening.
        """
        self._check_open()
        if self._gate is None:
            raise ReadOnlyError(f"{self.storage.name} was opened read-only")
        metadata = self.metadata()
        with self._gate:
            self._reclaimer.wait()
            self.storage.flush()  # what requests have unlinked may be overwritten from here on
            try:
                yield metadata
                self.size = self._requests.size
            except CorruptImageError:
                raise
            except BaseException:
                self._gate.fail()
                self._refuse_requests()
                self._allocator.restart()  # what was free may be in use
                raise

    def _refuse_requests(self) -> None:
        self._requests = ClosedRequests(self.storage, self._clusters, 0, InFlight())

    def succeed(self, retired: QEDImage) -> None:
        """This one takes the place of `retired`, a read-only opening of the same image with the same `in_flight`."""
        retired._requests.follow(self._requests)

    def start_timer(self) -> None:
        """Clear NEED_CHECK when allocations pause, from a thread: call it after any fork."""
        if self._gate is not None:
            self._gate.start_timer(lambda error: self._log(str(error)))

    def pread_into(self, buf: WriteBuffer, pos: int) -> None:
        """Fill `buf` (a writable buffer of bytes) from guest position `pos`."""
        if getattr(buf, "itemsize", 1) != 1:
            buf = memoryview(buf).cast("B")
        self._requests.pread_into(buf, pos)

    def pread(self, length: int, pos: int) -> bytes:
        """`length` bytes from guest position `pos`."""
        buf = bytearray(length)
        self._requests.pread_into(buf, pos)
        return bytes(buf)

    def pwrite(self, buf: ReadBuffer, pos: int, fua: bool = False) -> None:
        """Write `buf` (a buffer of bytes) to guest position `pos`; with `fua` it is on stable storage on return."""
        if getattr(buf, "itemsize", 1) != 1:
            buf = memoryview(buf).cast("B")
        self._requests.pwrite(buf, pos)
        if fua or self._writethrough:
            try:
                self.storage.flush()
            except StorageError as error:
                self._flush_failed(error)
                raise

    def zero(
        self, pos: int, length: int, fua: bool = False, *, may_trim: bool = False, only_fast: bool = False
    ) -> None:
        """Make `length` bytes at guest position `pos` read as zeros; with `may_trim` their clusters are freed.

        With `only_fast`, UnsupportedError instead of writing data.
        """
        requests = self._requests
        if only_fast and isinstance(requests, WritableRequests) and not requests.zero_is_fast(pos, length, may_trim):
            raise UnsupportedError(f"zeroing {length} bytes at position {pos} is not fast")
        requests.zero(pos, length, may_trim)
        if fua or self._writethrough:
            self.flush()

    def trim(self, pos: int, length: int, fua: bool = False) -> None:
        """Free the whole clusters among `length` bytes at guest position `pos`: what had data reads as zeros."""
        self._requests.trim(pos, length)
        if fua or self._writethrough:
            self.flush()

    def clear(self, pos: int, length: int) -> None:
        """Make a range read as zeros as zero() does; but data clusters keep their places in the file, as holes if it
        can have any.  No other request may be in flight.
        """
        self._check_open()
        while length:
            kind, offset, n = self._clusters.lookup(pos, length)
            if kind is FOUND:
                make_zeros(self.storage, offset, offset + n)
            else:
                self._requests.zero(pos, n)
            pos += n
            length -= n

    def add_zero_clusters(self, pos: int, length: int) -> None:
        """Hide what is below the image in a range where it has no clusters (WritableRequests.add_zero_clusters)."""
        self._requests.add_zero_clusters(pos, length)

    def flush(self) -> None:
        """Everything completed before this call is on stable storage on return."""
        self._check_open()
        if self._gate is None:
            self.storage.flush()
            return
        try:
            self._reclaimer.flush()
        except StorageError as error:
            self._flush_failed(error)
            raise

    def _flush_failed(self, error: StorageError) -> None:
        """Let the next opening not believe the system's cache: it may go on showing what it could not write."""
        if self._gate is not None and not isinstance(error, UnreachableError):
            self._gate.mark_for_check()

    def holes(self, search: bool = True) -> int:
        """Clusters that are free inside the file; its free tail is given back first.  No request may be in flight.

        With `search` the census is taken, if nothing has asked for it yet: there may be leaks.
        """
        self._check_open()
        if self._gate is None:
            return 0
        self._gate.refuse_others()
        if search:
            self._gate.take_census()
            self._reclaimer.wait()
        if self._reclaimer.pending:
            self._reclaimer.flush()
        if self._reclaimer.free_clusters:
            with self._gate:  # the file gets shorter in a dirty period
                pass
        self._gate.clear()
        return 0 if self.header.need_check else self._reclaimer.free_clusters

    def extents(self, pos: int, length: int, one: bool = False) -> tuple[Kind, list[int]]:
        """(kind, bytes of each run) of a range, through the whole chain: alternately FOUND and ZERO, from `kind` on.

        With `one` only the first run.
        """
        return self._requests.extents(pos, length, one)

    def lookup(self, pos: int, length: int) -> tuple[Kind, int, int]:
        """The run at pos in this image alone (Source, ClusterMap.lookup)."""
        self._check_open()
        return self._clusters.lookup(pos, length)

    def data_run(self, pos: int, length: int) -> tuple[bool, int]:
        """Clusters that the image has are data (Source)."""
        return True, length

    def close(self) -> None:
        """Tidy, flush, clear NEED_CHECK, close this image and its backing chain.  A second call does nothing.

        Raises StorageError if something could not be made durable; NEED_CHECK then stays set.
        """
        told = self._gate is not None and self._gate.refused
        other_writer: ForeignWriterError | None = None
        if self.tidy is not None and not self._closed and isinstance(self._requests, WritableRequests):
            try:
                self.tidy(self)
            except ForeignWriterError as error:  # the gate is shut for good now, and does not tell it again
                other_writer = None if told else error
            except (QEDError, MemoryError) as error:  # if the storage has failed, the rest of this tells
                self._log(f"{self.storage.name}: clusters may stay free: {error or 'out of memory'}")
            except BaseException:  # Ctrl-C, which is the one to tell: the file is closed and unlocked all the same
                self.tidy, self._log = None, lambda line: None
                with suppress(QEDError):
                    self.close()
                raise
        with self._lifecycle:
            if self._closed:
                return
            self._closed = True
        self._refuse_requests()
        try:
            if self._gate is not None:
                self._end_census()
                self._gate.close()
                self.storage.flush()
                if self.header.need_check:
                    self._log(f"{self.storage.name}: NEED_CHECK stays set, for the next writable open to repair")
                if other_writer is not None:
                    raise other_writer
        except StorageError:
            # Linux may go on showing what it could not write: whoever opens the image next must not rely on that.
            self.storage.drop_cache()
            raise
        finally:
            close_all(layer.storage for layer in layers(self))

    def _end_census(self) -> None:
        if self._counting is not None and self._census is not None:
            self._census.stopped = True
            self._counting.join()
            self._counting = None

    def _check_open(self) -> None:
        if self._closed:
            raise ShutdownError(f"{self.storage.name} was closed")

    def __enter__(self) -> QEDImage:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # the first error is the one to tell
            self._log = lambda line: None
        try:
            self.close()
        except QEDError:
            if kind is None:
                raise
