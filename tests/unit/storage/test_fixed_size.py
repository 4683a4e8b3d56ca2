"""Images on devices and exports, whose size is fixed: where they end, growth over old contents, and the limit."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import F_NEED_CHECK, assert_sound

import qedcore
from qedcore.check.image_end import end_of_image
from qedcore.engine import allocator
from qedcore.errors import StorageError
from qedcore.storage.fixed_size import FixedSizeStorage
from unit.storage.disk import CS, Disk, Image, make


@pytest.mark.parametrize("punch", [True, False], ids=["zero", "write"])
def test_growth_hides_what_was_there(image: Image, monkeypatch: pytest.MonkeyPatch, punch: bool) -> None:
    """Parts of clusters, tables in new places, several steps."""
    monkeypatch.setattr(allocator, "GROWTH_STEP", 5 * CS)
    disk, built = make(image, layout="D-Z")
    disk.fail_punch = not punch
    model = bytearray(built.read(0, 8 * MiB))
    rng = random.Random(3)
    for _ in range(3):
        with disk.open() as img:
            for _ in range(30):
                pos, length = rng.randrange(0, 8 * MiB - 9000), rng.randrange(1, 9000)
                img.pwrite(stamp(5, pos, length), pos)
                model[pos : pos + length] = stamp(5, pos, length)
            assert_same(img.pread(8 * MiB, 0), bytes(model))
    with disk.open(writable=False) as img:
        assert_same(img.pread(8 * MiB, 0), bytes(model))
    built.path.write_bytes(disk.data[: end_of_image(disk)])
    assert_sound(built.path)


def test_limit(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC when it is full, to the last cluster; what is there stays and can be overwritten."""
    disk, built = make(image, layout="D", capacity=built_end(image) + 4 * CS + 100)
    with disk.open() as img:
        for i in range(1, 5):
            img.pwrite(stamp(2, i * CS, CS), i * CS)
        with pytest.raises(StorageError, match="disk") as caught:
            img.pwrite(b"x", 5 * CS)
        assert caught.value.errno == errno.ENOSPC
        img.pwrite(stamp(3, CS, CS), CS)
        want = stamp(1, 0, CS) + stamp(3, CS, CS) + stamp(2, 2 * CS, 3 * CS) + bytes(CS)
        assert_same(img.pread(6 * CS, 0), want)
    with disk.open() as img:
        assert_same(img.pread(6 * CS, 0), want)
        with pytest.raises(StorageError):
            img.pwrite(b"x", 5 * CS)


def built_end(image: Image) -> int:
    return image("measure.qed", size=8 * MiB, cluster_size=CS, table_size=1, layout="D").end


@pytest.mark.parametrize("n", range(30))
def test_crash(image: Image, rng: random.Random, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Any part of what was not flushed is lost: nothing old of the device ever shows, nothing flushed is lost."""
    monkeypatch.setattr(allocator, "GROWTH_STEP", rng.randrange(0, 6) * CS)
    disk, _ = make(image, layout="-")
    flushed = bytearray(8 * MiB)
    current = bytearray(8 * MiB)
    for _ in range(3):
        img = disk.open()
        for _ in range(rng.randrange(1, 15)):
            pos, length = rng.randrange(0, 512 * KiB), rng.randrange(1, 9000)
            img.pwrite(stamp(5, pos, length), pos)
            current[pos : pos + length] = stamp(5, pos, length)
            if rng.random() < 0.3:
                img.flush()
                flushed[:] = current
        disk = disk.after_crash(rng)
        with disk.open() as img:
            after = img.pread(8 * MiB, 0)
        assert_possible(after, bytes(flushed), bytes(current))
        current[:] = flushed[:] = after


def assert_possible(after: bytes, flushed: bytes, current: bytes) -> None:
    for at in range(0, len(after), 512):
        found = after[at : at + 512]
        if found not in (flushed[at : at + 512], current[at : at + 512]):
            # several writes to a sector since the flush: every byte is from one of them
            allowed = (set(pair) for pair in zip(flushed[at : at + 512], current[at : at + 512]))
            assert all(byte in choice | {0} for byte, choice in zip(found, allowed)), f"foreign data at {at:#x}"


def test_repair_at_open(image: Image) -> None:
    """Clusters that nothing refers to, at the end, are not part of the image any more."""
    disk, built = make(image, layout="D-D", leaks=3, features=F_NEED_CHECK, entries={5: lambda b: b.end + 8 * MiB})
    end = end_of_image(disk)
    assert end < built.end
    with disk.open() as img:
        assert not img.header.need_check
        assert_same(img.pread(CS, 0), stamp(1, 0, CS))
        img.pwrite(b"x", 7 * CS)
        assert img.pread(CS, 7 * CS) == b"x" + bytes(CS - 1)


@pytest.mark.parametrize("table", ["L1", "L2"])
def test_what_damage_has_lost_is_not_overwritten(image: Image, table: str) -> None:
    """Data that no entry leads to any more may still be salvaged: it is no room for the image to grow."""
    layout = {0: "data", 513: "data", 514: "data"}
    _, built = make(image, layout=layout)
    wrong: dict[str, Any] = {"entries": {514: built.offsets[514] + 1}}
    if table == "L1":
        wrong = {"l1_entries": {1: built.l2_offsets[1] + 1}}
    disk, built = make(image, layout=layout, **wrong)
    before = bytes(disk.data)
    with disk.open() as img:
        with pytest.raises(StorageError) as caught:
            for pos in range(CS, 512 * CS, CS):
                img.pwrite(b"x" * CS, pos)
        assert caught.value.errno == errno.ENOSPC
        img.pwrite(b"y", 0)  # in place
    changed = [at for at in range(0, len(before), CS) if before[at : at + CS] != disk.data[at : at + CS]]
    assert set(changed) <= {0, built.offsets[0]}


def test_wrong_header_is_told(image: Image) -> None:
    disk, _ = make(image, header={"table_size": 3})
    with pytest.raises(qedcore.errors.ImageFormatError, match="table size"):
        disk.open()
    assert disk.closed


def test_reads_and_writes_past_the_end() -> None:
    disk = Disk(b"abc", 100)
    storage = FixedSizeStorage(disk, 3)
    buf = bytearray(b"?????")
    storage.pread_into(buf, 1)
    assert buf == b"bc\0\0\0"
    storage.pwrite(b"xy", 6)
    assert storage.size() == 8
    assert disk.data[:9] == b"abc\0\0\0xy\xee"
    storage.truncate(4)
    buf[:] = b"?????"
    storage.pread_into(buf, 0)
    assert buf == b"abc\0\0"
    storage.truncate(8)
    assert disk.data[:9] == b"abc\0\0\0\0\0\xee"
    with pytest.raises(StorageError) as caught:
        storage.truncate(101)
    assert caught.value.errno == errno.ENOSPC
    assert storage.size() == 8
