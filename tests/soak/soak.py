#!/usr/bin/env python3
"""Hours of mixed work through the real server, with every byte verified: `make soak ARGS='--minutes 60'`.

Several clients read, write, zero, trim and flush, with requests in flight all the time, and leave and come back.
A server's life ends in one of these ways, and the next one finds what it left:

    term          the clients leave, SIGTERM: sound, clean for QEMU, and QEMU reads what was written
    term-loaded   SIGTERM with requests in flight: likewise
    vanish        the clients hang up with requests in flight, then SIGTERM
    kill          kill -9 with requests in flight: everything answered is there; of what was not answered, each
                  sector is old or new.  No manual step: the next server repairs, and QEMU agrees with it.

`--kills N` does only the last, N times at random moments, also while the server is still opening the image.

The model is the whole device in memory.  Each client owns parts of it, so that all of them meet in clusters and
tables but every read has one right answer.  Threads, descriptors and memory of the server are printed, and must not
grow.  The same seed gives the same requests, at other moments.  A server that gives no answer shows its stacks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from support import qemu
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import ImageSpec, assert_sound, build
from support.server import Nbdkit, disconnect, import_nbd

SECTOR = 512
CLIENTS = 4
DEPTH = 12  # requests in flight of each client
SHARED_AREA = 20 * KiB + SECTOR  # bytes: several clients meet in one cluster
OWN_AREA = 3 * MiB  # bytes: of one client, so that trims have whole clusters
LIVES = 6  # of servers for one image
# cluster_size in bytes, table_size in clusters, over a backing file
IMAGES = ((64 * KiB, 4, False), (4 * KiB, 2, False), (64 * KiB, 4, True), (MiB, 2, False), (4 * KiB, 16, True))

# See test_lifecycle.py: nbdkit before 1.34 may abort when a client hangs up.  To us it is one more kill.
HANGUP_ABORT = "raw_send_socket: Assertion"

# Of the server: more than this is a leak.
MAX_THREADS = CLIENTS * 17 + 8  # nbdkit has 16 and one for each connection
MAX_DESCRIPTORS = 24 + 4 * CLIENTS
MAX_GROWTH = 8 * MiB  # bytes of memory, from the second quarter of a life to the last
PATIENCE = 60  # seconds: no disk takes longer for a flush
LONG_LIFE = 20.0  # seconds: growth is looked at from here on


@dataclass(frozen=True)
class Request:
    kind: str
    pos: int = 0  # bytes
    length: int = 0  # bytes
    new: bytes = b""  # what the range may or must hold afterwards
    flags: int = 0


class Client(threading.Thread):
    """One connection after the other, with DEPTH requests in flight, until `stop` or the end of the server."""

    def __init__(self, uri: str, seed: str, areas: Sequence[tuple[int, int]], model: bytearray) -> None:
        super().__init__()
        self.nbd = import_nbd()
        self.uri = uri
        self.rng = random.Random(seed)
        self.areas = areas
        self.model = model  # changed in our areas only
        self.stop = threading.Event()  # finish what is in flight, and leave
        self.vanish = threading.Event()  # leave at once
        self.ending = threading.Event()  # the server may go away
        self.unknown: list[Request] = []  # without an answer
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None
        self._busy: dict[Request, Any] = {}  # in flight, with the buffer
        self._answers: list[tuple[Request, int]] = []
        self._number = 0

    def run(self) -> None:
        try:
            while not (self.stop.is_set() or self.vanish.is_set() or self.ending.is_set()):
                self._connection()
        except BaseException as error:  # noqa: BLE001 - raised by the main thread
            self.error = error

    def _connection(self) -> None:
        handle = self.nbd.NBD()
        try:
            handle.connect_uri(self.uri)
        except self.nbd.Error:
            if not self.ending.is_set():
                raise
            return
        self.counts["connections"] += 1
        requests = self.rng.randrange(200, 4000)
        while True:
            if self.vanish.is_set():
                break
            leaving = self.stop.is_set() or requests <= 0
            while not leaving and len(self._busy) < DEPTH:
                self._issue(handle, self._next())
                requests -= 1
            if not self._busy:
                disconnect(handle)
                break
            if not self._poll(handle):
                break
            for request, error in self._answers:
                self._answered(handle, request, error)
            self._answers.clear()
        for request in self._busy:
            self._lost(request)
        self._busy.clear()
        self._answers.clear()

    def _poll(self, handle: Any) -> bool:
        """Wait for answers; False once the server is gone and all its answers are taken."""
        try:
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise self.nbd.Error("closed")
            if handle.poll(PATIENCE * 1000) == 0:
                raise AssertionError(f"no answer in {PATIENCE} s to {len(self._busy)} requests")
        except self.nbd.Error:
            if not self.ending.is_set():
                raise
            for request, error in self._answers:
                if not error and request.kind not in ("trim", "settle"):
                    self._answered(handle, request, error)
            return False
        return True

    def _next(self) -> Request:
        rng = self.rng
        while True:
            kind = rng.choices(("write", "read", "zero", "trim", "flush"), (50, 25, 8, 8, 3))[0]
            if kind == "flush":
                self._number += 1
                return Request("flush", self._number)
            start, size = rng.choice(self.areas)
            unit = rng.choice((1, SECTOR, 4 * KiB))  # bytes
            length = min(size, unit * rng.randint(1, 32) if rng.random() < 0.9 else rng.randrange(1, 512 * KiB))
            pos = start + rng.randrange(size - length + 1) // unit * unit
            if not any(pos < other.pos + other.length and other.pos < pos + length for other in self._busy):
                break
        self._number += 1
        fua = self.nbd.CMD_FLAG_FUA if kind != "read" and rng.random() < 0.03 else 0
        if kind == "write":
            return Request(kind, pos, length, stamp(self._number % 127 + 1, pos, length), fua)
        if kind == "zero" and rng.random() < 0.5:
            fua |= self.nbd.CMD_FLAG_NO_HOLE
        return Request(kind, pos, length, b"" if kind == "read" else bytes(length), fua)

    def _lost(self, request: Request) -> None:
        """There will be no answer, or an error at the server's end: it may have been done, or in part."""
        if request.kind not in ("read", "flush"):
            self.unknown.append(request)

    def _issue(self, handle: Any, request: Request) -> None:
        def done(error: Any) -> int:
            self._answers.append((request, error.value))
            return 1

        buffer = None
        if request.kind == "write":
            buffer = bytearray(request.new)  # libnbd 1.14 never frees an nbd.Buffer
        elif request.kind in ("read", "settle"):
            buffer = bytearray(request.length)
        self._busy[request] = buffer  # before it is sent: it may be done, or never
        try:
            if request.kind == "write":
                handle.aio_pwrite(buffer, request.pos, completion=done, flags=request.flags)
            elif request.kind in ("read", "settle"):
                handle.aio_pread(buffer, request.pos, completion=done)
            elif request.kind == "flush":
                handle.aio_flush(completion=done)
            else:
                call = handle.aio_zero if request.kind == "zero" else handle.aio_trim
                call(request.length, request.pos, completion=done, flags=request.flags)
        except self.nbd.Error:
            if not self.ending.is_set():
                raise

    def _answered(self, handle: Any, request: Request, error: int) -> None:
        buffer = self._busy.pop(request)
        if error:
            assert self.ending.is_set(), f"{request.kind} at {request.pos:#x}: {os.strerror(error)}"
            self._lost(request)
            return
        self.counts[request.kind] += 1
        part = slice(request.pos, request.pos + request.length)
        if request.kind in ("write", "zero"):
            self.model[part] = request.new
            self.counts["bytes"] += request.length
        elif request.kind == "read":
            assert_same(bytes(buffer), bytes(self.model[part]), request.pos)
        elif request.kind == "trim":  # zeros where there were whole clusters: look
            self._issue(handle, Request("settle", request.pos, request.length, request.new))
        elif request.kind == "settle":
            settle(self.model, request, bytes(buffer))


