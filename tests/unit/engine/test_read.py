"""The read, write and zero state machine: what the guest sees, what goes to disk in which order, and after errors."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.patterns import GiB, KiB, MiB, Model, assert_same, check_model, random_ops, stamp, zeros
from support.qed_image import Built, Geometry, QedFile, assert_sound, raw_reader

import qedcore
from qedcore.engine import allocator
from qedcore.errors import (
    CorruptImageError,
    QEDError,
    ReadOnlyError,
    RequestError,
    ShutdownError,
    StorageError,
    UnsupportedError,
)
from qedcore.storage.file import FileStorage
from unit.fakes import CHANGES, Call, FailAt, Gate, Hook, Interrupted, Job, Tap, Waits, extents, open_tapped

Image = Callable[..., Built]
CS = 64 * KiB
BASE = 9  # tag of backing data


# Boundary matrix


@dataclass(frozen=True)
class Shape:
    """A geometry, a device that ends in the middle of a cluster, and the positions where something changes."""

    geometry: Geometry
    size: int  # bytes
    edges: tuple[int, ...]  # bytes
    n: int  # bytes: the unit of lengths

    def __str__(self) -> str:
        return str(self.geometry)


def shape(cluster_size: int, table_size: int, extra: int, n: int) -> Shape:
    geometry = Geometry(cluster_size, table_size)
    reach = geometry.l2_span
    size = reach + extra
    edges = [2 * cluster_size, reach, size]
    if geometry.table_bytes > MiB:  # a table of several slices
        edges.insert(1, MiB // 8 * cluster_size)
    return Shape(geometry, size, tuple(edges), n)


SHAPES = (
    shape(4 * KiB, 1, 5 * 4 * KiB + 1536, 4 * KiB),
    shape(64 * KiB, 4, 5 * 64 * KiB + 512, 64 * KiB),
    shape(2 * MiB, 2, 4 * MiB + 512, 8 * KiB),
    shape(64 * MiB, 16, 130 * MiB, 4 * KiB),
)
POSITIONS = (-2, -1, 0, 1)  # in units of n from the edge, and a byte to either side
LENGTHS = ((0, 1), (1, -1), (1, 0), (1, 1), (2, -1), (2, 1))  # (units of n, bytes)


def cases(s: Shape, edge: int) -> Iterator[tuple[int, int]]:
    """(pos, length) at and across the edge, inside the device."""
    for unit in POSITIONS:
        for byte in (-1, 0, 1):
            for units, bytes_ in LENGTHS:
                pos, length = edge + unit * s.n + byte, units * s.n + bytes_
                if 0 <= pos and pos + length <= s.size:
                    yield pos, length


def kinds_around(rng: random.Random, s: Shape, edge: int) -> dict[int, str]:
    """A kind for each cluster near the edge; in about every second case one of the tables is missing."""
    middle, cs = edge // s.geometry.cluster_size, s.geometry.cluster_size
    last = (s.size - 1) // cs
    near = [c for c in range(middle - 3, middle + 4) if 0 <= c <= last]
    gone = rng.choice([None, None, *sorted({c // s.geometry.entries for c in near})])
    kinds = {}
    for cluster in near:
        kind = rng.choice(["data", "zero", "-"])
        if cluster // s.geometry.entries != gone:
            kinds[cluster] = kind
    return kinds


def make_base(rng: random.Random, path: Path, s: Shape, edge: int) -> None:
    """A sparse raw file with data around the edge, which ends before, at or after it."""
    length = max(0, edge + rng.choice([-4, -1, 0, 1, 4]) * s.n + rng.choice([0, 1, 77, 512]))
    first = max(0, edge - 4 * s.n)
    with path.open("wb") as f:
        f.truncate(length)
        if first < length:
            f.seek(first)
            f.write(stamp(BASE, first, length - first))


PLACES = [
    (s, edge, backing)
    for s in SHAPES
    for edge in s.edges
    for backing in (False, True)
    if not backing or edge < 15 << 40  # the backing file is a raw one: file systems have limits
]


@pytest.mark.parametrize(("s", "edge", "backing"), PLACES, ids=str)
def test_boundaries(image: Image, tmp_path: Path, rng: random.Random, s: Shape, edge: int, backing: bool) -> None:
    """Writes and zeros in groups, each group on an image of its own, whose clusters are of random kinds."""
    cs, group = s.geometry.cluster_size, 6
    todo = list(cases(s, edge))
    rng.shuffle(todo)
    if cs > 2 * MiB and backing:
        todo = todo[:group]  # each fills clusters of 64 MiB
    base = tmp_path / "base.raw"
    for start in range(0, len(todo), group):
        spec: dict[str, Any] = {"cluster_size": cs, "table_size": s.geometry.table_size, "size": s.size}
        if backing:
            make_base(rng, base, s, edge)
            spec |= {"backing": "base.raw", "no_probe": True}
        built = image(layout=kinds_around(rng, s, edge), **spec)
        below = raw_reader(base) if backing else zeros
        model = Model(s.size, lambda p, n: built.read(p, n, below))  # noqa: B023
        done = [f"edge {edge:#x}, {built.kinds}"]
        lo = max(0, edge - 5 * s.n)
        around = min(s.size, edge + 5 * s.n) - lo
        with qedcore.open_image(built.path) as img:
            for pos, length in todo[start : start + group]:
                zero = rng.random() < 0.4
                done.append(f"{'zero' if zero else 'write'} {length} at {pos:#x}")
                if zero:
                    img.zero(pos, length)
                    model.zero(pos, length)
                else:
                    img.pwrite(stamp(len(done), pos, length), pos)
                    model.write(pos, stamp(len(done), pos, length))
                assert img.pread(around, lo) == model.read(lo, around), done
                assert img.pread(length, pos) == model.read(pos, length), done
        report = assert_sound(built.path)
        assert report.leaks == [], done
        with QedFile(built.path) as file:
            assert file.read(lo, around) == model.read(lo, around), done


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize(
    ("geometry", "size"),
    [(Geometry(4 * KiB, 1), 5 * MiB + 512), (Geometry(64 * KiB, 4), 3 * MiB + 512), (Geometry(MiB, 2), 9 * MiB)],
    ids=str,
)
def test_random_requests(
    image: Image, tmp_path: Path, rng: random.Random, geometry: Geometry, size: int, backing: bool
) -> None:
    """Many requests on one image, closed and opened again now and then."""
    spec: dict[str, Any] = {"cluster_size": geometry.cluster_size, "table_size": geometry.table_size, "size": size}
    base = tmp_path / "base.raw"
    base.write_bytes(stamp(BASE, 0, size * 2 // 3 + 100))
    if backing:
        spec |= {"backing": "base.raw"}
    built = image(layout="D-Z-", **spec)
    model = Model(size, lambda pos, n: built.read(pos, n, raw_reader(base)) if backing else built.read(pos, n))
    for _ in range(3):
        with qedcore.open_image(built.path) as img:
            for op in random_ops(rng, size, geometry.cluster_size, 60, align=rng.choice([1, 512])):
                op.apply(model)
                img.zero(op.pos, op.length) if op.kind == "zero" else img.pwrite(op.data, op.pos)
                lo = max(0, op.pos - 700)
                n = min(size - lo, op.length + 1400)
                assert_same(img.pread(n, lo), model.read(lo, n), lo)
            check_model(model, lambda pos, n: img.pread(n, pos))
        assert_sound(built.path)
        with QedFile(built.path) as file:
            check_model(model, file.read)


# What may be asked for


@pytest.mark.parametrize(
    ("pos", "length", "good"),
    [(0, 0, True), (MiB, 0, True), (MiB - 1, 1, True), (0, MiB, True), (MiB, 1, False), (MiB - 1, 2, False),
     (-1, 1, False), (-1, 0, False), (MiB + 1, 0, False), (0, MiB + 1, False), (1 << 63, 1, False)],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["", "D" * 16, "Z" * 16])
def test_range(image: Image, layout: str, pos: int, length: int, good: bool) -> None:
    built = image(size=MiB, layout=layout)
    before = built.path.read_bytes()
    with qedcore.open_image(built.path) as img:
        for _ in range(2):  # without and with the table in the cache
            for request in (
                lambda: img.pread(length, pos),
                lambda: img.extents(pos, length),
                lambda: img.pwrite(stamp(1, max(pos, 0), length) if layout[:1] == "D" else bytes(length), pos),
                lambda: img.zero(pos, length if layout[:1] != "D" else 0) if good else img.zero(pos, length),
            ):
                if good:
                    request()
                else:
                    with pytest.raises(RequestError, match="outside the device of 1048576 bytes") as caught:
                        request()
                    assert caught.value.errno == errno.EINVAL
    if not good or not length:
        assert built.path.read_bytes() == before


@pytest.mark.parametrize("layout", ["D", "Z", "-", ""])
def test_read_only(image: Image, layout: str) -> None:
    built = image(layout=layout)
    before = built.path.read_bytes()
    with qedcore.open_image(built.path, writable=False) as img:
        for _ in range(2):
            for request in (lambda: img.pwrite(b"x", 0), lambda: img.zero(0, 1), lambda: img.zero(0, CS)):
                with pytest.raises(ReadOnlyError) as caught:
                    request()
                assert caught.value.errno == errno.EROFS
            img.pread(CS, 0)
            img.flush()
    assert built.path.read_bytes() == before


def test_closed(image: Image) -> None:
    img = qedcore.open_image(image(layout="D").path)
    img.pread(1, 0)
    img.close()
    img.close()
    for request in (
        lambda: img.pread(1, 0),
        lambda: img.pread(0, 0),
        lambda: img.pwrite(b"x", 0),
        lambda: img.pwrite(b"x" * CS, CS),
        lambda: img.zero(0, 1),
        lambda: img.extents(0, 1),
    ):
        with pytest.raises(ShutdownError) as caught:
            request()
        assert caught.value.errno == errno.ESHUTDOWN


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffers(image: Image, kind: Callable[[bytes], Any]) -> None:
    with qedcore.open_image(image().path) as img:
        img.pwrite(kind(b"hello" * 1000), 100)
        img.pwrite(kind(b"world" * 1000), 100)
        buf = bytearray(5010)
        img.pread_into(memoryview(buf)[5:5005], 100)
        assert buf == bytes(5) + b"world" * 1000 + bytes(5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backing", [0, 100, 2 * CS, 2 * CS + 100, MiB])
def test_every_byte_of_the_buffer_is_set(image: Image, tmp_path: Path, backing: int, layers: int) -> None:
    """Also where there is nothing below, or the files below are shorter; the caller's buffer is not blank."""
    (tmp_path / "base.raw").write_bytes(stamp(BASE, 0, backing))
    base = {"backing": "base.raw", "no_probe": True} if backing else {}
    built = image("1.qed", layout="--DZ- ", size=8 * CS, **base)
    if layers == 2:
        image("2.qed", size=10 * CS, backing="1.qed")
    with qedcore.open_image(tmp_path / f"{layers}.qed", writable=False) as img:
        want = built.read(0, 8 * CS, raw_reader(tmp_path / "base.raw") if backing else zeros)
        want += bytes(img.size - len(want))
        for pos in (0, 50, CS + 1, 2 * CS, 4 * CS, 7 * CS + 100):
            for length in (100, CS, 3 * CS, img.size - pos):
                buf = bytearray(b"\xee" * min(length, img.size - pos))
                img.pread_into(buf, pos)
                assert_same(bytes(buf), want[pos : pos + len(buf)], pos)


