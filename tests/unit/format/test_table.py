"""Tables on disk: whole sectors, little-endian, and memory left alone by a write."""

from __future__ import annotations

import errno
import struct
from array import array

import pytest

from qedcore.errors import StorageError
from qedcore.format import table
from qedcore.format.table import TableIO, contiguous, empty
from unit.fakes import Call, FailAt, MemoryStorage, Tap

ENTRIES = 192  # three sectors
AT = 4096  # bytes: where the table lies


def numbered(n: int = ENTRIES, start: int = 0x0102030405060700) -> array[int]:
    return array("Q", range(start, start + n))


def raw(entries: array[int]) -> bytes:
    return struct.pack(f"<{len(entries)}Q", *entries)


# (index, n) -> (first entry, entries) of the write
ROUNDED = {
    (0, 1): (0, 64),
    (1, 1): (0, 64),
    (62, 1): (0, 64),
    (63, 1): (0, 64),
    (64, 1): (64, 64),
    (65, 1): (64, 64),
    (127, 1): (64, 64),
    (128, 1): (128, 64),
    (191, 1): (128, 64),
    (0, 63): (0, 64),
    (0, 64): (0, 64),
    (0, 65): (0, 128),
    (1, 63): (0, 64),
    (1, 64): (0, 128),
    (63, 2): (0, 128),
    (63, 65): (0, 128),
    (63, 66): (0, 192),
    (64, 64): (64, 64),
    (64, 65): (64, 128),
    (65, 64): (64, 128),
    (127, 2): (64, 128),
    (0, 192): (0, 192),
}


@pytest.mark.parametrize(("index", "n"), ROUNDED)
def test_write_is_rounded_to_sectors(index: int, n: int) -> None:
    old, new = numbered(), array("Q", range(900, 900 + n))
    storage = MemoryStorage(b"\xee" * (AT + 3 * 512 + 512))
    tap = Tap(storage)
    TableIO(tap).write(AT, old, index, new)
    first, entries = ROUNDED[index, n]
    assert tap.log == [Call("pwrite", AT + first * 8, entries * 8)]
    want = numbered()
    want[index : index + n] = new
    sectors = raw(want)[first * 8 : (first + entries) * 8]
    assert storage.data[AT + first * 8 : AT + (first + entries) * 8] == sectors
    rest = storage.data[: AT + first * 8] + storage.data[AT + (first + entries) * 8 :]
    assert rest == b"\xee" * len(rest)
    assert old == numbered()  # the caller publishes
    assert list(new) == list(range(900, 900 + n))


def test_short_table_is_written_as_far_as_it_goes() -> None:
    """A resident L1 table may end before the last sector of the one on disk does; here it ends with it."""
    tap = Tap(MemoryStorage())
    TableIO(tap).write(0, numbered(64), 60, array("Q", [7]))
    assert tap.log == [Call("pwrite", 0, 512)]


def test_read() -> None:
    storage = MemoryStorage(bytes(AT) + raw(numbered()))
    assert TableIO(storage).read(AT, ENTRIES) == numbered()
    assert TableIO(storage).read(AT + 8 * 5, 3) == numbered()[5:8]
    assert TableIO(storage).read(AT + 8 * (ENTRIES - 1), 3) == numbered()[-1:] + array("Q", [0, 0])


def test_bytes_are_little_endian() -> None:
    storage = MemoryStorage()
    TableIO(storage).write_all(512, array("Q", [0x0102030405060708, 1]))
    assert storage.data == bytes(512) + bytes.fromhex("0807060504030201 0100000000000000")


def test_big_endian(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the swap inverted, as on a machine of the other byte order, every path swaps exactly once."""
    little = MemoryStorage(raw(numbered()))
    monkeypatch.setattr(table, "_SWAP", not table._SWAP)
    swapped = array("Q", numbered())
    swapped.byteswap()
    assert TableIO(little).read(0, ENTRIES) == swapped
    storage = MemoryStorage(bytes(ENTRIES * 8))
    mine = numbered()
    TableIO(storage).write_all(0, mine)
    assert storage.data == struct.pack(f">{ENTRIES}Q", *numbered())  # on a big-endian machine, too
    assert mine == numbered()  # a swap in place would garble the table that readers use
    entries = array("Q", [5, 6])
    TableIO(storage).write(0, mine, 63, entries)
    assert (mine, list(entries)) == (numbered(), [5, 6])
    assert TableIO(storage).read(63 * 8, 2) == entries
    assert TableIO(storage).read(0, 63) == numbered()[:63]


@pytest.mark.parametrize("n", [0, 1, 64, 65])
def test_empty(n: int) -> None:
    assert empty(n).tolist() == [0] * n


@pytest.mark.parametrize(("offset", "n"), [(4096, 0), (4096, 1), (8192, 5), (1 << 62, 2)])
def test_contiguous(offset: int, n: int) -> None:
    assert contiguous(offset, n, 4096).tolist() == [offset + i * 4096 for i in range(n)]


@pytest.mark.parametrize("late", [False, True])
def test_errors_pass_and_change_nothing(late: bool) -> None:
    old = numbered()
    tables = TableIO(Tap(MemoryStorage(bytes(4096)), FailAt(1, ["pwrite"], errno.ENOSPC, late)))
    with pytest.raises(StorageError) as caught:
        tables.write(0, old, 3, array("Q", [1]))
    assert caught.value.errno == errno.ENOSPC
    assert old == numbered()
