"""FileStorage and DirectStorage: full-length I/O or an error, whatever the system calls do."""

from __future__ import annotations

import errno
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, assert_same
from support.tools import unavailable

from qedcore.errors import RequestError, StorageError
from qedcore.storage import close_all, direct
from qedcore.storage.cache_mode import CACHE_MODES, CacheMode, cache_mode
from qedcore.storage.direct import DirectStorage
from qedcore.storage.file import FileStorage
from qedcore.storage.open import open_storage
from unit.fakes import Gate, Job, open_fds

Open = Callable[..., FileStorage]


def has_direct(directory: str) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as f:
            f.write(bytes(8 * KiB))
            f.flush()
            DirectStorage(f.name, True, CacheMode(direct=True)).close()
    except (OSError, StorageError):
        return False
    return True


@pytest.fixture(scope="session")
def direct_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose file system has O_DIRECT."""
    for candidate in (str(tmp_path_factory.getbasetemp()), "/var/tmp", os.getcwd(), "/dev/shm"):
        if os.path.isdir(candidate) and os.access(candidate, os.W_OK) and has_direct(candidate):
            with tempfile.TemporaryDirectory(dir=candidate) as name:
                yield Path(name)
            return
    unavailable("no file system with O_DIRECT")


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Open]:
    yield from opener(tmp_path / "file", CacheMode())


@pytest.fixture
def open_direct(direct_dir: Path) -> Iterator[Open]:
    with tempfile.TemporaryDirectory(dir=direct_dir) as name:
        yield from opener(Path(name) / "file", CacheMode(direct=True))


@pytest.fixture(params=["buffered", "direct"])
def open_any(request: pytest.FixtureRequest) -> Open:
    result: Open = request.getfixturevalue("open_file" if request.param == "buffered" else "open_direct")
    return result


def opener(path: Path, mode: CacheMode) -> Iterator[Open]:
    opened: list[FileStorage] = []

    def make(content: bytes = b"", writable: bool = True) -> FileStorage:
        path.write_bytes(content)
        storage = open_storage(path, writable, mode)
        assert isinstance(storage, FileStorage)
        opened.append(storage)
        return storage

    yield make
    for storage in opened:
        storage.close()


def numbers(rng: random.Random, length: int) -> bytes:
    return rng.randbytes(length)


def content(storage: FileStorage) -> bytes:
    return Path(storage.name).read_bytes()


def step(storage: FileStorage) -> int:
    """Smallest piece that the system may move at once."""
    return storage.block if isinstance(storage, DirectStorage) else 1


# Opening


def test_cache_modes_choose_the_storage(direct_dir: Path) -> None:
    path = direct_dir / "modes"
    path.write_bytes(bytes(4096))
    for name, mode in CACHE_MODES.items():
        assert cache_mode(name) is mode
        storage = open_storage(path, True, mode)
        assert isinstance(storage, DirectStorage) is (name in ("none", "directsync"))
        storage.close()
    assert {name for name, mode in CACHE_MODES.items() if mode.writethrough} == {"writethrough", "directsync"}
    with pytest.raises(RequestError, match="cache=fast is not one of writeback, .*unsafe"):
        cache_mode("fast")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(path))  # the length of such names is limited


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


REFUSED: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "fifo": (make_fifo, {errno.EINVAL}),
    "directory": (Path.mkdir, {errno.EISDIR, errno.EINVAL}),
    "socket": (make_socket, {errno.ENXIO}),
    "character device": (lambda path: path.symlink_to("/dev/null"), {errno.EINVAL}),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), {errno.EINVAL}),
    "absent": (lambda path: None, {errno.ENOENT}),
    "below a file": (lambda path: None, {errno.ENOTDIR}),
    "symlink loop": (make_loop, {errno.ELOOP}),
    "symlink to nothing": (lambda path: path.symlink_to("gone"), {errno.ENOENT}),
}


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize("mode", ["writeback", "none"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path: Path, kind: str, mode: str, writable: bool) -> None:
    """At once, without waiting for a FIFO's other end, and without keeping a descriptor."""
    make, codes = REFUSED[kind]
    path = tmp_path / "x"
    make(path)
    if kind == "below a file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "x"
    before = open_fds()
    with pytest.raises(StorageError) as caught:
        open_storage(path, writable, CACHE_MODES[mode])
    assert caught.value.errno in codes | ({errno.EINVAL} if mode == "none" else set())
    assert str(path) in str(caught.value)
    assert open_fds() == before