@pytest.mark.parametrize(("mode", "fua", "flushes"), [("writeback", False, 0), ("writeback", True, 1),
                                                      ("writethrough", False, 1)])  # fmt: skip
def test_fua(image: Image, mode: str, fua: bool, flushes: int) -> None:
    """Once, after everything that the request wrote."""
    img, tap = open_tapped(image(layout="D").path, cache=mode)
    with img:
        for request in (lambda: img.pwrite(b"x" * 100, 0, fua=fua), lambda: img.zero(0, 100, fua=fua)):
            tap.log.clear()
            request()
            assert [call.name for call in tap.log] == ["pwrite"] + ["flush"] * flushes
        tap.log.clear()
        img.pwrite(b"x" * CS, CS, fua=fua)
        assert (tap.log[-1].name == "flush") is bool(flushes)


# What goes to disk, in order.  Offsets in clusters of the default image: header 0, L1 1-4.

SET = ("pwrite", 0, 64)
FLUSH = ("flush", 0, 0)
GROW = ("truncate",)


def logged(tap: Tap) -> list[tuple[Any, ...]]:
    """The changes since the last call; vectored writes as plain ones, growth without its size."""
    names = {"pwritev": "pwrite"}
    out = [GROW if call.name == "truncate" else (names.get(call.name, call.name), *call[1:]) for call in tap.log]
    tap.log.clear()
    return out


@pytest.fixture
def tapped(image: Image, tmp_path: Path) -> Iterator[Callable[..., tuple[qedcore.QEDImage, Tap, Built]]]:
    opened = []

    def make(hook: Hook | None = None, backing: int = 0, **spec: Any) -> tuple[qedcore.QEDImage, Tap, Built]:
        """backing: bytes of a raw file under the image, 0 for none."""
        if backing:
            (tmp_path / "base.raw").write_bytes(stamp(BASE, 0, backing))
            spec |= {"backing": "base.raw", "no_probe": True}
        built = image(**spec)
        img, tap = open_tapped(built.path, hook)
        opened.append((img, tap))
        tap.log.clear()
        return img, tap, built

    yield make
    for img, tap in opened:
        tap.hook = None
        try:
            img.close()
        except QEDError:
            pass


Tapped = Callable[..., tuple[qedcore.QEDImage, Tap, Built]]


def test_first_write(tapped: Tapped) -> None:
    """The flag, durable; data; the table, durable with its data; the L1 entry.  Fresh clusters are not filled."""
    img, tap, _ = tapped()
    img.pwrite(b"x" * 4096, 4096)
    data, table = 5 * CS, 6 * CS
    assert logged(tap) == [
        SET, FLUSH, GROW, ("pwrite", data + 4096, 4096), ("pwrite", table, 512), FLUSH, ("pwrite", CS, 512),
    ]  # fmt: skip


def test_later_writes(tapped: Tapped) -> None:
    img, tap, built = tapped(layout="D")
    end = built.end
    img.pwrite(b"x" * 4096, 4096)
    assert logged(tap) == [("pwrite", built.offsets[0] + 4096, 4096)]  # in place: the data and nothing else
    img.pwrite(b"x" * 3 * CS, 70 * CS + 100)  # table exists: no flush without a backing file
    table = built.l2_offsets[0]
    assert logged(tap) == [SET, FLUSH, GROW, ("pwrite", end + 100, 3 * CS), ("pwrite", table + 512, 512)]
    img.pwrite(b"x" * CS, 63 * CS)  # one period, one flag
    assert logged(tap) == [("pwrite", end + 4 * CS, CS), ("pwrite", table, 512)]
    img.pwrite(b"x" * 4 * CS, 126 * CS)  # entries in two sectors: one write
    assert logged(tap) == [("pwrite", end + 5 * CS, 4 * CS), ("pwrite", table + 512, 1024)]


@pytest.mark.parametrize(("layout", "pos"), [("D-", CS), ("DZ", CS), ("D", 40 * CS)], ids=["none", "zero", "far"])
def test_with_backing_data_is_durable_before_its_entry(tapped: Tapped, layout: str, pos: int) -> None:
    img, tap, built = tapped(layout=layout, backing=MiB)
    img.pwrite(b"x" * 1000, pos + 500)
    log = logged(tap)
    assert log[:3] == [SET, FLUSH, GROW]
    data, flush, link = log[3:]
    assert data[0] == "pwrite" and built.end <= data[1] < built.end + CS
    assert (flush, link) == (FLUSH, ("pwrite", built.l2_offsets[0], 512))


