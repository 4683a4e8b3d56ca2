"""NbdStorage against a server that crashes, stalls and fails on demand: no acknowledged flush is ever lost."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.nbd_server import (
    CAN_FLUSH,
    CAN_MULTI_CONN,
    CAN_ZERO,
    FLUSH,
    HAS_FLAGS,
    READ,
    READ_ONLY,
    WRITE,
    ZERO,
    Crash,
    CrashAfter,
    Disconnect,
    Fail,
    FailAfter,
    FakeServer,
    HangUp,
    Request,
)
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built
from support.server import import_nbd, wait_for

import qedcore
from qedcore.errors import StorageError, UnreachableError
from qedcore.server.shared_image import Opener
from qedcore.storage import nbd as nbd_module
from qedcore.storage import nbd_session
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.file_lock import LockedError, Locking
from qedcore.storage.nbd import NbdStorage, UriPeer, open_uri
from qedcore.storage.nbd_link import Link
from unit.fakes import Gate, Job, open_fds

SIZE = 1 * MiB


class Clock:
    """Time that only passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_pause: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.on_pause()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    import_nbd()
    fake = FakeServer(tmp_path / "s", stamp(1, 0, SIZE)).start()
    yield fake
    fake.crash()


both = pytest.mark.parametrize("several", [False, True], ids=["one connection", "several"])


@pytest.fixture
def shared(server: FakeServer) -> FakeServer:
    """It lets clients have several connections."""
    server.flags |= CAN_MULTI_CONN
    return server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(server: FakeServer, clock: Clock) -> Iterator[NbdStorage]:
    opened = connect(server, clock)
    yield opened
    opened.close()


def connect(server: FakeServer, clock: Clock, **options: Any) -> NbdStorage:
    peer = UriPeer(server.uri, trusted=True)
    return NbdStorage(server.uri, peer, True, patience=30.0, clock=clock, pause=clock.pause, **options)


def read(storage: NbdStorage, offset: int, length: int) -> bytes:
    buf = bytearray(b"?" * length)
    storage.pread_into(buf, offset)
    return bytes(buf)


def test_contract(storage: NbdStorage, server: FakeServer) -> None:
    assert storage.size() == SIZE
    assert_same(read(storage, 100, 1000), stamp(1, 100, 1000))
    assert read(storage, SIZE - 8, 16) == stamp(1, SIZE - 8, 8) + bytes(8)
    assert read(storage, SIZE + 8, 16) == bytes(16)
    storage.pwritev([b"abc", bytearray(b"de")], 1)
    assert read(storage, 0, 7) == stamp(1, 0, 1) + b"abcde" + stamp(1, 6, 1)
    assert storage.punch(10, 1000)
    assert read(storage, 9, 1002) == stamp(1, 9, 1) + bytes(1000) + stamp(1, 1010, 1)
    assert [r.kind for r in server.log[-2:]] == [ZERO, READ]
    storage.flush()
    assert server.durable == bytes(server.now)
    for offset, data in ((SIZE, b"x"), (SIZE - 1, b"xy")):
        with pytest.raises(StorageError) as caught:
            storage.pwrite(data, offset)
        assert caught.value.errno == errno.ENOSPC


def test_requests_are_in_flight_together(server: FakeServer, storage: NbdStorage) -> None:
    """Sixteen threads, answered last come first served; then one is answered while the others wait."""
    arrived = threading.Barrier(16)
    turn = {i: threading.Event() for i in range(17)}
    turn[16].set()

    def hook(request: Request) -> None:
        i = request.offset // KiB
        arrived.wait(20)
        assert turn[i + 1].wait(20)
        turn[i].set()

    server.hook = hook
    jobs = [Job(read, storage, i * KiB, KiB) for i in range(16)]
    for i, job in enumerate(jobs):
        assert_same(job.result(), stamp(1, i * KiB, KiB))


def test_the_one_who_polls_leaves_first(server: FakeServer, storage: NbdStorage) -> None:
    """Somebody else takes over, and gets his answer."""
    gates = {0: Gate(), KiB: Gate(), 2 * KiB: Gate()}
    server.hook = lambda request: gates[request.offset].stop()
    jobs = {}
    for offset, gate in gates.items():
        jobs[offset] = Job(read, storage, offset, 10)
        gate.reached()
    for offset in (0, 2 * KiB, KiB):
        gates[offset].open()
        assert_same(jobs[offset].result(), stamp(1, offset, 10))


