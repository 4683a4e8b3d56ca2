"""A device that holds an image, and may crash."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

from support.patterns import KiB, MiB
from support.qed_image import Built

import qedcore
from qedcore.errors import StorageError
from unit.fakes import MemoryStorage

Image = Callable[..., Built]
CS = 4 * KiB
GARBAGE = 0xEE  # what was on the device before


class Disk(MemoryStorage):
    """A device: its size is fixed.  What was written since the last flush may be lost in a crash."""

    def __init__(self, data: bytes, capacity: int) -> None:
        super().__init__(data.ljust(capacity, bytes([GARBAGE])), "disk")
        self.fixed_size = True
        self.durable = bytes(self.data)
        self.pending: list[tuple[int, bytes]] = []
        self.fail_punch = False

    def pwrite(self, buf: Any, offset: int) -> None:
        data = bytes(buf)
        if offset + len(data) > len(self.data):
            raise StorageError("past the end", code=errno.ENOSPC)
        self.data[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def punch(self, offset: int, length: int) -> bool:
        if self.fail_punch:
            return False
        self.pwrite(bytes(length), offset)
        return True

    def truncate(self, size: int) -> None:
        raise StorageError("the size is fixed", code=errno.ENOSPC)

    def flush(self) -> None:
        self.durable = bytes(self.data)
        self.pending.clear()

    def after_crash(self, rng: random.Random) -> Disk:
        """With some of what was not flushed."""
        disk = bytearray(self.durable)
        for offset, data in self.pending:
            for at in range(0, len(data), 512):
                if rng.random() < 0.5:
                    disk[offset + at : offset + at + len(data[at : at + 512])] = data[at : at + 512]
        return Disk(bytes(disk), len(disk))

    def open(self, writable: bool = True, **options: Any) -> qedcore.QEDImage:
        return qedcore.open_image("disk", writable, opener=lambda *args: self, **options)


def make(image: Image, capacity: int = 2 * MiB, **spec: Any) -> tuple[Disk, Built]:
    built = image(**{"size": 8 * MiB, "cluster_size": CS, "table_size": 1, **spec})
    return Disk(built.path.read_bytes(), capacity), built
