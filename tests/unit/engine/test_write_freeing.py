"""Trims and zeros that free clusters, and their reuse."""

from __future__ import annotations

import errno
import os

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import QedFile, assert_sound

import qedcore
from qedcore.engine import reclaim
from qedcore.errors import (
    StorageError,
)
from qedcore.storage.file import FileStorage
from unit.engine.tapped import CS, FLUSH, Tapped, logged, stop_at
from unit.fakes import FailAt, Gate, Job, Tap

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
        assert os.path.getsize(built.path) == (1 + 2 * built.spec.table_size) * CS  # nothing but header and tables


@pytest.mark.parametrize("zero", [False, True], ids=["trim", "zero"])
def test_a_long_request_does_not_hold_up_what_it_frees(
    tapped: Tapped, monkeypatch: pytest.MonkeyPatch, zero: bool
) -> None:
    """A flush for some runs, neither none nor one for each."""
    monkeypatch.setattr(reclaim, "_MAX_UNLINKED", 10)
    img, tap, built = tapped(size=100 * CS, layout="D" * 100, reverse=True)
    if zero:
        img.zero(0, 100 * CS, may_trim=True)
    else:
        img.trim(0, 100 * CS)
    assert img._reclaimer.pending < 10
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
    assert img._reclaimer.free_clusters == 2
    data = stamp(5, 0, CS)
    img.pwrite(data, 60 * CS + 100)
    assert img._reclaimer.free_clusters == 0
    assert_same(img.pread(2 * CS, 60 * CS), bytes(100) + data + bytes(CS - 100))
    img.close()
    assert_sound(built.path)
