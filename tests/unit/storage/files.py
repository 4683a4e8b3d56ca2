"""Files that tests open through storages (the fixtures `open_file`, `open_direct` and `open_any`)."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from support.patterns import KiB

from qedcore.errors import StorageError
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.direct import DirectStorage
from qedcore.storage.file import FileStorage
from qedcore.storage.open import open_storage

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
