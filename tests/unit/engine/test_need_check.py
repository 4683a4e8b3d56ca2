"""The dirty period: what is durable when, who waits for whom, and when NEED_CHECK stays."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from qedcore.check.cluster_use import ClusterUse
from qedcore.engine.allocator import Allocator
from qedcore.engine.in_flight import InFlight
from qedcore.engine.need_check import IDLE_SECONDS, NeedCheckGate
from qedcore.engine.reclaim import Reclaimer
from qedcore.errors import ForeignWriterError, QEDError, StorageError, UnreachableError
from qedcore.format.geometry import Bounds, Geometry
from qedcore.format.header import Header, HeaderUpdater
from unit.fakes import CHANGES, WAIT, Call, FailAt, Gate, Hook, Interrupted, Job, MemoryStorage, Tap, Waits

CS = 4096


NEED_CHECK = 2


def allocator(storage: Tap | MemoryStorage, clusters: int = 2) -> tuple[Allocator, Reclaimer]:
    geometry = Geometry(CS, 1)
    bounds = Bounds(geometry, 1, storage.size())
    assert bounds.end == clusters * CS
    reclaimer = Reclaimer(storage, geometry, bounds, InFlight())
    reclaimer.adopt(ClusterUse(0))
    return Allocator(storage, geometry, bounds, reclaimer), reclaimer


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
        target, reclaimer = allocator(tap)
        clock = Clock()
        return Dirty(NeedCheckGate(tap, updater, target, reclaimer, clock), tap, updater, target, clock)

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


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 7], ids=["set", "flush", "cut", "second flush", "clear", "last flush"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [UnreachableError("away"), MemoryError("none left")], ids=["server", "memory"])
def test_what_is_away_for_a_moment(make: Callable[..., Dirty], n: int, late: bool, error: Exception) -> None:
    """At any step of a dirty period: NEED_CHECK does not stay set for good, and is set when it must be."""
    steps = itertools.count(1)

    def hook(call: Call) -> Any:
        if call.name in CHANGES and next(steps) == n:
            if late:
                return error
            raise error
        return None

    dirty = make(hook=hook)

    def period() -> None:
        with dirty.gate:
            assert dirty.on_disk
            if n > 2:
                dirty.allocator.allocate(1)
        dirty.gate.clear()

    with pytest.raises(type(error)):
        period()
    if n % 2:  # with another allocation, or without
        with dirty.gate:
            assert dirty.on_disk
    dirty.gate.close()
    assert not dirty.on_disk and not dirty.header.header.need_check


def test_flush_of_the_cleared_flag_that_fails(make: Callable[..., Dirty]) -> None:
    """What was overwritten since the last flush may be lost: the next opening must not believe the cache."""
    flushes = itertools.count(1)

    def hook(call: Call) -> StorageError | None:
        if call.name == "flush" and next(flushes) >= 3:
            raise StorageError("lost")
        return None

    dirty = make(hook=hook)
    with dirty.gate:
        pass
    with pytest.raises(StorageError, match="lost"):
        dirty.gate.clear()
    assert dirty.on_disk
    assert not dirty.gate.clear() and dirty.on_disk


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
    def _refusal(self) -> ForeignWriterError | None:
        seen, other, self.other = self.seen, self.other, None
        if other is not None:
            other()
        return seen

    @_refusal.setter
    def _refusal(self, seen: ForeignWriterError | None) -> None:
        self.seen = seen


def test_gate_stays_shut_if_another_writer_is_noticed_just_now(make: Callable[..., Dirty]) -> None:
    dirty = make()
    gate = Noticing(dirty.tap, dirty.header, dirty.allocator, dirty.gate._reclaimer, dirty.clock)

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
    """It says so, keeps NEED_CHECK for now, and can still be ended."""
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
    assert dirty.on_disk
    dirty.clock.now = dirty.clock.timer
    dirty.gate.close()
    assert not dirty.on_disk


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
    # Once: it does not try again and again.  After the last flush, the flag is set for the next opening.
    assert log == ["truncate", "flush", "clear", "flush", "set"][: n + (n == 4)]
    assert dirty.on_disk
    assert [thread.name for thread in threading.enumerate()].count("need-check") == 1
    with dirty.gate:
        assert dirty.take_log() == ([] if n < 3 else ["set", "flush"])
    dirty.gate.close()
    assert dirty.on_disk is (n != 3)
    assert len(errors) == 1
