"""Files past the page cache: requests that are not aligned, and writers that share blocks."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, assert_same

from qedcore.errors import StorageError
from qedcore.storage import direct
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.direct import DirectStorage
from qedcore.storage.file import FileStorage
from qedcore.storage.open import open_storage
from unit.fakes import Gate, Job
from unit.storage.files import Open, content, numbers, step


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