def settle(model: bytearray, request: Request, got: bytes) -> None:
    """Each sector of a request without an answer is old or new; the model takes what it is."""
    end = request.pos + request.length
    at = request.pos
    while at < end:
        n = min(SECTOR - at % SECTOR, end - at)
        part = got[at - request.pos : at - request.pos + n]
        new = request.new[at - request.pos : at - request.pos + n]
        assert part in (new, bytes(model[at : at + n])), f"{request.kind}: neither old nor new at {at:#x}"
        at += n
    model[request.pos : end] = got


@dataclass
class Figures:
    """Of one server, over its life."""

    rss: list[int] = field(default_factory=list)  # bytes
    threads: int = 0
    descriptors: int = 0

    def sample(self, pid: int) -> None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        self.rss.append(int(status["VmRSS"].split()[0]) * KiB)
        self.threads = max(self.threads, int(status["Threads"]))
        self.descriptors = max(self.descriptors, len(os.listdir(f"/proc/{pid}/fd")))

    def growth(self) -> int:
        quarter = len(self.rss) // 4
        return max(self.rss[-quarter:]) - max(self.rss[quarter : 2 * quarter]) if quarter else 0

    def check(self, seconds: float) -> None:
        assert self.threads <= MAX_THREADS, f"{self.threads} threads"
        assert self.descriptors <= MAX_DESCRIPTORS, f"{self.descriptors} descriptors"
        assert seconds < LONG_LIFE or self.growth() <= MAX_GROWTH, f"grew by {self.growth()} bytes: {self.rss}"


