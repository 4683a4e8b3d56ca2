"""Arithmetic of the format, for all 75 geometries, against formulas of the specification."""

from __future__ import annotations

import errno

import pytest
from support.patterns import GiB, KiB, MiB, TiB

from qedcore.errors import ImageFormatError, QEDError
from qedcore.format.geometry import (
    MAX_DEVICE_SIZE,
    Bounds,
    Geometry,
    check_device_size,
    is_marked,
    mark_dangling,
    round_up,
)

PiB, EiB = 1 << 50, 1 << 60
ALL = [(4 * KiB << i, 1 << j) for i in range(15) for j in range(5)]
SOME = [(4 * KiB, 1), (4 * KiB, 2), (64 * KiB, 4), (64 * KiB, 16), (MiB, 16), (2 * MiB, 8), (64 * MiB, 16)]

# As in the notes; those from 2M/16 on overflow 64 bits in QEMU, which then computes 0 (B4a).
MAX_SIZES = {
    (4 * KiB, 1): GiB,
    (4 * KiB, 2): 4 * GiB,
    (4 * KiB, 16): 256 * GiB,
    (64 * KiB, 1): 4 * TiB,
    (64 * KiB, 4): 64 * TiB,
    (64 * KiB, 16): PiB,
    (MiB, 16): 4 * EiB,
    (2 * MiB, 8): 1 << 63,
    (2 * MiB, 16): 1 << 65,
    (64 * MiB, 1): 1 << 72,
    (64 * MiB, 16): 1 << 80,
}


@pytest.mark.parametrize("shape", MAX_SIZES)
def test_max_size_of_the_notes(shape: tuple[int, int]) -> None:
    assert Geometry(*shape).max_image_size == MAX_SIZES[shape]


@pytest.mark.parametrize("shape", ALL)
def test_shifts_and_sizes(shape: tuple[int, int]) -> None:
    cs, ts = shape
    geo = Geometry(cs, ts)
    entries = cs * ts // 8
    assert (geo.table_bytes, geo.table_entries) == (cs * ts, entries)
    assert (1 << geo.l2_shift, 1 << geo.l1_shift) == (cs, cs * entries)
    assert (geo.cluster_mask, geo.l2_table_reach) == (cs - 1, cs * entries)
    # 3 * log2(cs) + 2 * log2(ts) - 6
    assert geo.max_image_size == cs**3 * ts**2 // 64 == entries * entries * cs
    assert geo.slice_bytes == min(cs * ts, 16 * KiB) == geo.slice_entries * 8
    assert geo.part_bytes == min(cs * ts, MiB) == geo.part_entries * 8
    assert geo.slices_per_table * geo.slice_bytes == cs * ts
    assert (1 << geo.slice_shift, geo.slice_mask) == (geo.slice_entries * cs, geo.slice_entries - 1)


@pytest.mark.parametrize("cs", [-4096, 0, 1, 512, 2048, 4095, 4097, 6144, 65535, 64 * MiB + 1, 128 * MiB, 1 << 40])
def test_bad_cluster_size(cs: int) -> None:
    with pytest.raises(ImageFormatError, match="cluster size is invalid"):
        Geometry(cs, 4)


@pytest.mark.parametrize("ts", [-1, 0, 3, 5, 6, 7, 15, 17, 32, 1 << 32])
def test_bad_table_size(ts: int) -> None:
    with pytest.raises(ImageFormatError, match="table size is invalid"):
        Geometry(64 * KiB, ts)


@pytest.mark.parametrize("shape", ALL)
def test_image_size_limit(shape: tuple[int, int]) -> None:
    geo = Geometry(*shape)
    for size in (0, 512, 1024, geo.cluster_size, geo.max_image_size - 512, geo.max_image_size):
        geo.check_image_size(size)
    for size in (1, 511, 513, geo.max_image_size + 512, geo.max_image_size - 1, geo.max_image_size * 2):
        with pytest.raises(ImageFormatError, match="image size is invalid") as caught:
            geo.check_image_size(size)
        assert str(size) in str(caught.value) and str(geo.max_image_size) in str(caught.value)


@pytest.mark.parametrize("size", [2**64 - 512, 2**63, 2**63 - 512])
@pytest.mark.parametrize("shape", [shape for shape, limit in MAX_SIZES.items() if limit > 1 << 64])
def test_no_overflow(shape: tuple[int, int], size: int) -> None:
    """B4a: QEMU takes the largest geometries for ones that hold nothing."""
    Geometry(*shape).check_image_size(size)


def test_device_size_limit() -> None:
    assert MAX_DEVICE_SIZE == 2**63 - 512
    check_device_size(0)
    check_device_size(2**63 - 512)
    for size in (2**63 - 511, 2**63, 2**64 - 512):
        with pytest.raises(QEDError, match=str(size)) as caught:
            check_device_size(size)
        assert caught.value.errno in (errno.ENOTSUP, errno.EINVAL)