def test_permission(tmp_path: Path, open_file: Open) -> None:
    storage = open_file(b"x" * 10, writable=False)
    with pytest.raises(StorageError) as caught:
        storage.pwrite(b"y", 0)
    assert caught.value.errno == errno.EBADF
    assert content(storage) == b"x" * 10


def test_identity(tmp_path: Path) -> None:
    """One file under several names is one file."""
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    os.link(tmp_path / "a", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("a")
    storages = {name: FileStorage(tmp_path / name, False) for name in ("a", "b", "hard", "soft")}
    same = [name for name, storage in storages.items() if storage.identity() == storages["a"].identity()]
    assert same == ["a", "hard", "soft"]
    for storage in storages.values():
        storage.close()
    assert storages["a"].identity() == storages["hard"].identity()  # also when closed


def test_close_twice(open_any: Open) -> None:
    storage = open_any(bytes(4096))
    before = open_fds()
    storage.close()
    assert open_fds() == before - 1
    other = os.open("/dev/null", os.O_RDONLY)  # may get the same number: the second close must not hit it
    storage.close()
    os.close(other)
    for use in (lambda: storage.pread_into(bytearray(1), 0), lambda: storage.pwrite(b"x", 0), storage.size):
        with pytest.raises(StorageError) as caught:
            use()
        assert caught.value.errno == errno.EBADF


def test_size_and_truncate(open_any: Open) -> None:
    storage = open_any(b"x" * 10000)
    assert storage.size() == 10000
    for size in (20000, 5000, 0, 7, 1 << 40):
        storage.truncate(size)
        assert storage.size() == size
    storage.truncate(5)
    storage.truncate(10)
    assert content(storage) == bytes(10)  # bytes gained read as zeros
    with pytest.raises(StorageError, match="cannot make .* long") as caught:
        storage.truncate(-1)
    assert caught.value.errno == errno.EINVAL


# Reads past the end


@pytest.mark.parametrize("size", [0, 1, 511, 512, 5000, 8192])
def test_zeros_past_the_end(open_any: Open, rng: random.Random, size: int) -> None:
    data = numbers(rng, size)
    storage = open_any(data)
    for offset in {0, 1, max(size - 513, 0), max(size - 1, 0), size, size + 1, size + 4096, 1 << 40}:
        for length in (0, 1, 511, 512, 513, 4096, 9000):
            buf = bytearray(b"\xee" * length)
            storage.pread_into(buf, offset)
            assert_same(bytes(buf), (data[offset:] + bytes(length))[:length], offset)
    assert storage.size() == size


@pytest.mark.parametrize("offset", [0, 5, 512, 4096, 5000, 9000])
def test_empty_requests_do_nothing(open_any: Open, rng: random.Random, offset: int) -> None:
    data = numbers(rng, 5000)
    storage = open_any(data)
    storage.pread_into(bytearray(), offset)
    storage.pwrite(b"", offset)
    storage.pwritev([b"", b""], offset)
    assert_same(content(storage), data)


# Short system calls


def shorten(monkeypatch: pytest.MonkeyPatch, limits: Iterator[int]) -> list[str]:
    """Every call moves at most the next limit (bytes); the list says which calls were made."""
    calls: list[str] = []

    def cut(bufs: Any, limit: int) -> list[memoryview]:
        out = []
        for buf in bufs:
            view = memoryview(buf).cast("B")[: max(limit, 0)]
            limit -= len(view)
            out.append(view)
        return out

    real = {name: getattr(os, name) for name in ("preadv", "pwrite", "pwritev")}

    def preadv(fd: int, bufs: Any, offset: int) -> int:
        calls.append("preadv")
        return int(real["preadv"](fd, cut(bufs, next(limits)), offset))

    def pwrite(fd: int, buf: Any, offset: int) -> int:
        calls.append("pwrite")
        return int(real["pwrite"](fd, cut([buf], next(limits))[0], offset))

    def pwritev(fd: int, bufs: Any, offset: int) -> int:
        calls.append("pwritev")
        return int(real["pwritev"](fd, cut(bufs, next(limits)), offset))

    for name, fake in (("preadv", preadv), ("pwrite", pwrite), ("pwritev", pwritev)):
        monkeypatch.setattr(os, name, fake)
    return calls


@pytest.mark.parametrize("seeded", range(6))
def test_short_calls_are_finished(
    open_any: Open, rng: random.Random, monkeypatch: pytest.MonkeyPatch, seeded: int
) -> None:
    model = bytearray(numbers(rng, 40000))
    storage = open_any(bytes(model))
    unit = step(storage)
    with monkeypatch.context() as patch:
        calls = shorten(patch, iter(lambda: unit * rng.randint(1, max(2000 // unit, 3)), None))
        for _ in range(30):
            length = rng.randrange(1, 9000)
            offset = rng.randrange(len(model) - length)
            if rng.random() < 0.5:
                data = numbers(rng, length)
                cuts = sorted(rng.randrange(length) for _ in range(2))
                if rng.random() < 0.5:
                    storage.pwrite(data, offset)
                else:
                    storage.pwritev([data[: cuts[0]], data[cuts[0] : cuts[1]], data[cuts[1] :]], offset)
                model[offset : offset + length] = data
            buf = bytearray(length)
            storage.pread_into(buf, offset)
            assert_same(bytes(buf), bytes(model[offset : offset + length]), offset)
        assert len(calls) > 60
    assert_same(content(storage)[: len(model)], bytes(model))


def test_short_read_then_end(open_file: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_file(b"0123456789")
    shorten(monkeypatch, iter(lambda: 3, None))
    buf = bytearray(b"\xee" * 20)
    storage.pread_into(buf, 2)
    assert buf == b"23456789" + bytes(12)


VECTORS = {
    "one": [b"0123456789ab"],
    "three": [b"012", b"34567", b"89ab"],
    "empty ones": [b"", b"0123", b"", b"456789ab", b""],
    "views": [memoryview(b"xx0123yy")[2:6], bytearray(b"4567"), memoryview(b"89ab")],
}


@pytest.mark.parametrize("name", VECTORS)
def test_partial_pwritev(open_file: Open, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first call writes 0 to 12 bytes, the rest follows from the right byte of the right buffer."""
    for first in range(13):
        storage = open_file(b"." * 30)
        with monkeypatch.context() as patch:
            shorten(patch, iter([first, *[2] * 40]))
            storage.pwritev(VECTORS[name], 7)
        assert content(storage) == b"." * 7 + b"0123456789ab" + b"." * 11, first
        storage.close()


@pytest.mark.parametrize("method", ["pwrite", "pwritev"])
def test_write_that_moves_nothing_fails(open_any: Open, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Not an endless loop."""
    storage = open_any(bytes(8192))
    shorten(monkeypatch, iter(lambda: 0, None))
    with pytest.raises(StorageError) as caught:
        storage.pwrite(b"x" * 600, 0) if method == "pwrite" else storage.pwritev([b"x", b"y"], 0)
    assert caught.value.errno == errno.EIO


# system call -> the methods that make it, with the words of the error
ERRORS: dict[str, list[tuple[Callable[[Any], None], str]]] = {
    "preadv": [(lambda s: s.pread_into(bytearray(5000), 0x1234), "cannot read 5000 bytes at 0x1234")],
    "pwrite": [(lambda s: s.pwrite(bytes(5000), 0x1234), "cannot write 5000 bytes at 0x1234")],
    "pwritev": [(lambda s: s.pwritev([bytes(5000), b"x"], 0x1234), "cannot write 5001 bytes at 0x1234")],
    "ftruncate": [(lambda s: s.truncate(77), "cannot make .* 77 bytes long")],
    "fdatasync": [(lambda s: s.flush(), "cannot flush")],
}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EAGAIN, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("name", ERRORS)
def test_errors_carry_errno_and_place(open_any: Open, monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    storage = open_any(bytes(16384))

    def fail(*args: object) -> None:
        raise OSError(code, "words that nobody sees")

    monkeypatch.setattr(os, "pwrite" if name == "pwritev" and step(storage) > 1 else name, fail)
    for use, words in ERRORS[name]:
        with pytest.raises(StorageError, match=words) as caught:
            use(storage)
        text = str(caught.value)
        assert caught.value.errno == code
        assert storage.name in text and text.endswith(os.strerror(code)) and "\n" not in text


def test_length_that_no_file_can_have(open_any: Open) -> None:
    with pytest.raises(StorageError, match=f"{1 << 63} bytes long: {os.strerror(errno.EFBIG)}") as caught:
        open_any(bytes(16384)).truncate(1 << 63)
    assert caught.value.errno == errno.EFBIG


def test_all_are_closed_whatever_happens() -> None:
    class Closing:
        def __init__(self, *errors: StorageError) -> None:
            self.errors = errors
            self.closed = False

        def close(self) -> None:
            self.closed = True
            for error in self.errors:
                raise error

    storages: list[Any] = [Closing(), Closing(StorageError("first")), Closing(StorageError("second")), Closing()]
    with pytest.raises(StorageError, match="first"):
        close_all(storages)
    assert all(storage.closed for storage in storages)


@pytest.mark.parametrize("done", [1, 600])
def test_error_after_a_short_call(open_file: Open, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """Part of it moved, then it failed: it failed."""
    storage = open_file(bytes(4096))

    def limits() -> Iterator[int]:
        yield done
        raise OSError(errno.ENOSPC, "full")

    for use in (
        lambda: storage.pwrite(bytes(2000), 0x10),
        lambda: storage.pwritev([bytes(500), bytes(1500)], 0x10),
        lambda: storage.pread_into(bytearray(2000), 0x10),
    ):
        with monkeypatch.context() as patch:
            shorten(patch, limits())
            with pytest.raises(StorageError) as caught:
                use()
        assert caught.value.errno == errno.ENOSPC


def test_unsafe_does_not_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").touch()
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    for name, count in (("unsafe", 0), ("writeback", 1)):
        storage = open_storage(tmp_path / "x", True, CACHE_MODES[name])
        storage.flush()
        assert len(synced) == count
        storage.close()


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EROFS, errno.EIO])
def test_flush_on_a_read_only_file_system(
    open_file: Open, monkeypatch: pytest.MonkeyPatch, writable: bool, code: int
) -> None:
    """Some cannot sync: there is nothing to."""
    storage = open_file(b"a", writable=writable)

    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fdatasync", fail)
    if writable or code == errno.EIO:
        with pytest.raises(StorageError, match="cannot flush"):
            storage.flush()
    else:
        storage.flush()


def test_drop_cache(open_file: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the file; where the system has no such thing, nothing."""
    storage = open_file(b"data")
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: calls.append(args))
    storage.drop_cache()
    assert calls == [(storage.fd, 0, 0, os.POSIX_FADV_DONTNEED)]

    def refuse(*args: int) -> None:
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    storage.drop_cache()


def test_failed_flush_is_never_forgotten(open_any: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_any(bytes(4096))

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError):
            storage.flush()
    with pytest.raises(StorageError) as caught:
        storage.flush()
    assert caught.value.errno == errno.EIO


# O_DIRECT


def edges(block: int) -> list[int]:
    return sorted({1, block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1, 3 * block + 7})


def sized(storage: FileStorage, model: bytearray) -> bytes:
    """The file's bytes as long as the model; what was rounded up to the block is zeros."""
    data = content(storage)
    assert len(model) <= len(data) < len(model) + step(storage)
    assert not any(data[len(model) :])
    return data[: len(model)]


@pytest.mark.parametrize("size", [0, 512, 521, 4096, 6 * 512, 6 * 512 - 1])
def test_unaligned_boundaries(open_direct: Open, rng: random.Random, size: int) -> None:
    """Every offset and length around the blocks, in files that end on a block and that do not."""
    storage = open_direct(numbers(rng, size))
    assert isinstance(storage, DirectStorage)
    start = content(storage)
    for offset in [0, *edges(storage.block)]:
        for n in edges(storage.block):
            storage.truncate(0)
            Path(storage.name).write_bytes(start)
            model = bytearray(start)
            data = numbers(rng, n)
            storage.pwrite(data, offset)
            model += bytes(max(offset + n - len(model), 0))
            model[offset : offset + n] = data
            assert_same(sized(storage, model), bytes(model))
            buf = bytearray(b"\xee" * n)
            storage.pread_into(buf, offset)
            assert_same(bytes(buf), data, offset)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_requests_larger_than_the_bounce_buffer(
    open_direct: Open, rng: random.Random, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    bounce = 8 * KiB
    monkeypatch.setattr(direct, "_BOUNCE_BYTES", bounce)
    model = bytearray(numbers(rng, 5 * bounce))
    storage = open_direct(bytes(model))
    for offset in (0, 1, 511, 512, bounce - 1, bounce):
        for delta in (-513, -1, 0, 1, 512):
            data = numbers(rng, rounds * bounce + delta)
            storage.pwrite(data, offset)
            model[offset : offset + len(data)] = data
            buf = bytearray(len(data))
            storage.pread_into(buf, offset)
            assert_same(bytes(buf), data, offset)
    assert_same(content(storage), bytes(model))


def test_random_requests(open_direct: Open, rng: random.Random) -> None:
    model = bytearray(20000)
    storage = open_direct(bytes(model))
    for _ in range(300):
        offset, n = rng.randrange(18000), rng.randrange(2000)
        data = numbers(rng, n)
        storage.pwritev([data[: n // 3], data[n // 3 : n // 2], data[n // 2 :]], offset)
        model[offset : offset + n] = data
        offset, n = rng.randrange(25000), rng.randrange(2000)
        buf = bytearray(n)
        storage.pread_into(buf, offset)
        assert_same(bytes(buf), (bytes(model[offset:]) + bytes(n))[:n], offset)
    assert_same(sized(storage, model), bytes(model))


def test_writers_that_share_blocks_lose_nothing(open_direct: Open, seed: str) -> None:
    """Each thread owns every fourth 100-byte stripe: nearly every block is shared by all of them."""
    stripe, threads, stripes = 100, 4, 80
    storage = open_direct(bytes(stripe * stripes))

    def work(me: int) -> dict[int, bytes]:
        rng = random.Random(f"{seed} {me}")
        mine: dict[int, bytes] = {}
        for _ in range(150):
            number = rng.randrange(stripes // threads) * threads + me
            mine[number] = rng.randbytes(stripe)
            storage.pwrite(mine[number], number * stripe)
        return mine

    want = bytearray(stripe * stripes)
    for job in [Job(work, me) for me in range(threads)]:
        for number, data in job.result().items():
            want[number * stripe : (number + 1) * stripe] = data
    assert_same(content(storage)[: len(want)], bytes(want))


# (first write, second write, must the second wait?) in (offset, length) of half blocks
SHARING = {
    "same block": ((0, 1), (1, 1), True),
    "end and start of one block": ((0, 3), (3, 1), True),
    "whole block, then part of it": ((0, 2), (0, 1), True),
    "part, then the whole block": ((0, 1), (0, 2), True),
    "neighbours": ((0, 1), (2, 1), False),
    "neighbours, whole": ((0, 2), (2, 2), False),
    "far": ((0, 1), (8, 3), False),
    "touching at a block": ((1, 3), (4, 1), False),
}


@pytest.mark.parametrize("name", SHARING)
def test_second_writer_waits(open_direct: Open, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """I5, one step at a time: the first has read its block and is about to write it when the second comes."""
    storage = open_direct(b"." * 4096 * 8)
    assert isinstance(storage, DirectStorage)
    half = storage.block // 2
    (first, n), (second, m), waits = SHARING[name]
    gate = Gate()
    real = os.pwrite

    def stopped(fd: int, buf: Any, offset: int) -> int:
        gate.stop()
        return real(fd, buf, offset)

    monkeypatch.setattr(os, "pwrite", stopped)
    jobs = [Job(storage.pwrite, b"1" * n * half, first * half)]
    gate.reached()
    jobs.append(Job(storage.pwrite, b"2" * m * half, second * half))
    gate.avoided() if waits else gate.reached()
    gate.open(2)
    for job in jobs:
        job.result()
    want = bytearray(b"." * 4096 * 8)
    want[first * half : (first + n) * half] = b"1" * n * half
    want[second * half : (second + m) * half] = b"2" * m * half
    assert_same(content(storage), bytes(want))
    assert storage._busy._busy == []


def test_failed_write_lets_the_next_one_go(open_direct: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_direct(bytes(4096))
    assert isinstance(storage, DirectStorage)

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "")

    for name in ("preadv", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(StorageError):
                storage.pwrite(b"x", 5)
        assert storage._busy._busy == []
    Job(storage.pwrite, b"y", 6).result()
    assert content(storage)[:8] == b"\0\0\0\0\0\0y\0"


def with_large_blocks(monkeypatch: pytest.MonkeyPatch, direct_dir: Path, content: bytes) -> DirectStorage:
    """As on a device with sectors of 4 KiB, where the system takes nothing less."""
    path = direct_dir / "large"
    path.write_bytes(content)
    for name in ("preadv", "pwrite"):
        call = getattr(os, name)

        def checked(fd: int, buf: Any, offset: int, call: Callable[..., int] = call) -> int:
            length = sum(map(len, buf)) if isinstance(buf, tuple) else len(buf[0] if isinstance(buf, list) else buf)
            if (offset % 4096 or length % 4096) and (call.__name__ == "pwrite" or offset < os.stat(fd).st_size):
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(fd, buf, offset)

        monkeypatch.setattr(os, name, checked)
    storage = open_storage(path, True, CacheMode(direct=True))
    assert isinstance(storage, DirectStorage)
    return storage


@pytest.mark.parametrize("start", [0, 512, 5000, 12288])
def test_exact_size_with_large_blocks(monkeypatch: pytest.MonkeyPatch, direct_dir: Path, start: int) -> None:
    """Blocks are written whole, and the file ends where the data do."""
    storage = with_large_blocks(monkeypatch, direct_dir, b"x" * start)
    want = bytearray(b"x" * start)
    for offset, length in ((0, 512), (start, 1536), (start + 9000, 100), (512, 512), (3 * 4096, 4096)):
        data = bytes([length % 251]) * length
        storage.pwrite(data, offset)
        want += bytes(max(0, offset + length - len(want)))
        want[offset : offset + length] = data
        assert content(storage) == want
    storage.close()


def test_who_writes_further_on_waits_for_the_exact_size(monkeypatch: pytest.MonkeyPatch, direct_dir: Path) -> None:
    storage = with_large_blocks(monkeypatch, direct_dir, b"")
    cut = os.ftruncate
    other: list[Job] = []

    def slowly(fd: int, size: int) -> None:
        other.append(Job(storage.pwrite, b"b" * 4096, 8192))
        other[0].join(0.05)  # it must not be cut off
        cut(fd, size)

    monkeypatch.setattr(os, "ftruncate", slowly)
    storage.pwrite(b"a" * 100, 0)
    other[0].result()
    assert content(storage) == b"a" * 100 + bytes(8192 - 100) + b"b" * 4096
    storage.close()
