"""Where clusters come from, and the dirty period around them: order of writes and flushes, and the timer."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest

from qedcore.engine import allocator as alloc
from qedcore.engine.allocator import GROWTH_STEP, Allocator, Extent
from qedcore.engine.in_flight import InFlight
from qedcore.engine.need_check import IDLE_SECONDS, NeedCheckGate
from qedcore.errors import ForeignWriterError, QEDError, StorageError, UnreachableError
from qedcore.format.geometry import Bounds, Geometry
from qedcore.format.header import Header, HeaderUpdater
from unit.fakes import WAIT, Call, FailAt, Gate, Hook, Interrupted, Job, MemoryStorage, Tap, Waits

CS = 4096
NEED_CHECK = 2


def allocator(
    storage: Tap | MemoryStorage, clusters: int = 2, in_flight: InFlight | None = None
) -> tuple[Allocator, Bounds]:
    geometry = Geometry(CS, 1)
    bounds = Bounds(geometry, 1, storage.size())
    assert bounds.end == clusters * CS
    return Allocator(storage, geometry, bounds, in_flight or InFlight()), bounds


# Allocator


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


# Freeing: a cluster is used again only when no request knows it, and its unlinking and the hole are durable


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


# NeedCheckGate


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


class HeaderCall(Call):
    what = ""


class HeaderTap(Tap):
    """Tells header writes apart: "set" and "clear"."""

    def pwrite(self, buf: object, offset: int) -> None:
        data = bytes(buf)  # type: ignore[call-overload]
        if offset or len(data) != 64:
            super().pwrite(data, offset)
            return
        call = HeaderCall("pwrite", 0, 64)
        call.what = "set" if Header.unpack(data).need_check else "clear"
        self._do(call, lambda: self.inner.pwrite(data, offset))


@pytest.fixture
def make() -> Callable[..., Dirty]:
    def make(features: int = 0, hook: Hook | None = None) -> Dirty:
        header = Header(cluster_size=CS, table_size=1, l1_table_offset=CS, features=features)
        tap = HeaderTap(MemoryStorage(header.pack() + bytes(2 * CS - 64)), hook)
        updater = HeaderUpdater(tap, header)
        target, _ = allocator(tap)
        clock = Clock()
        return Dirty(NeedCheckGate(tap, updater, target, clock), tap, updater, target, clock)

    return make


def test_flag_is_durable_before_the_body_runs(make: Callable[..., Dirty]) -> None:
    dirty = make()
    with dirty.gate:
        assert dirty.take_log() == ["set", "flush"]
        assert dirty.on_disk and dirty.header.header.need_check
    assert dirty.take_log() == []


def test_flag_is_set_once_per_period(make: Callable[..., Dirty]) -> None:
    dirty = make()
    for _ in range(3):
        with dirty.gate, dirty.gate:
            pass
    assert dirty.take_log() == ["set", "flush"]


def test_image_that_was_not_closed_is_dirty_from_the_start(make: Callable[..., Dirty]) -> None:
    dirty = make(NEED_CHECK)
    with dirty.gate:
        assert dirty.take_log() == []


@pytest.mark.parametrize("step", ["set", "flush"])
def test_others_wait_until_the_flag_is_durable(make: Callable[..., Dirty], step: str) -> None:
    stop, inside = Gate(), Gate()
    armed = [True]

    def hook(call: Call) -> None:
        if armed and getattr(call, "what", call.name) == step:
            armed.clear()
            stop.stop()

    dirty = make(hook=hook)
    waits = Waits(dirty.gate._cond)

    def work() -> None:
        with dirty.gate:
            inside.stop()

    jobs = [Job(work)]
    stop.reached()
    for _ in range(3):
        jobs.append(Job(work))
        waits.come()
    inside.avoided()
    stop.open()
    inside.reached(4)  # all at once: the gate is no lock
    assert dirty.take_log() == ["set", "flush"]
    inside.open(4)
    for job in jobs:
        job.result()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("n", [1, 2], ids=["set", "flush"])
def test_failure_to_set(make: Callable[..., Dirty], n: int, late: bool) -> None:
    """The request fails before it has changed anything, and the next one tries again."""
    dirty = make(hook=FailAt(n, code=errno.ENOSPC, late=late))
    with pytest.raises(StorageError) as caught:
        with dirty.gate:
            raise AssertionError("the body ran")
    assert caught.value.errno == errno.ENOSPC
    dirty.take_log()
    with dirty.gate:
        assert dirty.take_log() == ["set", "flush"]
        assert dirty.on_disk
    assert dirty.gate.clear()  # nothing counts as in flight


def test_failure_to_set_wakes_those_who_wait(make: Callable[..., Dirty]) -> None:
    stop = Gate()
    fail = FailAt(1, ["pwrite"])

    def hook(call: Call) -> StorageError | None:
        if call.name == "pwrite" and not fail.hit:
            stop.stop()
        return fail(call)

    dirty = make(hook=hook)
    waits = Waits(dirty.gate._cond)
    first = Job(dirty.gate.__enter__)
    stop.reached()
    second = Job(dirty.gate.__enter__)
    waits.come()
    stop.open()
    with pytest.raises(StorageError):
        first.result()
    second.result()
    assert dirty.take_log() == ["set", "set", "flush"]


def begin(dirty: Dirty, clusters: int = 1) -> None:
    """A dirty period with an allocation that is over."""
    with dirty.gate:
        if clusters:
            dirty.allocator.allocate(clusters)
    dirty.take_log()


@pytest.mark.parametrize("grown", [0, 1])
def test_order_of_clearing(make: Callable[..., Dirty], grown: int) -> None:
    """Everything the flag stands for, then the flag, durable before the next allocation may set it again."""
    dirty = make()
    begin(dirty, grown)
    assert dirty.gate.clear() is True
    assert dirty.take_log() == ["truncate"] * grown + ["flush", "clear", "flush"]
    assert not dirty.on_disk
    assert dirty.tap.size() == (2 + grown) * CS
    assert dirty.gate.clear() is False  # clean
    assert dirty.take_log() == []
    with dirty.gate:
        assert dirty.take_log() == ["set", "flush"]


@pytest.mark.parametrize("step", range(4), ids=["truncate", "flush", "clear", "second flush"])
def test_allocations_wait_while_clearing(make: Callable[..., Dirty], step: int) -> None:
    stop, inside = Gate(), Gate()
    armed: list[int] = []

    def hook(call: Call) -> None:
        if armed and len(dirty.tap.log) == armed[0]:
            armed.clear()
            stop.stop()

    dirty = make(hook=hook)
    begin(dirty)
    waits = Waits(dirty.gate._cond)
    armed.append(step + 1)
    clearing = Job(dirty.gate.clear)
    stop.reached()

    def work() -> None:
        with dirty.gate:
            inside.stop()

    job = Job(work)
    waits.come()
    inside.avoided()
    stop.open()
    inside.reached()
    assert clearing.result() is True
    assert dirty.take_log() == ["truncate", "flush", "clear", "flush", "set", "flush"]
    inside.open()
    job.result()


def test_no_clear_while_in_flight(make: Callable[..., Dirty]) -> None:
    dirty = make()
    with dirty.gate:
        with dirty.gate:
            pass
        dirty.take_log()
        assert dirty.gate.clear() is False
    assert dirty.take_log() == []
    assert dirty.gate.clear() is True


def test_gate_that_was_shut_while_somebody_came_in(make: Callable[..., Dirty]) -> None:
    """Between the steps that take no lock the whole dirty period may end: it begins again."""
    dirty = make()
    begin(dirty)
    cleared: list[bool] = []
    dirty.gate.inside = Interrupted(lambda: cleared.append(dirty.gate.clear()), before=True)
    with dirty.gate:
        assert cleared == [True] and dirty.on_disk
        assert dirty.take_log()[-2:] == ["set", "flush"]
        assert len(dirty.gate.inside) == 1


def test_gate_stays_open_for_who_is_coming_in(make: Callable[..., Dirty]) -> None:
    dirty = make()
    begin(dirty)
    cleared: list[bool] = []
    dirty.gate.inside = Interrupted(lambda: cleared.append(dirty.gate.clear()), before=False)
    with dirty.gate:
        assert cleared == [False] and dirty.on_disk
    assert dirty.take_log() == []
    assert dirty.gate.clear() is True


class Leaving(list[None]):
    """Who is inside a gate; `other` runs just before somebody looks."""

    def __init__(self, other: Callable[[], object]) -> None:
        self._other = [other]

    def __len__(self) -> int:
        if self._other:
            self._other.pop()()
        return super().__len__()


def test_no_clear_if_the_last_one_inside_fails_just_now(make: Callable[..., Dirty]) -> None:
    dirty = make()
    begin(dirty)

    def fail() -> None:
        dirty.gate.fail()
        dirty.gate.__exit__()

    dirty.gate.inside = Leaving(fail)
    dirty.gate.inside.append(None)
    assert dirty.gate.clear() is False
    assert dirty.on_disk


class Noticing(NeedCheckGate):
    """`other` runs just after somebody has looked whether there are other writers."""

    other: Callable[[], object] | None = None
    seen: ForeignWriterError | None = None

    @property  # type: ignore[override]
    def _others(self) -> ForeignWriterError | None:
        seen, other, self.other = self.seen, self.other, None
        if other is not None:
            other()
        return seen

    @_others.setter
    def _others(self, seen: ForeignWriterError | None) -> None:
        self.seen = seen


def test_gate_stays_shut_if_another_writer_is_noticed_just_now(make: Callable[..., Dirty]) -> None:
    dirty = make()
    gate = Noticing(dirty.tap, dirty.header, dirty.allocator, dirty.clock)

    def notice() -> None:
        dirty.tap.inner.pwrite(dirty.header.header._replace(image_size=CS).pack(), 0)
        with pytest.raises(ForeignWriterError):
            dirty.allocator.before_growth()

    with gate:
        gate.other = notice
        assert gate.clear() is False
    with pytest.raises(ForeignWriterError), gate:
        pass


def test_failed_body_is_not_in_flight(make: Callable[..., Dirty]) -> None:
    dirty = make()
    with pytest.raises(ZeroDivisionError), dirty.gate:
        raise ZeroDivisionError
    assert dirty.gate.clear() is True


@pytest.mark.parametrize(("passed", "cleared"), [(0, False), (4.999, False), (5.0, True), (100, True)])
def test_no_clear_before_it_is_idle(make: Callable[..., Dirty], passed: float, cleared: bool) -> None:
    """The time counts from the end of the last allocation, not from its start."""
    dirty = make()
    with dirty.gate:
        dirty.clock.now += 50
    dirty.take_log()
    dirty.clock.now += passed
    assert dirty.gate.clear(5.0) is cleared
    assert dirty.on_disk is not cleared


def test_no_clear_after_a_failed_metadata_write(make: Callable[..., Dirty]) -> None:
    dirty = make()
    with dirty.gate:
        dirty.gate.fail()
    dirty.take_log()
    assert dirty.gate.clear() is False
    dirty.gate.close()
    assert dirty.take_log() == []
    assert dirty.on_disk


@pytest.mark.parametrize("n", [1, 2], ids=["truncate", "data flush"])
def test_failure_before_the_flag_keeps_it(make: Callable[..., Dirty], n: int) -> None:
    dirty = make()
    begin(dirty)
    dirty.tap.hook = FailAt(n, code=errno.ENOSPC)
    with pytest.raises(StorageError) as caught:
        dirty.gate.clear()
    assert caught.value.errno == errno.ENOSPC
    assert dirty.on_disk and dirty.header.header.need_check
    assert "clear" not in dirty.take_log()
    assert dirty.gate.clear() is False  # for good: something may be missing (I2)
    with dirty.gate:  # but allocations go on
        assert dirty.take_log() == []
    dirty.gate.close()
    assert dirty.on_disk


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("n", [3, 4], ids=["clear", "last flush"])
def test_failure_of_the_flag_itself(make: Callable[..., Dirty], n: int, late: bool) -> None:
    """What is on disk is unknown then: the next allocation must set it, durably."""
    dirty = make()
    begin(dirty)
    dirty.tap.hook = FailAt(n, late=late)
    with pytest.raises(StorageError):
        dirty.gate.clear()
    dirty.take_log()
    with dirty.gate:
        assert dirty.take_log() == ["set", "flush"]
        assert dirty.on_disk


def test_settled(make: Callable[..., Dirty]) -> None:
    """The repair at open has cleared the flag on disk."""
    dirty = make(NEED_CHECK)
    dirty.header.set_features(clear=NEED_CHECK)
    dirty.gate.settled()
    dirty.take_log()
    with dirty.gate:
        assert dirty.take_log() == ["set", "flush"]


@pytest.mark.parametrize("timer", [False, True])
@pytest.mark.parametrize("dirtied", [False, True])
def test_close(make: Callable[..., Dirty], timer: bool, dirtied: bool) -> None:
    """Does not wait for the idle time, and ends the timer's thread."""
    dirty = make()
    if timer:
        dirty.gate.start_timer(lambda error: None)
    if dirtied:
        begin(dirty)
    dirty.gate.close()
    assert dirty.take_log() == (["truncate", "flush", "clear", "flush"] if dirtied else [])
    assert not dirty.on_disk
    assert not [thread for thread in threading.enumerate() if thread.name == "need-check"]


