"""Where guest positions live: wrong entries fail the requests on them, and only those."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from support.patterns import GiB, assert_same, stamp
from support.qed_image import (
    Built,
    QedFile,
)

import qedcore
from qedcore.errors import (
    CorruptImageError,
    QEDError,
)
from unit.engine.tapped import CS, Image
from unit.fakes import extents


@pytest.mark.parametrize(("cut", "readable"), [(0, True), (1, True), (511, True), (512, False), (CS, False)])
def test_last_cluster_of_a_cut_file(image: Callable[..., Built], cut: int, readable: bool) -> None:
    built = image(layout="D", leaks=1, entries={1: lambda b: b.end - CS})
    with built.path.open("r+b") as f:
        f.seek(built.end - CS)
        f.write(b"x" * CS)
        f.truncate(built.end - cut)
    with qedcore.open_image(str(built.path), writable=False) as img:
        assert_same(img.pread(CS, 0), built.read(0, CS))
        if readable:
            assert_same(img.pread(CS, CS), b"x" * (CS - cut) + bytes(cut), CS)
        else:
            with pytest.raises(QEDError) as caught:
                img.pread(CS, CS)
            assert caught.value.errno == errno.EIO


BAD_L2: dict[str, Any] = {
    "2": 2,
    "unaligned": 0x50088,
    "unaligned by 512": 6 * CS + 512,
    "in the header": lambda b: CS,
    "the file's end": lambda b: b.end,
    "far": 1 << 40,
    "2**63": 1 << 63,
    "2**64 - 1 cluster": 2**64 - CS,
    "2**64 - 1": 2**64 - 1,
}


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize("name", BAD_L2)
def test_bad_l2_entry(image: Callable[..., Built], name: str, writable: bool) -> None:
    built = image(layout="D DZ", entries={1: BAD_L2[name]}, header_size=2)
    with QedFile(built.path) as oracle:
        value = oracle.entry(1)
    with qedcore.open_image(str(built.path), writable=writable) as img:
        with pytest.raises(QEDError) as caught:
            img.pread(4096, CS)
        assert caught.value.errno == errno.EIO
        # A writable open sets the lowest bit of entries past the end, so that growth cannot make them valid.
        assert f"{value:#x}" in str(caught.value) or (writable and f"{value | 1:#x}" in str(caught.value))
        assert "\n" not in str(caught.value)
        if writable:
            with pytest.raises(QEDError) as caught:
                img.pwrite(b"w" * 4096, CS)
            assert caught.value.errno == errno.EIO
            img.pwrite(b"n" * 512, 2 * CS)
            assert img.pread(512, 2 * CS) == b"n" * 512
        assert_same(img.pread(CS, 0), built.read(0, CS))
        assert_same(img.pread(CS, 3 * CS), bytes(CS), 3 * CS)


@pytest.mark.parametrize("name", ["1", *BAD_L2, "last cluster past the end"])
def test_bad_l1_entry(image: Callable[..., Built], name: str) -> None:
    values = {**BAD_L2, "1": 1, "last cluster past the end": lambda b: b.end - CS}
    built = image(size=6 * GiB, layout={0: "data"}, header_size=2, l1_entries={1: values[name]})
    with qedcore.open_image(str(built.path)) as img:
        for request in (lambda: img.pread(512, 2 * GiB), lambda: img.pwrite(b"w" * 512, 2 * GiB)):
            with pytest.raises(QEDError) as caught:
                request()
            assert caught.value.errno == errno.EIO
            assert "\n" not in str(caught.value)
        assert_same(img.pread(CS, 0), built.read(0, CS))
        img.pwrite(stamp(2, 4 * GiB, CS), 4 * GiB)
        assert_same(img.pread(CS, 4 * GiB), stamp(2, 4 * GiB, CS), 4 * GiB)


def test_bad_entry_in_the_middle_of_a_run_is_not_read(image: Callable[..., Built]) -> None:
    """Every cluster of a contiguous run is checked against the file's end, not only the first."""
    built = image(layout="D", leaks=1, entries={1: lambda b: b.end - CS, 2: lambda b: b.end})
    with qedcore.open_image(str(built.path)) as img:
        for pos, length in ((CS, 2 * CS), (0, 4 * CS), (2 * CS, 512)):
            with pytest.raises(QEDError) as caught:
                img.pread(length, pos)
            assert caught.value.errno == errno.EIO
    assert built.path.stat().st_size == built.end


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
def test_run_ends_with_the_file(image: Image, writable: bool) -> None:
    """The last cluster is read, the next one of the run is an error, however they are asked for."""
    built = image(layout="D", leaks=2, entries={n: lambda b, n=n: b.end + (n - 3) * CS for n in (1, 2, 3)})
    with qedcore.open_image(built.path, writable) as img:
        for pos, length in ((CS, 3 * CS), (2 * CS, 2 * CS), (3 * CS, 1), (3 * CS - 1, 2)):
            for request in (lambda: img.pread(length, pos), lambda: img.extents(pos, length)):  # noqa: B023
                with pytest.raises(CorruptImageError, match="L2 entry 3 at .* not a cluster"):
                    request()
        assert img.pread(2 * CS, CS) == bytes(2 * CS)
        assert extents(img, 0, 3 * CS) == [(3 * CS, "FOUND")]
        assert extents(img, 0, 4 * CS, one=True) == [(3 * CS, "FOUND")]  # the next request is told
