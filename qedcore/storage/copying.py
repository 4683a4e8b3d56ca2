"""Copying: one loop for all that copies, from pieces of storages to a target that can be written and zeroed.

The pieces come in the order of their places in the target, and are cut into windows:

    target:   |    window    |    window    |    window    | ...
    pieces:   | data | zeros        | data in the same file | data in another |
    jobs:     | 1: data      | 2: zeros, data | 3: data     | ...

Threads read the windows ahead, each into a buffer of its own.  The thread that called run() writes them in order, so
that a target that makes clusters as they are written has them in order, too; `any_order` lets the readers write.
All zeros of more than a window are done by the caller's thread, without a buffer.

The caller's thread alone touches what is in Copy; a job belongs to one thread at a time, the queues hand it over.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from threading import Thread
from typing import TYPE_CHECKING, Callable, NamedTuple, Protocol

from ..errors import QEDError, StorageError
from ..units import MiB
from . import ZEROS, ReadBuffer, Storage

if TYPE_CHECKING:
    from queue import SimpleQueue

WINDOW = 1 * MiB  # bytes: system calls do not matter any more, and a buffer stays in a processor's cache
READERS = 8  # threads at most, as many as qemu-img has coroutines; more than processors help where reading waits


class Piece(NamedTuple):
    """Bytes that are in one place, and where they go; positions, offsets and lengths in bytes."""

    pos: int  # in the target
    length: int
    storage: Storage | None = None  # has them; None: zeros
    offset: int = 0  # in `storage`


class Target(Protocol):
    """What is copied into."""

    def pwrite(self, buf: ReadBuffer, pos: int) -> None: ...

    def clear(self, pos: int, length: int) -> None:
        """Make a range read as zeros, whose space may be given back."""
        ...


Read = Callable[[Piece, memoryview], None]  # fills the buffer with the bytes of a piece, or of a part of one


def read_piece(piece: Piece, view: memoryview) -> None:
    """The usual Read.  Raises StorageError."""
    assert piece.storage is not None
    piece.storage.pread_into(view, piece.offset)


class WriteError(StorageError):
    """The target could not be written at guest position `pos` (bytes)."""

    def __init__(self, pos: int, error: QEDError) -> None:
        super().__init__(f"error while writing at byte {pos}: {os.strerror(error.errno)}", code=error.errno)
        self.pos = pos


class _Job:
    """A window's part of the pieces: what is read into `buffer`, which begins at `start` of the target."""

    def __init__(self, start: int, buffer: bytearray) -> None:
        self.start = start  # bytes
        self.end = start  # bytes
        self.pieces: list[Piece] = []
        self.buffer = buffer
        self.parts: list[tuple[int, int, bool]] = []  # (start, end, zeros), bytes in the buffer: to be written
        self.error: BaseException | None = None

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.end = piece.pos + piece.length


