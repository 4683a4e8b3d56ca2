"""The L2 cache: what is evicted, what is shared, and how often a slice is read."""

from __future__ import annotations

import errno
import random
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qedcore.engine import l2_cache
from qedcore.engine.l2_cache import L2Cache
from qedcore.errors import StorageError
from unit.fakes import WAIT, Gate, Job

ENTRIES = 512  # per slice, 4 KiB


class Tables:
    """A TableIO that counts; `hook` runs before each read."""

    def __init__(self, hook: Callable[[int], None] = lambda offset: None) -> None:
        self.reads: list[int] = []
        self.hook = hook

    def read(self, offset: int, entries: int) -> array[int]:
        self.reads.append(offset)
        self.hook(offset)
        return array("Q", [offset]) * entries


def cache(tables: Tables, slices: int) -> L2Cache:
    return L2Cache(tables, ENTRIES, slices * ENTRIES * 8)  # type: ignore[arg-type]


def load(target: L2Cache, index: int) -> array[int]:
    """As in a look-up: touch what is there, load what is not."""
    table = target.slices.get(index)
    if table is not None:
        target.touch(index)
        return table
    return target.load(index, index * 4096)


# accesses in order -> slices left with room for 3, oldest use first
ORDERS = {
    (0,): [0],
    (0, 1, 2): [0, 1, 2],
    (0, 1, 2, 3): [1, 2, 3],
    (0, 1, 2, 0, 3): [2, 0, 3],
    (0, 1, 2, 1, 0, 3, 4): [0, 3, 4],
    (0, 1, 2, 2, 2, 3): [1, 2, 3],
    (0, 1, 2, 3, 0): [2, 3, 0],
    (0, 0, 0): [0],
}


@pytest.mark.parametrize("order", ORDERS)
def test_least_recently_used_goes_first(order: tuple[int, ...]) -> None:
    target = cache(Tables(), 3)
    for index in order:
        assert load(target, index)[0] == index * 4096
    assert list(target.slices) == ORDERS[order]


def test_order_against_a_model(rng: random.Random) -> None:
    tables = Tables()
    target = cache(tables, 5)
    model: OrderedDict[int, None] = OrderedDict()
    reads = 0
    for _ in range(1000):
        index = rng.randrange(9)
        if rng.random() < 0.1:
            target.add(index, array("Q", [index * 4096]) * ENTRIES)
        else:
            reads += index not in model
            load(target, index)
        model[index] = None
        model.move_to_end(index)
        if len(model) > 5:
            model.popitem(last=False)
        assert list(target.slices) == list(model)
        assert len(tables.reads) == reads


def test_touch_of_what_was_evicted_does_nothing() -> None:
    target = cache(Tables(), 2)
    load(target, 1)
    target.touch(5)
    assert list(target.slices) == [1]


# limit in bytes, bytes per slice -> slices kept
BOUNDS = {
    (0, 4096): 2,  # never less than two
    (4096, 4096): 2,
    (3 * 4096 - 1, 4096): 2,
    (3 * 4096, 4096): 3,
    (8 << 20, 256 << 10): 32,
    (1 << 20, 1 << 20): 2,
}


