"""What runs in parallel and what does not, shown with fault points as barriers, not with clocks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.server import wait_for

import qedcore
from qedcore.engine.cluster_locks import Claims

KiB, MiB = 1024, 1024 * 1024
CLUSTER = 4 * KiB
REACH = CLUSTER * (CLUSTER * 2 // 8)  # guest bytes of one L2 table at 4 KiB / 2
SIZE = 8 * REACH
SECONDS = 20  # a bound for what should happen at once


@pytest.fixture
def path(tmp_path: Path) -> Path:
    qedcore.create(tmp_path / "image.qed", SIZE, cluster_size=CLUSTER, table_size=2)
    with qedcore.open_image(tmp_path / "image.qed") as image:
        for table in range(4):  # tables exist, most clusters do not
            image.pwrite(b"old" + bytes(509), table * REACH)
    return tmp_path / "image.qed"


class Hook:
    """A fault point callback that can be exchanged while the image is open."""

    def __init__(self) -> None:
        self.call: Callable[[str], None] = lambda event: None

    def __call__(self, event: str) -> None:
        self.call(event)


def start(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def finish(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a request hangs"


@pytest.mark.parametrize("event", ["write_aio", "l2_update"])
@pytest.mark.parametrize("positions", [(1, 2), (5, 6)], ids=["tables exist", "tables missing"])
def test_tables_run_in_parallel(path: Path, event: str, positions: tuple[int, int]) -> None:
    """Two allocating writes in different tables are inside the same step at the same time."""
    hook = Hook()
    meeting = threading.Barrier(2)

    def meet(name: str) -> None:
        if name == event:
            meeting.wait(SECONDS)  # raises BrokenBarrierError unless the other one comes

    with qedcore.open_image(path, fault=hook) as image:
        hook.call = meet
        writers = [
            start(lambda table=table: image.pwrite(b"new", table * REACH + 9 * CLUSTER))  # type: ignore[misc]
            for table in positions
        ]
        finish(*writers)
        hook.call = lambda name: None
        assert not meeting.broken
        for table in positions:
            assert image.pread(3, table * REACH + 9 * CLUSTER) == b"new"


@pytest.mark.parametrize("table", [1, 5], ids=["table exists", "table missing"])
def test_clusters_of_one_table_run_in_parallel(path: Path, table: int) -> None:
    """The data of two allocating writes in one L2 table is written at the same time."""
    hook = Hook()
    meeting = threading.Barrier(2)

    def meet(name: str) -> None:
        if name == "write_aio":
            meeting.wait(SECONDS)

    with qedcore.open_image(path, fault=hook) as image:
        hook.call = meet
        pos = table * REACH + 9 * CLUSTER
        writers = [start(lambda at=at: image.pwrite(b"new", at)) for at in (pos, pos + CLUSTER)]  # type: ignore[misc]
        finish(*writers)
        hook.call = lambda name: None
        assert not meeting.broken
        assert image.pread(3, pos) == image.pread(3, pos + CLUSTER) == b"new"


def overlay(path: Path) -> None:
    """Give the image a backing file full of b."""
    path.with_name("base").write_bytes(b"b" * SIZE)
    with qedcore.open_image(path) as image, image.maintenance() as metadata:
        metadata.header.set_backing("base", raw=True)


@pytest.mark.parametrize("table", [1, 5], ids=["table exists", "table missing"])
def test_one_cluster_takes_turns(path: Path, table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one allocating write is between its data and its entry, others wait for its cluster."""
    hook = Hook()
    inside, leave, waiting = threading.Event(), threading.Event(), threading.Event()
    steps: list[str] = []
    wait = Claims._wait

    def announced(claims: Claims, cluster: int) -> None:
        waiting.set()
        wait(claims, cluster)

    def stop_first(name: str) -> None:
        if name in ("write_aio", "l2_update"):
            steps.append(f"{threading.current_thread().name} {name}")
            if name == "write_aio" and not inside.is_set():
                inside.set()
                assert leave.wait(SECONDS)

    monkeypatch.setattr(Claims, "_wait", announced)
    overlay(path)
    with qedcore.open_image(path, fault=hook) as image:
        hook.call = stop_first
        pos = table * REACH + 9 * CLUSTER
        first = start(lambda: image.pwrite(b"1st", pos))
        assert inside.wait(SECONDS)
        second = start(lambda: image.pwrite(b"2nd", pos + 512))
        assert waiting.wait(SECONDS)
        assert steps == [f"{first.name} write_aio"]
        leave.set()
        finish(first, second)
        # It finds the cluster, and writes in place.
        assert steps == [f"{first.name} write_aio", f"{first.name} l2_update", f"{second.name} write_aio"]
        content = bytearray(b"b" * CLUSTER)
        content[:3], content[512:515] = b"1st", b"2nd"
        assert image.pread(CLUSTER, pos) == content


