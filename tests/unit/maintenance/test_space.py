"""What moving clusters needs of the disk: holes stay holes, and space is given back before any is needed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.crashes import World, check_crashes, guest
from support.patterns import KiB
from support.qed_image import Built, QedFile, assert_sound

import qedcore
from qedcore.maintenance import compact as module
from qedcore.maintenance.compact import compact
from qedcore.maintenance.tidy import tidy
from unit.fakes import SmallDisk

CS = 64 * KiB
BLOCK = SmallDisk.BLOCK
GEOMETRY = {"cluster_size": CS, "table_size": 1}
Image = Callable[..., Built]


def cleared(path: Path, clusters: list[int]) -> None:
    """Make clusters leaks."""
    with QedFile(path) as oracle, path.open("r+b") as file:
        for cluster in clusters:
            index, slot = divmod(cluster, oracle.geometry.entries)
            file.seek(oracle.l1[index] + slot * 8)
            file.write(bytes(8))


def sparse(path: Path) -> None:
    """Leave 4 KiB of data in the middle of each cluster, and the last cluster zeros."""
    with QedFile(path) as oracle:
        entries = sorted(oracle.entries().values())
    with path.open("r+b") as file:
        for entry in entries:
            file.seek(entry)
            file.write(bytes(5 * BLOCK))
            file.seek(entry + 6 * BLOCK)
            file.write(bytes(CS - 6 * BLOCK))
        file.seek(entries[-1])
        file.write(bytes(CS))


def opened(disk: SmallDisk) -> qedcore.QEDImage:
    return qedcore.open_image("disk", opener=lambda path, writable, mode: disk)


@pytest.mark.parametrize("can_punch", [True, False], ids=["", "no holes"])
@pytest.mark.parametrize("work", [compact, tidy])
def test_holes_stay_holes(
    image: Image, monkeypatch: pytest.MonkeyPatch, work: Callable[[qedcore.QEDImage], Any], can_punch: bool
) -> None:
    path = image(**GEOMETRY, size=200 * CS, layout="D" * 20, reverse=True).path
    sparse(path)
    before = guest(path)
    disk = SmallDisk(path.read_bytes())
    if not can_punch:
        monkeypatch.setattr(disk, "punch", lambda offset, length: False)
    blocks = len(disk.blocks)
    with opened(disk) as img:
        img.trim(CS, 2 * CS)
        img.flush()
        work(img)
    path.write_bytes(disk.data)
    assert_sound(path)
    assert guest(path) == before[:CS] + bytes(2 * CS) + before[3 * CS :]
    if can_punch:
        assert len(disk.blocks) <= blocks


@pytest.mark.parametrize("limited", [False, True], ids=["full", "file size limit"])
@pytest.mark.parametrize("leaks", [[3, 4, 5, 6, 11], [7, 11]], ids=["several", "two"])
def test_compact_on_a_full_disk(image: Image, leaks: list[int], limited: bool) -> None:
    """Leaks are given back before anything is copied, and nothing is beyond the end of the file."""
    path = image(**GEOMETRY, size=200 * CS, layout="D" * 20, reverse=True).path
    cleared(path, leaks)
    before, length = guest(path), path.stat().st_size
    disk = SmallDisk(path.read_bytes(), limit=length) if limited else SmallDisk(path.read_bytes(), free=0)
    with opened(disk) as img:
        assert compact(img)
        assert img.pread(img.size, 0) == before
    path.write_bytes(disk.data)
    assert_sound(path)
    assert path.stat().st_size == length - len(leaks) * CS
    assert guest(path) == before


def test_compact_without_space_for_the_order(image: Image) -> None:
    """It stays as it is, and needs no repair."""
    layout = {n * 2000: "data" for n in range(10)}
    path = image(cluster_size=CS, table_size=2, size=20000 * CS, layout=layout, reverse=True).path
    with QedFile(path) as oracle:
        before = {cluster: oracle.read(cluster * CS, CS) for cluster in layout}
    length = path.stat().st_size
    disk = SmallDisk(path.read_bytes(), limit=length)
    with opened(disk) as img:
        assert not compact(img)
        assert {cluster: img.pread(CS, cluster * CS) for cluster in layout} == before
    path.write_bytes(disk.data)
    assert_sound(path)
    assert path.stat().st_size == length


def test_another_error_than_no_space_is_one(image: Image) -> None:
    path = image(**GEOMETRY, size=200 * CS, layout="D" * 5, reverse=True).path
    disk = SmallDisk(path.read_bytes())

    def broken(buf: Any, offset: int) -> None:
        if offset >= CS:
            raise qedcore.errors.StorageError("injected", OSError(errno.EIO, ""))
        SmallDisk.pwrite(disk, buf, offset)

    disk.pwrite = broken  # type: ignore[method-assign]
    with pytest.raises(qedcore.errors.StorageError, match="injected"), opened(disk) as img:
        compact(img)


def test_crash_while_sparse_clusters_move(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that are not written are there all the same, also at the end of the file."""
    cs = 4 * KiB
    monkeypatch.setattr(module, "WINDOW", 4 * cs)
    path = image(cluster_size=cs, table_size=1, size=100 * cs, layout="D" * 10, reverse=True, leaks=2).path
    with QedFile(path) as oracle, path.open("r+b") as file:
        for cluster in (0, 3, 4, 8, 9):
            file.seek(oracle.entry(cluster))
            file.write(bytes(cs))
    before = guest(path)
    world = World(path)
    with qedcore.open_image(path, opener=world.open) as img:
        compact(img)
    assert check_crashes(world, path, [before]) > 20
    world.save()
    assert assert_sound(path).allocated == 10


