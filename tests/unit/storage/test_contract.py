"""The contract of Storage, over every storage and every stand-in of the tests: what the engine relies on."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.crashes import World
from support.nbd_server import FakeServer
from support.patterns import KiB

from qedcore.engine.traced import TracedStorage
from qedcore.errors import StorageError
from qedcore.server.shared_image import _Borrowed
from qedcore.storage import Storage, Wrapper
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.fixed_size import FixedSizeStorage
from qedcore.storage.open import open_file
from qedcore.storage.overlay import Rehearsal
from unit.fakes import MemoryStorage, Tap
from unit.storage.disk import Disk

SIZE = 64 * KiB
CONTENT = random.Random(1).randbytes(16 * KiB) + bytes(16 * KiB) + random.Random(2).randbytes(32 * KiB)


class _NoProbe:
    def fault(self, event: str) -> None:
        pass


def _file(path: Path, mode: CacheMode = CacheMode()) -> Storage:
    (path / "f").write_bytes(CONTENT)
    try:
        return open_file(str(path / "f"), True, mode)
    except StorageError as error:
        if mode.direct and error.errno == errno.EINVAL:
            pytest.skip("no O_DIRECT on this file system")
        raise


def _recorded(path: Path) -> Storage:
    (path / "f").write_bytes(CONTENT)
    return World(path / "f").open(str(path / "f"), True, CacheMode())


# name -> how it is made, over CONTENT
STORAGES: dict[str, Callable[[Path], Storage]] = {
    "file": _file,
    "past the cache": lambda path: _file(path, CacheMode(direct=True)),
    "overlay": lambda path: Rehearsal(MemoryStorage(CONTENT)),
    "fixed size as a file": lambda path: FixedSizeStorage(Disk(CONTENT, 4 * SIZE), SIZE),
    "traced": lambda path: TracedStorage(_file(path), _NoProbe()),  # type: ignore[arg-type]
    "borrowed": lambda path: _Borrowed(_file(path)),
    "in memory": lambda path: MemoryStorage(CONTENT),
    "tapped": lambda path: Tap(MemoryStorage(CONTENT)),
    "recorded": _recorded,
    "device": lambda path: Disk(CONTENT, SIZE),
}


@pytest.fixture(params=[*STORAGES, "server"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param != "server":
        made = STORAGES[request.param](tmp_path)
        yield made
        made.close()
        return
    pytest.importorskip("nbd", reason="libnbd's Python module")
    from qedcore.storage.nbd import open_uri

    server = FakeServer(tmp_path / "s", CONTENT).start()
    made = open_uri(server.uri, True)
    yield made
    made.close()
    server.crash()


def read(storage: Storage, offset: int, length: int) -> bytes:
    buf = bytearray(length)
    storage.pread_into(buf, offset)
    return bytes(buf)


def test_reads_are_of_full_length(storage: Storage) -> None:
    for offset, length in ((0, SIZE), (1, 511), (4095, 2), (SIZE - 1, 1), (16 * KiB - 3, 6)):
        assert read(storage, offset, length) == CONTENT[offset : offset + length]


def test_bytes_past_the_end_read_as_zeros(storage: Storage) -> None:
    assert read(storage, SIZE - 5, 10) == CONTENT[-5:] + bytes(5)
    assert read(storage, SIZE + 4096, 7) == bytes(7)


def test_writes_show_at_once(storage: Storage, rng: random.Random) -> None:
    want = bytearray(CONTENT)
    for _ in range(50):
        offset = rng.randrange(SIZE - 3000)
        pieces = [rng.randbytes(rng.choice((0, 1, 511, 512, 999))) for _ in range(3)]
        data = b"".join(pieces)
        if rng.random() < 0.5:
            storage.pwritev(pieces, offset)
        else:
            storage.pwrite(data, offset)
        want[offset : offset + len(data)] = data
    storage.flush()
    assert read(storage, 0, SIZE) == want


def test_truncation(storage: Storage) -> None:
    if storage.fixed_size:
        with pytest.raises(StorageError) as caught:
            storage.truncate(SIZE + 4096)
        assert caught.value.errno == errno.ENOSPC and storage.size() == SIZE
        return
    storage.truncate(3 * 4096 + 5)
    assert storage.size() == 3 * 4096 + 5
    storage.truncate(SIZE)
    assert read(storage, 0, SIZE) == CONTENT[: 3 * 4096 + 5].ljust(SIZE, b"\0")


def test_what_is_punched_reads_as_zeros(storage: Storage) -> None:
    punched = storage.punch(4096, 8192)
    middle = bytes(8192) if punched else CONTENT[4096 : 4096 + 8192]
    assert read(storage, 0, SIZE) == CONTENT[:4096] + middle + CONTENT[4096 + 8192 :]
    assert storage.size() == SIZE


def test_no_data_means_zeros(storage: Storage) -> None:
    storage.punch(40 * KiB, 8 * KiB)
    content, at = read(storage, 0, SIZE), 0
    while at < SIZE:
        has_data, n = storage.data_run(at, SIZE - at)
        assert 0 < n <= SIZE - at and (has_data or not any(content[at : at + n]))
        at += n
    for at in range(0, SIZE, 512):
        data = storage.next_data(at)
        assert data >= at and not any(content[at:data])


def test_hints_change_nothing(storage: Storage) -> None:
    storage.prefetch(0, SIZE)
    storage.flush()
    storage.drop_cache()
    assert not storage.in_doubt(0, SIZE)
    assert read(storage, 0, SIZE) == CONTENT


def test_identity_and_close(storage: Storage) -> None:
    assert storage.identity() == storage.identity() and storage.name
    storage.close()
    storage.close()


def test_wrapper_has_the_methods_of_what_it_wraps() -> None:
    """All of them, also the capabilities, and without a call in between."""
    inner = MemoryStorage(CONTENT)
    wrapper = Wrapper(inner)
    methods = [name for name in dir(Storage) if not name.startswith("_") and callable(getattr(Storage, name))]
    assert {"next_data", "data_run", "prefetch", "drop_cache", "in_doubt"} <= set(methods)
    for name in methods:
        assert getattr(wrapper, name) == getattr(inner, name)