@pytest.mark.parametrize("table", [1, 5], ids=["table exists", "table missing"])
def test_a_zero_does_not_wait_for_a_write_which_then_fills_with_zeros(path: Path, table: int) -> None:
    """A write has filled its cluster from the backing file when that is hidden: it starts again."""
    hook = Hook()
    writing, zeroed = threading.Event(), threading.Event()
    steps: list[str] = []

    def stop_write(name: str) -> None:
        if name in ("write_aio", "l2_update"):
            steps.append(name)
            if len(steps) == 1:
                writing.set()
                assert zeroed.wait(SECONDS)

    overlay(path)
    with qedcore.open_image(path, fault=hook) as image:
        hook.call = stop_write
        pos = table * REACH + 9 * CLUSTER
        write = start(lambda: image.pwrite(b"new", pos + 512))
        assert writing.wait(SECONDS)
        image.zero(pos, CLUSTER)
        assert image.pread(CLUSTER, pos) == bytes(CLUSTER)
        zeroed.set()
        finish(write)
        assert steps == ["write_aio", "l2_update", "write_aio", "l2_update"]
        assert image.pread(CLUSTER, pos) == bytes(512) + b"new" + bytes(CLUSTER - 515)


def test_readers_and_in_place_writers_do_not_wait(path: Path) -> None:
    """With a write stopped inside its L2 lock, reads and in-place writes of that table go on."""
    hook = Hook()
    inside, leave = threading.Event(), threading.Event()

    def stop(name: str) -> None:
        if name == "l2_update" and not inside.is_set():
            inside.set()
            assert leave.wait(SECONDS)

    with qedcore.open_image(path, fault=hook) as image:
        hook.call = stop
        pos = REACH + 9 * CLUSTER
        writer = start(lambda: image.pwrite(b"new", pos))
        assert inside.wait(SECONDS)
        done: list[bytes] = []

        def others() -> None:
            done.append(image.pread(3, pos))  # not linked yet: the old content
            image.pwrite(b"inplace", REACH + 100)
            done.append(image.pread(7, REACH + 100))

        finish(start(others))
        assert done == [bytes(3), b"inplace"]
        assert writer.is_alive()
        leave.set()
        finish(writer)
        assert image.pread(3, pos) == b"new"


