"""Where new clusters come from, and what becomes of freed ones."""

from __future__ import annotations

import errno
import random
import threading
from typing import NamedTuple

import pytest

from qedcore.engine import allocator as alloc
from qedcore.engine.allocator import GROWTH_STEP, Allocator, Extent
from qedcore.engine.in_flight import InFlight
from qedcore.engine.need_check import NeedCheckGate
from qedcore.errors import StorageError, UnreachableError
from qedcore.format.geometry import Bounds, Geometry
from qedcore.format.header import Header, HeaderUpdater
from unit.fakes import WAIT, Call, FailAt, Gate, Hook, Job, MemoryStorage, Tap

CS = 4096


def allocator(
    storage: Tap | MemoryStorage, clusters: int = 2, in_flight: InFlight | None = None
) -> tuple[Allocator, Bounds]:
    geometry = Geometry(CS, 1)
    bounds = Bounds(geometry, 1, storage.size())
    assert bounds.end == clusters * CS
    return Allocator(storage, geometry, bounds, in_flight or InFlight()), bounds


@pytest.fixture
def small_step(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(alloc, "GROWTH_STEP", 8 * CS)
    return 8 * CS


def test_clusters_follow_the_end() -> None:
    tap = Tap(MemoryStorage(bytes(2 * CS)))
    target, bounds = allocator(tap)
    assert target.allocate(1) == Extent(2 * CS, 1, True)
    assert target.allocate(3) == Extent(3 * CS, 3, True)
    assert bounds.end == 6 * CS
    assert tap.log == [Call("truncate", 3 * CS + GROWTH_STEP)]  # one step serves them all
    assert tap.size() >= bounds.end


def test_growth_steps(small_step: int) -> None:
    """The file always covers what was handed out, and is made longer only when it has to be."""
    tap = Tap(MemoryStorage(bytes(2 * CS)))
    target, bounds = allocator(tap)
    sizes = []
    for n in (1, 8, 1, 30, 8, 1):
        target.allocate(n)
        assert tap.size() >= bounds.end
        sizes.append(tap.size() // CS)
    assert sizes == [11, 11, 20, 50, 50, 59]
    assert len(tap.log) == 4


@pytest.mark.parametrize("code", [errno.EFBIG, errno.ENOSPC, errno.EDQUOT])
def test_step_over_a_limit(small_step: int, code: int) -> None:
    """Over the limit only by the step: exactly what is wanted; more than that fails and changes nothing."""
    limit = 6 * CS

    def hook(call: Call) -> None:
        if call.name == "truncate" and call.offset > limit:
            raise StorageError("too long", OSError(code, ""))

    storage = MemoryStorage(bytes(2 * CS))
    target, bounds = allocator(Tap(storage, hook))
    assert target.allocate(3) == Extent(2 * CS, 3, True)
    assert storage.size() == 5 * CS
    with pytest.raises(StorageError) as caught:
        target.allocate(2)
    assert caught.value.errno == code
    assert (bounds.end, storage.size()) == (5 * CS, 5 * CS)
    assert target.allocate(1) == Extent(5 * CS, 1, True)
    limit = 100 * CS
    assert target.allocate(2) == Extent(6 * CS, 2, True)


# length of the file -> where the first cluster goes; its bytes so far must not show
PARTIAL = {
    2 * CS: 2 * CS,
    2 * CS + 1: 2 * CS,
    2 * CS + 512: 2 * CS,
    3 * CS - 512: 2 * CS,
    3 * CS - 511: 3 * CS,  # counts as a whole cluster, as in QEMU
    3 * CS - 1: 3 * CS,
}


@pytest.mark.parametrize("length", PARTIAL)
def test_partial_last_cluster_reads_as_zeros(length: int) -> None:
    storage = MemoryStorage(b"\xee" * length)
    end = PARTIAL[length]
    target, bounds = allocator(storage, end // CS)
    extent = target.allocate(2)
    assert extent == Extent(end, 2, True)
    assert not any(storage.data[end : end + 2 * CS])
    assert storage.data[: min(length, end)] == b"\xee" * min(length, end)
    assert not any(storage.data[min(length, end) : end])


def test_partial_last_cluster_is_kept_until_something_is_allocated() -> None:
    storage = MemoryStorage(b"\xee" * (2 * CS + 100))
    target, _ = allocator(storage)
    target.trim_tail()
    assert storage.data == b"\xee" * (2 * CS + 100)


@pytest.mark.parametrize(("step", "late"), [("truncate", False), ("truncate", True), ("flush", False)])
def test_failed_growth_of_a_partial_cluster_is_repeated(step: str, late: bool) -> None:
    """And what was cut off must be durable, whoever cut it."""
    storage = MemoryStorage(b"\xee" * (2 * CS + 100))
    tap = Tap(storage, FailAt(1, [step], late=late))
    target, bounds = allocator(tap)
    with pytest.raises(StorageError):
        target.allocate(1)
    assert bounds.end == 2 * CS
    del tap.log[:]
    assert target.allocate(1) == Extent(2 * CS, 1, True)
    assert [call.name for call in tap.log] == ["truncate", "flush", "truncate"]
    assert not any(storage.data[2 * CS : 3 * CS])


def test_released_clusters_are_used_again_but_are_not_fresh() -> None:
    target, bounds = allocator(MemoryStorage(bytes(2 * CS)))
    first, second = target.allocate(3), target.allocate(2)
    target.release(first)
    assert target.allocate(1) == Extent(2 * CS, 1, False)
    assert target.allocate(4) == Extent(3 * CS, 2, False)  # fewer than asked for
    assert target.allocate(1).fresh
    target.release(second._replace(fresh=True))
    assert target.allocate(2) == Extent(second.offset, 2, False)


def test_tables_are_appended() -> None:
    target, bounds = allocator(MemoryStorage(bytes(2 * CS)))
    target.release(target.allocate(3))
    assert target.allocate_table() == Extent(5 * CS, 1, True)


def flushes(tap: Tap) -> int:
    return [call.name for call in tap.log].count("flush")


def filled(n: int, in_flight: InFlight | None = None, hook: Hook | None = None) -> tuple[Tap, Allocator, Extent]:
    """n clusters of data, after a header and a table."""
    tap = Tap(MemoryStorage(bytes(2 * CS)), hook)
    target, _ = allocator(tap, in_flight=in_flight)
    extent = target.allocate(n)
    tap.inner.pwrite(b"\xee" * (n * CS), extent.offset)
    del tap.log[:]
    return tap, target, extent


def test_freed_clusters_are_punched_and_used_again_as_fresh() -> None:
    tap, target, extent = filled(4)
    target.free(Extent(extent.offset + 2 * CS, 2, False))
    target.free(Extent(extent.offset, 1, False))
    target.free(Extent(extent.offset + CS, 1, False))
    assert tap.log == [] and target.pending == 4
    assert target.allocate(9) == Extent(extent.offset, 4, True)
    assert tap.log == [Call("punch", extent.offset, 4 * CS), Call("flush")]
    assert target.pending == 0
    assert bytes(4 * CS) == tap.inner.data[extent.offset :][: 4 * CS]  # type: ignore[attr-defined]
    assert target.allocate(1).offset > extent.offset + 3 * CS


def test_flushes_of_clients_do_the_work() -> None:
    tap, target, extent = filled(4)
    target.free(extent)
    target.flush()
    assert tap.log == [Call("punch", extent.offset, 4 * CS), Call("flush")] and target.pending == 0
    del tap.log[:]
    assert target.allocate(4) == Extent(extent.offset, 4, True)
    target.flush()
    assert tap.log == [Call("flush")]


def test_nothing_is_punched_or_reused_under_a_request() -> None:
    in_flight = InFlight()
    tap, target, extent = filled(4, in_flight)
    with in_flight.request():  # it may have looked the clusters up
        target.free(extent)
        for _ in range(3):
            target.flush()
        assert not target.allocate(4).offset == extent.offset
        assert "punch" not in [call.name for call in tap.log]
    assert target.allocate(4) == Extent(extent.offset, 4, True)


def test_requests_that_came_later_do_not_matter() -> None:
    in_flight = InFlight()
    tap, target, extent = filled(4, in_flight)
    target.free(extent)
    with in_flight.request():
        assert target.allocate(4) == Extent(extent.offset, 4, True)


def test_what_cannot_be_punched_is_used_as_it_is() -> None:
    tap, target, extent = filled(4, hook=FailAt(1, ["punch"]))
    target.free(extent)
    assert target.allocate(4) == Extent(extent.offset, 4, False)


def test_nothing_is_reused_after_a_failed_flush() -> None:
    tap, target, extent = filled(4, hook=FailAt(1, ["flush"]))
    target.free(extent)
    with pytest.raises(StorageError):
        target.flush()
    for _ in range(9):
        assert target.allocate(1).offset > extent.offset + 3 * CS
        target.flush()


def test_freed_clusters_wait_for_a_server_that_is_away() -> None:
    """Nothing was lost then: the next flush makes them free."""
    away = [UnreachableError("away")]

    def hook(call: Call) -> None:
        if call.name == "flush" and away:
            raise away.pop()

    tap, target, extent = filled(3, hook=hook)
    target.free(extent)
    with pytest.raises(UnreachableError):
        target.flush()
    assert (target.pending, target.free_clusters) == (3, 0)
    target.flush()
    assert (target.pending, target.free_clusters) == (0, 3)
    assert target.allocate(3) == extent


def test_a_damaged_image_reuses_nothing() -> None:
    """Another entry may point to the same cluster."""
    tap, target, extent = filled(4)
    target.reuse = False
    target.free(extent)
    target.flush()
    assert target.allocate(4).offset > extent.offset and "punch" not in [call.name for call in tap.log]


def test_nothing_is_reused_if_another_writer_is_noticed_while_somebody_looks() -> None:
    tap, target, extent = filled(4)

    def look(unlinked: list[Extent]) -> bool:
        target.reuse = False
        return True

    target.sole_users = look
    target.free(extent)
    for _ in range(2):
        target.flush()
    assert not target.reuse and "punch" not in [call.name for call in tap.log]


@pytest.mark.parametrize("sole", [True, False])
def test_nothing_is_reused_while_somebody_looks_for_other_users(sole: bool) -> None:
    tap, target, extent = filled(4)
    gate = Gate()

    def look(unlinked: list[Extent]) -> bool:
        assert unlinked == [Extent(extent.offset, 2, False)]
        gate.stop()
        return sole

    target.sole_users = look
    target.free(Extent(extent.offset, 2, False))
    first = Job(target.flush)
    gate.reached()
    target.flush()  # by another client: durable, and nothing else
    target.free(Extent(extent.offset + 2 * CS, 1, False))
    assert target.allocate(1).offset > extent.offset
    assert "punch" not in [call.name for call in tap.log] and flushes(tap) >= 1
    gate.open()
    first.result()
    assert ("punch" in [call.name for call in tap.log]) is sole
    assert (target.allocate(9) == Extent(extent.offset, 2, True)) is sole
    assert target.allocate(9).offset > extent.offset + 2 * CS  # what was freed meanwhile
    assert target.pending == 0
    looks: list[list[Extent]] = []
    target._look = lambda unlinked: looks.append(unlinked) or True  # type: ignore[func-returns-value]
    for _ in range(2):  # nobody unlinks anything now: it is looked for once more, and only once
        target.recall()
        target.flush()
        assert looks == [[Extent(extent.offset + 2 * CS, 1, False)]] * sole
    assert (target.allocate(9) == Extent(extent.offset + 2 * CS, 1, True)) is sole
    assert target.pending == 0


def test_few_freed_clusters_wait(small_step: int) -> None:
    """A flush is made for as much as is worth it, not for every cluster."""
    tap, target, extent = filled(64 * 32)
    for n in range(64 - 1):
        target.free(Extent(extent.offset + n * CS, 1, False))
        if n == 3:
            target.allocate(1)
            assert flushes(tap) == 0
    target.free(Extent(extent.offset + 63 * CS, 1, False))
    assert target.allocate(100).n == 64
    assert flushes(tap) == 1


def test_a_full_disk_takes_what_was_freed() -> None:
    full = False

    def hook(call: Call) -> None:
        if full and call.name == "truncate":
            raise StorageError("full", OSError(errno.ENOSPC, ""))

    tap, target, extent = filled(64 * 32, hook=hook)
    tap.inner.truncate(target._bounds.end)
    target._grown, full = target._bounds.end, True
    with pytest.raises(StorageError) as caught:
        target.allocate(1)
    assert caught.value.errno == errno.ENOSPC
    target.free(Extent(extent.offset, 1, False))
    assert target.allocate(2) == Extent(extent.offset, 1, True)
    with pytest.raises(StorageError):
        target.allocate(1)


def test_the_file_shrinks_when_its_tail_was_freed() -> None:
    tap, target, extent = filled(8)
    target.free(Extent(extent.offset + 5 * CS, 3, False))
    target.free(Extent(extent.offset + 2 * CS, 1, False))
    target.flush()
    target.trim_tail()
    assert tap.size() == target._bounds.end == extent.offset + 5 * CS
    assert target.allocate(1) == Extent(extent.offset + 2 * CS, 1, True)
    assert target.allocate(1) == Extent(extent.offset + 5 * CS, 1, True)


def test_the_file_shrinks_also_when_it_has_not_grown() -> None:
    tap = Tap(MemoryStorage(b"\xee" * (6 * CS)))
    target, bounds = allocator(tap, 6)
    target.free(Extent(4 * CS, 2, False))
    target.flush()
    target.trim_tail()
    assert tap.size() == bounds.end == 4 * CS


def test_many_freed_runs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc, "_MAX_UNLINKED", 10)
    tap, target, extent = filled(64 * 32)
    for n in range(0, 100, 2):
        target.free(Extent(extent.offset + n * CS, 1, False))
    assert flushes(tap) == 5 and len(target._unlinked) < 10


def test_flushes_that_would_free_nothing_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc, "_MAX_UNLINKED", 10)
    in_flight = InFlight()
    tap, target, extent = filled(64 * 32, in_flight)
    with in_flight.request():  # it takes long
        for n in range(0, 100, 2):
            target.free(Extent(extent.offset + n * CS, 1, False))
    assert flushes(tap) == 0
    target.free(Extent(extent.offset + 100 * CS, 1, False))
    assert flushes(tap) == 1 and target.pending == 0


def test_trim_tail() -> None:
    storage = MemoryStorage(bytes(2 * CS))
    target, bounds = allocator(storage)
    kept, a, b, c = (target.allocate(n) for n in (1, 2, 1, 3))
    for extent in (b, a, c):  # in any order: they lie one behind the other
        target.release(extent)
    target.trim_tail()
    assert bounds.end == storage.size() == kept.offset + CS
    assert target.allocate(2) == Extent(a.offset, 2, True)  # fresh again: the file was cut
    assert not any(storage.data[a.offset :])


def test_trim_tail_keeps_what_lies_below_a_used_cluster() -> None:
    storage = MemoryStorage(bytes(2 * CS))
    target, bounds = allocator(storage)
    below = target.allocate(2)
    used = target.allocate(1)
    target.release(below)
    target.trim_tail()
    assert bounds.end == storage.size() == used.offset + CS
    assert target.allocate(1) == Extent(below.offset, 1, False)


def test_trim_tail_of_an_untouched_file_only_flushes() -> None:
    tap = Tap(MemoryStorage(bytes(2 * CS + 77)))
    allocator(tap)[0].trim_tail()
    assert tap.log == [Call("flush")]


FAILED_TRIMS = [("truncate", False), ("truncate", True), ("flush", False)]


@pytest.mark.parametrize("clean", [False, True], ids=["used", "clean"])
@pytest.mark.parametrize(("fault", "late"), FAILED_TRIMS)
def test_after_a_failed_trim(fault: str, late: bool, clean: bool) -> None:
    """The tail is cut off, or not, or not for good: the file must cover what is handed out, and fresh means zeros."""
    storage = MemoryStorage(bytes(2 * CS))
    target, _ = allocator(tap := Tap(storage))
    extent = target.allocate(2)
    storage.pwrite(b"\xee" * (2 * CS), extent.offset)
    if clean:
        target.free(extent)
        target.flush()
    else:
        target.release(extent)
    before = bytes(storage.data)  # comes back if the cut is lost
    tap.hook = FailAt(1, [fault], late=late)
    with pytest.raises(StorageError):
        target.trim_tail()
    for n in (1, 1, 3):
        found = target.allocate(n)
        assert storage.size() >= found.offset + n * CS
        content = before[found.offset :][: n * CS] + bytes(storage.data[found.offset :][: n * CS])
        assert not found.fresh or not any(content)


@pytest.mark.parametrize(("fault", "late"), FAILED_TRIMS)
def test_leftovers_after_a_failed_trim(fault: str, late: bool) -> None:
    """They are still to be cut off, durably, before the file grows."""
    storage = MemoryStorage(b"\xee" * (3 * CS + 100))
    target, _ = allocator(tap := Tap(storage), 3)
    target.free(Extent(2 * CS, 1, False))
    target.flush()
    tap.hook = FailAt(1, [fault], late=late)
    with pytest.raises(StorageError):
        target.trim_tail()
    del tap.log[:]
    found = target.allocate(2)
    assert [call.name for call in tap.log] == ["truncate", "flush", "truncate"]
    assert found.fresh and not any(storage.data[found.offset : found.offset + 2 * CS])


def test_random_life(rng: random.Random, small_step: int) -> None:
    """Never a cluster twice; fresh means zeros; the file covers everything that is in use, and is not too long."""
    storage = MemoryStorage(b"\xee" * (2 * CS + 600))
    target, bounds = allocator(storage)
    held: list[Extent] = []
    for step in range(600):
        action = rng.random()
        if action < 0.6 or not step:  # until the file has grown once, its end is left alone
            extent = target.allocate(rng.randint(1, 5))
            mine = set(range(extent.offset // CS, extent.offset // CS + extent.n))
            for other in held:
                assert not mine & set(range(other.offset // CS, other.offset // CS + other.n))
            span = slice(extent.offset, extent.offset + extent.n * CS)
            assert extent.offset % CS == 0 and extent.offset >= 2 * CS
            assert storage.size() >= span.stop and bounds.end >= span.stop
            if extent.fresh:
                assert not any(storage.data[span])
            storage.data[span] = b"\xdd" * (extent.n * CS)
            held.append(extent)
        elif action < 0.8 and held:
            target.release(held.pop(rng.randrange(len(held))))
        elif action < 0.92 and held:
            target.free(held.pop(rng.randrange(len(held))))
        elif action < 0.95:
            target.flush()
        elif action >= 0.95:
            target.flush()
            target.trim_tail()
            top = max((extent.offset + extent.n * CS for extent in held), default=2 * CS)
            assert storage.size() == bounds.end == top
    assert storage.data[: 2 * CS] == b"\xee" * (2 * CS)


def test_threads_get_different_clusters(small_step: int) -> None:
    storage = MemoryStorage(bytes(2 * CS))
    target, bounds = allocator(storage)

    def work(n: int) -> list[Extent]:
        return [target.allocate(n) for _ in range(100)]

    extents = sorted(extent for job in [Job(work, n) for n in (1, 2, 3)] for extent in job.result())
    assert [extent.offset for extent in extents[1:]] == [e.offset + e.n * CS for e in extents[:-1]]
    assert bounds.end == (2 + 600) * CS <= storage.size()


class Clock:
    """Seconds; the timer thread has hands of its own, so that it never waits for real."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timer: float | None = None
        self.looked = threading.Semaphore(0)  # released whenever the timer thread looks

    def __call__(self) -> float:
        if self.timer is not None and threading.current_thread().name == "need-check":
            self.looked.release()
            return self.timer
        return self.now


class Dirty(NamedTuple):
    """A gate with everything around it."""

    gate: NeedCheckGate
    tap: Tap
    header: HeaderUpdater
    allocator: Allocator
    clock: Clock

    @property
    def on_disk(self) -> bool:
        raw = bytes(self.tap.inner.data[:64])  # type: ignore[attr-defined]
        return Header.unpack(raw).need_check

    def take_log(self) -> list[str]:
        """The changes since the last call: names; set and clear for header writes."""
        log, self.tap.log[:] = list(self.tap.log), []
        return [getattr(call, "what", call.name) for call in log]


def look(dirty: Dirty, times: int = 2) -> None:
    for _ in range(times):
        assert dirty.clock.looked.acquire(timeout=WAIT), "the timer does not look"
