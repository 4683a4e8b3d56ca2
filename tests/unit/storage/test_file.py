"""Files: full-length I/O or an error, whatever the system calls do."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.patterns import assert_same

from qedcore.errors import StorageError
from qedcore.storage import close_all
from qedcore.storage.cache_mode import CACHE_MODES
from qedcore.storage.file import FileStorage
from qedcore.storage.open import open_storage
from unit.fakes import open_fds
from unit.storage.files import Open, content, numbers, step


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


@pytest.mark.parametrize("device", [True, False], ids=["device", "file"])
def test_zeros_where_nothing_can_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    """A device zeroes the range itself; a file is left to be written."""
    (tmp_path / "f").write_bytes(b"x" * 16384)
    modes: list[int] = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        modes.append(mode)
        return errno.EOPNOTSUPP if mode & 2 else 0

    monkeypatch.setattr("qedcore.storage.file._fallocate", lambda: fallocate)
    storage = FileStorage(tmp_path / "f", True)
    storage.fixed_size = device
    assert storage.punch(4096, 4096) is device
    assert modes == ([0x03, 0x11] if device else [0x03])
    storage.close()