@pytest.mark.parametrize(("limit", "size"), BOUNDS)
def test_bound_in_bytes(limit: int, size: int) -> None:
    target = L2Cache(Tables(), size // 8, limit)  # type: ignore[arg-type]
    for index in range(40):
        target.add(index, array("Q", bytes(size)))
    assert list(target.slices) == list(range(40 - BOUNDS[limit, size], 40))


def test_evicted_table_in_use_is_found_again() -> None:
    """I2: else two requests would change two copies of one table."""
    tables = Tables()
    target = cache(tables, 2)
    mine = load(target, 0)
    for index in (1, 2, 3):
        load(target, index)
    assert 0 not in target.slices
    mine[5] = 77
    again = target.load(0, 0)
    assert again is mine
    assert tables.reads == [0, 4096, 8192, 12288]
    assert list(target.slices) == [3, 0]


def test_evicted_table_that_nobody_uses_is_gone() -> None:
    """The bound holds: nothing is kept alive behind the cache's back."""
    tables = Tables()
    target = cache(tables, 2)
    for index in (0, 1, 2, 0):
        load(target, index)
    assert tables.reads == [0, 4096, 8192, 0]


def test_added_table_is_the_one_that_is_found() -> None:
    tables = Tables()
    target = cache(tables, 2)
    mine = array("Q", bytes(ENTRIES * 8))
    target.add(4, mine)
    assert target.load(4, 0) is mine
    for index in (1, 2, 3):
        load(target, index)
    assert target.load(4, 0) is mine
    assert 0 not in tables.reads


@pytest.mark.parametrize("evicted", [False, True])
def test_discard(evicted: bool) -> None:
    """The next use reads again, though somebody still has the old table in hand."""
    tables = Tables()
    target = cache(tables, 2)
    old = load(target, 9)
    if evicted:
        load(target, 1)
        load(target, 2)
    target.discard(9)
    new = target.load(9, 9 * 4096)
    assert new is not old
    assert tables.reads.count(9 * 4096) == 2
    assert target.load(9, 0) is new
    target.discard(1234)  # never there: harmless


def test_clear() -> None:
    tables = Tables()
    target = cache(tables, 3)
    held = [load(target, index) for index in range(3)]
    target.clear()
    assert not target.slices
    assert load(target, 1) is not held[1]
    assert tables.reads == [0, 4096, 8192, 4096]


# Single flight


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released by every thread that begins to wait for another's load."""
    come = threading.Semaphore(0)

    class Announced(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            come.release()
            return super().wait(timeout)

    monkeypatch.setattr(l2_cache, "threading", SimpleNamespace(Event=Announced))
    return come


THREADS = 8


def start(target: L2Cache, tables: Tables, waiting: threading.Semaphore, gate: Gate) -> list[Job]:
    """Threads that all miss slice 3: one reads (and is stopped there), the others wait for it."""
    first = Job(target.load, 3, 12288)
    gate.reached()
    tables_stop = tables.hook

    def second_reader(offset: int) -> None:
        waiting.release()  # so that a cache without single flight fails and does not hang
        tables_stop(offset)

    tables.hook = second_reader
    jobs = [first] + [Job(target.load, 3, 12288) for _ in range(THREADS - 1)]
    for _ in range(THREADS - 1):
        assert waiting.acquire(timeout=WAIT)
    return jobs


def test_one_read_for_all_that_miss_at_once(waiting: threading.Semaphore) -> None:
    gate = Gate()
    tables = Tables(lambda offset: gate.stop())
    target = cache(tables, 2)
    jobs = start(target, tables, waiting, gate)
    assert tables.reads == [12288]
    gate.open(THREADS)
    found = [job.result() for job in jobs]
    assert tables.reads == [12288]
    assert all(table is found[0] for table in found)


def test_other_slices_do_not_wait(waiting: threading.Semaphore) -> None:
    gate = Gate()
    target = cache(Tables(lambda offset: gate.stop()), 4)
    jobs = [Job(target.load, index, index * 4096) for index in range(4)]
    gate.reached(4)  # all of them are reading
    gate.open(4)
    assert [job.result()[0] for job in jobs] == [0, 4096, 8192, 12288]


@pytest.mark.parametrize("failures", [1, 2, THREADS - 1, THREADS])
def test_waiters_try_themselves_after_a_failed_load(waiting: threading.Semaphore, failures: int) -> None:
    """Each failed read is one caller's error; the first that succeeds serves all who are left."""
    gate = Gate()

    def read(offset: int) -> None:
        number = len(tables.reads)
        if number == 1:
            gate.stop()
        if number <= failures:
            raise StorageError(f"read {number}", code=errno.EIO)

    tables = Tables(read)
    target = cache(tables, 2)
    jobs = start(target, tables, waiting, gate)
    gate.open()
    results = []
    for job in jobs:
        job.join(WAIT)
        results.append(str(job.error) if job.error else "table")
    assert sorted(results) == [f"read {n + 1}" for n in range(failures)] + ["table"] * (THREADS - failures)
    assert len(tables.reads) == min(failures + 1, THREADS)
    if failures == THREADS:
        tables.hook = lambda offset: None
        assert target.load(3, 12288)[0] == 12288  # no failed load is remembered


def test_cache_is_not_locked_while_reading() -> None:
    gate = Gate()
    tables = Tables(lambda offset: gate.stop() if offset == 4096 else None)
    target = cache(tables, 3)
    job = Job(target.load, 1, 4096)
    gate.reached()
    Job(target.add, 2, array("Q", [7])).result()
    Job(target.discard, 2).result()
    Job(target.load, 0, 0).result()
    gate.open()
    job.result()
