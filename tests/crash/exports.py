"""Histories of an image in an export: the connection is lost, the server dies or refuses, the program is killed.

The server is in this process, and what it carries out is the log of a World.  So each moment at which the program may
be killed, also in the middle of sending writes again, is a state of that log, and so is what a power loss of the
server leaves then.

    cut      the connection is lost, before or after a request was carried out; the server has lost nothing
    crash    the server is gone, and with it some of what it had not flushed; it is back at once
    away     nobody answers, for longer than a request waits: it fails; or only for a flush
    late     likewise, and the server finds the request in its socket when it has answered others
    refuse   an error, before or after a request was carried out; half: in the middle of a write
"""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crash.engine import IMAGE, MIX, Guest, History, Setup, small_steps
from support.crashes import Op, World
from support.nbd_server import FLUSH, READ, WRITE, ZERO, Crash, CrashAfter, Fail, FailAfter, FakeServer, Request
from support.qed_image import QedFile

from qedcore.errors import StorageError
from qedcore.maintenance.tidy import tidy
from qedcore.storage.nbd import NbdStorage, UriPeer

PATIENCE = 1.0  # seconds of the clock of this history
EVENTS = ("cut", "cut after", "crash", "crash after", "away", "away at flush", "late")
REFUSALS = ("refuse", "refuse after", "half")


class Clock:
    """Time that passes when somebody waits, for which `wait` runs."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.now = 0.0
        self._wait = wait

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self._wait()
        self.now += seconds


class Server(FakeServer):
    """Carries out requests on a World; `chances` of events, each for a request that is no read."""

    def __init__(self, path: Path, history: History, rng: random.Random, chances: dict[str, float]) -> None:
        super().__init__(path, history.world.files[IMAGE], self._decide)
        self.armed = False
        self.seen: set[str] = set()  # what has happened
        self._history = history
        self._world: World = history.world
        self._rng = rng
        self._chances = chances
        self._event = ""
        self._late: list[list[Any]] = []  # requests to come, and after how many others
        self._lock = threading.RLock()  # type: ignore[assignment]

    def start(self) -> Server:
        self.durable = bytes(self._world.files[IMAGE])  # which is, that World knows
        super().start()
        self.now = self._world.files[IMAGE]
        return self

    def _decide(self, request: Request) -> None:
        """What is to become of a request (FakeServer.hook)."""
        self._event = ""
        if not self.armed or request.kind == READ:
            return
        event = self._rng.choices(("", *self._chances), (1 - sum(self._chances.values()), *self._chances.values()))[0]
        if event == "late" and not (request.kind in (WRITE, ZERO) and self._is_unused(request)):
            event = "away"
        if not event or (event == "away at flush" and request.kind != FLUSH):
            return
        self.seen.add(event)
        self._event = event
        if event == "late":
            self._late.append([self._rng.randrange(1, 12), request])
        if event in ("cut", "crash", "away", "away at flush", "late"):
            raise Crash
        if event in ("cut after", "crash after"):
            raise CrashAfter
        code = self._rng.choice((errno.EIO, errno.ENOSPC))
        if event == "half" and request.kind == WRITE:
            self._world.do(Op(IMAGE, request.offset, request.data[: len(request.data) // 1024 * 512]))
        if event == "refuse after" and request.kind != FLUSH:
            raise FailAfter(code)
        raise Fail(code)

    def _is_unused(self, request: Request) -> bool:
        """Whether nothing leads there now."""
        scratch = self.path.with_suffix(".qed")
        scratch.write_bytes(self._world.files[IMAGE])
        with QedFile(scratch) as image:
            used, size = image.in_use(), image.geometry.cluster_size
        first, end = request.offset // size, -(-(request.offset + request.length) // size)
        return used.isdisjoint(range(first, end))

    def crash(self) -> None:
        """The end of all connections, whatever the reason."""
        with self._lock:  # whoever waits for a server that comes back at once waits for this (settle)
            event, self._event = self._event, ""
            self._end(event)

    def settle(self) -> None:
        """Return when what is happening to the server has happened."""
        with self._lock:
            pass

    def _end(self, event: str) -> None:
        if event in ("cut", "cut after"):
            for broken in list(self._open):
                with suppress(OSError):
                    broken.shutdown(socket.SHUT_RDWR)
            return
        super().crash()
        if event in ("crash", "crash after"):
            share = self._rng.choice((0.3, 1.0))
            self._world.give_up(IMAGE, lambda: self._rng.random() < share)
            self._world.drop_cache(IMAGE)
            self._history.events.append((len(self._world.log), "lose_by_server", ()))
            self._late.clear()
            self.start()

    def _carry_out(self, request: Request) -> bytes:
        for late in list(self._late):
            late[0] -= 1
            if not late[0]:
                self._late.remove(late)
                self._apply(late[1])
        return self._apply(request)

    def _apply(self, request: Request) -> bytes:
        end = request.offset + request.length
        if request.kind == READ:
            return bytes(self._world.files[IMAGE][request.offset : end])
        if request.kind == FLUSH:
            self._world.do(Op(IMAGE))
        else:
            self._world.do(Op(IMAGE, request.offset, request.data or bytes(request.length)))
        return b""

    def come_back(self) -> None:
        """After it was away."""
        with self._lock:
            if self._listener is None:
                self.start()


class Patient(Guest):
    """A guest whose requests fail while the server is away; it is back afterwards."""

    def __init__(self, server: Server, *args: Any) -> None:
        super().__init__(*args, may_fail=True)
        self._server = server

    def run(self, requests: int, mix: Sequence[int]) -> None:
        for _ in range(requests):
            super().run(1, mix)
            self._server.come_back()


@contextmanager
def exported(directory: Path, history: History, rng: random.Random, chances: dict[str, float]) -> Iterator[Server]:
    server = Server(directory / "s", history, rng, chances).start()
    try:
        yield server
    finally:
        server.armed = False
        FakeServer.crash(server)


def record_export(
    setup: Setup,
    directory: Path,
    rng: random.Random,
    requests: int = 25,
    events: Sequence[str] = (*EVENTS, *REFUSALS),
    mix: Sequence[int] = MIX,
) -> History:
    """A guest with such events.  Raises Violation.  The image is closed cleanly in the end, with the server there."""
    history = History(setup)
    each = rng.choice((0.02, 0.1))
    chances = dict.fromkeys(rng.sample(sorted(set(events)), rng.randint(1, len(set(events)))), each)
    if "away at flush" in chances:  # there are fewer of those
        chances["away at flush"] = 0.3
    tags = iter(range(1, 1 << 32))
    with exported(directory, history, rng, chances) as server, small_steps(setup.shape):
        clock = Clock(server.settle)
        storage = NbdStorage(
            server.uri,
            UriPeer(server.uri, trusted=True),
            True,
            patience=PATIENCE,
            clock=clock,
            pause=clock.pause,
            identity=str(directory),
        )
        image = setup.open(storage)
        server.armed = True
        guest = Patient(server, setup, history, image, rng, tags)
        guest.run(requests, mix)
        server.armed = False
        server.come_back()
        began = history.tell("begin_flush")
        refused = not server.seen.isdisjoint(REFUSALS)
        try:
            tidy(image)
            image.close()
        except StorageError:
            if not refused:
                raise
        else:
            history.tell("end_flush", began)
            # An outage is over when it is over: a flush that has met one may be made again.
            if not guest.failed:
                setup.judge(history.world.files[IMAGE], "closed", space=False)
    return history