class Soak:
    """An image, its model, and one server after the other on it."""

    def __init__(self, directory: Path, rng: random.Random, size: int, quiet: bool = False) -> None:
        self.directory = directory
        self.rng = rng
        self.size = size  # bytes, of the device
        self.quiet = quiet
        self.counts: Counter[str] = Counter()
        self.peak = Figures()
        self.worst_growth = 0  # bytes
        self.images = 0

    def new_image(self) -> None:
        cluster_size, table_size, backing = IMAGES[self.images % len(IMAGES)]
        self.images += 1
        self.path = self.directory / "image.qed"
        base = stamp(127, 0, self.size // 2 + 3 * SECTOR) if backing else b""
        (self.directory / "base.raw").write_bytes(base)
        spec = ImageSpec(
            self.size, cluster_size, table_size, backing="base.raw" if backing else None, no_probe=backing
        )
        build(self.path, spec)
        self.model = bytearray(base.ljust(self.size, b"\0"))
        self.unknown: list[Request] = []
        self.crashed = False  # since the image was new: clusters may be lost in the file
        self.name = f"{cluster_size // KiB}K_{table_size}{' backing' if backing else ''}"
        half = self.size // 2 // SHARED_AREA * SHARED_AREA
        areas = [(at, SHARED_AREA) for at in range(0, half, SHARED_AREA)]
        areas += [(at, min(OWN_AREA, self.size - at)) for at in range(half, self.size, OWN_AREA)]
        self.areas = [areas[n::CLIENTS] for n in range(CLIENTS)]

    def life(self, seconds: float, ending: str) -> None:
        """Start a server, verify, load it for so long, end it that way, and verify the file if it must be sound."""
        figures = Figures()
        with Nbdkit({"file": self.path}) as server:
            try:
                self._verify(server)
                clients = [
                    Client(server.uri, f"{self.rng.random()}", areas, self.model)
                    for areas in (self.areas if seconds else ())
                ]
                for client in clients:
                    client.start()
                end = time.monotonic() + seconds
                while (left := end - time.monotonic()) > 0 and all(client.is_alive() for client in clients):
                    time.sleep(min(left, 0.5))
                    figures.sample(server.pid)
                for client in clients:
                    if client.error is not None:
                        raise client.error
                aborted = self._end(server, clients, ending)
                assert "Traceback" not in server.log()
                self.counts["repairs"] += server.log().count("was not closed cleanly")
            except BaseException:
                if server.running():
                    server.show_stacks()
                print(
                    f"image {self.path} ({self.name}), {ending}; log of the server:\n{server.log()}", file=sys.stderr
                )
                raise
            finally:
                for client in locals().get("clients", ()):
                    client.ending.set()
                server.remove()
        figures.check(seconds)
        self.counts[ending] += 1
        self.counts["aborts of nbdkit"] += aborted
        self.crashed = self.crashed or aborted or ending == "kill"
        for client in clients:
            self.counts.update(client.counts)
            self.unknown += client.unknown
        self.counts["without an answer"] += sum(len(client.unknown) for client in clients)
        self.peak.threads = max(self.peak.threads, figures.threads)
        self.peak.descriptors = max(self.peak.descriptors, figures.descriptors)
        self.peak.rss = [max(self.peak.rss + figures.rss, default=0)]
        if seconds >= LONG_LIFE:
            self.worst_growth = max(self.worst_growth, figures.growth())
        if not self.quiet and seconds:
            done = sum((client.counts for client in clients), Counter())
            print(
                f"{self.name:14} {ending:12} {seconds:5.1f} s  {sum(done[k] for k in KINDS):7} requests  "
                f"threads {figures.threads:3}  descriptors {figures.descriptors:3}  "
                f"RSS {max(figures.rss, default=0) / MiB:6.1f} MiB, grown {figures.growth() / MiB:+5.1f}",
                flush=True,
            )
        if ending != "kill" and not aborted:
            self._verify_file()

    def kill_while_opening(self) -> None:
        """kill -9 while the server opens, and perhaps repairs, what another one left."""
        with Nbdkit({"file": self.path}) as server:
            client = threading.Thread(target=self._try_to_connect, args=(server.uri,))
            client.start()
            time.sleep(self.rng.random() * 0.06)
            server.send_signal(signal.SIGKILL)
            client.join()
            server.wait()
            server.remove()
        self.crashed = True
        self.counts["kill while opening"] += 1

    @staticmethod
    def _try_to_connect(uri: str) -> None:
        nbd = import_nbd()
        try:
            nbd.NBD().connect_uri(uri)
        except nbd.Error:
            pass

    def _end(self, server: Nbdkit, clients: Sequence[Client], ending: str) -> bool:
        """True if nbdkit itself aborted, as it may when clients vanish."""
        for client in clients:
            if ending != "term":
                client.ending.set()
            if ending == "vanish":
                client.vanish.set()
            elif ending == "term":
                client.stop.set()
        if ending == "kill":
            server.send_signal(signal.SIGKILL)
        elif ending == "term-loaded":
            server.send_signal(signal.SIGTERM)
            for client in clients:
                client.stop.set()
        for client in clients:
            client.join(2 * PATIENCE)
            assert not client.is_alive(), "a client hangs"
        for client in clients:
            if client.error is not None:
                raise client.error
        if ending in ("term", "vanish") and server.running():
            server.send_signal(signal.SIGTERM)
        code = server.wait()
        if ending == "kill":
            assert code == -signal.SIGKILL, f"exit code {code}"
            return False
        if ending == "vanish" and code == -signal.SIGABRT:
            assert HANGUP_ABORT in server.log()
            return True
        assert code == 0, f"exit code {code}"
        return False

    def _verify(self, server: Nbdkit) -> None:
        """Through a connection that may write: the server repairs first, if it has to."""
        handle = server.connect()
        got = b"".join(bytes(handle.pread(min(MiB, self.size - at), at)) for at in range(0, self.size, MiB))
        for request in self.unknown:
            settle(self.model, request, got[request.pos : request.pos + request.length])
        self.unknown.clear()
        assert_same(got, bytes(self.model))
        disconnect(handle)

    def _verify_file(self) -> None:
        """After a clean end: the metadata, what QEMU makes of them, and what QEMU reads."""
        assert_sound(self.path, leaks=None if self.crashed else 0)
        found = json.loads(qemu.qemu_img("check", "--output=json", "-f", "qed", self.path).out)
        assert not found.get("corruptions") and not found["check-errors"], found
        raw = self.directory / "image.raw"
        qemu.to_raw(self.path, raw)
        got = raw.read_bytes()
        for request in self.unknown:
            settle(self.model, request, got[request.pos : request.pos + request.length])
        self.unknown.clear()
        assert_same(got, bytes(self.model))
        self.counts["compared with QEMU"] += 1

    def report(self) -> str:
        counts = self.counts
        parts = [f"{counts[kind]} {kind}" for kind in (*KINDS, "connections", *ENDINGS, *OTHERS) if counts[kind]]
        rss = max(self.peak.rss, default=0) / MiB
        return (
            f"{', '.join(parts)}; {counts['bytes'] / MiB:.0f} MiB written\n"
            f"server at most: {self.peak.threads} threads, {self.peak.descriptors} descriptors, "
            f"RSS {rss:.1f} MiB, growth in a life {self.worst_growth / MiB:.1f} MiB"
        )


KINDS = ("write", "read", "zero", "trim", "flush")
ENDINGS = ("term", "term-loaded", "vanish", "kill", "kill while opening")
OTHERS = ("aborts of nbdkit", "repairs", "without an answer", "compared with QEMU")


def run_minutes(soak: Soak, seconds: float) -> None:
    """Lives of every ending, until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        soak.new_image()
        for ending in [soak.rng.choice(ENDINGS[:4]) for _ in range(LIVES - 1)] + ["term"]:
            left = end - time.monotonic()
            length = soak.rng.choice((soak.rng.uniform(0.3, 5), soak.rng.uniform(5, 60)))
            soak.life(max(0.3, min(length, left)), ending)
            if left <= length:
                break
    soak.life(0, "term")  # what the last one left


def run_kills(soak: Soak, kills: int) -> None:
    for number in range(kills):
        if number % 20 == 0:
            soak.new_image()
        soak.life(soak.rng.random() * 0.8 + 0.01, "kill")
        if soak.rng.random() < 0.3:
            soak.kill_while_opening()
        if soak.rng.random() < 0.5 or number == kills - 1:
            soak.life(0, "term")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default %(default)s)")
    parser.add_argument("--kills", type=int, metavar="N", help="instead: kill -9 so many times")
    parser.add_argument("--size", type=int, default=48, metavar="MIB", help="of the device (default %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("-q", "--quiet", action="store_true", help="only the summary")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="qedsoak-") as directory:
        soak = Soak(Path(directory), random.Random(args.seed), args.size * MiB, args.quiet)
        if args.kills is not None:
            run_kills(soak, args.kills)
        else:
            run_minutes(soak, args.minutes * 60)
    print(soak.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