def test_failed_close_ends_the_timer(make: Callable[..., Dirty]) -> None:
    dirty = make()
    dirty.gate.start_timer(lambda error: None)
    begin(dirty)
    dirty.tap.hook = FailAt(2)
    with pytest.raises(StorageError):
        dirty.gate.close()
    assert dirty.on_disk
    assert not [thread for thread in threading.enumerate() if thread.name == "need-check"]


# The timer.  Its thread sees clock.timer; it is at most a tenth of a second from its next look.


def look(dirty: Dirty, times: int = 2) -> None:
    for _ in range(times):
        assert dirty.clock.looked.acquire(timeout=WAIT), "the timer does not look"


def run_timer(dirty: Dirty, errors: list[QEDError] | None = None) -> None:
    dirty.clock.timer = dirty.clock.now + IDLE_SECONDS - 0.05
    dirty.gate.start_timer((errors if errors is not None else []).append)


def test_timer_ends_idle_periods(make: Callable[..., Dirty]) -> None:
    cleared = threading.Semaphore(0)

    def hook(call: Call) -> None:
        if len(dirty.tap.log) >= 4 and dirty.tap.log[-1].name == "flush":
            cleared.release()

    dirty = make()
    run_timer(dirty)
    for _ in range(2):  # it goes on after the first period
        begin(dirty)
        dirty.tap.hook = hook
        look(dirty)
        assert dirty.take_log() == []
        dirty.clock.timer = dirty.clock.now + IDLE_SECONDS
        assert cleared.acquire(timeout=WAIT)
        dirty.tap.hook = None
        with dirty.gate._cond:
            dirty.gate._cond.wait_for(lambda: not dirty.gate._dirty, WAIT)
        assert dirty.take_log() == ["truncate", "flush", "clear", "flush"]
        assert not dirty.on_disk
        dirty.clock.timer -= 0.05
    dirty.gate.close()


