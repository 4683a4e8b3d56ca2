"""Writes and zeros: what the guest sees, and what goes to disk in which order."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.patterns import GiB, KiB, MiB, Model, assert_same, check_model, random_ops, stamp, zeros
from support.qed_image import Geometry, QedFile, assert_sound, raw_reader

import qedcore
from qedcore.errors import (
    UnsupportedError,
)
from unit.engine.tapped import BASE, CS, FLUSH, GROW, SET, Image, Tapped, logged
from unit.fakes import open_tapped


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


def kinds(path: str, n: int) -> str:
    with QedFile(path) as file:
        entries = [file.entry(cluster) for cluster in range(n)]
    return "".join("-" if entry == 0 else "Z" if entry == 1 else "D" for entry in entries)


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