def test_new_tables_take_turns_at_the_l1_table(path: Path) -> None:
    """Two new L2 tables whose L1 entries share a sector: the second waits, and carries the first entry along."""
    hook = Hook()
    inside, leave, waiting = threading.Event(), threading.Event(), threading.Event()
    updates: list[str] = []

    def stop_first(name: str) -> None:
        if name == "l1_update":
            updates.append(threading.current_thread().name)
            if not inside.is_set():
                inside.set()
                assert leave.wait(SECONDS)

    class Announced:
        """The L1 lock, saying when a second thread comes."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            if inside.is_set():
                waiting.set()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    with qedcore.open_image(path, fault=hook) as image:
        image._clusters.l1_lock = Announced(image._clusters.l1_lock)
        hook.call = stop_first
        first = start(lambda: image.pwrite(b"1st", 5 * REACH))
        assert inside.wait(SECONDS)
        second = start(lambda: image.pwrite(b"2nd", 6 * REACH))
        assert waiting.wait(SECONDS)
        assert updates == [first.name]
        leave.set()
        finish(first, second)
    with qedcore.open_image(path, writable=False) as image:
        assert (image.pread(3, 5 * REACH), image.pread(3, 6 * REACH)) == (b"1st", b"2nd")


def test_evicted_table_in_use_stays_the_same(path: Path) -> None:
    """A table that a stopped writer holds is evicted, and read by others: they find the writer's copy."""
    hook = Hook()
    inside, leave = threading.Event(), threading.Event()

    def stop(name: str) -> None:
        if name == "l2_update" and not inside.is_set():
            inside.set()
            assert leave.wait(SECONDS)

    with qedcore.open_image(path, fault=hook, l2_cache=0) as image:
        hook.call = stop
        pos = REACH + 9 * CLUSTER
        writer = start(lambda: image.pwrite(b"new", pos))
        assert inside.wait(SECONDS)
        for table in (0, 2, 3):
            image.pread(1, table * REACH)
        assert 1 not in image._clusters.cache.slices, "the cache was meant to be too small"
        assert image.pread(3, pos) == bytes(3)
        leave.set()
        finish(writer)
        assert image.pread(3, pos) == b"new"


def test_clusters_are_handed_out_once(tmp_path: Path) -> None:
    """Threads that allocate at once never get the same cluster."""
    path = tmp_path / "image.qed"
    qedcore.create(path, MiB, cluster_size=CLUSTER, table_size=2)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with qedcore.open_image(path) as image:
            allocator = image._requests._allocator  # type: ignore[attr-defined]
            taken: list[list[int]] = [[] for _ in range(8)]

            def work(mine: list[int]) -> None:
                for count in range(4000):
                    extent = allocator.allocate(1)
                    if count % 7 == 3:
                        allocator.release(extent)
                    else:
                        mine.append(extent.offset)

            finish(*[start(lambda mine=mine: work(mine)) for mine in taken])  # type: ignore[misc]
            offsets = [offset for mine in taken for offset in mine]
            assert len(offsets) == len(set(offsets))
    finally:
        sys.setswitchinterval(interval)


def test_one_flush_for_many_writes_over_a_backing_file(tmp_path: Path) -> None:
    """Allocating writes in different tables that wait for a sync share the next one."""
    (tmp_path / "base").write_bytes(b"b" * MiB)
    path = tmp_path / "image.qed"
    tables = 6
    qedcore.create(path, SIZE, cluster_size=CLUSTER, table_size=2, backing_file="base", backing_fmt="raw")
    with qedcore.open_image(path) as image:
        for table in range(tables):
            image.pwrite(b"x", table * REACH)

        syncs = 0
        first_in, leave = threading.Event(), threading.Event()
        commit = image.storage._commit  # type: ignore[attr-defined]
        real_sync = commit._sync

        def sync() -> None:
            nonlocal syncs
            syncs += 1
            if syncs == 1:
                first_in.set()
                assert leave.wait(SECONDS)
            real_sync()

        image.flush()
        commit._sync = sync
        writers = [start(lambda: image.pwrite(b"new", 9 * CLUSTER))]
        assert first_in.wait(SECONDS)
        for table in range(1, tables):
            writers.append(start(lambda table=table: image.pwrite(b"new", table * REACH + 9 * CLUSTER)))  # type: ignore[misc]
        # All the others have written their data and wait for a sync that starts after it.
        wait_for(lambda: len(commit._next.gates) == tables - 1, "the writers at the flush")
        leave.set()
        finish(*writers)
        commit._sync = real_sync
        assert syncs == 2
        for table in range(tables):
            assert image.pread(3, table * REACH + 9 * CLUSTER) == b"new"
