"""Files in memory whose changes are recorded, and the states that a crash may leave of them.

The disk is a write-back cache over granules (sectors, or blocks of 4 KiB).  What was issued before the start of a
completed flush is on disk.  Of everything after, any subset may be, granule by granule: writes torn, reordered, lost;
growth and truncation kept or lost; holes punched or not.

    log:      op op F( op )F op op op | crash
    durable:  =====   any subset of the rest

When a flush fails, the system may give up some of the writes: they can be read until the cache is dropped, but no
later flush writes them (Linux does so).

A Medium says what kind of storage the disk is to the engine.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import qedcore
from qedcore.errors import StorageError
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from support.qed_image import QedFile

GRANULES = (512, 4096)  # bytes that a disk writes as a whole: old and new ones
Files = dict[str, bytes]  # path -> content


class Medium(NamedTuple):
    """What a storage can do."""

    fixed: bool = False  # a block device or an export: its size cannot be changed
    holes: bool = True  # it can punch holes

    def check(self, size: int, end: int) -> None:
        """Raises StorageError if a storage of `size` bytes cannot be made longer, up to `end`, or be cut there."""
        if self.fixed and end != size:
            raise StorageError("fixed size", code=errno.ENOSPC)


FILE = Medium()


class Op(NamedTuple):
    """A change of a file, or the end of its flush (data None and size -1).

    Or no change: `lost` are the ops that were given up when a flush failed; `dropped`: so was the cache.
    """

    path: str
    offset: int = 0
    data: bytes | None = None
    size: int = -1
    covers: int = 0  # of a flush: the ops before its start, of any file
    lost: frozenset[int] = frozenset()
    dropped: bool = False

    def apply(self, files: dict[str, bytearray]) -> None:
        content = files[self.path]
        if self.data is not None:
            content += bytes(max(0, self.offset + len(self.data) - len(content)))
            content[self.offset : self.offset + len(self.data)] = self.data
        elif self.size >= 0:
            del content[self.size :]
            content += bytes(self.size - len(content))

    @property
    def is_flush(self) -> bool:
        return self.data is None and self.size < 0 and not self.lost and not self.dropped

    def granules(self, granule: int) -> Iterator[Op]:
        """The parts that are kept or lost as a whole."""
        data = self.data or b""
        start = 0
        while start < len(data):
            end = start + granule - (self.offset + start) % granule
            yield self._replace(offset=self.offset + start, data=data[start:end])
            start = end
        if self.data is None:
            yield self


class State(NamedTuple):
    """What a crash may leave."""

    name: str
    ops: int  # how many there were before it
    files: dict[str, bytearray]
    whole: bool  # nothing is lost: this is also what the death of the program alone leaves


class World:
    """Some files; `open` is an opener for open_image.

    `before` and `after` run around each op and may raise; `flush_failed` runs when `before` has raised for a flush.
    `before_read` runs before each read, and may raise; `shorten` tells what is done of an op that then fails.
    `pause` runs before each call, and while a flush is under way: other threads may go on there.
    """

    def __init__(self, *paths: Path, files: Files | None = None, medium: Medium = FILE) -> None:
        self.medium = medium
        self.start: Files = files if files is not None else {str(path): path.read_bytes() for path in paths}
        self.files = {path: bytearray(content) for path, content in self.start.items()}
        self.log: list[Op] = []
        self.before: Callable[[int], None] = lambda number: None
        self.after: Callable[[int], None] = lambda number: None
        self.before_read: Callable[[], None] = lambda: None
        self.shorten: Callable[[Op], Op | None] = lambda op: None
        self.flush_failed: Callable[[str], None] = lambda path: None
        self.pause: Callable[[], None] = lambda: None

    def open(self, path: str | os.PathLike[str], writable: bool, mode: CacheMode) -> Storage:
        return RecordedFile(self, os.fspath(path), writable)

    def do(self, op: Op) -> None:
        self.pause()
        try:
            self.before(len(self.log))
        except StorageError:
            if op.is_flush:
                self.flush_failed(op.path)
            raise
        if op.is_flush:
            op = op._replace(covers=len(self.log))
            self.pause()
        part = self.shorten(op)
        self.log.append(op if part is None else part)
        self.log[-1].apply(self.files)
        if part is not None:
            raise StorageError("injected, half done", code=errno.EIO)
        self.after(len(self.log) - 1)

    def stop_at(self, number: int, error: BaseException, dead: bool = False) -> None:
        """Raise `error` instead of op `number`; if `dead`, instead of every one from there on."""

        def before(at: int) -> None:
            if at == number:
                if not dead:
                    self.before = lambda at: None
                raise error

        self.before = before

    def give_up(self, path: str, chosen: Callable[[], bool] = lambda: True) -> None:
        """A flush of this file has failed: of its unflushed writes those `chosen` never reach the disk."""
        unflushed: list[int] = []
        for number, op in enumerate(self.log):
            if op.path == path and op.is_flush:
                unflushed = [at for at in unflushed if at >= op.covers]
            elif op.path == path and op.data is not None:
                unflushed.append(number)
        lost = frozenset(number for number in unflushed if chosen())
        if lost:
            self.log.append(Op(path, lost=lost))

    def drop_cache(self, path: str) -> None:
        """What is read from here on is what the disk has, or will have."""
        lost = frozenset[int]().union(*(op.lost for op in self.log if op.path == path))
        self.files[path] = bytearray(self.start[path])
        for number, op in enumerate(self.log):
            if op.path == path and number not in lost:
                op.apply(self.files)
        self.log.append(Op(path, dropped=True))

    def save(self) -> None:
        for path, content in self.files.items():
            Path(path).write_bytes(content)

    def crash_states(self, rng: random.Random | None = None, subsets: int = 1, part: float = 1.0) -> Iterator[State]:
        """After each op: with all that was written; without one, or any, of the unflushed ops; torn; random subsets.

        The prefixes of what is unflushed, and each of its ops alone, are states after earlier ops.
        Only about this `part` of the states.
        """
        rng = rng or random.Random(0)
        seen: set[tuple[int, tuple[int, ...]]] = set()
        durable = {path: bytearray(content) for path, content in self.start.items()}
        pending: list[tuple[int, Op]] = []
        flushes = 0
        shown: set[str] = set()  # files of which writes can be read that were given up
        for number, op in enumerate(self.log):
            if op.lost:
                pending = [found for found in pending if found[0] not in op.lost]
                shown.add(op.path)
            elif op.dropped:
                shown.discard(op.path)
            elif op.is_flush:
                rest = []
                for at, done in pending:
                    if done.path == op.path and at < op.covers:
                        done.apply(durable)
                    else:
                        rest.append((at, done))
                flushes += len(rest) != len(pending)
                pending = rest
            else:
                pending.append((number, op))
            for name, numbers, kept in self._subsets(pending, durable, rng, subsets):
                # Only once, the first time: then the guest may find the least.
                if numbers is not None and len(numbers) != len(pending):
                    if (flushes, numbers) in seen:
                        continue
                    seen.add((flushes, numbers))
                if part < 1 and rng.random() >= part:
                    continue
                files = {path: bytearray(content) for path, content in durable.items()}
                for other in kept:
                    other.apply(files)
                whole = numbers is not None and len(numbers) == len(pending) and not shown
                yield State(f"op {number}, {name}", number + 1, files, whole)

    @staticmethod
    def _subsets(
        pending: list[tuple[int, Op]], durable: dict[str, bytearray], rng: random.Random, subsets: int
    ) -> Iterator[tuple[str, tuple[int, ...] | None, Iterable[Op]]]:
        """(name, which of the pending ops, they); None for which: parts of them."""

        def chosen(name: str, kept: list[tuple[int, Op]]) -> tuple[str, tuple[int, ...], list[Op]]:
            return name, tuple(number for number, _ in kept), [op for _, op in kept]

        yield chosen("all of it", pending)
        if not pending:
            return
        yield chosen("nothing unflushed", [])
        yield chosen("only the last", pending[-1:])
        truncations = [found for found in pending if found[1].size >= 0]
        yield chosen("only truncations and growth", truncations)
        yield chosen("no truncation and growth", [found for found in pending if found[1].size < 0])
        inside = [found for found in pending if found[1].size < 0 and found[1].offset < len(durable[found[1].path])]
        yield chosen("nothing past the old end", inside)
        for i, (number, _) in enumerate(pending[:-1]):
            yield chosen(f"all but op {number}", pending[:i] + pending[i + 1 :])
        last = pending[-1][1]
        if last.data is not None and len(last.data) > GRANULES[0]:
            before = [op for _, op in pending[:-1]]
            middle = len(last.data) // 2 // GRANULES[0] * GRANULES[0]
            yield "first half of the last", None, [*before, last._replace(data=last.data[:middle])]
            rest = last._replace(offset=last.offset + middle, data=last.data[middle:])
            yield "second half of the last", None, [*before, rest]
        for i in range(subsets):
            granule = rng.choice(GRANULES)
            share = rng.choice((0.1, 0.5, 0.9))
            growth = rng.choice((0.0, 0.5))
            kept = _survivors([op for _, op in pending], granule, share, growth, rng)
            yield f"subset {i} of the {granule} byte granules", None, kept


def _survivors(ops: list[Op], granule: int, share: float, growth: float, rng: random.Random) -> Iterator[Op]:
    """A share of the granules; a lost one may have made the file longer all the same."""
    for op in ops:
        for part in op.granules(granule):
            if rng.random() < share:
                yield part
            elif part.data is not None and rng.random() < growth:
                yield part._replace(offset=part.offset + len(part.data), data=b"")


class RecordedFile(Storage):
    """A Storage in a World."""

    def __init__(self, world: World, path: str, writable: bool) -> None:
        self.name = path
        self.fixed_size = world.medium.fixed
        self._world = world
        self._writable = writable
        if path not in world.files:
            raise StorageError(f"cannot open {path}", OSError(2, "No such file"))

    def size(self) -> int:
        return len(self._world.files[self.name])

    def pread_into(self, buf: Any, offset: int) -> None:
        self._world.pause()
        self._world.before_read()
        view = memoryview(buf).cast("B")
        part = self._world.files[self.name][offset : offset + len(view)]
        view[:] = bytes(part) + bytes(len(view) - len(part))

    def pwrite(self, buf: Any, offset: int) -> None:
        assert self._writable, f"{self.name} was opened read-only"
        self._world.medium.check(self.size(), max(self.size(), offset + len(buf)))
        self._world.do(Op(self.name, offset, bytes(buf)))

    def pwritev(self, bufs: Sequence[Any], offset: int) -> None:
        self.pwrite(b"".join(bytes(buf) for buf in bufs), offset)

    def truncate(self, size: int) -> None:
        assert self._writable
        self._world.medium.check(self.size(), size)
        self._world.do(Op(self.name, size=size))

    def punch(self, offset: int, length: int) -> bool:
        if not self._world.medium.holes:
            return False
        self._world.do(Op(self.name, offset, bytes(length)))
        return True

    def flush(self) -> None:
        self._world.do(Op(self.name))

    def drop_cache(self) -> None:
        self._world.drop_cache(self.name)

    def identity(self) -> object:
        return self.name

    def close(self) -> None:
        pass


def guest(path: Path) -> bytes:
    """All that the guest reads, by the independent reader."""
    with QedFile(path) as image:
        return image.read(0, image.size)


def check_crashes(
    world: World,
    top: Path,
    allowed: Sequence[bytes],
    before: Callable[[], None] = lambda: None,
    rng: random.Random | None = None,
    subsets: int = 1,
) -> int:
    """Let the engine open and repair each crash state; the guest must find one of `allowed`.  How many there were.

    `before` runs first on each state, on disk; it may repair other layers.
    """
    states = 0
    for name, _, files, _ in world.crash_states(rng, subsets):
        states += 1
        for path, content in files.items():
            Path(path).write_bytes(content)
        before()
        with qedcore.open_image(str(top), writable=True, cache="unsafe") as image:
            found = image.pread(image.size, 0)
        assert found in allowed, f"{name}: the guest reads something else"
        with QedFile(top) as oracle:
            report = oracle.verify()
            assert not report.errors, f"{name}: {report.errors[:3]}"
            assert not report.need_check, name
            assert oracle.read(0, oracle.size) == found, name
    return states
