"""Parameters of a server whose images are fakes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from qedcore.engine.image import QEDImage
from qedcore.errors import StorageError
from qedcore.format.geometry import Geometry
from qedcore.server.parameters import Parameters
from unit.fakes import MemoryStorage

LIMIT = 20  # seconds, for what must happen


class FakeImage:
    """Stands for a QEDImage, and tells `world` what happens to it."""

    def __init__(self, world: World, name: str, writable: bool) -> None:
        self.world, self.name, self.writable = world, name, writable

    def start_timer(self) -> None:
        if self.name in self.world.timer_fails:
            raise RuntimeError("can't start new thread")

    geometry = Geometry(4096, 1)
    storage = MemoryStorage()

    def holes(self, search: bool) -> int:
        return 0

    def succeed(self, retired: QEDImage) -> None:
        pass

    def close(self) -> None:
        self.world.close(self)


class World(Parameters):
    """Opens fake images; closing those in `slow` waits for the event there."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        super().__init__(self.lines.append, self.lines.append)
        self.guard = threading.Lock()
        self.open_now: dict[str, int] = {}
        self.events: list[str] = []
        self.slow: dict[str, tuple[threading.Event, threading.Event]] = {}  # name -> (close has begun, may end)
        self.close_fails: set[str] = set()
        self.open_fails: set[str] = set()
        self.timer_fails: set[str] = set()

    def open_image(self, path: str, writable: bool, opener: object, in_flight: object) -> QEDImage:
        name = os.path.basename(path)
        with self.guard:
            self.events.append(f"open {name} {'rw' if writable else 'ro'}")
            if name in self.open_fails:
                raise StorageError("no luck", code=errno.EACCES)
            self.open_now[name] = self.open_now.get(name, 0) + 1
        image: Any = FakeImage(self, name, writable)
        return image  # type: ignore[no-any-return]

    def close(self, image: FakeImage) -> None:
        with self.guard:
            self.events.append(f"close {image.name}")
        if image.name in self.slow:
            begun, may_end = self.slow[image.name]
            begun.set()
            assert may_end.wait(LIMIT)
        with self.guard:
            self.events.append(f"closed {image.name}")
            self.open_now[image.name] -= 1
        if image.name in self.close_fails:
            raise StorageError("cannot flush")


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