class Copy:
    """Copies pieces of storages into `target`.

    fresh      the target reads as zeros already: zeros are left out
    detect     bytes: zeros are looked for among the data in units of this size; 0: they are not
    store      write zeros like data, so that the target has space for all
    readers    threads that read ahead; with 1 the caller's thread does everything
    any_order  the readers write what they have read
    progress   told up to which position of the target all is done, bytes
    written    told of the bytes of data that were written; it may wait
    """

    def __init__(
        self,
        target: Target,
        *,
        fresh: bool = False,
        detect: int = 0,
        store: bool = False,
        readers: int = READERS,
        any_order: bool = False,
        progress: Callable[[int], None] = lambda pos: None,
        written: Callable[[int], None] = lambda length: None,
    ) -> None:
        self._target = target
        self._fresh = fresh
        self._detect = detect
        self._store = store
        self._readers = min(readers, READERS)
        self._any_order = any_order
        self._progress = progress
        self._written = written
        self._buffers: list[bytearray] = []  # free ones

    def run(self, pieces: Iterable[Piece], read: Read = read_piece) -> None:
        """Copy these.  Raises WriteError, and what `read` and the iterator raise: nothing is in flight then."""
        threads: list[_Reader] = []
        waiting: deque[tuple[_Reader, _Job]] = deque()
        turn = 0
        first = True
        try:
            for job in self._jobs(pieces):
                if not job.buffer or first or self._readers < 2:
                    # Starting threads takes longer than copying one window.
                    first = first and not job.buffer
                    while waiting:
                        self._finish(*waiting.popleft())
                    self._fill(job, read)
                    self._done(job)
                    continue
                if turn == len(threads) and turn < self._readers:
                    threads.append(_Reader(self._fill, read))
                reader = threads[turn]
                turn = (turn + 1) % self._readers
                reader.jobs.put(job)
                waiting.append((reader, job))
                if len(waiting) == self._readers:
                    self._finish(*waiting.popleft())
            while waiting:
                self._finish(*waiting.popleft())
        finally:
            for reader in threads:
                reader.stop()

    def _finish(self, reader: _Reader, job: _Job) -> None:
        reader.done.get()
        if job.error is not None:
            raise job.error
        self._done(job)

    def _done(self, job: _Job) -> None:
        """The job was read: write it, unless the reader has."""
        if not self._any_order:
            self._write(job)
        length = sum(end - start for start, end, zeros in job.parts if not zeros)
        if job.buffer:
            self._buffers.append(job.buffer)
        if length:
            self._written(length)
        self._progress(job.end)

    # -- jobs --------------------------------------------------------------------------------------------------

    def _jobs(self, pieces: Iterable[Piece]) -> Iterator[_Job]:
        job: _Job | None = None
        for piece in pieces:
            if piece.storage is None and self._fresh and not self._store:
                continue
            pos, end = piece.pos, piece.pos + piece.length
            while pos < end:
                if job is not None and pos >= job.start - job.start % WINDOW + WINDOW:
                    yield job
                    job = None
                n = min(end - pos, WINDOW - pos % WINDOW)
                if piece.storage is None and not self._store and (job is None or end - pos > n):
                    # Zeros by themselves, as many as there are.
                    if job is not None:
                        yield job
                        job = None
                    n = end - pos
                    alone = _Job(pos, bytearray())
                    alone.add(Piece(pos, n))
                    yield alone
                else:
                    if job is None:
                        job = _Job(pos, self._buffers.pop() if self._buffers else bytearray(WINDOW))
                    job.add(Piece(pos, n, piece.storage, piece.offset + pos - piece.pos))
                pos += n
        if job is not None:
            yield job

    # -- any thread, one job -----------------------------------------------------------------------------------

    def _fill(self, job: _Job, read: Read) -> None:
        """Read the data of a job, and find what of it is to be written, and how."""
        view = memoryview(job.buffer)
        for piece in job.pieces:
            start = piece.pos - job.start
            end = start + piece.length
            if piece.storage is not None:
                read(piece, view[start:end])
                self._add_data(job, start, end)
            elif not self._store:
                _add(job.parts, start, end, True)
            else:
                view[start:end] = ZEROS[: end - start]
                _add(job.parts, start, end, False)
        if self._any_order:
            self._write(job)

    def _add_data(self, job: _Job, start: int, end: int) -> None:
        """The parts of data that were read: units of zeros, and all else."""
        unit, buffer, parts = self._detect, job.buffer, job.parts
        if not unit or self._store:
            _add(parts, start, end, False)
            return
        first = min(-(job.start + start) % unit, end - start)  # bytes up to the first whole unit
        # Almost always the first bytes of each unit tell that there are no zeros.
        if 0 not in buffer[start + first : end : unit] and (not first or buffer[start]):
            _add(parts, start, end, False)
            return
        at, step = start, first or unit
        while at < end:
            stop = min(at + step, end)
            zeros = not buffer[at] and buffer.startswith(ZEROS[: stop - at], at)
            _add(parts, at, stop, zeros)
            at, step = stop, unit

    def _write(self, job: _Job) -> None:
        view = memoryview(job.buffer)
        for start, end, zeros in job.parts:
            pos = job.start + start
            try:
                if not zeros:
                    self._target.pwrite(view[start:end], pos)
                elif not self._fresh:
                    self._target.clear(pos, end - start)
            except QEDError as error:
                raise WriteError(pos, error) from error


def _add(parts: list[tuple[int, int, bool]], start: int, end: int, zeros: bool) -> None:
    """Add a part; neighbours of a kind are one."""
    if parts and parts[-1][1:] == (start, zeros):
        start = parts.pop()[0]
    parts.append((start, end, zeros))


class _Reader:
    """A thread that takes jobs and gives them back in the same order."""

    def __init__(self, fill: Callable[[_Job, Read], None], read: Read) -> None:
        from queue import SimpleQueue  # here, because small copies do without

        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.done: SimpleQueue[_Job] = SimpleQueue()
        self._fill = fill
        self._read = read
        self._stopped = False
        self._thread = Thread(target=self._work, name="qed-copy", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            job = self.jobs.get()
            if job is None:
                return
            if not self._stopped:
                try:
                    self._fill(job, self._read)
                except BaseException as error:  # noqa: BLE001  # for the thread that waits
                    job.error = error
            self.done.put(job)

    def stop(self) -> None:
        """End the thread; what it has not begun is not done."""
        self._stopped = True
        self.jobs.put(None)
        self._thread.join()