def test_timer_waits_for_requests_in_flight(make: Callable[..., Dirty]) -> None:
    dirty = make()
    run_timer(dirty)
    with dirty.gate:
        dirty.take_log()
        dirty.clock.timer = dirty.clock.now + 1000
        look(dirty, 4)
        assert dirty.take_log() == [] and dirty.on_disk
    dirty.gate.close()
    assert not dirty.on_disk


def test_timer_counts_from_the_last_allocation(make: Callable[..., Dirty]) -> None:
    dirty = make()
    run_timer(dirty)
    begin(dirty)
    look(dirty)
    dirty.clock.now += 3
    begin(dirty)
    dirty.clock.timer = dirty.clock.now + IDLE_SECONDS - 0.05  # long over for the first
    look(dirty, 4)
    assert dirty.take_log() == [] and dirty.on_disk
    dirty.gate.close()


def test_timer_without_memory(make: Callable[..., Dirty]) -> None:
    """It says so, keeps NEED_CHECK, and can still be ended."""
    told = threading.Event()
    errors: list[QEDError] = []

    def report(error: QEDError) -> None:
        errors.append(error)
        told.set()

    def hook(call: Call) -> None:
        raise MemoryError

    dirty = make()
    dirty.clock.timer = dirty.clock.now + IDLE_SECONDS - 0.05
    dirty.gate.start_timer(report)
    begin(dirty)
    dirty.tap.hook = hook
    dirty.clock.timer += 1
    assert told.wait(WAIT)
    dirty.tap.hook = None
    assert [error.errno for error in errors] == [errno.ENOMEM]
    dirty.gate.close()
    assert dirty.on_disk


@pytest.mark.parametrize("n", [1, 2, 3, 4], ids=["truncate", "data flush", "clear", "last flush"])
def test_timer_reports_errors_and_lives_on(make: Callable[..., Dirty], n: int) -> None:
    told = threading.Event()
    errors: list[QEDError] = []

    def report(error: QEDError) -> None:
        errors.append(error)
        told.set()

    dirty = make()
    dirty.clock.timer = dirty.clock.now + IDLE_SECONDS - 0.05
    dirty.gate.start_timer(report)
    begin(dirty)
    dirty.tap.hook = FailAt(n, code=errno.ENOSPC)
    dirty.clock.timer += 1
    assert told.wait(WAIT)
    assert [error.errno for error in errors] == [errno.ENOSPC]
    log = dirty.take_log()
    assert log == ["truncate", "flush", "clear", "flush"][:n]  # once: it does not try again and again
    assert dirty.on_disk is (n < 4)
    assert [thread.name for thread in threading.enumerate()].count("need-check") == 1
    with dirty.gate:
        assert dirty.take_log() == ([] if n < 3 else ["set", "flush"])
    dirty.gate.close()
    assert dirty.on_disk is (n < 3)
    assert len(errors) == 1
