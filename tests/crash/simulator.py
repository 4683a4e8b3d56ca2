"""Power loss, simulated: a storage that records, the states a crash may leave, and what a guest may find there.

The disk is modelled as a write-back cache over sectors of 512 bytes.  What was issued before the start of a completed
flush is on disk.  Of everything after, any subset may be, sector by sector: writes torn, reordered, lost; file growth
and truncation kept or lost.

    log:      op op F( op )F op op op | crash
    durable:  =====   any subset of the rest
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

SECTOR = 512  # bytes


class Disk:
    """Content of a file: sectors that are not zeros, and a length."""

    def __init__(self, sectors: dict[int, bytes] | None = None, size: int = 0) -> None:
        self.sectors = dict(sectors or {})
        self.size = size  # bytes

    def copy(self) -> Disk:
        return Disk(self.sectors, self.size)

    def write_sector(self, number: int, start: int, data: bytes) -> None:
        """Change bytes [start, start + len(data)) of one sector."""
        old = self.sectors.get(number, bytes(SECTOR))
        self.sectors[number] = old[:start] + data + old[start + len(data) :]
        self.size = max(self.size, number * SECTOR + start + len(data))

    def truncate(self, size: int) -> None:
        if size < self.size:
            for number in [n for n in self.sectors if n * SECTOR >= size]:
                del self.sectors[number]
            if size % SECTOR and size // SECTOR in self.sectors:
                kept = self.sectors[size // SECTOR][: size % SECTOR]
                self.sectors[size // SECTOR] = kept + bytes(SECTOR - len(kept))
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        first, last = offset // SECTOR, (offset + length - 1) // SECTOR
        data = b"".join(self.sectors.get(n, bytes(SECTOR)) for n in range(first, last + 1))
        return data[offset - first * SECTOR :][:length]

    def to_bytes(self) -> bytes:
        return self.read(0, self.size) if self.size else b""


@dataclass(frozen=True)
class Op:
    """The smallest thing that is kept or lost: a part of one sector, or a change of the file's length."""

    sector: int = -1
    start: int = 0
    data: bytes = b""
    size: int = -1  # a truncation

    def apply(self, disk: Disk) -> None:
        if self.sector >= 0:
            disk.write_sector(self.sector, self.start, self.data)
        else:
            disk.truncate(self.size)


class RecordingStorage:
    """A qedcore Storage in memory.  `log` holds every Op; `durable` says how many of them are on disk at least.

    `on_op` is called after each op: a crash may happen there.
    """

    def __init__(self, disk: Disk, name: str = "recorded") -> None:
        self.name = name
        self.fixed_size = False
        self.start = disk.copy()
        self.disk = disk.copy()
        self.log: list[Op] = []
        self.durable = 0  # ops
        self.flushes: list[tuple[int, int]] = []  # (ops when it completed, ops that it made durable)
        self.on_op: Callable[[], None] = lambda: None

    def size(self) -> int:
        return self.disk.size

    def pread_into(self, buf: memoryview | bytearray, offset: int) -> None:
        memoryview(buf)[:] = self.disk.read(offset, len(buf))

    def pwrite(self, buf: bytes, offset: int) -> None:
        view = bytes(buf)
        while view:
            start = offset % SECTOR
            piece, view = view[: SECTOR - start], view[SECTOR - start :]
            self._do(Op(offset // SECTOR, start, piece))
            offset += len(piece)

    def pwritev(self, bufs: Sequence[bytes], offset: int) -> None:
        self.pwrite(b"".join(bytes(buf) for buf in bufs), offset)

    def truncate(self, size: int) -> None:
        self._do(Op(size=size))

    def punch(self, offset: int, length: int) -> bool:
        self.pwrite(bytes(length), offset)
        return True

    def _do(self, op: Op) -> None:
        op.apply(self.disk)
        self.log.append(op)
        self.on_op()

    def flush(self) -> None:
        issued = len(self.log)
        self.on_op()  # a crash during the flush
        self.durable = issued
        self.flushes.append((len(self.log), issued))

    def cut(self, ops: int) -> RecordingStorage:
        """This storage as it was after its first `ops` ops."""
        earlier = RecordingStorage(self.start, self.name)
        earlier.log = self.log[:ops]
        for op in earlier.log:
            op.apply(earlier.disk)
        earlier.durable = max([issued for completed, issued in self.flushes if completed <= ops], default=0)
        return earlier

    def identity(self) -> object:
        return id(self)

    def close(self) -> None:
        pass


def crash_states(storage: RecordingStorage, rng: random.Random, subsets: int) -> Iterator[tuple[str, Disk]]:
    """States that a crash now may leave, with a name each: the extremes, near ones, and random subsets."""
    base = storage.start.copy()
    for op in storage.log[: storage.durable]:
        op.apply(base)
    pending = storage.log[storage.durable :]

    def state(kept: Callable[[int, Op], bool]) -> Disk:
        disk = base.copy()
        for i, op in enumerate(pending):
            if kept(i, op):
                op.apply(disk)
        return disk

    yield "nothing unsynced", state(lambda i, op: False)
    if not pending:
        return
    yield "everything", state(lambda i, op: True)
    last = len(pending) - 1
    yield "only the last", state(lambda i, op: i == last)
    yield "growth lost, with all in it", state(lambda i, op: 0 <= op.sector * SECTOR < base.size)
    yield "truncations lost", state(lambda i, op: op.sector >= 0)
    yield "only growth", state(lambda i, op: op.sector < 0)
    one = rng.randrange(len(pending))
    yield f"all but op {one}", state(lambda i, op: i != one)
    yield f"only op {one}", state(lambda i, op: i == one)
    for number in range(subsets):
        share = rng.choice((0.1, 0.5, 0.9))
        chosen = {i for i in range(len(pending)) if rng.random() < share}
        yield f"subset {number}", state(lambda i, op, chosen=chosen: i in chosen)  # type: ignore[misc]


@dataclass
class GuestModel:
    """Which values each guest sector may have after a crash (P1, P2), and must have after a kill (P3)."""

    initial: Callable[[int], bytes]  # sector number -> content before the first write
    durable: dict[int, bytes] = field(default_factory=dict)  # as of the last completed flush
    pending: dict[int, list[bytes]] = field(default_factory=dict)  # values since, the newest last

    def begin(self, pos: int, data: bytes) -> None:
        """A write of whole sectors is issued."""
        for i in range(0, len(data), SECTOR):
            self.pending.setdefault((pos + i) // SECTOR, []).append(data[i : i + SECTOR])

    def flushed(self) -> None:
        for sector, values in self.pending.items():
            self.durable[sector] = values[-1]
        self.pending.clear()

    def before(self, sector: int) -> bytes:
        return self.durable[sector] if sector in self.durable else self.initial(sector)

    def allowed(self, sector: int) -> list[bytes]:
        return [self.before(sector), *self.pending.get(sector, [])]

    def copy(self) -> GuestModel:
        return GuestModel(self.initial, dict(self.durable), {s: list(values) for s, values in self.pending.items()})

    def sectors(self) -> set[int]:
        return set(self.durable) | set(self.pending)