def test_missing_table_with_backing(tapped: Tapped) -> None:
    img, tap, built = tapped(backing=MiB)
    img.pwrite(b"x" * 1000, 500)
    assert logged(tap) == [
        SET, FLUSH, GROW, ("pwrite", built.end, CS), ("pwrite", built.end + CS, 512), FLUSH, ("pwrite", CS, 512),
    ]  # fmt: skip


def test_write_across_two_tables(tapped: Tapped) -> None:
    img, tap, built = tapped(size=4 * GiB)
    img.pwrite(b"x" * 2 * CS, 2 * GiB - CS)
    first, second = built.end, built.end + 5 * CS
    assert logged(tap) == [
        SET, FLUSH, GROW,
        ("pwrite", first, CS), ("pwrite", first + CS + 4 * CS - 512, 512), FLUSH, ("pwrite", CS, 512),
        ("pwrite", second, CS), ("pwrite", second + CS, 512), FLUSH, ("pwrite", CS, 512),
    ]  # fmt: skip


def test_close_of_a_clean_image_writes_nothing(tapped: Tapped) -> None:
    img, tap, _ = tapped(layout="D")
    img.pwrite(b"x", 0)
    img.pread(MiB, 0)
    tap.log.clear()
    img.close()
    assert {call.name for call in tap.log} <= {"flush"}


def test_close_after_a_write(tapped: Tapped) -> None:
    img, tap, _ = tapped()
    img.pwrite(b"x", 0)
    tap.log.clear()
    img.close()
    assert logged(tap)[:4] == [GROW, FLUSH, SET, FLUSH]  # 64 bytes of header, now without the flag


# Zero clusters and zeroing


@pytest.mark.parametrize("length", [1, 512, 4096, CS - 1])
@pytest.mark.parametrize("start", [0, 1, 512, 4096])
def test_write_into_a_zero_cluster_over_data(tapped: Tapped, start: int, length: int) -> None:
    """B1: QEMU fills the rest of the cluster from the backing file, whose data comes back from the dead."""
    img, _, built = tapped(layout="-Z-", backing=MiB)
    length = min(length, CS - start)
    img.pwrite(b"x" * length, CS + start)
    want = bytearray(CS)
    want[start : start + length] = b"x" * length
    assert_same(img.pread(3 * CS, 0), stamp(BASE, 0, CS) + bytes(want) + stamp(BASE, 2 * CS, CS))
    img.close()
    with QedFile(built.path) as file:
        assert_same(file.read(CS, CS), bytes(want))


# layout, backing (bytes), (pos, length) -> entries afterwards: D data, Z zero cluster, - nothing; writes of data?
ZEROED: dict[str, tuple[str, int, tuple[int, int], str, bool]] = {
    "nothing, alone": ("- -", 0, (0, 3 * CS), "---", False),
    "no table, alone": ("", 0, (0, 3 * CS), "---", False),
    "part of nothing, alone": ("-", 0, (5, 100), "---", False),
    "zero clusters": ("ZZZ", MiB, (0, 3 * CS), "ZZZ", False),
    "part of a zero cluster": ("-Z-", MiB, (CS + 5, 100), "-Z-", False),
    "whole clusters": ("---", MiB, (CS, 2 * CS), "-ZZ", False),
    "whole cluster, no table": ("", MiB, (CS, CS), "-Z-", False),
    "head": ("---", MiB, (100, 2 * CS - 100), "DZ-", True),
    "tail": ("---", MiB, (CS, CS + 100), "-ZD", True),
    "both": ("---", MiB, (1, 3 * CS - 2), "DZD", True),
    "inside one cluster": ("---", MiB, (CS + 1, CS - 2), "-D-", True),
    "across two, none whole": ("---", MiB, (CS - 1, 2), "DD-", True),
    "data": ("DDD", MiB, (CS, CS), "DDD", True),
    "data and nothing": ("D--", MiB, (0, 3 * CS), "DZZ", True),
    "past the backing file": ("---", CS, (CS, 2 * CS), "---", False),
    "part, past the backing file": ("---", CS, (CS + 7, 100), "---", False),
    "across the end of the backing file": ("---", CS + 1, (CS, 2 * CS), "-ZZ", False),
}


