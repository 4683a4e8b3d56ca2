"""Entries that point past the end of a file whose NEED_CHECK is clear: what QEMU can leave after a power loss.

The next allocations take just the place they point to. They must stay invalid then, or two guest clusters would share
one cluster of the file.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from support.qed_image import ImageSpec, QedFile, build

import qedcore
from qedcore.engine.dangling import PastEnd
from qedcore.errors import CorruptImageError
from qedcore.format.table import Table

CS = 64 * 1024
SPAN = 32768 * CS  # guest bytes of one L2 table
SPEC = {"size": 4 * SPAN, "layout": {0: "data", 32768: "data"}}


@pytest.mark.parametrize("l2_cache", [0, 8 << 20], ids=["tables are evicted", "tables stay"])
@pytest.mark.parametrize("ahead", [0, 1, 4], ids=lambda n: f"{n} clusters past the end")
def test_l2_entry_past_the_end_stays_invalid(tmp_path: Path, ahead: int, l2_cache: int) -> None:
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, entries={1: lambda b: b.end + ahead * CS, 2: 1}))  # type: ignore[arg-type]
    with qedcore.open_image(path, l2_cache=l2_cache) as image:
        image.pwrite(b"Z" * (8 * CS), 9 * CS)  # takes the place
        for pos in range(0, 4 * SPAN, SPAN):  # other tables push the first one out
            image.pwrite(b"other", pos + 7 * CS)
        with pytest.raises(CorruptImageError, match=r"L2 entry 1 at .* points to 0x[0-9a-f]+0001:"):
            image.pread(1, CS)
        with pytest.raises(CorruptImageError):
            image.pwrite(b"x", CS)
        assert image.pread(8 * CS, 9 * CS) == b"Z" * (8 * CS)
        assert image.pread(1, 2 * CS) == b"\0"
        image.pwrite(b"y", 3 * CS)  # writes the sector of entry 1
    with QedFile(path) as file:
        offsets = [entry for entry in file.entries().values() if entry > 1]
        assert len(offsets) == len(set(offsets))


@pytest.mark.parametrize("entry", ["L1", "L2"])
def test_they_stay_invalid_in_later_sessions(tmp_path: Path, entry: str) -> None:
    """Also when the file has grown over the place before the table with the entry is first read."""
    path = tmp_path / "image.qed"
    past = {1: lambda b: b.end} if entry == "L2" else {}
    l1_past = {2: lambda b: b.end} if entry == "L1" else {}
    build(path, ImageSpec(**SPEC, entries=past, l1_entries=l1_past))  # type: ignore[arg-type]
    notices: list[str] = []
    with qedcore.open_image(path, log=notices.append) as image:
        image.pwrite(b"Z" * (8 * CS), SPAN + 9 * CS)
        with pytest.raises(CorruptImageError):
            image.pread(1, CS if entry == "L2" else 2 * SPAN)
    assert [line for line in notices if "pointed past the end" in line]
    for writable in (True, False, True):
        with qedcore.open_image(path, writable) as image:
            with pytest.raises(CorruptImageError):
                image.pread(1, CS if entry == "L2" else 2 * SPAN)
            assert image.pread(8 * CS, SPAN + 9 * CS) == b"Z" * (8 * CS)


def test_reading_does_not_change_a_read_only_image(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, entries={1: lambda b: b.end}))  # type: ignore[arg-type]
    before = path.read_bytes()
    with qedcore.open_image(path, False) as image, pytest.raises(CorruptImageError):
        image.pread(1, CS)
    assert path.read_bytes() == before


def test_l1_entry_past_the_end_stays_invalid(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, l1_entries={2: lambda b: b.end, 3: lambda b: b.end - CS}))  # type: ignore[arg-type]
    with qedcore.open_image(path) as image:
        image.pwrite(b"Z" * (16 * CS), 9 * CS)
        for table in (2, 3):
            with pytest.raises(CorruptImageError, match=rf"L1 entry {table} at .* points to 0x[0-9a-f]+0001:"):
                image.pread(1, table * SPAN)
            with pytest.raises(CorruptImageError):
                image.pwrite(b"x", table * SPAN)
        assert image.pread(16 * CS, 9 * CS) == b"Z" * (16 * CS)


def test_own_tables_and_clusters_past_the_old_end_are_valid(tmp_path: Path) -> None:
    """What was allocated since the open lies past the old end, too, and is read back after eviction."""
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC))  # type: ignore[arg-type]
    with qedcore.open_image(path, l2_cache=0) as image:
        for table in range(4):
            for cluster in (5, 70, 5000):
                image.pwrite(b"%d/%d" % (table, cluster), table * SPAN + cluster * CS)
        for table in range(4):
            for cluster in (5, 70, 5000):
                want = b"%d/%d" % (table, cluster)
                assert image.pread(len(want), table * SPAN + cluster * CS) == want


def test_reading_costs_no_memory_that_stays(tmp_path: Path) -> None:
    """However many tables a client reads, more is kept only of those that are written."""
    path = tmp_path / "image.qed"
    build(path, ImageSpec(size=1 << 61, cluster_size=1 << 20, table_size=16, layout={0: "data"}))  # type: ignore[arg-type]
    with qedcore.open_image(path, l2_cache=0) as image:
        slice_bytes = 1 << image.geometry.slice_shift
        image.pread(1, 0)
        tracemalloc.start()
        try:
            for pos in range(0, 32 * slice_bytes, slice_bytes):  # one table of many slices
                image.pread(1, pos)
            before = tracemalloc.get_traced_memory()[0]
            for pos in range(0, 1024 * slice_bytes, slice_bytes):
                image.pread(1, pos)
            assert tracemalloc.get_traced_memory()[0] - before < 10_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("remembered", [100, 5], ids=["", "more than are remembered"])
def test_tables_are_screened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: int) -> None:
    """However often they are read: it takes longer than the rest of a read."""
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC))  # type: ignore[arg-type]
    screened: list[int] = []
    screen = PastEnd._screen

    def note(self: PastEnd, table: Table, offset: int, limit: int) -> None:
        screened.append(offset)
        screen(self, table, offset, limit)

    monkeypatch.setattr(PastEnd, "_screen", note)
    monkeypatch.setattr("qedcore.engine.dangling._MAX_REMEMBERED", remembered)
    with qedcore.open_image(path, l2_cache=0) as image:
        del screened[:]
        for _ in range(3):
            for pos in range(0, 10 << image.geometry.slice_shift, 1 << image.geometry.slice_shift):
                image.pread(1, pos)
    assert len(set(screened)) == 10
    assert len(screened) == (10 if remembered == 100 else 5 + 3 * 5)
