"""P5: an I/O error fails its request with the right errno, and corrupts nothing, then or later.

Every fault point under every operation; a full disk and a failing one under a real server.  Where no crash and no
server is involved, real syncs would only take time (cache="unsafe").
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, QedFile, assert_sound
from support.server import Nbdkit, import_nbd
from support.tools import require, run, unavailable

import qedcore
from qedcore.engine import allocator
from qedcore.errors import StorageError
from qedcore.maintenance.tidy import tidy
from qedcore.trace import FAULT_POINTS

CS = 4 * KiB
TABLE = 512 * CS  # guest bytes of one L2 table, of one cluster
SIZE = 2 * TABLE
END = 24 * CS  # guest bytes that are compared, in either table
SERVED = 64 * KiB  # cluster size in servers
Image = Callable[..., Built]
Serve = Callable[..., Nbdkit]


class Operation(NamedTuple):
    """What meets the fault: `run` on an image with `layout`; it writes `new` at `pos`, or frees that range."""

    run: Callable[[qedcore.QEDImage], object]
    pos: int = 0  # bytes
    new: bytes = b""
    layout: str = "DDZ-DD-D"
    backing: bool = False


def write(pos: int, length: int, fua: bool = False, **more: Any) -> Operation:
    data = stamp(7, pos, length)
    return Operation(lambda img: img.pwrite(data, pos, fua=fua), pos, data, **more)


def zero(pos: int, length: int, may_trim: bool = False, **more: Any) -> Operation:
    return Operation(lambda img: img.zero(pos, length, may_trim=may_trim), pos, bytes(length), **more)


OPERATIONS = {
    "read": Operation(lambda img: img.pread(END, 0)),
    "read, backing": Operation(lambda img: img.pread(END, 0), backing=True),
    "write in place": write(100, 700),
    "write in place, FUA": write(100, 700, fua=True),
    "write, zero cluster": write(2 * CS + 100, 700),
    "write, allocating": write(3 * CS + 100, 700),
    "write, allocating, FUA": write(3 * CS + 100, 700, fua=True),
    "write, backing": write(3 * CS + 100, 700, backing=True),
    "write, new table": write(TABLE + 100, 700),
    "write, new table, backing": write(TABLE + 100, 700, backing=True),
    "write, mixed": write(CS + 100, 6 * CS, backing=True),
    "write, two tables": write(TABLE - CS, 2 * CS),
    "zero": zero(CS + 100, 6 * CS, backing=True),
    "zero, freeing": zero(CS // 2, 6 * CS, may_trim=True),
    "zero, freeing, backing": zero(CS // 2, 6 * CS, may_trim=True, backing=True),
    "trim": Operation(lambda img: img.trim(0, 2 * CS), 0, bytes(2 * CS)),
    "trim, backing": Operation(lambda img: img.trim(0, 2 * CS), 0, bytes(2 * CS), backing=True),
    "flush": Operation(lambda img: img.flush()),
    "idle": Operation(lambda img: img._gate.clear()),  # type: ignore[union-attr]
    "tidy": Operation(tidy),
}
CODES = (errno.EIO, errno.ENOSPC, errno.EAGAIN, errno.EINTR)


class Faults:
    """The fault point `point` fails while armed: the first time, or every time."""

    def __init__(self, point: str, code: int, for_ever: bool) -> None:
        self.armed = False
        self.hits = 0
        self._point = point
        self._code = code
        self._for_ever = for_ever

    def __call__(self, name: str) -> None:
        if self.armed and name == self._point and (self._for_ever or not self.hits):
            self.hits += 1
            raise OSError(self._code, os.strerror(self._code))


def both(read: Callable[[int, int], bytes]) -> bytes:
    """What is compared of a guest: the start, and both sides of the border between the tables."""
    return read(END, 0) + read(2 * END, TABLE - END)


def splice(content: bytes, pos: int, data: bytes) -> bytes:
    """both(), after a write."""
    whole = bytearray(content)
    for i, start in enumerate((0, TABLE - END)):
        base, length = (0, END) if i == 0 else (END, 2 * END)
        first, last = max(pos, start), min(pos + len(data), start + length)
        if first < last:
            whole[base + first - start : base + last - start] = data[first - pos : last - pos]
    return bytes(whole)


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_fault_points(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, for_ever: bool
) -> None:
    monkeypatch.setattr(allocator, "GROWTH_STEP", 4 * CS)
    operation = OPERATIONS[name]
    spec: dict[str, Any] = {}
    if operation.backing:
        (tmp_path / "base").write_bytes(stamp(9, 0, SIZE))
        spec = {"backing": "base", "no_probe": True}
    image("first.qed", layout=operation.layout, cluster_size=CS, table_size=1, size=SIZE, **spec)
    met: set[str] = set()
    first = tmp_path / "dry.qed"
    shutil.copy(tmp_path / "first.qed", first)
    with prepared(first, operation, met.add) as img:
        met.clear()
        operation.run(img)
        points = sorted(met)
    assert points
    for point in points:
        for code in CODES[: 1 if for_ever else None]:
            fault_point(tmp_path, operation, Faults(point, code, for_ever), code)


def prepared(path: Path, operation: Operation, fault: Callable[[str], None]) -> qedcore.QEDImage:
    """In a dirty period, with something to flush, and a hole to fill."""
    img = qedcore.open_image(path, fault=fault, cache="unsafe")
    img.pwrite(b"before" * 100, 9 * CS)
    img.trim(7 * CS, CS)
    if operation.new:
        img.flush()
    return img


def fault_point(directory: Path, operation: Operation, fault: Faults, code: int) -> None:
    path = directory / "image.qed"
    shutil.copy(directory / "first.qed", path)
    img = prepared(path, operation, fault)
    old = both(img.pread)
    new = splice(old, operation.pos, operation.new)
    fault.armed = True
    with pytest.raises(StorageError) as caught:
        operation.run(img)
    assert caught.value.errno == code and fault.hits
    fault.armed = False
    got = both(img.pread)
    for at in range(0, len(got), 512):
        assert got[at : at + 512] in (old[at : at + 512], new[at : at + 512]), hex(at)
    # In the same cluster, and nothing else that would write its entry; killed after the flush.
    near = operation.pos + 200
    img.pwrite(b"near" * 50, near)
    img.flush()
    killed = directory / "killed.qed"
    shutil.copy(path, killed)
    ends = {killed: splice(got, near, b"near" * 50)}
    # In new clusters and freed ones; then the same again.
    expected = ends[killed]
    for pos, data in ((10 * CS, b"other" * 50), (TABLE + 3 * CS, b"far" * 50)):
        img.pwrite(data, pos)
        expected = splice(expected, pos, data)
    assert_same(both(img.pread), expected)
    operation.run(img)
    ends[path] = splice(expected, operation.pos, operation.new)
    tidy(img)
    img.close()
    for end, expected in ends.items():
        with qedcore.open_image(end, cache="unsafe") as again:
            assert_same(both(again.pread), expected)
        with QedFile(end) as file:
            assert_same(both(lambda length, pos: file.read(pos, length)), expected)
        assert_sound(end, leaks=None)


@pytest.mark.parametrize("point", FAULT_POINTS)
@pytest.mark.parametrize("code", CODES)
def test_close(image: Image, point: str, code: int) -> None:
    """An error is told, and what was not made durable keeps NEED_CHECK; a second close does nothing."""
    fault = Faults(point, code, True)
    built = image(layout="D", cluster_size=CS, table_size=1)
    img = qedcore.open_image(built.path, fault=fault, cache="unsafe")
    img.pwrite(b"data" * 100, 3 * CS)
    fault.armed = True
    try:
        img.close()
    except StorageError as error:
        assert error.errno == code and fault.hits
        with QedFile(built.path) as file:
            assert file.need_check
    else:
        assert not fault.hits
    img.close()
    with qedcore.open_image(built.path) as again:
        assert again.pread(400, 3 * CS) == b"data" * 100
    assert_sound(built.path)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("point", FAULT_POINTS)
def test_open_with_repair(image: Image, point: str, code: int) -> None:
    """The image does not open, and is no worse: the next open repairs it."""
    fault = Faults(point, code, True)
    built = image(layout="DD-D", cluster_size=CS, table_size=1, features=2, leaks=3, entries={2: 1 << 40})
    fault.armed = True
    try:
        qedcore.open_image(built.path, fault=fault, cache="unsafe").close()
    except StorageError as error:
        assert error.errno == code and fault.hits
        with QedFile(built.path) as file:
            assert file.need_check
    else:
        assert not fault.hits
    with qedcore.open_image(built.path) as img:
        assert_same(img.pread(4 * CS, 0), built.read(0, 4 * CS))
    assert_sound(built.path)


# -- a real server -------------------------------------------------------------------------------------------------


def errno_of(request: Callable[..., Any], *args: Any) -> str | None:
    try:
        request(*args)
    except import_nbd().Error as error:
        return str(error.errno)
    return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid():
        pytest.skip("only root can mount a small file system")
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", where], stderr=subprocess.PIPE).returncode:
        unavailable("mounting is not allowed here")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_full_disk(image: Image, serve: Serve, small_disk: Path, backing: bool) -> None:
    """ENOSPC to the client while there is no space; then the same server goes on, and has lost nothing."""
    base = small_disk.parent / "base"
    base.write_bytes(stamp(9, 0, 8 * MiB))
    spec: dict[str, Any] = {"backing": str(base), "no_probe": True} if backing else {}
    built = image("disk/image.qed", layout="D", size=16 * MiB, **spec)
    server = serve(built.path, **({"backing": "any"} if backing else {}))
    client = server.connect()
    written = 0
    while True:
        error = errno_of(client.pwrite, stamp(3, written, SERVED), written)
        if error:
            break
        written += SERVED
    assert error == "ENOSPC"
    assert MiB < written < 4 * MiB
    assert errno_of(client.pwrite, b"x" * SERVED, 9 * MiB) == "ENOSPC"  # and again, where a table exists
    new = stamp(4, 0, SERVED)
    client.pwrite(new, 0)  # in place needs no space
    client.flush()

    def check(read: Callable[[int, int], bytes]) -> None:
        assert_same(read(SERVED, 0), new)
        assert_same(read(written - SERVED, SERVED), stamp(3, SERVED, written - SERVED))
        rest = read(SERVED, written)
        for at in range(0, SERVED, 512):
            old = stamp(9, written + at, 512) if backing else bytes(512)
            assert rest[at : at + 512] in (old, stamp(3, written + at, 512))

    check(client.pread)
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    more = stamp(5, 8 * MiB, MiB)
    client.pwrite(more, 8 * MiB)
    client.flush()
    check(client.pread)
    client.shutdown()
    assert server.stop() == 0
    assert_sound(built.path)
    with qedcore.open_image(built.path, writable=False) as img:
        check(img.pread)
        assert_same(img.pread(MiB, 8 * MiB), more)


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
def test_failed_sync(image: Image, serve: Serve, tmp_path: Path, code: str) -> None:
    """It is reported to every flush and FUA write from then on, and NEED_CHECK stays: the data may be lost."""
    require("strace")
    if run(["strace", "-D", "-o", str(tmp_path / "probe"), "true"]).rc != 0:
        unavailable("strace may not trace here")
    built = image(layout="D", size=16 * MiB)
    # The third sync fails, the later ones would work: the first sets NEED_CHECK, the second is the first flush's.
    inject = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:error={code}:when=3"]
    wrapper = ["strace", "-D", "-f", "-qq", "-o", str(tmp_path / "log"), *inject]
    server = serve(built.path, wrapper=wrapper, threads=1)  # strace counts the calls of each thread
    client = server.connect()
    client.pwrite(b"a" * SERVED, SERVED)
    client.flush()
    client.pwrite(b"b" * SERVED, 2 * SERVED)
    for _ in range(3):
        assert errno_of(client.flush) == code
    nbd = import_nbd()
    assert errno_of(client.pwrite, b"c" * 512, 0, nbd.CMD_FLAG_FUA) == code
    other = server.connect()  # another client of the same image
    assert errno_of(other.flush) == code
    other.shutdown()
    assert bytes(client.pread(SERVED, SERVED)) == b"a" * SERVED
    client.shutdown()
    server.stop()
    assert "cannot flush" in server.log()
    with QedFile(built.path) as file:
        assert file.need_check
    with qedcore.open_image(built.path) as img:
        assert img.pread(SERVED, SERVED) == b"a" * SERVED
    assert_sound(built.path)
