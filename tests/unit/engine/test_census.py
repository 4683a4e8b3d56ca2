"""The look at all tables before a file grows: entries that point past its end, shared clusters, and leaks.

QEMU can leave such entries after a power loss, and NEED_CHECK clear.  The next allocations take just the place that
they point to.  They must stay invalid then, or two guest clusters would share one cluster of the file.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import tracemalloc
from bisect import bisect_right
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.patterns import KiB
from support.qed_image import F_NEED_CHECK, F_NO_PROBE, ImageSpec, QedFile, assert_sound, build

import qedcore
from qedcore.check.cluster_use import ClusterUse
from qedcore.engine.census import Census
from qedcore.engine.chain import open_image
from qedcore.engine.image import QEDImage
from qedcore.errors import CorruptImageError, StorageError, UnreachableError
from qedcore.format.table import Table
from unit.fakes import Call, Gate, Job, MemoryStorage, open_tapped

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
        with pytest.raises(CorruptImageError, match=r"L2 entry 1 at .* points to 0x[0-9a-f]+bad:"):
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
            with pytest.raises(CorruptImageError, match=rf"L1 entry {table} at .* points to 0x[0-9a-f]+bad:"):
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


# What follows needs more than one session, or a damaged image


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("work", ["pwrite", "zero", "trim"])
def test_a_cluster_that_is_lost_can_be_overwritten(tmp_path: Path, work: str, backing: bool) -> None:
    """As a whole: then nothing is left of what its entry was for.  In part it stays unreadable."""
    path = tmp_path / "image.qed"
    (tmp_path / "base").write_bytes(b"base" * (CS * 8 // 4))
    below = {"backing": "base", "features": F_NO_PROBE} if backing else {}
    build(path, ImageSpec(**SPEC, **below, entries={1: lambda b: b.end, 2: lambda b: b.end + CS}))  # type: ignore[arg-type]
    new = b"new!" * (CS // 4) if work == "pwrite" else bytes(CS)
    with qedcore.open_image(path) as image:
        for pos, length in ((CS, 512), (CS + 512, CS), (CS, CS - 1)):
            with pytest.raises(CorruptImageError):
                image.pwrite(b"x" * length, pos) if work == "pwrite" else image.zero(pos, length)
        if work == "pwrite":
            image.pwrite(new, CS)
        else:
            getattr(image, work)(CS, CS)
        assert image.pread(CS, CS) == new
        with pytest.raises(CorruptImageError):
            image.pread(1, 2 * CS)
    with qedcore.open_image(path) as image:
        assert image.pread(CS, CS) == new
        image.pwrite(new * 3, CS)  # the next one, too, in a longer request
        assert image.pread(3 * CS, CS) == new * 3
    assert_sound(path)


def test_a_last_cluster_that_is_lost_is_whole_up_to_the_end_of_the_device(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    build(path, ImageSpec(size=8 * CS - 512, layout={0: "data"}, entries={7: lambda b: b.end}))
    with qedcore.open_image(path) as image:
        with pytest.raises(CorruptImageError):
            image.pwrite(b"x" * (CS - 1024), 7 * CS)
        image.pwrite(b"x" * (CS - 512), 7 * CS)
        assert image.pread(CS - 512, 7 * CS) == b"x" * (CS - 512)
    assert_sound(path)


def test_tables_that_nobody_reads_are_screened_too(tmp_path: Path) -> None:
    """The place that an entry points to is taken in one session, and does not come true in the next."""
    path = tmp_path / "image.qed"
    stale = 2 * 2048  # in another slice of the table
    build(path, ImageSpec(size=1 << 30, layout={0: "data"}, entries={stale: lambda b: b.end}))
    with qedcore.open_image(path) as image:
        image.pwrite(b"A" * (4 * CS), 10 * CS)
    with qedcore.open_image(path) as image:
        for request in (lambda: image.pread(1, stale * CS), lambda: image.pwrite(b"B" * 512, stale * CS)):
            with pytest.raises(CorruptImageError):
                request()
        assert image.pread(4 * CS, 10 * CS) == b"A" * (4 * CS)


def test_an_entry_does_not_come_to_lead_to_a_table(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    build(path, ImageSpec(size=4 << 30, layout={0: "data"}, entries={4096: lambda b: b.end + CS}))
    with qedcore.open_image(path) as image:
        image.pwrite(b"p" * CS, SPAN)  # data at the end of the file, and a table after it
    for _ in range(2):
        with qedcore.open_image(path) as image:
            with pytest.raises(CorruptImageError):
                image.pwrite(b"x" * 512, 4096 * CS)
            assert image.pread(CS, SPAN) == b"p" * CS


def test_what_is_cached_is_marked_as_well(tmp_path: Path) -> None:
    """Slices and the L1 table that were read before the first allocation."""
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, entries={1: lambda b: b.end}, l1_entries={2: lambda b: b.end}))  # type: ignore[arg-type]
    with qedcore.open_image(path) as image:
        for _ in range(2):
            for pos in (CS, 2 * SPAN):
                with pytest.raises(CorruptImageError):
                    image.pread(1, pos)
            image.pwrite(b"Z" * (8 * CS), SPAN + 9 * CS)
        assert image.pread(8 * CS, SPAN + 9 * CS) == b"Z" * (8 * CS)


def test_a_slice_that_is_just_being_read_is_marked_as_well(tmp_path: Path) -> None:
    """It was read before the entry was marked on disk, and comes into the cache afterwards."""
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, entries={1: lambda b: b.end}))  # type: ignore[arg-type]
    image, _ = open_tapped(path)
    gate, read = Gate(), image._clusters.cache.read

    def read_late(index: int, offset: int) -> Table:
        table = read(index, offset)
        if index == 0:
            gate.stop()
        return table

    image._clusters.cache.read = read_late  # type: ignore[method-assign]
    reader = Job(image.pread, 1, CS)
    gate.reached()
    writer = Job(image.pwrite, b"Z" * (8 * CS), SPAN + 9 * CS)
    while not any(mark & 1 for mark in _entry_on_disk(path, 1)):
        assert writer.is_alive()
    assert writer.is_alive()  # it waits for the load, before it lets the file grow
    gate.open()
    with pytest.raises(CorruptImageError):
        reader.result()
    writer.result()
    with pytest.raises(CorruptImageError):
        image.pread(1, CS)
    image.close()


def _entry_on_disk(path: Path, cluster: int) -> bytes:
    with QedFile(path) as file:
        return file.entries().get(cluster, 0).to_bytes(8, "little")[:1]


# name -> (layout, wrong L1 entries): what the last one leads to has entries past the end, but may be data
UNPROVEN = {
    "data of the guest": (dict.fromkeys(range(8), "data"), {1: lambda b: b.offsets[2]}),
    "two tables overlap": ({0: "data", 32768: "data"}, {2: lambda b: b.l2_offsets[1] + CS}),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_nothing_is_written_to_what_may_be_no_table(tmp_path: Path, name: str) -> None:
    """Then nothing is allocated in any session, but what is there can be read and overwritten."""
    path = tmp_path / "image.qed"
    layout, l1_entries = UNPROVEN[name]
    extra = {"entries": {32769: 1 << 47}} if name == "two tables overlap" else {}
    build(path, ImageSpec(size=4 * SPAN, layout=layout, leaks=8, l1_entries=l1_entries, **extra))  # type: ignore[arg-type]
    if not extra:
        with qedcore.open_image(path) as image:
            image.pwrite((0xFFFF888000000000).to_bytes(8, "little") * (CS // 8), 2 * CS)
    before = path.read_bytes()
    for _ in range(2):
        with qedcore.open_image(path) as image:
            for _ in range(2):
                with pytest.raises(CorruptImageError, match=r"perhaps no table: .*qed check -r all"):
                    image.pwrite(b"x", 100 * CS)
            image.pwrite(before[:0] + image.pread(512, 0), 0)
            with pytest.raises(CorruptImageError):
                image.pread(1, SPAN if not extra else SPAN + CS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("features", [0, F_NEED_CHECK], ids=["clean", "dirty"])
def test_a_file_too_large_for_the_map_is_screened_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: int
) -> None:
    for module in ("engine.image", "check.recovery"):
        monkeypatch.setattr(f"qedcore.{module}.MAP_LIMIT", 12)
    path = tmp_path / "image.qed"
    layout = dict.fromkeys(range(6), "data")
    build(path, ImageSpec(size=1 << 30, layout=layout, entries={4096: lambda b: b.end}, features=features))
    lines: list[str] = []
    for _ in range(2):
        with qedcore.open_image(path, log=lines.append) as image:
            image.pwrite(b"A" * CS, 10 * CS)
            with pytest.raises(CorruptImageError):
                image.pwrite(b"B" * 512, 4096 * CS)
            image.trim(5 * CS, CS)
            image.flush()
            assert image._reclaimer.free_clusters == 0
            assert image.pread(CS, 10 * CS) == b"A" * CS
    assert any(line.endswith("freed clusters are not used again: the file is too large") for line in lines)


def test_a_table_that_cannot_be_read_stops_growth_until_it_can(tmp_path: Path) -> None:
    path = tmp_path / "image.qed"
    built = build(path, ImageSpec(**SPEC))  # type: ignore[arg-type]
    image, tap = open_tapped(path)
    bad = built.l2_offsets[1]

    def hook(call: Call) -> StorageError | None:
        if call.name == "pread" and call.offset <= bad < call.offset + call.length:
            raise StorageError("bad sector", OSError(errno.EIO, ""))
        return None

    tap.hook = hook
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            image.pwrite(b"x", 7 * CS)
        assert caught.value.errno == errno.EIO
    image.pwrite(b"y", 0)  # in place
    assert not [call for call in tap.log if call.name == "truncate"]
    tap.hook = None
    image.pwrite(b"x", 7 * CS)
    image.close()
    assert_sound(path)


@pytest.mark.parametrize("entry", ["L1", "L2"])
@pytest.mark.parametrize("failing", ["the flush", "the write", "memory"])
def test_marks_of_an_attempt_that_failed_count_for_the_next(tmp_path: Path, failing: str, entry: str) -> None:
    """They are on disk already, so the next attempt finds nothing to mark; in memory they were not marked."""
    path = tmp_path / "image.qed"
    past = {1: lambda b: b.end} if entry == "L2" else {}
    l1_past = {2: lambda b: b.end} if entry == "L1" else {}
    pos = CS if entry == "L2" else 2 * SPAN
    build(path, ImageSpec(**SPEC, entries=past, l1_entries=l1_past))  # type: ignore[arg-type]
    image, tap = open_tapped(path)

    def fail(call: Call) -> StorageError | None:
        if call.name == "flush" and failing == "the flush":
            raise UnreachableError("no server")
        if call.name == "pwrite" and failing == "the write":
            return StorageError("no answer", code=errno.EIO)  # after it was carried out
        return None

    with image:
        with pytest.raises(CorruptImageError):
            image.pread(1, pos)  # the entry is in memory from here on
        tap.hook = fail
        no_memory = mock.patch.object(type(image._clusters), "mark", side_effect=MemoryError)
        with no_memory if failing == "memory" else nullcontext(), pytest.raises((StorageError, MemoryError)):
            image.pwrite(b"Z" * (8 * CS), 9 * CS)
        tap.hook = None
        tap.log.clear()
        image.pwrite(b"Z" * (8 * CS), 9 * CS)  # takes the place
        assert tap.log[0].name == "flush"  # of the marks
        with pytest.raises(CorruptImageError, match=r"points to 0x[0-9a-f]+bad:"):
            image.pread(1, pos)
        assert image.pread(8 * CS, 9 * CS) == b"Z" * (8 * CS)


# How much is read


class Counting(MemoryStorage):
    """A file in memory that knows its holes, and how often each of its bytes was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_bytes())
        self.pages = [at for at in range(0, len(self.data), 4096) if any(self.data[at : at + 4096])]
        self.reads: list[tuple[int, int]] = []

    def next_data(self, offset: int) -> int:
        at = bisect_right(self.pages, offset - 4096)
        return max(offset, self.pages[at]) if at < len(self.pages) else 1 << 62

    def pread_into(self, buf: Any, offset: int) -> None:
        self.reads.append((offset, len(buf)))
        super().pread_into(buf, offset)


