"""Storages and threads for the unit tests: a file in memory, a tap that records, blocks or fails calls."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import qedcore
from qedcore.errors import StorageError
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.open import open_storage

WAIT = 20  # seconds: nothing waits this long unless something is broken
CHANGES = ("pwrite", "pwritev", "truncate", "punch", "flush")


class MemoryStorage(Storage):
    """A Storage in a bytearray; zeros past its end."""

    def __init__(self, data: bytes = b"", name: str = "memory") -> None:
        self.name = name
        self.fixed_size = False
        self.data = bytearray(data)
        self.closed = 0

    def size(self) -> int:
        return len(self.data)

    def pread_into(self, buf: Any, offset: int) -> None:
        view = memoryview(buf)
        part = self.data[offset : offset + len(view)]
        view[:] = bytes(part) + bytes(len(view) - len(part))

    def pwrite(self, buf: Any, offset: int) -> None:
        data = bytes(buf)
        if offset + len(data) > len(self.data):
            self.truncate(offset + len(data))
        self.data[offset : offset + len(data)] = data

    def pwritev(self, bufs: Sequence[Any], offset: int) -> None:
        self.pwrite(b"".join(bufs), offset)

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data += bytes(size - len(self.data))

    def punch(self, offset: int, length: int) -> bool:
        self.data[offset : offset + length] = bytes(length)
        return True

    def flush(self) -> None:
        pass

    def identity(self) -> object:
        return id(self)

    def close(self) -> None:
        self.closed += 1


class Call(NamedTuple):
    """A call of a storage method: position and length in bytes, 0 where it has none."""

    name: str
    offset: int = 0
    length: int = 0


# Runs before a call: it may wait, raise, or return an error to be raised after the call was carried out.
Hook = Callable[[Call], "StorageError | None"]


class Tap(Storage):
    """Passes everything on to another storage; notes the calls that change it, and asks the hook first."""

    def __init__(self, inner: Storage, hook: Hook | None = None) -> None:
        self.inner = inner
        self.name = inner.name
        self.fixed_size = inner.fixed_size
        self.hook = hook
        self.log: list[Call] = []  # changes only
        self.closed = 0

    def _do(self, call: Call, work: Callable[[], Any]) -> Any:
        if call.name in CHANGES:
            self.log.append(call)
        late = self.hook(call) if self.hook else None
        result = work()
        if late is not None:
            raise late
        return result

    def size(self) -> int:
        return self._do(Call("size"), self.inner.size)

    def pread_into(self, buf: Any, offset: int) -> None:
        self._do(Call("pread", offset, len(buf)), lambda: self.inner.pread_into(buf, offset))

    def pwrite(self, buf: Any, offset: int) -> None:
        self._do(Call("pwrite", offset, len(buf)), lambda: self.inner.pwrite(buf, offset))

    def pwritev(self, bufs: Sequence[Any], offset: int) -> None:
        length = sum(len(buf) for buf in bufs)
        self._do(Call("pwritev", offset, length), lambda: self.inner.pwritev(bufs, offset))

    def truncate(self, size: int) -> None:
        self._do(Call("truncate", size), lambda: self.inner.truncate(size))

    def punch(self, offset: int, length: int) -> bool:
        return bool(self._do(Call("punch", offset, length), lambda: self.inner.punch(offset, length)))

    def flush(self) -> None:
        self._do(Call("flush"), self.inner.flush)

    def drop_cache(self) -> None:
        self._do(Call("drop_cache"), self.inner.drop_cache)

    def identity(self) -> object:
        return self.inner.identity()

    def close(self) -> None:
        self.closed += 1
        self.inner.close()


class FailAt:
    """Hook: the n-th call (from 1) of those named fails, before or after it was carried out; later ones work."""

    def __init__(self, n: int, names: Iterable[str] = CHANGES, code: int = errno.EIO, late: bool = False) -> None:
        self.n = n
        self.names = frozenset(names)
        self.code = code
        self.late = late
        self.armed = True
        self.hit: Call | None = None  # the call that failed

    def __call__(self, call: Call) -> StorageError | None:
        if not self.armed or self.hit or call.name not in self.names:
            return None
        self.n -= 1
        if self.n:
            return None
        self.hit = call
        error = StorageError("injected", OSError(self.code, os.strerror(self.code)))
        if self.late:
            return error
        raise error


class Interrupted(list[None]):
    """Who is inside a gate; `other` runs just before, or just after, the next one has come in, as a thread may."""

    def __init__(self, other: Callable[[], object], before: bool) -> None:
        self._other = [other]
        self._before = before

    def append(self, item: None) -> None:
        if self._other and self._before:
            self._other.pop()()
        super().append(item)
        if self._other:
            self._other.pop()()


def open_tapped(
    path: Path | str, hook: Hook | None = None, writable: bool = True, **options: Any
) -> tuple[qedcore.QEDImage, Tap]:
    """An open image and the tap on its own storage; files under it are not tapped."""
    taps: list[Tap] = []

    def opener(name: str, rw: bool, mode: CacheMode) -> Storage:
        storage = open_storage(name, rw, mode)
        if taps:
            return storage
        taps.append(Tap(storage, hook))
        return taps[0]

    return qedcore.open_image(str(path), writable, opener=opener, **options), taps[0]


class Job(threading.Thread):
    """A function in a thread that dies with the test run."""

    def __init__(self, work: Callable[..., Any], *args: Any, name: str | None = None) -> None:
        super().__init__(daemon=True, name=name)
        self._work = work
        self._args = args
        self._value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._work(*self._args)
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            self.error = error

    def result(self) -> Any:
        self.join(WAIT)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self._value


class Gate:
    """Where a thread stops: reached() waits for one to come, open() lets one (or n) through."""

    def __init__(self) -> None:
        self._come = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def stop(self) -> None:
        self._come.release()
        assert self._go.acquire(timeout=WAIT), "nobody opened the gate"

    def reached(self, n: int = 1) -> None:
        for _ in range(n):
            assert self._come.acquire(timeout=WAIT), "nobody came to the gate"

    def avoided(self) -> None:
        """Nobody comes.  The moment only gives broken code the time to show itself."""
        assert not self._come.acquire(timeout=0.05), "somebody came to the gate"

    def open(self, n: int = 1) -> None:
        for _ in range(n):
            self._go.release()


class Waits:
    """Counts the waits on a condition: come(n) returns when n more threads wait on it."""

    def __init__(self, cond: threading.Condition) -> None:
        self._come = threading.Semaphore(0)
        wait = cond.wait

        def counted(timeout: float | None = None) -> bool:
            self._come.release()
            return wait(timeout)

        cond.wait = counted  # type: ignore[method-assign]

    def come(self, n: int = 1) -> None:
        for _ in range(n):
            assert self._come.acquire(timeout=WAIT), "nobody waits"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def extents(img: qedcore.QEDImage, pos: int, length: int, one: bool = False) -> list[tuple[int, str]]:
    """(bytes, "FOUND" or "ZERO") of the runs of a range."""
    first, sizes = img.extents(pos, length, one)
    names = ("FOUND", "ZERO") if first.name == "FOUND" else ("ZERO", "FOUND")
    return list(zip(sizes, cycle(names)))


class SmallDisk(MemoryStorage):
    """A sparse file on a disk with room for `free` more blocks; `limit` (bytes) is how long the file may get."""

    BLOCK = 4096  # bytes

    def __init__(self, data: bytes, free: int = 1 << 40, limit: int = 1 << 60) -> None:
        super().__init__(data)
        self.free = free
        self.limit = limit
        self.blocks = {at for at in range(0, len(data), self.BLOCK) if any(data[at : at + self.BLOCK])}
        self.bytes_read = 0
        self.holes_read = 0  # bytes

    def next_data(self, offset: int) -> int:
        later = [at for at in self.blocks if at + self.BLOCK > offset]
        return max(min(later), offset) if later else 1 << 63

    def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        data = self.next_data(offset)
        if data > offset:
            return False, min(length, data - offset)
        end = offset - offset % self.BLOCK
        while end in self.blocks:
            end += self.BLOCK
        return True, min(length, end - offset)

    def pread_into(self, buf: Any, offset: int) -> None:
        self.bytes_read += len(buf)
        blocks = range(offset - offset % self.BLOCK, offset + len(buf), self.BLOCK)
        self.holes_read += sum(self.BLOCK for at in blocks if at not in self.blocks)
        super().pread_into(buf, offset)

    def pwrite(self, buf: Any, offset: int) -> None:
        end = offset + len(buf)
        if end > self.limit:
            raise StorageError("too long", OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
        new = set(range(offset - offset % self.BLOCK, end, self.BLOCK)) - self.blocks
        if len(new) > self.free:
            raise StorageError("full", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self.free -= len(new)
        self.blocks |= new
        super().pwrite(buf, offset)

    def truncate(self, size: int) -> None:
        if size > self.limit:
            raise StorageError("too long", OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
        self._give_back({at for at in self.blocks if at >= size})
        super().truncate(size)

    def punch(self, offset: int, length: int) -> bool:
        assert offset % self.BLOCK == length % self.BLOCK == 0
        self._give_back(self.blocks & set(range(offset, offset + length, self.BLOCK)))
        return super().punch(offset, length)

    def _give_back(self, blocks: set[int]) -> None:
        self.free += len(blocks)
        self.blocks -= blocks