@pytest.mark.parametrize("name", ZEROED)
def test_zero(tapped: Tapped, name: str) -> None:
    layout, backing, (pos, length), after, writes = ZEROED[name]
    img, tap, built = tapped(layout=layout, backing=backing)
    before = img.pread(4 * CS, 0)
    img.zero(pos, length)
    data = [call for call in tap.log if call.name.startswith("pwrite") and call.offset >= built.end]
    in_place = [call for call in tap.log if call.offset in range(built.offsets.get(1, 0), built.end) and call.offset]
    if not writes:
        # Only the flag and tables: at most a new table, no data.
        assert len(data) <= ("Z" in after and not layout)
    if after == "---":
        assert tap.log == []  # no metadata where it reads as zeros anyhow
    if "D" in layout and "D" == after[pos // CS]:
        assert in_place or pos < CS  # the cluster is kept
    want = before[:pos] + bytes(length) + before[pos + length :]
    assert_same(img.pread(4 * CS, 0), want)
    img.close()
    assert_sound(built.path)
    with QedFile(built.path) as file:
        entries = [file.entry(cluster) for cluster in range(3)]
        assert_same(file.read(0, 4 * CS), want)
    assert "".join("-" if entry == 0 else "Z" if entry == 1 else "D" for entry in entries) == after


@pytest.mark.parametrize("tail", [512, 8192, CS - 512, CS])
@pytest.mark.parametrize("start", [0, CS])
def test_zero_to_the_end_of_the_device(tapped: Tapped, tail: int, start: int) -> None:
    """The last cluster counts as whole where the device ends in it: what lies behind does not matter."""
    size = 2 * CS + tail
    img, tap, built = tapped(layout="---", size=size, backing=MiB)
    img.zero(start, size - start)
    assert not [call for call in tap.log if call.name == "pwritev"]
    assert_same(img.pread(size, 0), stamp(BASE, 0, start) + bytes(size - start))
    img.close()
    with QedFile(built.path) as file:
        assert [file.entry(n) for n in range(3)] == [0 if n * CS < start else 1 for n in range(3)]
        assert_same(file.read(0, size), stamp(BASE, 0, start) + bytes(size - start))
    assert_sound(built.path)


def test_zero_of_much_data(tapped: Tapped) -> None:
    """More than one piece of zeros at a time, clusters in several runs."""
    size = 5 * MiB + 512
    img, tap, built = tapped(layout={n: "data" for n in range(81) if n % 20 != 7}, size=size, backing=size)
    img.zero(300, 5 * MiB - 1000)
    want = bytearray(size)
    want[:300] = built.read(0, 300)
    want[5 * MiB - 700 :] = built.read(5 * MiB - 700, 1212)
    assert_same(img.pread(size, 0), bytes(want))
    assert max(call.length for call in tap.log) <= MiB


# Freeing: layout, backing, range, layout after; "may_trim" and trim differ outside whole clusters
FREED: dict[str, tuple[str, int, tuple[int, int], str]] = {
    "nothing": ("- -", 0, (0, 3 * CS), "---"),
    "no table": ("", 0, (0, 3 * CS), "---"),
    "zero clusters": ("ZZZ", 0, (0, 3 * CS), "ZZZ"),
    "one": ("DDD", 0, (CS, CS), "D-D"),
    "all": ("DDD", 0, (0, 3 * CS), "---"),
    "all, backing": ("DDD", MiB, (0, 3 * CS), "ZZZ"),
    "past the backing file": ("DDD", CS, (CS, CS), "DZD"),
    "between": ("DDD", 0, (1, 3 * CS - 2), "D-D"),
    "across two, none whole": ("DDD", 0, (1, 2 * CS - 2), "DDD"),
    "inside one": ("DDD", MiB, (CS + 1, CS - 2), "DDD"),
    "mixed": ("DZD", 0, (0, 3 * CS), "-Z-"),
}


def kinds(path: str, n: int) -> str:
    with QedFile(path) as file:
        entries = [file.entry(cluster) for cluster in range(n)]
    return "".join("-" if entry == 0 else "Z" if entry == 1 else "D" for entry in entries)


@pytest.mark.parametrize("zero", [False, True], ids=["trim", "zero"])
@pytest.mark.parametrize("name", FREED)
def test_freeing(tapped: Tapped, name: str, zero: bool) -> None:
    layout, backing, (pos, length), after = FREED[name]
    img, tap, built = tapped(layout=layout, backing=backing)
    before = bytearray(img.pread(4 * CS, 0))
    want = bytearray(before)
    for cluster in range(3):
        if kinds(built.path, 3)[cluster] != after[cluster]:
            want[cluster * CS : (cluster + 1) * CS] = bytes(CS)
    if zero:
        img.zero(pos, length, may_trim=True)
        want[pos : pos + length] = bytes(length)
    else:
        img.trim(pos, length)
    assert_same(img.pread(4 * CS, 0), bytes(want))
    changed = [call for call in tap.log if call.name != "flush"]
    if layout == "".join(after) and not zero or not layout.strip("- Z"):
        assert changed == []  # neither metadata nor the flag
    img.close()
    assert_sound(built.path, leaks=None)
    assert kinds(built.path, 3) == after
    with QedFile(built.path) as file:
        assert_same(file.read(0, 4 * CS), bytes(want))
    if after in ("---", "ZZZ") and "D" in layout:
        assert os.path.getsize(built.path) == built.l2_offsets[0] + built.spec.table_size * CS  # nothing but tables


@pytest.mark.parametrize("zero", [False, True], ids=["trim", "zero"])
def test_a_long_request_does_not_hold_up_what_it_frees(
    tapped: Tapped, monkeypatch: pytest.MonkeyPatch, zero: bool
) -> None:
    """A flush for some runs, neither none nor one for each."""
    monkeypatch.setattr(allocator, "_MAX_UNLINKED", 10)
    img, tap, built = tapped(size=100 * CS, layout="D" * 100, reverse=True)
    if zero:
        img.zero(0, 100 * CS, may_trim=True)
    else:
        img.trim(0, 100 * CS)
    assert img._allocator.pending < 10
    assert 10 <= [call.name for call in tap.log].count("flush") <= 13
    assert_same(img.pread(100 * CS, 0), bytes(100 * CS))


def test_shared_clusters_are_not_freed(tapped: Tapped) -> None:
    """QEMU leaves such images without NEED_CHECK: what one entry gives up, the other still has."""
    img, tap, built = tapped(layout="DDD", entries={5: lambda built: built.offsets[1]})
    img.trim(CS, CS)
    img.trim(2 * CS, CS)
    img.flush()
    for cluster in range(6, 9):
        img.pwrite(b"x" * CS, cluster * CS)
    assert_same(img.pread(CS, 5 * CS), built.read(CS, CS))
    assert_same(img.pread(2 * CS, CS), bytes(2 * CS))
    assert "punch" not in [call.name for call in tap.log]


def test_zero_over_a_backing_file_frees_and_hides(tapped: Tapped) -> None:
    img, tap, built = tapped(layout="D-D", backing=MiB)
    img.zero(0, 3 * CS, may_trim=True)
    assert img.pread(3 * CS, 0) == bytes(3 * CS)
    img.close()
    assert kinds(built.path, 3) == "ZZZ"


def test_trim_leaves_what_the_backing_file_has(tapped: Tapped) -> None:
    img, tap, built = tapped(layout="D--", backing=MiB)
    before = img.pread(3 * CS, 0)
    img.trim(0, 3 * CS)
    assert img.pread(3 * CS, 0) == bytes(CS) + before[CS:]


def test_trim_to_the_end_of_the_device(tapped: Tapped) -> None:
    """The last cluster counts as whole where the device ends in it."""
    img, tap, built = tapped(layout="DD", size=CS + 512)
    img.trim(0, CS + 512)
    img.close()
    assert kinds(built.path, 2) == "--"


@pytest.mark.parametrize(
    ("layout", "backing", "pos", "length", "may_trim", "fast"),
    [
        ("D", 0, 0, CS, True, True),
        ("D", 0, 0, CS, False, False),
        ("D", 0, 512, CS - 512, True, False),
        ("DD", 0, 0, CS + 512, True, False),
        ("-", 0, 77, 100, False, True),
        ("Z", MiB, 77, 100, False, True),
        ("-", MiB, 0, CS, False, True),
        ("-", MiB, 0, CS - 512, False, False),
        ("-", 512, CS, 300, False, True),
        ("", MiB, 0, 4 * CS, False, True),
    ],
)
def test_fast_zero(
    tapped: Tapped, layout: str, backing: int, pos: int, length: int, may_trim: bool, fast: bool
) -> None:
    """It succeeds exactly where no data is written, and changes nothing where it fails."""
    img, tap, built = tapped(layout=layout, backing=backing)
    before = img.pread(4 * CS, 0)
    if fast:
        img.zero(pos, length, may_trim=may_trim, only_fast=True)
        assert img.pread(4 * CS, 0) == before[:pos] + bytes(length) + before[pos + length :]
        tables = [*range(built.l1_offset, built.end)] if not layout else []
        assert not [call for call in tap.log if call.length > CS and call.offset not in tables]
    else:
        with pytest.raises(UnsupportedError) as caught:
            img.zero(pos, length, may_trim=may_trim, only_fast=True)
        assert caught.value.errno == errno.ENOTSUP and tap.log == []


def test_freed_clusters_are_used_before_the_file_grows(tapped: Tapped) -> None:
    img, tap, built = tapped(layout=dict.fromkeys(range(40), "data"), size=4 * MiB)
    img.trim(0, 40 * CS)
    end = os.path.getsize(built.path)
    for n in range(40):
        img.pwrite(b"x" * 700, n * CS + n)
    assert os.path.getsize(built.path) == end
    assert all(img.pread(CS, n * CS) == bytes(n) + b"x" * 700 + bytes(CS - n - 700) for n in range(40))
    img.close()
    assert_sound(built.path)


def test_a_write_longer_than_the_free_run(tapped: Tapped) -> None:
    """It takes several runs, and the end of the file for the rest."""
    img, tap, built = tapped(layout=dict.fromkeys(range(40), "data"), size=8 * MiB)
    for n in range(0, 20, 2):
        img.trim(n * CS, CS)
    data = stamp(5, 100, 30 * CS)
    img.pwrite(data, 45 * CS + 100)
    assert_same(img.pread(30 * CS, 45 * CS + 100), data)
    img.close()
    assert_sound(built.path)


@pytest.mark.parametrize("backing", [0, 16 * MiB], ids=["alone", "backing"])
def test_many_pieces_are_flushed_and_linked_at_once(tapped: Tapped, backing: int) -> None:
    img, tap, built = tapped(layout=dict.fromkeys(range(40), "data"), size=8 * MiB, backing=backing)
    for n in range(0, 40, 2):
        img.trim(n * CS, CS)
    img.flush()
    before = img.pread(40 * CS, 45 * CS)
    tap.log.clear()
    data = stamp(5, 100, 19 * CS - 300)
    img.pwrite(data, 45 * CS + 100)
    log = logged(tap)
    assert len([call for call in log if call[0] == "pwrite" and call[2] >= CS - 300]) == 19  # holes of one cluster
    assert log.count(FLUSH) == bool(backing) and log[-1] == ("pwrite", built.l2_offsets[0], 512)
    want = before[:100] + data + before[100 + len(data) :]
    assert_same(img.pread(40 * CS, 45 * CS), want)
    img.close()
    assert_sound(built.path, leaks=None)
    with QedFile(built.path) as file:
        assert_same(file.read(45 * CS, 40 * CS), want)


def test_fill_trim_ten_times(tapped: Tapped) -> None:
    """The file does not grow beyond one fill and 5 %."""
    size = 4 * MiB
    img, tap, built = tapped(layout="", size=size)
    largest = []
    for turn in range(10):
        for pos in range(0, size, 96 * 1024):
            img.pwrite(bytes((turn + 1,)) * min(96 * 1024, size - pos), pos)
        largest.append(img._bounds.end)
        img.trim(0, size)
    assert max(largest) <= largest[0] * 1.05
    img.close()
    assert os.path.getsize(built.path) < largest[0] / 4


def test_a_table_made_after_the_file_shrank(tapped: Tapped) -> None:
    """It lies where the file once ended; read again, it is not taken for one that points past the end."""
    img, tap, built = tapped(layout=dict.fromkeys(range(40), "data"), size=1 << 40)
    img.trim(0, 40 * CS)
    assert img._gate.clear()  # the idle timer fires: the tail is given back
    far = img.geometry.l2_table_reach * 3
    img.pwrite(b"x" * CS * 2, far)
    img._clusters.cache.clear()
    assert img.pread(2 * CS, far) == b"x" * CS * 2


@pytest.mark.parametrize("retired", [False, True], ids=["same image", "read-only opening"])
def test_no_reuse_under_a_reader(tapped: Tapped, retired: bool) -> None:
    """It looked its cluster up before that was freed: it reads what was there or zeros, never another's data."""
    img, tap, built = tapped(layout=dict.fromkeys(range(40), "data"), size=4 * MiB)
    gate = Gate()
    stopped = stop_at(gate, lambda call: call.name == "pread" and call.length == 7 * KiB)
    if retired:  # as SharedImage has it: the connections of before still use the read-only one
        other = qedcore.open_image(
            built.path,
            writable=False,
            opener=lambda path, rw, mode: Tap(FileStorage(path, rw, mode), stopped),  # takes no lock
            in_flight=img._requests._in_flight,
        )
    else:
        other = img
        tap.hook = stopped
    before = img.pread(KiB, 100)
    reader = Job(other.pread, 7 * KiB, 100)
    gate.reached()
    img.trim(0, 40 * CS)
    img.flush()
    for n in range(40):
        img.pwrite(b"new" * 21000, n * CS)
    gate.open()
    assert reader.result()[:KiB] in (before, bytes(KiB))
    if retired:
        other.close()
    img.flush()
    end = os.path.getsize(built.path)
    img.trim(0, 40 * CS)
    img.pwrite(b"new" * 21000, 0)
    assert os.path.getsize(built.path) == end  # now it is reused


def test_no_reuse_under_a_writer_in_place(tapped: Tapped) -> None:
    gate = Gate()
    img, tap, built = tapped(layout=dict.fromkeys(range(40), "data"), size=4 * MiB)
    tap.hook = stop_at(gate, lambda call: call.name == "pwrite" and call.length == 7 * KiB)
    writer = Job(img.pwrite, b"old" + bytes(7 * KiB - 3), 100)
    gate.reached()
    img.trim(0, 40 * CS)
    img.flush()
    for n in range(40):
        img.pwrite(b"new" * 21000, n * CS)
    content = img.pread(40 * CS, 0)
    gate.open()
    writer.result()
    assert img.pread(40 * CS, 0) == content
    img.flush()
    img.trim(0, 40 * CS)  # what was written into the hole meanwhile does not show in the next cluster there
    img.pwrite(b"x", 5)
    assert img.pread(40 * CS, 0) == bytes(5) + b"x" + bytes(40 * CS - 6)


# Reused clusters


@pytest.mark.parametrize("backing", [0, MiB], ids=["alone", "backing"])
@pytest.mark.parametrize("layout", ["D---", "DZZZ", ""])
def test_reused_cluster_shows_nothing_old(tapped: Tapped, layout: str, backing: int) -> None:
    """A data write that failed half-way leaves bytes in a cluster; the next one to get it starts from zeros."""
    fault = FailAt(1, ["pwrite", "pwritev"], errno.ENOSPC, late=True)
    img, tap, built = tapped(None, backing, layout=layout)
    before = img.pread(4 * CS, 0)
    tap.hook = lambda call: fault(call) if call.offset >= built.end else None
    with pytest.raises(StorageError):
        img.pwrite(b"old" * 20000, CS + 100)
    assert fault.hit is not None
    tap.log.clear()
    img.pwrite(b"new", 2 * CS + 1000)
    log = logged(tap)
    assert log[-1][0] == "pwrite" and log[-1][2] == 512
    assert FLUSH in log[:-1]  # durable before it is linked: a crash must not show what it held before
    want = before[: 2 * CS + 1000] + b"new" + before[2 * CS + 1003 :]
    assert_same(img.pread(4 * CS, 0), want)
    img.close()
    report = assert_sound(built.path, leaks=None)
    assert len(report.leaks) <= 1
    with QedFile(built.path) as file:
        assert_same(file.read(0, 4 * CS), want)


@pytest.mark.parametrize(("old", "hole"), [(20, 3), (3, 20)], ids=["hole first", "hole last"])
def test_old_data_beside_a_hole(tapped: Tapped, old: int, hole: int) -> None:
    """A write gets two clusters that are apart: one reads as zeros, the other has what a failed write left there."""
    img, tap, built = tapped(layout=dict.fromkeys(range(40), "data"), size=8 * MiB)
    img.trim(old * CS, CS)
    img.flush()
    tap.hook = FailAt(1, ["pwrite"], errno.ENOSPC, late=True)
    with pytest.raises(StorageError):
        img.pwrite(b"old!" * (CS // 4), 50 * CS)
    tap.hook = None
    img.trim(hole * CS, CS)
    img.flush()
    assert img._allocator.free_clusters == 2
    data = stamp(5, 0, CS)
    img.pwrite(data, 60 * CS + 100)
    assert img._allocator.free_clusters == 0
    assert_same(img.pread(2 * CS, 60 * CS), bytes(100) + data + bytes(CS - 100))
    img.close()
    assert_sound(built.path)


# Failed calls: every call of a request fails once


@dataclass(frozen=True)
class Scene:
    """Where the failing request goes: what is there, and what is below."""

    layout: str
    pos: int  # bytes
    length: int  # bytes
    backing: int = 0  # bytes
    zero: bool = False
    may_trim: bool = False


KS = 4 * KiB  # cluster size of these scenes
END = 16 * KS
BACKED = END

SCENES = {
    "no table": Scene("", 3 * KS + 100, 700),
    "no cluster": Scene("D----", 3 * KS + 100, 700),
    "zero clusters": Scene("DZZZZZ", 2 * KS + 100, 2 * KS),
    "in place": Scene("DDDDD", 3 * KS + 100, 700),
    "mixed": Scene("D-ZD-Z", KS - 300, 4 * KS),
    "no table, backing": Scene("", 3 * KS + 100, 700, BACKED),
    "no cluster, backing": Scene("D----", 3 * KS + 100, 700, BACKED),
    "zero clusters, backing": Scene("DZZZZZ", 2 * KS + 100, 2 * KS, BACKED),
    "zero": Scene("D----", KS, 3 * KS, BACKED, zero=True),
    "zero, no table": Scene("", 100, 3 * KS, BACKED, zero=True),
    "zero, mixed": Scene("D-ZD-Z", KS - 300, 4 * KS, BACKED, zero=True),
    "freeing zero": Scene("DDDDDD", KS - 300, 4 * KS, may_trim=True, zero=True),
    "freeing zero, backing": Scene("D-ZDDZ", KS - 300, 5 * KS, BACKED, may_trim=True, zero=True),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN], ids=["EIO", "EAGAIN"])
@pytest.mark.parametrize("name", SCENES)
def test_every_failed_call(
    tapped: Tapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, late: bool
) -> None:
    """B2, B6: the request fails with that errno; what memory says is what the disk says; nothing is lost later."""
    scene = SCENES[name]
    monkeypatch.setattr(allocator, "GROWTH_STEP", 4 * KS)
    for n in range(1, 100):
        fault = FailAt(n, [*CHANGES, "pread"], code, late)
        fault.armed = False
        img, tap, built = tapped(fault, scene.backing, layout=scene.layout, cluster_size=KS, table_size=2)
        old = img.pread(END, 0)
        new = bytearray(old)
        data = bytes(scene.length) if scene.zero else stamp(6, scene.pos, scene.length)
        new[scene.pos : scene.pos + scene.length] = data

        def request() -> None:
            if scene.zero:
                img.zero(scene.pos, scene.length, may_trim=scene.may_trim)  # noqa: B023
            else:
                img.pwrite(data, scene.pos)  # noqa: B023

        fault.armed = True
        try:
            request()
        except StorageError as error:
            assert error.errno == code
        else:
            if fault.hit is None:
                break
            # Only the step by which the file grows may fail unseen: it grows by what is needed instead.
            assert fault.hit.name == "truncate"
            assert img.pread(END, 0) == new
        where = f"call {n}: {fault.hit}"
        got = img.pread(END, 0)
        for pos in range(0, END, 512):
            assert got[pos : pos + 512] in (old[pos : pos + 512], bytes(new[pos : pos + 512])), f"{where}, {pos:#x}"
        with QedFile(built.path) as file:
            assert file.read(0, END) == got, where
            assert not file.verify().errors, where
        # Other clusters of the same table, then the same request again.
        more = {7 * KS + 500: b"other" * 50, scene.pos + scene.length + 600: b"near" * 50}
        expected = bytearray(got)
        for pos, text in more.items():
            img.pwrite(text, pos)
            expected[pos : pos + len(text)] = text
        assert img.pread(END, 0) == expected, where
        request()
        expected[scene.pos : scene.pos + scene.length] = data
        img.flush()
        # A kill after the flush: the next open repairs if it has to, and finds everything.
        copy = tmp_path / "killed.qed"
        shutil.copy(built.path, copy)
        for path in (copy, built.path):
            if path == built.path:
                img.close()
            with qedcore.open_image(path) as again:
                assert again.pread(END, 0) == expected, where
            with QedFile(path) as file:
                assert file.read(0, END) == expected, where
            assert_sound(path, leaks=None)
    assert n > (1 if name == "in place" else 3)


def test_lost_write_of_b2(tapped: Tapped) -> None:
    """The reproduction of B2: entries that exist in memory only, later acknowledged as in-place writes."""
    fault = FailAt(1, ["pwrite"])
    img, tap, built = tapped(layout="D")
    tap.hook = lambda call: fault(call) if call.offset == built.l2_offsets[0] else None
    with pytest.raises(StorageError):
        img.pwrite(b"a" * CS, CS)
    assert img.pread(CS, CS) == bytes(CS)
    img.pwrite(b"b" * CS, CS)
    img.flush()
    img.close()
    with QedFile(built.path) as file:
        assert file.read(CS, CS) == b"b" * CS


def test_need_check_stays_after_a_failed_metadata_write(tapped: Tapped) -> None:
    """The next writable open repairs what nobody knows."""
    fault = FailAt(1, ["pwrite"], late=True)
    img, _, built = tapped(lambda call: fault(call) if call.length == 512 else None, layout="D")
    with pytest.raises(StorageError):
        img.pwrite(b"a" * CS, CS)
    img.close()
    with QedFile(built.path) as file:
        assert file.need_check
    qedcore.open_image(built.path).close()
    assert_sound(built.path)


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
def test_run_ends_with_the_file(image: Image, writable: bool) -> None:
    """The last cluster is read, the next one of the run is an error, however they are asked for."""
    built = image(layout="D", leaks=2, entries={n: lambda b, n=n: b.end + (n - 3) * CS for n in (1, 2, 3)})
    with qedcore.open_image(built.path, writable) as img:
        for pos, length in ((CS, 3 * CS), (2 * CS, 2 * CS), (3 * CS, 1), (3 * CS - 1, 2)):
            for request in (lambda: img.pread(length, pos), lambda: img.extents(pos, length)):  # noqa: B023
                with pytest.raises(CorruptImageError, match="L2 entry 3 at .* not a cluster"):
                    request()
        assert img.pread(2 * CS, CS) == bytes(2 * CS)
        assert extents(img, 0, 3 * CS) == [(3 * CS, "FOUND")]
        assert extents(img, 0, 4 * CS, one=True) == [(3 * CS, "FOUND")]  # the next request is told


# Extents


@pytest.mark.parametrize("backing", [0, 3 * CS + 5, MiB])
def test_extents(tapped: Tapped, rng: random.Random, backing: int) -> None:
    layout = "".join(rng.choice("DZ-") for _ in range(20))
    size = 20 * CS - 512
    img, tap, built = tapped(layout=layout, size=size, backing=backing)

    def kind(pos: int) -> str:
        here = built.kinds[pos // CS]
        return "FOUND" if here == "data" or (here == "-" and pos < backing) else "ZERO"

    for _ in range(100):
        pos = rng.randrange(size)
        length = rng.randrange(1, size - pos + 1)
        at = pos
        previous = None
        for n, found in extents(img, pos, length):
            assert n > 0 and found != previous  # neighbours of one kind are joined
            for probe in {at, at + n - 1, at + n // 2}:
                assert found == kind(probe), (pos, length, probe)
            at += n
            previous = found
        assert at == pos + length
    assert tap.log == []


@pytest.mark.parametrize("backing", [0, 40 * CS + 5])
def test_extents_after_every_change(tapped: Tapped, rng: random.Random, backing: int) -> None:
    """What was remembered of a table does not outlive a change of it, nor a failure after which it is read again."""
    clusters = 3000
    img, tap, _ = tapped(layout="D" * 40, size=clusters * CS, backing=backing)
    for turn in range(60):
        first = rng.choice([0, 15, 40, 100, 1000])
        change = [
            lambda: img.pwrite(b"x" * CS, first * CS),  # noqa: B023
            lambda: img.trim(first * CS, (clusters - first) * CS),  # noqa: B023
            lambda: img.zero(first * CS, 50 * CS, may_trim=True),  # noqa: B023
        ][turn % 3]
        if turn % 4 == 3:
            tap.hook = FailAt(rng.choice([1, 2]), ["pwrite"], late=True)
        try:
            change()
        except StorageError:
            pass
        tap.hook = None
        at = 0
        for n, kind in extents(img, 0, img.size):
            for cluster in range(at // CS, (at + n) // CS):
                here = img.lookup(cluster * CS, CS)[0].name
                data = here == "FOUND" or (here != "ZERO" and cluster * CS < backing)
                assert data == (kind == "FOUND") or cluster == backing // CS, (turn, cluster)
            at += n
        assert at == img.size


def test_extents_beside_a_write(tapped: Tapped, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen of a table before it changed is not remembered after."""
    img, _, _ = tapped(layout="-", size=GiB)
    gate = Gate()
    look = img._clusters._few_runs

    def slow(start: int) -> Any:
        runs = look(start)
        gate.stop()
        return runs

    monkeypatch.setattr(img._clusters, "_few_runs", slow)
    job = Job(img.extents, 0, GiB)
    gate.reached()
    monkeypatch.undo()
    img.pwrite(b"x", 100 * CS)
    gate.open()
    job.result()
    assert extents(img, 0, GiB) == [
        (100 * CS, "ZERO"),
        (CS, "FOUND"),
        (GiB - 101 * CS, "ZERO"),
    ]


# Two requests at a time, one step after the other


@pytest.mark.parametrize("backing", [0, 30 * MiB])
def test_extents_of_long_runs(image: Image, tmp_path: Path, rng: random.Random, backing: int) -> None:
    """Runs of all lengths in many tables, and gaps of many tables, against one cluster after the other."""
    entries, tables = 2048, 80
    reach = entries * 4 * KiB
    size = tables * reach - 512
    base = tmp_path / "base.raw"
    base.write_bytes(b"\1" * backing)  # a hole would not be data
    path = image(
        cluster_size=4 * KiB, table_size=4, size=size, backing=str(base) if backing else None, features=4
    ).path
    start = path.stat().st_size
    present = [*rng.sample(range(4), 2), *rng.sample(range(45, tables), 12), tables - 1]  # a gap of 41 tables
    data = start + len(present) * 16 * KiB
    guest = [0] * (tables * entries)  # the entry of each guest cluster
    for number in present:
        at = number * entries
        while at < (number + 1) * entries:
            n = min(rng.choice([1, 2, 31, 32, 33, 34, 64, 95, 500, entries]), (number + 1) * entries - at)
            kind = rng.randrange(3)
            first = data + rng.randrange(1 << 14) * 4 * KiB
            guest[at : at + n] = [kind] * n if kind < 2 else range(first, first + n * 4 * KiB, 4 * KiB)
            at += n
    with path.open("r+b") as file:
        file.truncate(data + (1 << 26) + entries * 4 * KiB)
        for i, number in enumerate(present):
            file.seek(4 * KiB + number * 8)
            file.write(struct.pack("<Q", start + i * 16 * KiB))
            file.seek(start + i * 16 * KiB)
            file.write(struct.pack(f"<{entries}Q", *guest[number * entries : (number + 1) * entries]))

    def has_data(cluster: int) -> bool:
        return guest[cluster] > 1 or (guest[cluster] == 0 and cluster * 4 * KiB < backing)

    with qedcore.open_image(path) as img:
        edges = [number * reach for number in present] + [4 * reach, 45 * reach, backing, size]
        for _ in range(100):
            pos = min(max(rng.choice(edges) + rng.randrange(-40, 40) * rng.choice([1, 512, 4096]), 0), size - 1)
            length = min(rng.choice([1, 4096, 33 * 4096, reach, 3 * reach, size]), size - pos)
            want: list[tuple[int, bool]] = []
            at = pos
            while at < pos + length:
                n = min(4096 - at % 4096, pos + length - at)
                at += n
                here = has_data((at - 1) // 4096)
                if want and want[-1][1] is here:
                    n += want.pop()[0]
                want.append((n, here))
            assert [(n, kind == "FOUND") for n, kind in extents(img, pos, length)] == want, (pos, length)
            assert [(n, kind == "FOUND") for n, kind in extents(img, pos, length, one=True)] == want[:1]
            kind, offset, n = img.lookup(pos, length)
            cluster, entry = pos // 4096, guest[pos // 4096]
            last = cluster + 1
            end = min(-(-(pos + length) // 4096), (cluster // entries + 1) * entries)
            while last < end and guest[last] == (entry + (last - cluster) * 4096 if entry > 1 else entry):
                last += 1
            assert n == min(last * 4096 - pos, length)
            assert offset == (entry + pos % 4096 if entry > 1 else 0)


def stop_at(gate: Gate, matches: Callable[[Call], bool]) -> Hook:
    """A hook that stops the first call that matches."""
    stopped: list[Call] = []

    def hook(call: Call) -> None:
        if not stopped and matches(call):
            stopped.append(call)
            gate.stop()

    return hook


@pytest.mark.parametrize("layout", ["", "D--", "DZZ"])
@pytest.mark.parametrize("backing", [0, MiB])
def test_two_writes_to_one_new_cluster(tapped: Tapped, layout: str, backing: int) -> None:
    """The second waits for the first, looks again, and writes in place."""
    gate, second_gate = Gate(), Gate()
    img, tap, built = tapped(backing=backing, layout=layout)
    before = img.pread(CS, CS)
    hook = stop_at(gate, lambda call: call.name.startswith("pwrite") and call.offset >= built.end)

    def either(call: Call) -> None:
        if call.offset >= built.end and call.name.startswith("pwrite") and second:
            second_gate.stop()
        hook(call)

    second: list[int] = []
    tap.hook = either
    jobs = [Job(img.pwrite, b"1" * 100, CS + 200)]
    gate.reached()
    second.append(1)
    jobs.append(Job(img.pwrite, b"2" * 100, CS + 900))
    second_gate.avoided()
    tap.hook = None
    second_gate.open(9)
    gate.open()
    for job in jobs:
        job.result()
    want = before[:200] + b"1" * 100 + before[300:900] + b"2" * 100 + before[1000:]
    assert_same(img.pread(CS, CS), want)
    img.close()
    assert_sound(built.path)
    with QedFile(built.path) as file:
        assert_same(file.read(CS, CS), want)


def test_tables_do_not_wait_for_each_other(tapped: Tapped) -> None:
    gate = Gate()
    img, tap, built = tapped(size=8 * GiB)
    tap.hook = stop_at(gate, lambda call: call.name.startswith("pwrite") and call.offset >= built.end)
    first = Job(img.pwrite, b"1" * 100, 200)
    gate.reached()
    Job(img.pwrite, b"2" * 100, 2 * GiB + 200).result()  # done while the first is stopped
    assert img.pread(100, 2 * GiB + 200) == b"2" * 100
    assert img.pread(100, 200) == bytes(100)
    gate.open()
    first.result()
    assert img.pread(100, 200) == b"1" * 100


@pytest.mark.parametrize("backing", [0, MiB])
@pytest.mark.parametrize("layout", ["", "D--", "DZZ"])
def test_nothing_is_seen_before_it_is_linked(tapped: Tapped, layout: str, backing: int) -> None:
    """I1: at every write of an allocating write, readers still see what was there before."""
    img, tap, built = tapped(backing=backing, layout=layout)
    before = img.pread(3 * CS, 0)
    gate = Gate()
    tap.hook = lambda call: gate.stop() if call.name in CHANGES else None
    job = Job(img.pwrite, b"1" * CS, CS)
    for _ in range(99):
        gate.reached()
        assert_same(Job(img.pread, 3 * CS, 0).result(), before)
        last = tap.log[-1]
        if last.length == 512 and last.offset in (built.l1_offset, built.l2_offsets.get(0)):
            break
        gate.open()
    gate.open()
    job.result()
    assert_same(img.pread(3 * CS, 0), before[:CS] + b"1" * CS + before[2 * CS :])
    tap.hook = None


def test_readers_and_writers_in_place_do_not_wait(tapped: Tapped) -> None:
    gate = Gate()
    img, tap, built = tapped(layout="DD--")
    tap.hook = stop_at(gate, lambda call: call.name.startswith("pwrite") and call.offset >= built.end)
    first = Job(img.pwrite, b"1" * 100, 2 * CS + 200)
    gate.reached()
    Job(img.pwrite, b"2" * 100, 5).result()
    assert Job(img.pread, 100, 5).result() == b"2" * 100
    Job(img.zero, CS, 100).result()
    Job(img.flush).result()
    gate.open()
    first.result()


@pytest.mark.parametrize("layout", ["", "Z" * 64, "D"], ids=["no table", "zero clusters", "table"])
def test_zeros_replace_what_the_buffer_held(image: Image, layout: str) -> None:
    with qedcore.open_image(image(size=4 * MiB, layout=layout).path) as img:
        for length in (1, 512, CS + 3, MiB - 1, MiB, 3 * MiB + 5):
            buf = bytearray(b"\xff" * length)
            img.pread_into(buf, 4 * MiB - length)
            assert not any(buf), length


# The short way of an allocating write: one fresh cluster in a dirty period, nothing below


@pytest.fixture
def dirty(tapped: Tapped) -> Callable[..., tuple[qedcore.QEDImage, Tap, Built]]:
    """As tapped; the dirty period has begun, and the first tables are in the cache."""

    def make(**spec: Any) -> tuple[qedcore.QEDImage, Tap, Built]:
        img, tap, built = tapped(**spec)
        img.pwrite(b"first", 100 * CS)
        tap.log.clear()
        return img, tap, built

    return make


@pytest.mark.parametrize("layout", ["D--", "DZZ"])
def test_one_fresh_cluster(tapped: Tapped, layout: str) -> None:
    """The flag, durable; then for each write its data, and its entry after it."""
    img, tap, built = tapped(layout=layout)
    table = ("pwrite", built.l2_offsets[0], 512)
    img.pwrite(b"1" * 700, CS + 100)
    assert logged(tap) == [SET, FLUSH, GROW, ("pwrite", built.end + 100, 700), table]
    img.pwrite(b"2" * CS, 2 * CS)
    assert logged(tap) == [("pwrite", built.end + CS, CS), table]
    assert img._gate.clear()
    tap.log.clear()
    img.pwrite(b"3" * 700, 3 * CS)  # and again in the next dirty period
    assert logged(tap) == [SET, FLUSH, GROW, ("pwrite", built.end + 2 * CS, 700), table]
    assert_same(
        img.pread(3 * CS, CS), bytes(100) + b"1" * 700 + bytes(CS - 800) + b"2" * CS + b"3" * 700 + bytes(CS - 700)
    )


def test_a_cluster_that_another_has_written_meanwhile(dirty: Tapped) -> None:
    """It had no data when the write first looked: it looks again, and writes in place."""
    img, _, _ = dirty(layout="D--")
    end = img._bounds.end
    img._gate.inside = Interrupted(lambda: Job(img.pwrite, b"2" * 100, CS + 900).result(), before=False)
    img.pwrite(b"1" * 100, CS + 200)
    assert img._bounds.end == end + CS
    assert_same(img.pread(CS, CS), bytes(200) + b"1" * 100 + bytes(600) + b"2" * 100 + bytes(CS - 1000))
    assert not img._gate.inside and not img._requests._claims.claimed


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_fresh_cluster_whose_data_failed_is_used_again(dirty: Tapped, late: bool) -> None:
    img, tap, built = dirty(layout="D--")
    end = img._bounds.end
    tap.hook = FailAt(1, ["pwrite"], errno.ENOSPC, late)
    with pytest.raises(StorageError):
        img.pwrite(b"old" * 300, CS + 100)
    assert not img._gate.inside and not img._requests._claims.claimed
    img.pwrite(b"new", 2 * CS + 500)
    assert img._bounds.end == end + CS
    assert_same(img.pread(2 * CS, CS), bytes(CS + 500) + b"new" + bytes(CS - 503))
    img.close()
    assert_sound(built.path)


def test_who_waits_for_a_fresh_cluster_goes_on(dirty: Tapped) -> None:
    img, tap, built = dirty(layout="D--")
    gate, waits = Gate(), Waits(img._requests._claims._given_up)
    tap.hook = stop_at(gate, lambda call: call.name == "pwrite" and call.offset >= built.end)
    jobs = [Job(img.pwrite, b"1" * 100, CS + 200)]
    gate.reached()
    jobs.append(Job(img.pwrite, b"2" * 100, CS + 900))
    waits.come()
    gate.open()
    for job in jobs:
        job.result()
    assert_same(img.pread(CS, CS), bytes(200) + b"1" * 100 + bytes(600) + b"2" * 100 + bytes(CS - 1000))
    assert not img._requests._claims.claimed


def test_entries_of_fresh_clusters_are_written_one_by_one(dirty: Tapped) -> None:
    """They share a sector: who writes it has the other's entry in it."""
    img, tap, built = dirty(layout="D--")
    first, second = Gate(), Gate()
    is_table = lambda call: call.offset == built.l2_offsets[0]  # noqa: E731
    tap.hook = stop_at(first, is_table)
    jobs = [Job(img.pwrite, b"1" * 100, CS)]
    first.reached()
    tap.hook = stop_at(second, is_table)
    jobs.append(Job(img.pwrite, b"2" * 100, 2 * CS))
    second.avoided()
    first.open()
    second.open()
    for job in jobs:
        job.result()
    img.close()
    with QedFile(built.path) as file:
        assert_same(file.read(CS, 2 * CS), b"1" * 100 + bytes(CS - 100) + b"2" * 100 + bytes(CS - 100))


def test_tables_of_fresh_clusters_stay_in_the_cache(image: Image) -> None:
    """One that is written to all the time is not the one that goes."""
    reach = 512 * 4 * KiB
    built = image(cluster_size=4 * KiB, table_size=1, size=3 * reach, layout={0: "data", 512: "zero", 1024: "zero"})
    with qedcore.open_image(built.path, l2_cache=0) as img:  # room for two
        img.pwrite(b"x", 100 * 4 * KiB)
        img.pread(1, reach)
        assert list(img._clusters.cache.slices) == [0, 1]
        img.pwrite(b"x", 101 * 4 * KiB)
        img.pread(1, 2 * reach)
        assert list(img._clusters.cache.slices) == [0, 2]


@pytest.mark.parametrize("layout", ["", "D--"], ids=["no table", "no cluster"])
def test_what_a_zero_overtook_is_used_again(tapped: Tapped, layout: str) -> None:
    """A write has filled its cluster from the backing file, which is hidden meanwhile: nothing leaks."""
    img, tap, built = tapped(layout=layout, backing=MiB)
    gate = Gate()
    tap.hook = stop_at(gate, lambda call: call.name in ("pwrite", "pwritev") and call.offset >= built.end)
    job = Job(img.pwrite, b"new", CS + 100)
    gate.reached()
    img.zero(CS, CS)
    gate.open()
    job.result()
    clusters = 1 if layout else 1 + built.spec.table_size
    assert img._bounds.end == built.end + clusters * CS
    assert_same(
        img.pread(3 * CS, 0),
        built.read(0, CS, raw_reader(Path(built.path).with_name("base.raw")))
        + bytes(100)
        + b"new"
        + bytes(CS - 103)
        + stamp(BASE, 2 * CS, CS),
    )
    img.close()
    assert_sound(built.path)


def test_a_table_that_cannot_be_read_again_leaks_nothing(image: Image, tmp_path: Path) -> None:
    """It left the cache before new data was linked there: nothing points at that, so it is used again."""
    cluster_size, reach = 4 * KiB, 512 * 4 * KiB
    (tmp_path / "base.raw").write_bytes(stamp(BASE, 0, MiB))
    layout = {0: "data", 512: "zero", 1024: "zero"}
    spec: dict[str, Any] = {"cluster_size": cluster_size, "table_size": 1, "size": 3 * reach}
    built = image(layout=layout, backing="base.raw", no_probe=True, **spec)
    img, tap = open_tapped(built.path, l2_cache=0)  # room for two
    img.pwrite(b"first", 5 * cluster_size)
    end = img._bounds.end

    def forget() -> None:
        tap.hook = None
        for table in (1, 2):
            img.pread(1, table * reach)

    def evict(call: Call) -> None:
        if call.name == "flush":
            forget()
            tap.hook = FailAt(1, ["pread"])

    forget()
    tap.hook = evict
    with pytest.raises(StorageError, match="injected"):
        img.pwrite(b"lost", 9 * cluster_size)
    img.pwrite(b"next", 11 * cluster_size)
    assert img._bounds.end == end + cluster_size
    img.close()
    assert_sound(built.path)
