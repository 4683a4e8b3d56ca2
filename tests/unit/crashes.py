"""Files in memory whose changes are recorded, and the states that a crash may leave of them.

What was written to a file before its last flush is on disk; of what came after, anything may be missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.qed_image import QedFile

import qedcore
from qedcore.errors import StorageError
from qedcore.storage import Storage
from qedcore.storage.file import CacheMode

SECTOR = 512
Files = dict[str, bytes]  # path -> content


class Op(NamedTuple):
    """A change of a file, or its flush (data None and size -1)."""

    path: str
    offset: int = 0
    data: bytes | None = None
    size: int = -1

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
        return self.data is None and self.size < 0


class World:
    """Some files; `open` is an opener for open_image.  `before` runs before each op and may raise."""

    def __init__(self, *paths: Path) -> None:
        self.start: Files = {str(path): path.read_bytes() for path in paths}
        self.files = {path: bytearray(content) for path, content in self.start.items()}
        self.log: list[Op] = []
        self.before: Callable[[int], None] = lambda number: None

    def open(self, path: str | os.PathLike[str], writable: bool, mode: CacheMode) -> Storage:
        return RecordedFile(self, os.fspath(path), writable)

    def do(self, op: Op) -> None:
        self.before(len(self.log))
        self.log.append(op)
        op.apply(self.files)

    def stop_at(self, number: int, error: BaseException, dead: bool = False) -> None:
        """Raise `error` instead of op `number`; if `dead`, instead of every one from there on."""

        def before(at: int) -> None:
            if at == number:
                if not dead:
                    self.before = lambda at: None
                raise error

        self.before = before

    def save(self) -> None:
        for path, content in self.files.items():
            Path(path).write_bytes(content)

    def crash_states(self) -> Iterator[tuple[str, Files]]:
        """(name, files) after each op: with all that was written; without one, or any, of the unflushed ops; torn."""
        seen = {hash(tuple(self.start.items()))}
        durable = {path: bytearray(content) for path, content in self.start.items()}
        pending: list[Op] = []
        for number, op in enumerate(self.log):
            if op.is_flush:
                for done in pending:
                    if done.path == op.path:
                        done.apply(durable)
                pending = [other for other in pending if other.path != op.path]
                continue
            pending.append(op)
            for name, kept in self._subsets(pending):
                files = {path: bytearray(content) for path, content in durable.items()}
                for other in kept:
                    other.apply(files)
                state = {path: bytes(content) for path, content in files.items()}
                key = hash(tuple(state.items()))
                if key not in seen:
                    seen.add(key)
                    yield f"op {number}, {name}", state

    @staticmethod
    def _subsets(pending: list[Op]) -> Iterator[tuple[str, list[Op]]]:
        yield "all of it", pending
        yield "nothing unflushed", []
        yield "only the last", pending[-1:]
        for i in range(len(pending) - 1):
            yield f"all but {i}", pending[:i] + pending[i + 1 :]
        last = pending[-1]
        if last.data is not None and len(last.data) > SECTOR:
            middle = len(last.data) // 2 // SECTOR * SECTOR
            yield "first half of the last", [*pending[:-1], last._replace(data=last.data[:middle])]
            rest = last._replace(offset=last.offset + middle, data=last.data[middle:])
            yield "second half of the last", [*pending[:-1], rest]


class RecordedFile:
    """A Storage in a World."""

    fixed_size = False

    def __init__(self, world: World, path: str, writable: bool) -> None:
        self.name = path
        self._world = world
        self._writable = writable
        if path not in world.files:
            raise StorageError(f"cannot open {path}", OSError(2, "No such file"))

    def size(self) -> int:
        return len(self._world.files[self.name])

    def pread_into(self, buf: Any, offset: int) -> None:
        view = memoryview(buf).cast("B")
        part = self._world.files[self.name][offset : offset + len(view)]
        view[:] = bytes(part) + bytes(len(view) - len(part))

    def pwrite(self, buf: Any, offset: int) -> None:
        assert self._writable, f"{self.name} was opened read-only"
        self._world.do(Op(self.name, offset, bytes(buf)))

    def pwritev(self, bufs: Sequence[Any], offset: int) -> None:
        self.pwrite(b"".join(bytes(buf) for buf in bufs), offset)

    def truncate(self, size: int) -> None:
        assert self._writable
        self._world.do(Op(self.name, size=size))

    def flush(self) -> None:
        self._world.do(Op(self.name))

    def identity(self) -> object:
        return self.name

    def close(self) -> None:
        pass


def guest(path: Path) -> bytes:
    """All that the guest reads, by the independent reader."""
    with QedFile(path) as image:
        return image.read(0, image.size)


def check_crashes(
    world: World, top: Path, allowed: Sequence[bytes], before: Callable[[], None] = lambda: None
) -> int:
    """Let the engine open and repair each crash state; the guest must find one of `allowed`.  How many there were.

    `before` runs first on each state, on disk; it may repair other layers.
    """
    states = 0
    for name, files in world.crash_states():
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