# -- tidying -------------------------------------------------------------------------------------------------------


def test_tidying_reads_each_byte_of_table_once_and_no_holes(image: Image) -> None:
    """A large table with one entry is not read whole, and a table is not read again for each that overlaps it."""
    cs = 64 * KiB
    layout = {n * 16 * 8192: "data" for n in range(20)}
    path = image(cluster_size=cs, table_size=16, size=20 * 16 * 8192 * cs, layout=layout).path
    disk = SmallDisk(path.read_bytes())
    with opened(disk) as img:
        img.pwrite(bytes([1]) * cs, cs)  # at the end of the file
    with opened(disk) as img:
        img.trim(0, cs)
        img.flush()
        disk.bytes_read = disk.holes_read = 0
        assert tidy(img) == 0
    # One part of each table; and the cluster that is moved, with the sector of its entry and that of the header.
    parts = (20 + 1) * img.geometry.part_bytes
    assert parts <= disk.bytes_read <= parts + cs + 8 * KiB


@pytest.mark.parametrize("limit, value", [("TIDY_BYTES", 2 * CS), ("TIDY_CLUSTERS", 9), ("TIDY_TABLE_BYTES", CS)])
def test_limits_of_tidying(image: Image, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    path = image(**GEOMETRY, size=200 * CS, layout="D" * 20).path
    before = guest(path)
    for over in (True, False):
        disk = SmallDisk(path.read_bytes())
        with opened(disk) as img:
            img.trim(3 * CS, 5 * CS)
            img.flush()
            with monkeypatch.context() as patch:
                if over:
                    patch.setattr(f"qedcore.maintenance.tidy.{limit}", value)
                log = len(disk.data)
                assert tidy(img) == (5 if over else 0)
                assert len(disk.data) == (log if over else log - 5 * CS)
        copy = path.with_name("copy")
        copy.write_bytes(disk.data)
        assert guest(copy) == before[: 3 * CS] + bytes(5 * CS) + before[8 * CS :]


def test_tidying_is_no_compaction(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a table fits nowhere it stays, and nothing else is moved for it."""
    cs = 4 * KiB
    layout = {n * 512 * 4: "data" for n in range(8)}  # tables of 4 clusters, each with one cluster of data
    path = image(cluster_size=cs, table_size=4, size=8 * 512 * 4 * cs, layout=layout).path
    with QedFile(path) as oracle:
        last = max(oracle.l1.values())
    world = World(path)
    with qedcore.open_image(path, opener=world.open) as img:
        for n in range(3):
            img.trim(n * 512 * 4 * cs, cs)
        img.flush()
        before = img.pread(img.size, 0)
        monkeypatch.setattr(module.Arrangement, "_compact", None)
        left = tidy(img)
        assert img.pread(img.size, 0) == before
    world.save()
    report = assert_sound(path, leaks=None)
    assert len(report.leaks) == left
    with QedFile(path) as oracle:
        assert last in oracle.l1.values()


def test_tidying_stops_when_it_is_told_to(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was moved is cut off, and the rest is left."""
    monkeypatch.setattr(module, "WINDOW", 2 * CS)
    path = image(**GEOMETRY, size=200 * CS, layout="D" * 20).path
    before = guest(path)
    length = path.stat().st_size
    disk = SmallDisk(path.read_bytes())
    answers = iter([False, False, False, True])  # at the start, before the table, before two clusters of data
    with opened(disk) as img:
        img.trim(3 * CS, 5 * CS)
        img.flush()
        assert tidy(img, lambda: next(answers, True)) == 2
    path.write_bytes(disk.data)
    assert len(disk.data) == length - 3 * CS
    assert len(assert_sound(path, leaks=2).leaks) == 2
    assert guest(path) == before[: 3 * CS] + bytes(5 * CS) + before[8 * CS :]