def test_writes_that_share_a_block(server: FakeServer, clock: Clock) -> None:
    """The first has read the block and is about to write it when the second comes, which waits; a third does not."""
    server.block = 4096
    storage = connect(server, clock)
    gate = Gate()
    server.hook = lambda request: gate.stop() if request.kind == WRITE else None
    jobs = [Job(storage.pwrite, b"one", 0)]
    gate.reached()
    jobs.append(Job(storage.pwrite, b"two", 100))
    gate.avoided()
    jobs.append(Job(storage.pwrite, b"three", 4096))
    gate.reached()
    gate.open(3)
    for job in jobs:
        job.result()
    want = bytearray(stamp(1, 0, 8192))
    want[:3], want[100:103], want[4096:4101] = b"one", b"two", b"three"
    assert_same(read(storage, 0, 8192), bytes(want))
    assert all(r.offset % 4096 == r.length % 4096 == 0 for r in server.log)
    storage.close()


def test_connection_found_broken_while_another_thread_is_about_to_poll(
    server: FakeServer, storage: NbdStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libnbd closes the socket, and the next connection has its number: nobody may wait for that one."""
    gate = Gate()
    poll, first = Link._poll, threading.Lock()

    def stopped(link: Link, wanted: tuple[int, int], seconds: float | None) -> int:
        if seconds is None and first.acquire(blocking=False):
            gate.stop()
        return poll(link, wanted, seconds)

    monkeypatch.setattr(Link, "_poll", stopped)
    server.hook = lambda request: gate.stop() if request.offset == 0 else None
    waiting = Job(read, storage, 0, 10)
    gate.reached(2)  # the thread before its poll, and the server with the request
    server.hook = lambda request: None
    server.crash()
    clock.on_pause = lambda: server.start() and None
    assert_same(read(storage, KiB, 10), stamp(1, KiB, 10))
    gate.open(2)
    assert_same(waiting.result(), stamp(1, 0, 10))


def test_large_request_while_another_waits(tmp_path: Path, clock: Clock) -> None:
    """More than the socket takes at once: the thread that polls must send the rest."""
    import_nbd()
    server = FakeServer(tmp_path / "s", bytes(64 * MiB)).start()
    storage = connect(server, clock)
    gate = Gate()
    server.hook = lambda request: gate.stop() if request.kind == READ else None
    waiting = Job(read, storage, 0, 10)
    gate.reached()
    data = random.Random(5).randbytes(40 * MiB)
    storage.pwrite(data, 1 * MiB)
    gate.open()
    waiting.result()
    assert server.now[MiB : 41 * MiB] == data
    assert [r.length for r in server.log if r.kind == WRITE] == [32 * MiB, 8 * MiB]
    storage.close()
    server.crash()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EPERM])
def test_errors_of_the_server(server: FakeServer, storage: NbdStorage, code: int) -> None:
    """One request fails with its errno; the connection and the others are as before."""
    broken = True

    def hook(request: Request) -> None:
        if broken:
            raise Fail(code)

    server.hook = hook
    for work in (lambda: read(storage, 0, 10), lambda: storage.pwrite(b"x", 0), lambda: storage.punch(0, 10)):
        with pytest.raises(StorageError) as caught:
            work()
        assert caught.value.errno == code
        assert not isinstance(caught.value, UnreachableError)
    broken = False
    storage.pwrite(b"y", 3)
    assert read(storage, 0, 5) == stamp(1, 0, 3) + b"y" + stamp(1, 4, 1)
    storage.flush()
    assert server.connections == 1


def test_failed_flush_is_never_forgotten(server: FakeServer, storage: NbdStorage) -> None:
    failing = [FLUSH]

    def hook(request: Request) -> None:
        if failing and request.kind == failing[0]:
            failing.clear()
            raise Fail(errno.EIO)

    server.hook = hook
    storage.pwrite(b"x", 0)
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot flush"):
            storage.flush()


def script(storage: NbdStorage, rng: random.Random, model: bytearray, durable: list[bytes]) -> None:
    """Writes, zeros, reads and flushes; `model` and `durable` are kept as promised."""
    for _ in range(12):
        kind = rng.choice(["write", "write", "zero", "read", "flush"])
        length = rng.randrange(1, 3000)
        offset = rng.randrange(0, 8 * KiB - length)
        if kind == "write":
            data = rng.randbytes(length)
            storage.pwrite(data, offset)
            model[offset : offset + length] = data
        elif kind == "zero":
            assert storage.punch(offset, length)
            model[offset : offset + length] = bytes(length)
        elif kind == "read":
            assert_same(read(storage, offset, length), bytes(model[offset : offset + length]))
        else:
            storage.flush()
            durable[0] = bytes(model)


@pytest.mark.parametrize("how", [Crash, CrashAfter, Disconnect])
@pytest.mark.parametrize("times", [1, 2])
@both
def test_crash_at_every_request(tmp_path: Path, seed: str, how: type[Exception], times: int, several: bool) -> None:
    """The server loses what was not flushed and comes back: the client never notices, and no flush lies."""
    import_nbd()
    crashes = 0
    for n in range(1, 40):
        rng = random.Random(seed)
        server = FakeServer(tmp_path / "s", bytes(8 * KiB))
        server.flags |= CAN_MULTI_CONN * several
        clock = Clock()
        count = 0
        left = times

        def hook(request: Request) -> None:
            nonlocal count, left, crashes
            count += 1
            if count >= n and left:  # noqa: B023
                left -= 1
                crashes += 1
                raise how

        server.hook = hook
        server.start()
        clock.on_pause = lambda: None if server.path.exists() else server.start() and None  # noqa: B023
        storage = connect(server, clock)
        model, durable = bytearray(8 * KiB), [bytes(8 * KiB)]
        Job(script, storage, rng, model, durable).result()  # the main thread waits in another way
        assert_same(read(storage, 0, 8 * KiB), bytes(model))
        storage.flush()
        assert_same(server.durable, bytes(model))
        assert not storage._log.cost
        storage.close()
        server.crash()
        if count < n:
            break
    assert crashes > 8


@pytest.mark.parametrize("n", range(4))
@both
def test_crashes_under_many_threads(
    server: FakeServer, clock: Clock, seed: str, n: int, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """Eight writers, each with its own range; the server crashes again and again, before and after requests."""
    monkeypatch.setattr(nbd_module, "_LOSSES", 1000)
    server.flags |= CAN_MULTI_CONN * several
    rng = random.Random(seed)
    crashes = iter([rng.randrange(5, 60) for _ in range(12)])
    lock = threading.Lock()
    left = next(crashes)

    def hook(request: Request) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left == 0:
                left = next(crashes, -1)
                raise (Crash, CrashAfter, Disconnect, HangUp)[left % 4]

    def come_back() -> None:
        if not server.path.exists():
            server.start()

    server.hook = hook
    clock.on_pause = come_back
    storage = connect(server, clock)
    model = bytearray(stamp(1, 0, SIZE))

    def write(thread: int) -> None:
        mine = random.Random(f"{seed}{thread}")
        for _ in range(40):
            offset, length = thread * 64 * KiB + mine.randrange(60 * KiB), mine.randrange(1, 4000)
            data = mine.randbytes(length)
            storage.pwrite(data, offset)
            model[offset : offset + length] = data
            if mine.random() < 0.2:
                storage.flush()
            if mine.random() < 0.3:
                assert_same(read(storage, offset, length), data, offset)

    for job in [Job(write, thread) for thread in range(8)]:
        job.result()
    storage.flush()
    assert_same(server.durable, bytes(model))
    assert next(crashes, None) is None and not storage._log.cost and not storage._log.cost
    storage.close()


@pytest.mark.parametrize("n", range(4))
def test_kill_while_writes_are_sent_again(server: FakeServer, storage: NbdStorage, seed: str, n: int) -> None:
    """The connection is lost, the server is not: at any time it has each answered write, and nothing older."""
    rng = random.Random(f"{seed}{n}")
    model = bytearray(server.now)
    for _ in range(100):
        offset, length = rng.randrange(8 * KiB), rng.randrange(1, 3000)
        data = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
        if any(data):
            storage.pwrite(data, offset)
        else:
            assert storage.punch(offset, length)
        model[offset : offset + length] = data
    seen = []
    server.hook = lambda request: seen.append((request.kind, bytes(server.now)))  # before it is carried out
    server.disconnect()
    assert_same(read(storage, 0, 12 * KiB), bytes(model[: 12 * KiB]))
    assert sum(kind in (WRITE, ZERO) for kind, _ in seen) > 5
    for _, now in seen:
        assert_same(now, bytes(model))


@pytest.mark.parametrize("kind", [WRITE, ZERO])
def test_overlapping_writes_in_flight(server: FakeServer, storage: NbdStorage, clock: Clock, kind: int) -> None:
    """The one that is answered last is the newer one: on the server, and after it has crashed."""
    gate = Gate()
    server.hook = lambda request: gate.stop() if request.length == 40 else None
    slow = Job(storage.punch, 0, 40) if kind == ZERO else Job(storage.pwrite, b"slow" * 10, 0)
    gate.reached()
    storage.pwrite(b"fast", 18)
    storage.pwrite(b"other", 40)  # is not sent again
    gate.open(2)
    slow.result()
    want = bytes(40) if kind == ZERO else b"slow" * 10
    assert server.now[:45] == want + b"other"
    assert [r.length for r in server.log] == [4, 5, 40, 40]
    server.hook = lambda request: None
    server.crash()
    clock.on_pause = lambda: server.start() and None
    assert read(storage, 0, 45) == want + b"other"


def test_server_that_answers_out_of_order(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """It carries out first what it answers last: what a reader then finds is what is sent again."""
    gate = Gate()
    server.hook = lambda request: gate.stop() if request.data == b"one" else None
    server.after = lambda request: gate.stop() if request.data == b"one" else None
    one = Job(storage.pwrite, b"one", 0)
    gate.reached()
    gate.open()
    gate.reached()  # carried out, not answered
    storage.pwrite(b"two", 0)
    assert server.now[:3] == b"two"
    gate.open(3)
    one.result()
    found = read(storage, 0, 3)
    server.hook = server.after = lambda request: None
    server.crash()
    clock.on_pause = lambda: server.start() and None
    assert found == read(storage, 0, 3) == b"one"


def test_answer_of_a_connection_that_is_lost_before_it_is_noted(
    server: FakeServer, storage: NbdStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread has made the next one, without that write, after the server has crashed: it is sent again."""
    gate, note = Gate(), storage._note
    monkeypatch.setattr(storage, "_note", lambda write, link: (gate.stop(), note(write, link))[1])
    writer = Job(storage.pwrite, b"x", 0)
    gate.reached()
    server.crash()
    server.start()
    assert read(storage, 0, 1) != b"x"
    gate.open(2)
    writer.result()
    assert read(storage, 0, 1) == b"x"


def test_a_connection_for_each_request_in_flight(shared: FakeServer, clock: Clock) -> None:
    """As many as are wanted at once, whichever threads want them, and no more; a flush is made on any of them."""
    storage = connect(shared, clock)
    gate = Gate()
    shared.hook = lambda request: gate.stop() if request.kind == WRITE else None
    for _ in range(3):
        jobs = [Job(storage.pwrite, bytes([i]), i) for i in range(3)]
        gate.reached(3)
        gate.open(3)
        for job in jobs:
            job.result()
        for _ in range(20):
            assert Job(read, storage, 0, 3).result() == bytes(range(3))
    Job(storage.flush).result()
    assert shared.durable[:3] == bytes(range(3))
    assert shared.connections == 3
    before = open_fds()
    storage.close()
    wait_for(lambda: open_fds() <= before - 2 * 3, "both ends of each are closed")


def test_requests_beyond_the_limit_of_connections(
    shared: FakeServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_session, "MOST_LINKS", 2)
    storage = connect(shared, clock)
    gate = Gate()
    shared.hook = lambda request: gate.stop()
    jobs = [Job(read, storage, i * KiB, 10) for i in range(6)]
    gate.reached(2)
    gate.avoided()
    gate.open(6)
    for i, job in enumerate(jobs):
        assert_same(job.result(), stamp(1, i * KiB, 10))
    assert shared.connections == 2
    storage.close()


def test_server_with_a_limit_of_connections(
    shared: FakeServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third is accepted and gets no answer: two have to do."""
    monkeypatch.setattr(nbd_session, "_MORE_SECONDS", 0.05)
    shared.most = 2
    storage = connect(shared, clock)
    gate = Gate()
    shared.hook = lambda request: gate.stop()
    jobs = [Job(read, storage, i * KiB, 10) for i in range(6)]
    gate.reached(2)
    gate.open(6)
    for i, job in enumerate(jobs):
        assert_same(job.result(), stamp(1, i * KiB, 10))
    assert shared.connections == 3
    storage.close()


@pytest.mark.parametrize("answers", [True, False])
def test_one_of_the_connections_is_lost(shared: FakeServer, clock: Clock, answers: bool) -> None:
    """What is on its way on another one is waited for, lest it overwrites what comes later; but not for ever."""
    storage = connect(shared, clock)
    storage._patience = 20.0 if answers else 0.05
    gate = Gate()

    def hook(request: Request) -> None:
        if request.data == b"slow":
            gate.stop()
        if request.kind == READ and shared.connections == 2:
            raise HangUp

    Job(storage.pwrite, b"kept", 10).result()
    shared.hook = hook
    slow = Job(storage.pwrite, b"slow", 0)
    gate.reached()
    reader = Job(read, storage, 10, 4)
    if answers:
        wait_for(lambda: storage._connecting, "the reader has noticed")
        assert shared.connections == 2
    else:
        assert reader.result() == b"kept"
    gate.open(3)
    slow.result()
    assert reader.result() == b"kept"
    assert read(storage, 0, 4) == b"slow"
    assert storage.in_doubt(0, 4) is not answers
    storage.close()


def test_flush_counts_for_all_connections_of_its_session(shared: FakeServer, clock: Clock) -> None:
    """Writes on three connections, a flush on one of them, a crash: nothing is missing, and nothing is sent again."""
    storage = connect(shared, clock)
    gate = Gate()
    shared.hook = lambda request: gate.stop() if request.kind == WRITE else None
    jobs = [Job(storage.pwrite, bytes([i]), i) for i in range(3)]
    gate.reached(3)
    gate.open(3)
    for job in jobs:
        job.result()
    Job(storage.flush).result()
    shared.crash()
    shared.log.clear()
    clock.on_pause = lambda: shared.start() and None
    assert Job(read, storage, 0, 3).result() == bytes(range(3))
    assert [r.kind for r in shared.log] == [READ]
    storage.close()


def test_second_crash_while_writes_are_sent_again(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    for i in range(4):
        storage.pwrite(bytes([i]), 2 * i)
    crashes = [3, 2, 1]

    def hook(request: Request) -> None:
        if request.kind == WRITE and crashes:
            crashes[-1] -= 1
            if not crashes[-1]:
                crashes.pop()
                raise Crash

    server.hook = hook
    clock.on_pause = lambda: None if server.path.exists() else server.start() and None
    server.crash()
    assert read(storage, 0, 8)[::2] == bytes(range(4))
    assert not crashes
    storage.flush()
    assert server.durable[:8:2] == bytes(range(4))


def test_where_a_write_has_no_answer(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """The server may carry it out later.  Not so after an answer, which may be an error, or if it was never sent."""
    clock.on_pause = lambda: None if server.path.exists() else server.start() and None

    def hook(request: Request) -> None:
        if request.offset == 2 * KiB and request.kind != READ:
            raise Disconnect
        if request.offset == 3 * KiB:
            raise Fail(errno.EIO)

    server.hook = hook
    for work in (lambda: storage.pwrite(bytes(512), 2 * KiB), lambda: storage.pwrite(bytes(512), 3 * KiB)):
        with pytest.raises(StorageError):
            work()
    storage.pwrite(bytes(512), 4 * KiB)
    server.crash()
    clock.on_pause = lambda: None
    for work in (lambda: read(storage, 0, 1), lambda: storage.pwrite(bytes(512), 5 * KiB)):
        with pytest.raises(UnreachableError):
            work()
    found = [at for at in range(0, 8 * KiB, 512) if storage.in_doubt(at, 512)]
    assert found == [2 * KiB]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flags": HAS_FLAGS | READ_ONLY | CAN_FLUSH | CAN_ZERO}, "read-only now"),
        ({"flags": HAS_FLAGS | CAN_ZERO}, "cannot flush"),
        ({"flags": HAS_FLAGS | CAN_FLUSH}, "cannot flush or write zeros"),
        ({"block": 4096}, "another export"),
        ({"largest": 1 << 20}, "another export"),
    ],
    ids=["read-only", "no flush", "no zeros", "blocks", "limit"],
)
def test_server_that_offers_less(
    server: FakeServer, storage: NbdStorage, clock: Clock, change: dict[str, int], message: str
) -> None:
    """It was started again with other options.  Nothing is lost: with the old ones all is well."""
    storage.pwrite(b"kept", 0)
    before = {name: getattr(server, name) for name in change}
    for name, value in change.items():
        setattr(server, name, value)
    server.crash()
    server.start()
    with pytest.raises(UnreachableError, match=message):
        storage.flush()
    for name, value in before.items():
        setattr(server, name, value)
    storage.flush()
    assert server.durable[:4] == b"kept"


def test_reader_of_a_server_that_became_read_only(server: FakeServer, clock: Clock) -> None:
    reader = open_uri(server.uri, False)
    server.flags = HAS_FLAGS | READ_ONLY
    server.crash()
    server.start()
    assert_same(read(reader, 0, 10), stamp(1, 0, 10))
    reader.close()


@pytest.mark.parametrize("cache", ["writeback", "unsafe"])
@pytest.mark.parametrize("in_place", [False, True], ids=["new cluster", "freed cluster"])
def test_image_with_a_write_without_an_answer(
    server: FakeServer, image: Callable[..., Built], cache: str, in_place: bool
) -> None:
    """The guest is told of an error, frees the place, and goes on elsewhere; then the server carries it out."""
    built = image(size=MiB, cluster_size=4 * KiB)
    server.crash()
    server.durable = built.path.read_bytes().ljust(4 * MiB, b"\xee")
    server.start()
    held = Gate()

    def hook(request: Request) -> None:
        if request.data[:4] == b"kept":
            server.disconnect()
            held.stop()

    with qedcore.open_image(server.uri, cache=cache) as opened:
        opened.pwrite(b"used" * KiB, 0)
        if in_place:
            opened.pwrite(b"data" * KiB, 4 * KiB)
            opened.flush()
        server.hook = hook
        with pytest.raises(UnreachableError):
            opened.pwrite(b"kept" * KiB, 4 * KiB)
        held.reached(5)
        opened.trim(4 * KiB, 4 * KiB)
        opened.flush()
        for i in range(2, 8):
            opened.pwrite(b"new!" * KiB, i * 4 * KiB)
        opened.flush()
        held.open(5)
        wait_for(lambda: server.now.count(b"kept") >= KiB, "the server carries it out")
        assert opened.pread(32 * KiB, 0) == b"used" * KiB + bytes(4 * KiB) + b"new!" * 6 * KiB


def test_flushed_data_is_not_sent_again(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """Another client may have changed it since; what came after the flush is sent, once and first."""
    storage.pwrite(b"old", 0)
    storage.flush()
    storage.pwrite(b"new", 10)
    server.crash()
    server.log.clear()
    clock.on_pause = lambda: server.start() and None
    assert read(storage, 10, 3) == b"new"
    assert [(r.kind, r.offset) for r in server.log] == [(WRITE, 10), (READ, 10)]


def test_write_during_a_flush_is_kept(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """It was not covered by the flush, which was on its way already."""
    gate = Gate()
    server.hook = lambda request: gate.stop() if request.kind == FLUSH else None
    storage.pwrite(b"one", 0)
    flush = Job(storage.flush)
    gate.reached()
    storage.pwrite(b"two", 3)
    gate.open()
    flush.result()
    server.durable = b"one" + stamp(1, 3, SIZE - 3)  # what it had to make durable, and no more
    server.hook = lambda request: None
    server.crash()
    clock.on_pause = lambda: server.start() and None
    assert read(storage, 0, 6) == b"onetwo"


def test_server_that_stays_away(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """Requests fail after a while, later ones at once; when it is back, nothing is missing and flushes work."""
    storage.pwrite(b"kept", 0)
    server.crash()
    with pytest.raises(UnreachableError, match="cannot reach nbd\\+unix.*: .*No such file") as caught:
        storage.pwrite(b"lost?", 10)
    assert caught.value.errno == errno.EIO
    assert 30 <= clock.now < 31
    for work in (storage.flush, lambda: read(storage, 0, 4), storage.flush):
        with pytest.raises(UnreachableError):
            work()
    assert clock.now < 31
    server.start()
    storage.flush()
    assert server.durable[:4] == b"kept"
    assert read(storage, 0, 4) == b"kept"
    server.crash()  # patience as before
    before = clock.now
    with pytest.raises(UnreachableError):
        storage.flush()
    assert clock.now - before >= 30


@pytest.mark.parametrize("function, n", [("pipe2", 1), ("dup", 1)])
def test_no_descriptor_left_for_a_moment(
    server: FakeServer, storage: NbdStorage, monkeypatch: pytest.MonkeyPatch, function: str, n: int
) -> None:
    """While connecting again: that is no failed flush, and nothing is left open."""
    storage.pwrite(b"kept", 0)
    before = open_fds()
    server.crash()
    server.start()
    real, calls = getattr(os, function), itertools.count(1)

    def fail(*args: Any) -> Any:
        if next(calls) == n:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*args)

    monkeypatch.setattr(os, function, fail)
    storage.flush()
    assert next(calls) > n + 1 and server.durable[:4] == b"kept"
    wait_for(lambda: open_fds() <= before, "descriptors are closed")


def test_many_wait_for_one_attempt(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    server.crash()
    waiting = threading.Semaphore(0)
    clock.on_pause = lambda: waiting.acquire(timeout=5) and server.start() and None
    before = server.connections
    jobs = [Job(read, storage, i * KiB, 10) for i in range(8)]
    waiting.release()
    for i, job in enumerate(jobs):
        assert_same(job.result(), stamp(1, i * KiB, 10))
    assert server.connections == before + 1


def test_request_that_kills_the_server(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """It fails in the end, and others work."""

    def hook(request: Request) -> None:
        if request.kind == READ and request.offset == 666:
            raise Crash

    server.hook = hook
    clock.on_pause = lambda: None if server.path.exists() else server.start() and None
    with pytest.raises(UnreachableError, match="5 times"):
        read(storage, 666, 1)
    assert_same(read(storage, 0, 10), stamp(1, 0, 10))


def test_another_export_in_its_place(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """Nothing is written into what cannot be the same image."""
    storage.pwrite(b"kept", 0)
    server.crash()
    server.durable = bytes(2 * SIZE)
    server.start()
    with pytest.raises(UnreachableError, match="another export"):
        storage.flush()
    assert server.now == bytes(2 * SIZE)


def test_replay_that_fails(server: FakeServer, storage: NbdStorage, clock: Clock) -> None:
    """No flush succeeds until what may have been lost is there again."""
    storage.pwrite(b"kept", 0)
    server.crash()
    broken = True

    def hook(request: Request) -> None:
        if broken and request.kind == WRITE:
            raise Fail(errno.ENOSPC)

    server.hook = hook
    server.start()
    with pytest.raises(UnreachableError, match="No space"):
        storage.flush()
    broken = False
    storage.flush()
    assert server.durable[:4] == b"kept"


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_failed_write_that_took_effect(server: FakeServer, storage: NbdStorage, clock: Clock, lost: bool) -> None:
    """Whoever has read what it left finds that later, too, although an older write to the place was not flushed."""

    def hook(request: Request) -> None:
        if request.kind == WRITE and request.data == b"new":
            raise FailAfter(errno.EIO)
        if lost and request.kind == FLUSH and server.connections == 1:
            raise Crash

    server.hook = hook
    clock.on_pause = lambda: None if server.path.exists() else server.start() and None
    storage.pwrite(b"old", 10)
    with pytest.raises(StorageError, match="Input/output error"):
        storage.pwrite(b"new", 10)
    found = read(storage, 10, 3)
    assert found == (b"old" if lost else b"new")
    server.crash()
    assert read(storage, 10, 3) == found
    storage.flush()
    assert server.durable[10:13] == found


def test_one_writer_and_one_connection(server: FakeServer) -> None:
    """A server's opener, as in test_lock.py: the writer has the reader's connection, and keeps other writers away."""
    opener = Opener(Locking.AUTO)
    reader = opener(server.uri, False, CacheMode())
    open_uri(server.uri, True).close()  # a reader locks nothing
    before = server.connections
    writer = opener(server.uri, True, CacheMode())
    assert server.connections == before
    writer.pwrite(b"x", 0)
    with pytest.raises(LockedError, match='Failed to get "write" lock. Is another process using the image'):
        open_uri(server.uri, True)
    open_uri(server.uri, True, locking=Locking.OFF).close()
    open_uri(server.uri, False).close()
    writer.close()
    assert read(reader, 0, 1) == b"x"
    opener.read_only()  # it was not to be
    open_uri(server.uri, True).close()
    writer = opener(server.uri, True, CacheMode())
    reader.close()
    open_uri(server.uri, True).close()


def test_one_writer_also_while_the_server_is_away(server: FakeServer) -> None:
    reader = open_uri(server.uri, False)
    server.crash()
    reader._patience = 0.0
    with pytest.raises(UnreachableError):
        read(reader, 0, 1)
    reader.allow_writing(Locking.AUTO)
    server.start()
    with pytest.raises(LockedError):
        open_uri(server.uri, True)
    reader.close()


def test_server_that_takes_no_more_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a one accepts the connection and says nothing: one clear line, and not only after half a minute."""
    import_nbd()
    monkeypatch.setattr(nbd_module, "_HANDSHAKE", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(StorageError, match="cannot open nbd.*: no answer: perhaps it takes no more clients"):
            open_uri(f"nbd+unix:///?socket={tmp_path}/s", False)


def test_much_is_flushed_by_itself(
    server: FakeServer, storage: NbdStorage, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(nbd_module, "KEPT_BYTES", 10 * KiB)
    for i in range(40):
        storage.pwrite(bytes([i]) * KiB, i * KiB)
        assert storage._log.cost < 12 * KiB
    assert 3 <= sum(r.kind == FLUSH for r in server.log) <= 5


def test_unsafe_cache_keeps_nothing(server: FakeServer, clock: Clock) -> None:
    storage = connect(server, clock, no_flush=True)
    storage.pwrite(b"x", 0)
    storage.flush()
    assert not storage._log.cost and FLUSH not in [r.kind for r in server.log]
    storage.close()


@both
def test_nothing_is_left_open(server: FakeServer, clock: Clock, several: bool) -> None:
    server.flags |= CAN_MULTI_CONN * several
    before = open_fds()
    for _ in range(3):
        storage = connect(server, clock)
        server.crash()
        server.start()
        read(storage, 0, 1)
        for job in [Job(read, storage, 0, 1) for _ in range(5)]:
            job.result()
        storage.close()
        storage.close()
        with pytest.raises(StorageError, match="closed"):
            read(storage, 0, 1)
    server.crash()
    with pytest.raises(StorageError, match="cannot open"):
        connect(server, clock)
    wait_for(lambda: open_fds() <= before, "descriptors are closed")


@both
def test_fork(server: FakeServer, clock: Clock, several: bool) -> None:
    """nbdkit goes to the background with the storage open: the child has it, and the parent leaves."""
    server.flags |= CAN_MULTI_CONN * several
    storage = connect(server, clock)
    assert_same(read(storage, 0, 10), stamp(1, 0, 10))
    pid = os.fork()
    if pid == 0:
        ok = Job(read, storage, 100, 10).result() == read(storage, 100, 10) == stamp(1, 100, 10)
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert server.connections == 1
