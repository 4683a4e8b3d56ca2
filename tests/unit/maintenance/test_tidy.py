"""Tidying: its limits, what it reads, and that it is no compaction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.crashes import World, guest
from support.patterns import KiB
from support.qed_image import Built, assert_sound

import qedcore
from qedcore.maintenance import compact as module
from qedcore.maintenance.tidy import tidy
from unit.fakes import SmallDisk

CS = 64 * KiB
GEOMETRY = {"cluster_size": CS, "table_size": 1}
Image = Callable[..., Built]


def opened(disk: SmallDisk) -> qedcore.QEDImage:
    return qedcore.open_image("disk", opener=lambda path, writable, mode: disk)


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
    # One block of each table; and the cluster that is moved, with the sector of its entry and that of the header.
    blocks = (20 + 1) * SmallDisk.BLOCK
    assert blocks <= disk.bytes_read <= blocks + cs + 8 * KiB


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
    """Where a table fits nowhere, those above a hole move down: nothing is put in order for it."""
    cs = 4 * KiB
    layout = {n * 512 * 4: "data" for n in range(8)}  # tables of 4 clusters, each with one cluster of data
    path = image(cluster_size=cs, table_size=4, size=8 * 512 * 4 * cs, layout=layout).path
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
    assert left == 0
    assert_sound(path)


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
