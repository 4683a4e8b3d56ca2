"""The copy loop: what arrives, what it costs the target, and that nothing goes on after an error."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp

from qedcore.errors import RequestError, StorageError
from qedcore.storage.copying import WINDOW, Copy, Piece, WriteError, read_piece

SIZE = 5 * MiB + 700


class Memory:
    """A storage in memory."""

    name = "memory"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def pread_into(self, buf: memoryview, offset: int) -> None:
        buf[:] = self.content[offset : offset + len(buf)]


class Target:
    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.writes: list[tuple[int, int]] = []
        self.cleared: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.fail_at = -1  # byte

    def _change(self, pos: int, data: bytes) -> None:
        self.threads.add(threading.get_ident())
        if pos <= self.fail_at < pos + len(data):
            raise StorageError("no", code=28)
        self.content[pos : pos + len(data)] = data

    def pwrite(self, buf: Any, pos: int) -> None:
        self.writes.append((pos, len(buf)))
        self._change(pos, bytes(buf))

    def clear(self, pos: int, length: int) -> None:
        self.cleared.append((pos, length))
        self._change(pos, bytes(length))


def pieces_of(rng: random.Random, storages: list[Memory], size: int) -> tuple[list[Piece], bytes]:
    """Pieces that cover [0, size), and what they say; some data are zeros, in whole units and not."""
    found, expected, pos = [], bytearray(), 0
    while pos < size:
        n = min(rng.choice((512, 4 * KiB, 5000, 64 * KiB, WINDOW - 1, WINDOW, 2 * WINDOW + 512)), size - pos)
        storage = rng.choice((*storages, None))
        offset = rng.randrange(len(storage.content) - n) if storage is not None else 0
        found.append(Piece(pos, n, storage, offset))  # type: ignore[arg-type]
        expected += bytes(n) if storage is None else storage.content[offset : offset + n]
        pos += n
    return found, bytes(expected)


@pytest.mark.parametrize(
    ("readers", "any_order", "detect", "store", "fresh"),
    list(product((1, 2, 8), (False, True), (0, 4 * KiB, 96 * KiB), (False, True), (False, True))),
)
def test_what_arrives(
    rng: random.Random, readers: int, any_order: bool, detect: int, store: bool, fresh: bool
) -> None:
    mixed = b"".join(rng.choice((stamp(1, i, 4 * KiB), bytes(4 * KiB), bytes(100))) for i in range(2000))
    pieces, expected = pieces_of(rng, [Memory(stamp(2, 0, 4 * MiB)), Memory(mixed)], SIZE)
    target = Target(bytes(SIZE) if fresh else stamp(3, 0, SIZE))
    done: list[int] = []
    written: list[int] = []
    copy = Copy(
        target,
        fresh=fresh,
        detect=detect,
        store=store,
        readers=readers,
        any_order=any_order,
        progress=done.append,
        written=written.append,
    )
    copy.run(iter(pieces))
    assert_same(bytes(target.content), expected)
    assert done == sorted(done) and sum(written) == sum(n for _, n in target.writes)
    if not any_order:
        assert target.writes == sorted(target.writes) and len(target.threads) <= 1
    if store:
        assert target.cleared == [] and sum(written) == SIZE
    elif fresh:
        assert target.cleared == []
    if detect and not store:
        assert all(any(expected[pos : pos + n]) for pos, n in target.writes)


def test_long_zeros_are_one_request() -> None:
    target = Target(stamp(1, 0, 8 * MiB))
    Copy(target).run([Piece(512, 7 * MiB)])
    assert target.cleared == [(512, 7 * MiB)] and target.writes == []


def test_pieces_of_a_window_are_one_write() -> None:
    memory = Memory(stamp(1, 0, MiB))
    target = Target(bytes(2 * MiB))
    Copy(target).run([Piece(MiB + i * 4096, 4096, memory, (255 - i) * 4096) for i in range(256)])  # type: ignore[arg-type]
    assert target.writes == [(MiB, MiB)]


@pytest.mark.parametrize("any_order", [False, True])
@pytest.mark.parametrize("what", ["read", "write", "pieces"])
def test_errors(what: str, any_order: bool) -> None:
    """The error comes out, and no thread goes on with the copy."""
    memory = Memory(stamp(1, 0, 32 * MiB))
    target = Target(bytes(32 * MiB))
    target.fail_at = 9 * MiB + 5 if what == "write" else -1

    def read(piece: Piece, view: memoryview) -> None:
        if what == "read" and piece.pos == 9 * MiB:
            raise RequestError("cannot read")
        read_piece(piece, view)

    def pieces() -> Iterator[Piece]:
        for i in range(32):
            if what == "pieces" and i == 9:
                raise RequestError("no more")
            yield Piece(i * MiB, MiB, memory, i * MiB)  # type: ignore[arg-type]

    before = threading.active_count()
    with pytest.raises(WriteError if what == "write" else RequestError) as caught:
        Copy(target, any_order=any_order).run(pieces(), read)
    assert threading.active_count() == before
    if isinstance(caught.value, WriteError):
        assert (caught.value.pos, caught.value.errno) == (9 * MiB, 28)
    if not any_order:
        assert len(target.writes) <= 10
