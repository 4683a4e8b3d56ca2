"""Position-stamped data and a sparse model of a guest device.

Each aligned 8-byte word of stamped data holds its own guest position and a tag (1-127), so that data which
ends up in the wrong place, comes from the wrong write or is torn shows itself.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

Reader = Callable[[int, int], bytes]  # (pos, length) -> bytes


def stamp(tag: int, pos: int, length: int) -> bytes:
    """Bytes [pos, pos + length) of a device stamped with tag; never zero in a whole word."""
    assert 0 < tag < 128
    first = pos & ~7
    last = (pos + length + 7) & ~7
    start = (tag << 56) + (first & ((1 << 56) - 1))
    words = array("Q", range(start, start + last - first, 8))
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()[pos - first : pos - first + length]


def device(handle: Any) -> Reader:
    """Reader of anything with pread(length, pos): a libnbd handle, an open image."""
    return lambda pos, length: bytes(handle.pread(length, pos))


def zeros(pos: int, length: int) -> bytes:
    return bytes(length)


def describe_difference(got: bytes, want: bytes, pos: int) -> str:
    """One line on where two buffers that start at guest position pos differ first."""
    if len(got) != len(want):
        return f"at {pos:#x}: {len(got)} bytes, expected {len(want)}"
    for i, (g, w) in enumerate(zip(got, want)):
        if g != w:
            word = i & ~7
            return (
                f"first difference at {pos + i:#x} (word {pos + word:#x}): "
                f"{got[word : word + 8][::-1].hex()}, expected {want[word : word + 8][::-1].hex()}"
            )
    return "no difference"


def assert_same(got: bytes, want: bytes, pos: int = 0) -> None:
    """Like assert got == want without printing megabytes."""
    if got != want:
        raise AssertionError(describe_difference(got, want, pos))


class Model:
    """Sparse bytearray model of a guest device: what was written, over what base(pos, length) gives."""

    PAGE = 4096  # bytes

    def __init__(self, size: int, base: Reader = zeros) -> None:
        self.size = size  # bytes
        self._base = base
        self._pages: dict[int, bytearray] = {}  # page number -> PAGE bytes

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bytearray(self._base(number * self.PAGE, self.PAGE))
        return page

    def write(self, pos: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            number, start = divmod(pos + done, self.PAGE)
            n = min(self.PAGE - start, len(data) - done)
            self._page(number)[start : start + n] = data[done : done + n]
            done += n

    def zero(self, pos: int, length: int) -> None:
        self.write(pos, bytes(length))

    def read(self, pos: int, length: int) -> bytes:
        out = bytearray()
        while len(out) < length:
            number, start = divmod(pos + len(out), self.PAGE)
            n = min(self.PAGE - start, length - len(out))
            page = self._pages.get(number)
            if page is None:
                out += self._base(number * self.PAGE + start, n)
            else:
                out += page[start : start + n]
        return bytes(out)

    def touched(self) -> Iterator[tuple[int, int]]:
        """(pos, length) runs ever written, widened to pages, cut at the end of the device."""
        run: list[int] | None = None
        for number in sorted(self._pages):
            if run and run[1] == number:
                run[1] += 1
                continue
            if run:
                yield self._cut(run)
            run = [number, number + 1]
        if run:
            yield self._cut(run)

    def _cut(self, run: list[int]) -> tuple[int, int]:
        pos = run[0] * self.PAGE
        return pos, min(run[1] * self.PAGE, self.size) - pos


def check_model(model: Model, reader: Reader, *, around: int = 64 * KiB, chunk: int = 4 * MiB) -> None:
    """Compare a device with the model: all of a small one, else every touched run and `around` bytes beside."""
    if model.size <= 32 * MiB:
        ranges = [(0, model.size)]
    else:
        ranges = [(0, 4 * KiB), (model.size - 4 * KiB, 4 * KiB)]
        for pos, length in model.touched():
            start = max(0, pos - around)
            ranges.append((start, min(model.size, pos + length + around) - start))
    for start, length in ranges:
        for pos in range(start, start + length, chunk):
            n = min(chunk, start + length - pos)
            assert_same(reader(pos, n), model.read(pos, n), pos)


@dataclass(frozen=True)
class Op:
    """One guest request of a random workload."""

    kind: str  # "write" or "zero"
    pos: int  # bytes
    length: int  # bytes
    tag: int

    @property
    def data(self) -> bytes:
        return stamp(self.tag, self.pos, self.length)

    def apply(self, model: Model) -> None:
        if self.kind == "zero":
            model.zero(self.pos, self.length)
        else:
            model.write(self.pos, self.data)


def random_ops(
    rng: random.Random,
    size: int,
    cluster_size: int,
    count: int,
    *,
    zeroes: bool = True,
    max_length: int = 256 * KiB,
    align: int = 512,
) -> list[Op]:
    """Writes and zero writes, many of them touching cluster ends, the image's end and one another."""
    ops: list[Op] = []
    for i in range(count):
        whole = rng.random() < 0.3 and cluster_size <= max_length
        if whole:
            length = cluster_size * rng.randint(1, max(1, max_length // cluster_size))
        else:
            length = align * rng.randint(1, max(1, min(max_length, 3 * cluster_size) // align))
        length = min(length, size)
        where = rng.random()
        if ops and where < 0.4:
            pos = rng.choice(ops).pos + align * rng.randint(-8, 8)
        elif where < 0.7:
            edge = rng.randrange(0, size // cluster_size + 1) * cluster_size
            pos = edge + align * rng.randint(-2, 2)
        else:
            pos = rng.randrange(0, size)
        step = cluster_size if whole else align
        pos = max(0, min(pos // step * step, (size - length) // align * align))
        kind = "zero" if zeroes and rng.random() < 0.3 else "write"
        ops.append(Op(kind, pos, length, i % 127 + 1))
    return ops


def write_at_random(handle: Any, model: Model, rng: random.Random, cluster_size: int, count: int) -> None:
    """Random writes to an NBD server, noted in the model and flushed; then it has what the model says."""
    for op in random_ops(rng, model.size, cluster_size, count, max_length=200 * KiB):
        handle.pwrite(op.data if op.kind == "write" else bytes(op.length), op.pos)
        op.apply(model)
    handle.flush()
    check_model(model, device(handle))
