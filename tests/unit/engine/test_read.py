"""Reading: what the guest sees, and which requests are refused."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import MiB, assert_same, stamp, zeros
from support.qed_image import raw_reader

import qedcore
from qedcore.errors import (
    ReadOnlyError,
    RequestError,
    ShutdownError,
)
from unit.engine.tapped import BASE, CS, Image


@pytest.mark.parametrize(
    ("pos", "length", "good"),
    [(0, 0, True), (MiB, 0, True), (MiB - 1, 1, True), (0, MiB, True), (MiB, 1, False), (MiB - 1, 2, False),
     (-1, 1, False), (-1, 0, False), (MiB + 1, 0, False), (0, MiB + 1, False), (1 << 63, 1, False)],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["", "D" * 16, "Z" * 16])
def test_range(image: Image, layout: str, pos: int, length: int, good: bool) -> None:
    built = image(size=MiB, layout=layout)
    before = built.path.read_bytes()
    with qedcore.open_image(built.path) as img:
        for _ in range(2):  # without and with the table in the cache
            for request in (
                lambda: img.pread(length, pos),
                lambda: img.extents(pos, length),
                lambda: img.pwrite(stamp(1, max(pos, 0), length) if layout[:1] == "D" else bytes(length), pos),
                lambda: img.zero(pos, length if layout[:1] != "D" else 0) if good else img.zero(pos, length),
            ):
                if good:
                    request()
                else:
                    with pytest.raises(RequestError, match="outside the device of 1048576 bytes") as caught:
                        request()
                    assert caught.value.errno == errno.EINVAL
    if not good or not length:
        assert built.path.read_bytes() == before


@pytest.mark.parametrize("layout", ["D", "Z", "-", ""])
def test_read_only(image: Image, layout: str) -> None:
    built = image(layout=layout)
    before = built.path.read_bytes()
    with qedcore.open_image(built.path, writable=False) as img:
        for _ in range(2):
            for request in (lambda: img.pwrite(b"x", 0), lambda: img.zero(0, 1), lambda: img.zero(0, CS)):
                with pytest.raises(ReadOnlyError) as caught:
                    request()
                assert caught.value.errno == errno.EROFS
            img.pread(CS, 0)
            img.flush()
    assert built.path.read_bytes() == before


def test_closed(image: Image) -> None:
    img = qedcore.open_image(image(layout="D").path)
    img.pread(1, 0)
    img.close()
    img.close()
    for request in (
        lambda: img.pread(1, 0),
        lambda: img.pread(0, 0),
        lambda: img.pwrite(b"x", 0),
        lambda: img.pwrite(b"x" * CS, CS),
        lambda: img.zero(0, 1),
        lambda: img.extents(0, 1),
    ):
        with pytest.raises(ShutdownError) as caught:
            request()
        assert caught.value.errno == errno.ESHUTDOWN


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffers(image: Image, kind: Callable[[bytes], Any]) -> None:
    with qedcore.open_image(image().path) as img:
        img.pwrite(kind(b"hello" * 1000), 100)
        img.pwrite(kind(b"world" * 1000), 100)
        buf = bytearray(5010)
        img.pread_into(memoryview(buf)[5:5005], 100)
        assert buf == bytes(5) + b"world" * 1000 + bytes(5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backing", [0, 100, 2 * CS, 2 * CS + 100, MiB])
def test_every_byte_of_the_buffer_is_set(image: Image, tmp_path: Path, backing: int, layers: int) -> None:
    """Also where there is nothing below, or the files below are shorter; the caller's buffer is not blank."""
    (tmp_path / "base.raw").write_bytes(stamp(BASE, 0, backing))
    base = {"backing": "base.raw", "no_probe": True} if backing else {}
    built = image("1.qed", layout="--DZ- ", size=8 * CS, **base)
    if layers == 2:
        image("2.qed", size=10 * CS, backing="1.qed")
    with qedcore.open_image(tmp_path / f"{layers}.qed", writable=False) as img:
        want = built.read(0, 8 * CS, raw_reader(tmp_path / "base.raw") if backing else zeros)
        want += bytes(img.size - len(want))
        for pos in (0, 50, CS + 1, 2 * CS, 4 * CS, 7 * CS + 100):
            for length in (100, CS, 3 * CS, img.size - pos):
                buf = bytearray(b"\xee" * min(length, img.size - pos))
                img.pread_into(buf, pos)
                assert_same(bytes(buf), want[pos : pos + len(buf)], pos)


@pytest.mark.parametrize("layout", ["", "Z" * 64, "D"], ids=["no table", "zero clusters", "table"])
def test_zeros_replace_what_the_buffer_held(image: Image, layout: str) -> None:
    with qedcore.open_image(image(size=4 * MiB, layout=layout).path) as img:
        for length in (1, 512, CS + 3, MiB - 1, MiB, 3 * MiB + 5):
            buf = bytearray(b"\xff" * length)
            img.pread_into(buf, 4 * MiB - length)
            assert not any(buf), length