@pytest.mark.parametrize("features", [0, F_NEED_CHECK], ids=["first allocation", "repair at open"])
def test_each_byte_of_overlapping_tables_is_read_once(tmp_path: Path, features: int) -> None:
    """However many L1 entries lead to it."""
    path, size, tables = tmp_path / "image.qed", 4096, 500
    build(path, ImageSpec(size=1 << 37, cluster_size=size, table_size=16, features=features))
    first = size * 17
    with path.open("r+b") as file:
        file.seek(size)
        file.write(struct.pack(f"<{tables}Q", *(first + n * size for n in range(tables))))
        file.seek(first)
        file.write(struct.pack("<Q", first + size) * (size // 8 * (tables + 16)))
    storage = Counting(path)
    image = QEDImage(storage, True)
    lines: list[str] = []
    image._log = lines.append
    image.start()
    if not features:
        image.pwrite(b"x" * size, 1 << 36)
        assert "check the image" in image._reclaimer._why
    else:
        assert any("damage may be left" in line for line in lines)
    in_tables = sum(length for offset, length in storage.reads if first <= offset < first + (tables + 16) * size)
    assert (tables + 15) * size <= in_tables <= (tables + 16) * size


def test_holes_are_not_read(tmp_path: Path) -> None:
    """Tables of 64 MiB with one entry each, in a sparse file: what is read is what is there."""
    path, size = tmp_path / "image.qed", 4 << 20
    layout = {n * (1 << 23): "data" for n in range(3)}
    build(path, ImageSpec(size=1 << 47, cluster_size=size, table_size=16, layout=layout))
    reads: list[int] = []
    image = qedcore.open_image(path)
    pread_into = image.storage.pread_into

    def note(buf: Any, offset: int) -> None:
        reads.append(len(buf))
        pread_into(buf, offset)

    image.storage.pread_into = note  # type: ignore[method-assign]
    image.pwrite(b"x", 5 * size)
    image.close()
    assert sum(reads) <= 256 * KiB


# Counting beside the requests, where there are many tables


@pytest.fixture
def slow_count(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Every image has many tables, and who counts in the background stops at the gate first."""
    gate = Gate()
    count = Census.count

    def stop_and_count(self: Census) -> ClusterUse | None:
        gate.stop()
        return count(self)

    monkeypatch.setattr("qedcore.engine.census.QUICK", 0)
    monkeypatch.setattr(Census, "count", stop_and_count)
    return gate


def test_allocations_do_not_wait_for_the_count_but_trims_do(tmp_path: Path, slow_count: Gate) -> None:
    path = tmp_path / "image.qed"
    built = build(path, ImageSpec(**SPEC, leaks=3))  # type: ignore[arg-type]
    with qedcore.open_image(path) as image:
        image.pwrite(b"a" * CS, 5 * CS)
        slow_count.reached()
        with QedFile(path) as file:
            assert file.entries()[5] >= built.end  # nothing is known to be free yet
        trim = Job(image.trim, 0, CS)
        image.pwrite(b"b" * CS, 6 * CS)
        assert trim.is_alive() and image.pread(CS, 0) == built.read(0, CS)
        slow_count.open()
        trim.result()
        assert image._reclaimer.free_clusters == 3
        image.pwrite(b"c" * CS, 7 * CS)
        with QedFile(path) as file:
            assert built.end - 3 * CS <= file.entries()[7] < built.end
        assert image.pread(3 * CS, 5 * CS) == b"a" * CS + b"b" * CS + b"c" * CS
    assert_sound(path, leaks=None)


def test_close_does_not_wait_for_the_whole_count(tmp_path: Path, slow_count: Gate) -> None:
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, leaks=3))  # type: ignore[arg-type]
    lines: list[str] = []
    image = open_image(path, log=lines.append)
    image.pwrite(b"a" * CS, 5 * CS)
    slow_count.reached()
    close = Job(image.close)
    while not image._census.stopped:  # type: ignore[union-attr]
        assert close.is_alive()
    slow_count.open()
    close.result()
    assert lines == []
    assert_sound(path, leaks=3)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), StorageError("bad sector", OSError(errno.EIO, ""))])
def test_count_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, background: bool
) -> None:
    """Nothing is used again, and that is all."""
    if background:
        monkeypatch.setattr("qedcore.engine.census.QUICK", 0)
    monkeypatch.setattr(Census, "count", mock.Mock(side_effect=error))
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, leaks=3))  # type: ignore[arg-type]
    lines: list[str] = []
    with qedcore.open_image(path, log=lines.append) as image:
        image.trim(0, CS)
        image.flush()
        assert image._reclaimer.free_clusters == 0
    why = "out of memory" if isinstance(error, MemoryError) else str(error)
    assert lines == [f"{path}: freed clusters are not used again: {why}"]
    with QedFile(path) as file:
        assert not file.need_check


def test_without_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedcore.engine.census.QUICK", 0)
    path = tmp_path / "image.qed"
    build(path, ImageSpec(**SPEC, leaks=3))  # type: ignore[arg-type]
    with qedcore.open_image(path) as image:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
            image.pwrite(b"a" * CS, 5 * CS)
        assert image._reclaimer.free_clusters == 2


# What is leaked


@pytest.mark.parametrize("shift", [12, 16, 19])
@pytest.mark.parametrize("seed_of_layout", range(3))
def test_leaks_are_what_no_entry_leads_to(
    tmp_path: Path, rng: random.Random, shift: int, seed_of_layout: int
) -> None:
    """In images in any order, with zero clusters and holes: against an independent reader."""
    size = 1 << shift
    path = tmp_path / "image.qed"
    kinds = [rng.choice(["data", "data", "zero", None]) for _ in range(900)]
    layout = {n: kind for n, kind in enumerate(kinds) if kind}
    build(
        path, ImageSpec(size=900 * size, cluster_size=size, table_size=2, layout=layout, reverse=bool(seed_of_layout))
    )
    freed = rng.sample([n for n, kind in layout.items() if kind == "data"], 40)
    with QedFile(path) as file, path.open("r+b") as raw:
        want = sorted(offset for n, offset in file.entries().items() if n in freed)
        for n in freed:
            raw.seek(file.l1[n // file.geometry.entries] + n % file.geometry.entries * 8)
            raw.write(bytes(8))
    with qedcore.open_image(path, writable=False) as image:
        census = Census(
            image._tables, image.geometry, image._bounds, image.header.l1_table_offset, map_limit=1 << 20, log=print
        )
        assert not census.screen()
        use = census.count()
    assert use is not None and census.leaks == len(freed)
    assert [n * size for n in range(use.clusters) if not use.marks(n)[0]] == want


@pytest.mark.parametrize("kill", ["killed", "flushed, killed"])
def test_no_crash_loses_space(tmp_path: Path, kill: str) -> None:
    """P9: one opening for writing and one close leave no leaks, whatever a killed server had allocated and freed."""
    path = tmp_path / "image.qed"
    build(path, ImageSpec(size=2 * SPAN, layout=dict.fromkeys(range(20), "data")))
    child = os.fork()
    if not child:
        image = qedcore.open_image(path)
        image.pwrite(b"n" * (30 * CS), SPAN)
        image.trim(3 * CS, 9 * CS)
        if kill.startswith("flushed"):
            image.flush()
        os._exit(9)
    os.waitpid(child, 0)
    with qedcore.open_image(path) as image:
        before = image.pread(40 * CS, 0), image.pread(40 * CS, SPAN)
    assert_sound(path)
    with qedcore.open_image(path, writable=False) as image:
        assert before == (image.pread(40 * CS, 0), image.pread(40 * CS, SPAN))
