"""What moving clusters needs of the disk: holes stay holes, and space is given back before any is needed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.crashes import RecordedFile, World, check_crashes, guest
from support.patterns import KiB
from support.qed_image import Built, QedFile, assert_sound

import qedcore
from qedcore.errors import StorageError
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
@pytest.mark.parametrize("l1_last", [False, True], ids=["", "L1 table last"])
def test_compact_on_a_full_disk(image: Image, leaks: list[int], limited: bool, l1_last: bool) -> None:
    """Leaks are given back before anything is copied, and nothing is beyond the end of the file."""
    path = image(**GEOMETRY, size=200 * CS, layout="D" * 20, reverse=True, l1_last=l1_last).path
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
            raise StorageError("injected", OSError(errno.EIO, ""))
        SmallDisk.pwrite(disk, buf, offset)

    disk.pwrite = broken  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="injected"), opened(disk) as img:
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


@pytest.mark.parametrize("leaks", [[], [3, 7], [0, 1, 2, 5]], ids=len)
def test_crash_while_space_is_short(image: Image, monkeypatch: pytest.MonkeyPatch, leaks: list[int]) -> None:
    """Windows get smaller, and what was begun is given up: at no step is anything lost."""
    cs = 4 * KiB
    monkeypatch.setattr(module, "WINDOW", 8 * cs)
    layout = dict.fromkeys([*range(9), 513], "data")
    path = image(cluster_size=cs, table_size=1, size=600 * cs, layout=layout, reverse=True).path
    cleared(path, leaks)
    before, length = guest(path), path.stat().st_size
    write, truncate = RecordedFile.pwrite, RecordedFile.truncate

    def limited(file: RecordedFile, data: Any, offset: int) -> None:
        if offset + len(data) > length:
            raise StorageError("too long", OSError(errno.EFBIG, "File too large"))
        write(file, data, offset)

    def limited_truncate(file: RecordedFile, size: int) -> None:
        if size > length:
            raise StorageError("too long", OSError(errno.EFBIG, "File too large"))
        truncate(file, size)

    world = World(path)
    with monkeypatch.context() as patch:
        patch.setattr(RecordedFile, "pwrite", limited)
        patch.setattr(RecordedFile, "truncate", limited_truncate)
        with qedcore.open_image(path, opener=world.open) as img:
            compact(img)
    assert check_crashes(world, path, [before]) > 5
    world.save()
    assert_sound(path)
    assert path.stat().st_size == length - len(leaks) * cs
