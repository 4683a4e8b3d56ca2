"""The header to the byte, and its updates: disk first, memory second, one at a time."""

from __future__ import annotations

import errno
import random

import pytest
from support.patterns import KiB, MiB

from qedcore.errors import ImageFormatError, StorageError
from qedcore.format.header import Header, HeaderUpdater, read_backing_name, read_header
from unit.fakes import Call, FailAt, Gate, Job, MemoryStorage, Tap

# qemu-img create -f qed -b base.raw -F raw, 1 MiB, as in the notes
EXAMPLE = bytes.fromhex(
    "51454400 00000100 04000000 01000000"
    "0500000000000000 0000000000000000 0000000000000000"
    "0000010000000000 0000100000000000 40000000 08000000"
)
FIELDS = Header(features=5, image_size=MiB, backing_filename_offset=64, backing_filename_size=8)

# Every field with bytes of its own: a swapped pair or a wrong width shows.
DISTINCT = bytes(range(1, 65))
DISTINCT_FIELDS = Header(
    magic=0x04030201,
    cluster_size=0x08070605,
    table_size=0x0C0B0A09,
    header_size=0x100F0E0D,
    features=0x1817161514131211,
    compat_features=0x201F1E1D1C1B1A19,
    autoclear_features=0x2827262524232221,
    l1_table_offset=0x302F2E2D2C2B2A29,
    image_size=0x3837363534333231,
    backing_filename_offset=0x3C3B3A39,
    backing_filename_size=0x403F3E3D,
)


@pytest.mark.parametrize(
    ("raw", "header"), [(EXAMPLE, FIELDS), (DISTINCT, DISTINCT_FIELDS)], ids=["example", "distinct"]
)
def test_bytes(raw: bytes, header: Header) -> None:
    assert len(raw) == 64
    assert header.pack() == raw
    assert Header.unpack(raw) == header


def test_defaults_are_those_of_create() -> None:
    assert Header().pack() == EXAMPLE[:16] + bytes(24) + EXAMPLE[40:48] + bytes(16)


@pytest.mark.parametrize(
    ("features", "size", "need_check", "has_backing"),
    [(0, 0, False, False), (1, 8, False, True), (1, 0, False, False), (2, 8, True, False), (7, 8, True, True),
     (4, 8, False, False)],
)  # fmt: skip
def test_flags(features: int, size: int, need_check: bool, has_backing: bool) -> None:
    header = Header(features=features, backing_filename_size=size)
    assert (header.need_check, header.has_backing) == (need_check, has_backing)


def test_header_area() -> None:
    assert Header(header_size=3, cluster_size=4 * KiB).header_bytes == 12 * KiB


def stored(header: Header, name: bytes = b"", length: int = 5 * 64 * KiB) -> MemoryStorage:
    storage = MemoryStorage(bytes(length))
    storage.pwrite(header.pack(), 0)
    storage.pwrite(name, header.backing_filename_offset)
    if not name:
        storage.pwrite(header.pack(), 0)
    return storage


def test_read_header() -> None:
    header, geometry, bounds = read_header(stored(FIELDS, b"base.raw"))
    assert header == FIELDS
    assert (geometry.cluster_size, geometry.table_size) == (64 * KiB, 4)
    assert (bounds.start, bounds.end) == (64 * KiB, 5 * 64 * KiB)


def test_read_header_changes_nothing() -> None:
    tap = Tap(stored(FIELDS._replace(autoclear_features=3), b"base.raw"))
    read_header(tap)
    assert tap.log == []


def test_storage_error_while_reading() -> None:
    with pytest.raises(StorageError) as caught:
        read_header(Tap(stored(FIELDS), FailAt(1, ["pread"], errno.ENXIO)))
    assert caught.value.errno == errno.ENXIO


NAMES = {
    b"base.raw": "base.raw",
    b"b": "b",
    b"a/b c": "a/b c",
    b"cut\0here": "cut",
    b"\0": None,
    b"\0x": None,
    b"n\xc3\xa4me": "n\u00e4me",
    b"\xff\xfe": "\udcff\udcfe",  # any bytes: the name goes back to the system as it came
    b"x" * 4095: "x" * 4095,
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:9]))
@pytest.mark.parametrize("offset", [64, 5000])
def test_backing_name(name: bytes, offset: int) -> None:
    header = FIELDS._replace(backing_filename_offset=offset, backing_filename_size=len(name))
    assert read_backing_name(stored(header, name), header) == NAMES[name]


@pytest.mark.parametrize(("features", "size"), [(0, 8), (4, 8), (1, 0)])
def test_no_backing_name(features: int, size: int) -> None:
    header = FIELDS._replace(features=features, backing_filename_size=size)
    assert read_backing_name(stored(header, b"base.raw"), header) is None