@pytest.mark.parametrize("shape", SOME)
def test_clusters(shape: tuple[int, int]) -> None:
    """B4d: QEMU divides by cluster_size - 1, one too many from that many clusters on."""
    geo, cs = Geometry(*shape), shape[0]
    for n in (0, 1, 2, cs - 2, cs - 1, cs, cs + 1, 2 * cs - 1, 2 * cs + 1):
        assert geo.clusters(n * cs) == n
        assert geo.clusters(n * cs + 1) == geo.clusters(n * cs + cs - 1) == n + 1
    for n in (0, 1, cs - 1, cs, cs + 1, 5 * cs - 1):
        assert geo.start_of_cluster(n) == n // cs * cs


@pytest.mark.parametrize("shape", SOME)
def test_slice_offset(shape: tuple[int, int]) -> None:
    cs, ts = shape
    geo = Geometry(cs, ts)
    entries = cs * ts // 8
    reach = cs * entries
    per_slice = min(cs * ts, 16 * KiB) // 8
    for edge in (0, cs, per_slice * cs, 3 * per_slice * cs, reach, 2 * reach, 5 * reach + per_slice * cs):
        for pos in (edge - 1, edge, edge + 1):
            if pos >= 0:
                entry = pos // cs % entries
                assert geo.slice_offset(pos) == entry // per_slice * per_slice * 8, hex(pos)


@pytest.mark.parametrize("shape", SOME)
def test_l1_entries(shape: tuple[int, int]) -> None:
    """As far as the device reaches, in whole sectors, but never more than the table has."""
    geo = Geometry(*shape)
    reach = geo.l2_table_reach
    for tables in (0, 1, 2, 63, 64, 65, 128, geo.table_entries - 1, geo.table_entries):
        if tables <= geo.table_entries:
            want = min(max(-(-tables // 64), 1) * 64, geo.table_entries)
            for size in (tables * reach, tables * reach - 512, (tables - 1) * reach + 512):
                if size >= 0:
                    assert geo.l1_entries(size) == want, (tables, size)


def test_round_up() -> None:
    table = {(0, 512): 0, (1, 512): 512, (511, 512): 512, (512, 512): 512, (513, 512): 1024, (7, 3): 9}
    assert {args: round_up(*args) for args in table} == table


CS = 64 * KiB

# file size -> end of its last cluster: QEMU counts one that lacks less than a sector
ENDS = {
    0: 0,
    1: 0,
    CS - 512: 0,
    CS - 511: CS,
    CS - 1: CS,
    CS: CS,
    CS + 511: CS,
    5 * CS - 512: 4 * CS,
    5 * CS - 511: 5 * CS,
    5 * CS: 5 * CS,
    6 * CS - 513: 5 * CS,
}


@pytest.mark.parametrize("size", ENDS)
def test_end_of_file(size: int) -> None:
    assert Bounds(Geometry(CS, 4), 1, size).end == ENDS[size]


def test_valid_offsets() -> None:
    """Header of 2 clusters, file of 9: clusters 2 to 8; tables of 4 start at 2 to 5."""
    bounds = Bounds(Geometry(CS, 4), 2, 9 * CS)
    clusters = [n for n in range(12) if bounds.valid_cluster(n * CS)]
    tables = [n for n in range(12) if bounds.valid_table(n * CS)]
    assert (clusters, tables) == ([2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5])
    for offset in (0, 1, 2, 3 * CS - 1, 3 * CS + 1, 3 * CS + 512, 1 << 63, 2**64 - CS, 2**64 - 4 * CS, 2**64 - 1):
        assert not bounds.valid_cluster(offset) and not bounds.valid_table(offset), hex(offset)
    bounds.end += CS  # it grows with the file
    assert bounds.valid_cluster(9 * CS) and bounds.valid_table(6 * CS) and not bounds.valid_table(7 * CS)


@pytest.mark.parametrize("size", [0, CS, 4 * CS])
def test_nothing_is_valid_in_a_short_file(size: int) -> None:
    bounds = Bounds(Geometry(CS, 4), 1, size)
    assert not any(bounds.valid_table(n * CS) for n in range(8))


@pytest.mark.parametrize("shape", SOME)
def test_the_mark_of_entries_that_are_invalid_for_good(shape: tuple[int, int]) -> None:
    geo = Geometry(*shape)
    bounds = Bounds(geo, 1, 1000 * geo.table_bytes)
    for entry in (geo.cluster_size, 2 * geo.table_bytes, 1 << 62):
        marked = mark_dangling(entry)
        assert is_marked(marked) and mark_dangling(marked) == marked
        assert geo.start_of_cluster(marked) == entry
        assert not bounds.valid_cluster(marked) and not bounds.valid_table(marked)
        # One or two wrong bits make neither a mark of an entry, nor an entry or an older version's mark of a mark.
        for first in range(64):
            for second in range(64):
                damaged = {1 << first, 1 << second}
                assert not is_marked(entry ^ sum(damaged)) and not is_marked(entry ^ sum(damaged) | 1)
                assert (marked ^ sum(damaged)) & 0xFFF not in (0, 1)
    assert not is_marked(0) and not is_marked(1)