@pytest.mark.parametrize(
    ("offset", "size", "good"),
    [(64, 4095, True), (64, 4096, False), (65536 - 4, 4, True), (65536 - 4, 5, False), (65536, 0, True),
     (0, 4, True), (2**32 - 1, 1, False), (1, 2**32 - 1, False)],
)  # fmt: skip
def test_place_of_the_backing_name(offset: int, size: int, good: bool) -> None:
    header = FIELDS._replace(features=1, backing_filename_offset=offset, backing_filename_size=size)
    storage = MemoryStorage(header.pack() + bytes(5 * 64 * KiB - 64))
    if good:
        assert read_header(storage)[0] == header
    else:
        with pytest.raises(ImageFormatError, match="backing filename"):
            read_header(storage)


# Updates


def updater(tap: Tap) -> HeaderUpdater:
    return HeaderUpdater(tap, Header.unpack(bytes(tap.inner.data[:64])))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("before", "clear", "set_", "after"),
    [(0, 0, 2, 2), (5, 0, 2, 7), (7, 2, 0, 5), (5, 2, 0, 5), (7, 1, 2, 6), (2, 2, 2, 2)],
)
def test_set_features(before: int, clear: int, set_: int, after: int) -> None:
    storage = stored(FIELDS._replace(features=before), b"base.raw")
    old = bytes(storage.data)
    tap = Tap(storage)
    header = updater(tap)
    header.set_features(clear=clear, set=set_)
    assert header.header == FIELDS._replace(features=after)
    assert storage.data[:64] == header.header.pack()
    assert storage.data[64:] == old[64:]
    assert tap.log == [Call("pwrite", 0, 64)]  # within one sector: a torn write cannot mix two headers


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EAGAIN])
def test_failed_write_leaves_memory_unchanged(code: int, late: bool) -> None:
    tap = Tap(stored(FIELDS), FailAt(1, code=code, late=late))
    header = updater(tap)
    with pytest.raises(StorageError, match="failed to update header") as caught:
        header.set_features(set=2)
    assert caught.value.errno == code
    assert header.header == FIELDS
    header.set_features(set=2)  # the lock is free again
    assert Header.unpack(bytes(tap.inner.data[:64])) == header.header == FIELDS._replace(features=7)


def test_memory_follows_the_disk() -> None:
    """While the write is under way, memory still has the old header."""
    gate = Gate()

    def hook(call: Call) -> None:
        gate.stop()

    header = updater(Tap(stored(FIELDS), hook))
    job = Job(lambda: header.set_features(set=2))
    gate.reached()
    assert header.header == FIELDS
    gate.open()
    job.result()
    assert header.header.features == 7


def test_concurrent_updates_lose_no_bit(rng: random.Random) -> None:
    """Each thread owns one bit; a header copied before and written after another's update would drop it."""
    bits = [1 << n for n in range(3, 9)]
    plans = {bit: [rng.random() < 0.5 for _ in range(60)] for bit in bits}
    storage = stored(Header())
    header = updater(Tap(storage))

    def work(bit: int) -> None:
        for want in plans[bit]:
            header.set_features(set=bit) if want else header.set_features(clear=bit)
            assert bool(header.header.features & bit) is want

    for job in [Job(work, bit) for bit in bits]:
        job.result()
    assert header.header.features == sum(bit for bit in bits if plans[bit][-1])
    assert storage.data[:64] == header.header.pack()


def test_updates_wait_for_each_other() -> None:
    """The second writes what the first left, even if it was asked for while the first was writing."""
    gate = Gate()
    header = updater(Tap(stored(FIELDS), lambda call: gate.stop()))
    first = Job(lambda: header.set_features(set=2))
    gate.reached()
    second = Job(lambda: header.set_features(clear=4))
    gate.avoided()
    gate.open(2)
    first.result()
    second.result()
    assert header.header.features == 3


def test_clear_unknown_autoclear() -> None:
    storage = stored(FIELDS._replace(autoclear_features=2**63 + 5))
    tap = Tap(storage)
    header = updater(tap)
    assert header.clear_unknown_autoclear() is True
    assert tap.log == [Call("pwrite", 0, 64), Call("flush")]  # durable before any change that they vouch for
    assert Header.unpack(bytes(storage.data[:64])) == header.header == FIELDS
    assert header.clear_unknown_autoclear() is False
    assert len(tap.log) == 2


@pytest.mark.parametrize("n", [1, 2], ids=["write", "flush"])
def test_failed_autoclear_is_reported(n: int) -> None:
    header = updater(Tap(stored(FIELDS._replace(autoclear_features=1)), FailAt(n, code=errno.ENOSPC)))
    with pytest.raises(StorageError) as caught:
        header.clear_unknown_autoclear()
    assert caught.value.errno == errno.ENOSPC
