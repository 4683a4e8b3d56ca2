"""GroupCommit: how many syncs, who waits for which, and that a failed one is never forgotten."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from qedcore.errors import StorageError, UnreachableError
from qedcore.storage import flush
from qedcore.storage.flush import GroupCommit
from unit.fakes import WAIT, Gate, Job


class Sync:
    """A sync that stops at a gate; `errors` are raised by the syncs of those numbers (from 1)."""

    def __init__(self, errors: dict[int, BaseException] | None = None) -> None:
        self.gate = Gate()
        self.errors = errors or {}
        self.count = 0
        self.running = 0

    def __call__(self) -> None:
        self.count += 1
        assert not self.running, "two syncs at once"
        self.running += 1
        number = self.count
        self.gate.stop()
        self.running -= 1
        if number in self.errors:
            raise self.errors[number]


class Waits:
    """Counts the flushes that wait: come(n) returns when n more do.

    `before` and `after` are called in the thread that waits.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._come = threading.Semaphore(0)
        self._before = before
        self._after = after
        made = ModuleType("threading")
        made.Lock = self._lock  # type: ignore[attr-defined]
        monkeypatch.setattr(flush, "threading", made)

    def _lock(self) -> Any:
        waits, lock = self, threading.Lock()

        class Counted:
            release = lock.release
            locked = lock.locked

            def acquire(self) -> None:
                if not lock.acquire(blocking=False):
                    waits._before()
                    waits._come.release()
                    lock.acquire()
                    waits._after()

        return Counted()

    def come(self, n: int = 1) -> None:
        for _ in range(n):
            assert self._come.acquire(timeout=WAIT), "nobody waits"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


def start(sync: Sync, waits: Waits, waiters: int) -> tuple[GroupCommit, list[Job]]:
    """A flush that is in its sync, and others that were asked for meanwhile."""
    commit = GroupCommit(sync)
    jobs = [Job(commit.flush)]
    sync.gate.reached()
    for _ in range(waiters):
        jobs.append(Job(commit.flush))
        waits.come()
    return commit, jobs


def failure(job: Job) -> StorageError:
    with pytest.raises(StorageError) as caught:
        job.result()
    return caught.value


def test_alone() -> None:
    calls: list[int] = []
    commit = GroupCommit(lambda: calls.append(1))
    for n in (1, 2, 3):  # one after the other: nothing to share
        commit.flush()
        assert len(calls) == n


@pytest.mark.parametrize("waiters", [1, 2, 7])
def test_one_sync_for_all_that_wait(waits: Waits, waiters: int) -> None:
    sync = Sync()
    _, jobs = start(sync, waits, waiters)
    sync.gate.open()
    jobs[0].result()
    sync.gate.reached()  # the second sync
    assert all(job.is_alive() for job in jobs[1:])
    sync.gate.open()
    for job in jobs:
        job.result()
    assert sync.count == 2


def test_flush_during_a_sync_waits_for_the_next(waits: Waits) -> None:
    """The running sync may have missed what was written before the later flush was asked for."""
    sync = Sync()
    commit, (a, b) = start(sync, waits, 1)
    sync.gate.open()
    a.result()
    sync.gate.reached()
    c = Job(commit.flush)  # during sync 2: not served by it
    waits.come()
    assert b.is_alive()
    sync.gate.open()
    b.result()
    sync.gate.reached()
    assert c.is_alive()
    sync.gate.open()
    c.result()
    assert sync.count == 3


def test_lock_is_free_during_the_sync(waits: Waits) -> None:
    sync = Sync()
    commit, (a,) = start(sync, waits, 0)
    with commit._lock:
        pass
    sync.gate.open()
    a.result()


@pytest.mark.parametrize("waiters", [0, 1, 5])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failure_is_sticky(waits: Waits, waiters: int, code: int) -> None:
    sync = Sync({1: StorageError("cannot flush x", OSError(code, "no"))})
    commit, jobs = start(sync, waits, waiters)
    sync.gate.open()
    errors = [failure(job) for job in jobs]
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            commit.flush()
        errors.append(caught.value)
    assert {error.errno for error in errors} == {code}
    assert all("cannot flush x" in str(error) for error in errors)
    assert len({id(error) for error in errors}) == len(errors)  # an exception belongs to one thread
    assert sync.count == 1  # a repeated sync that succeeds proves nothing


def test_failure_of_a_later_sync(waits: Waits) -> None:
    """Who was served by the first sync keeps its success, all others fail."""
    sync = Sync({2: StorageError("broken", code=errno.EIO)})
    commit, (a, b, c) = start(sync, waits, 2)
    sync.gate.open()
    a.result()
    sync.gate.reached()
    d = Job(commit.flush)
    waits.come()
    sync.gate.open()
    for job in (b, c, d):
        assert failure(job).errno == errno.EIO
    assert sync.count == 2


def test_unexpected_exception_is_nobodys_success(waits: Waits) -> None:
    """Whatever ends a sync early, those who waited for that sync were not served by it, nor is anybody later."""
    sync = Sync({2: RuntimeError("a bug")})
    commit, jobs = start(sync, waits, 2)
    sync.gate.open()
    jobs[0].result()
    sync.gate.reached()
    sync.gate.open()
    for job in jobs[1:]:
        job.join(WAIT)
    assert {type(job.error) for job in jobs[1:]} == {RuntimeError, StorageError}
    with pytest.raises(StorageError, match="did not end: RuntimeError"):
        commit.flush()
    assert sync.count == 2


class Interrupt(BaseException):
    """What a signal's handler raises."""


def once() -> Callable[[], None]:
    """Interrupts the first who calls it."""
    interrupts = [Interrupt()]

    def interrupt() -> None:
        if interrupts:
            raise interrupts.pop()

    return interrupt


def test_another_syncs_for_who_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    sync = Sync()
    commit, (a, b, c) = start(sync, Waits(monkeypatch, after=once()), 2)
    sync.gate.open()
    a.result()  # and one of the two was told to sync
    sync.gate.reached()
    sync.gate.open()
    b.join(WAIT)
    c.join(WAIT)
    assert {type(job.error) for job in (b, c)} == {Interrupt, type(None)}
    sync.gate.open()
    commit.flush()
    assert sync.count == 3


@pytest.mark.parametrize("others", [0, 1])
def test_who_was_interrupted_is_not_told_to_sync(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    sync = Sync()
    waits = Waits(monkeypatch, before=once())
    commit, (a,) = start(sync, waits, 0)
    with pytest.raises(Interrupt):
        commit.flush()
    jobs = [Job(commit.flush) for _ in range(others)]
    waits.come(others)
    sync.gate.open()
    a.result()
    sync.gate.open(2)
    for job in jobs:
        job.result()
    commit.flush()
    assert sync.count == 2 + others


def test_sync_that_does_not_begin_is_made_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    commit = GroupCommit(lambda: calls.append(1))
    make = flush._Batch
    fails = [MemoryError("out of memory")]

    def batch() -> Any:
        if fails:
            raise fails.pop()
        return make()

    monkeypatch.setattr(flush, "_Batch", batch)
    with pytest.raises(MemoryError):
        commit.flush()
    for n in (1, 2):
        Job(commit.flush).result()
        assert len(calls) == n


def test_unreachable_server_is_no_lost_write(waits: Waits) -> None:
    """Everybody who waited for that sync is told; the next one counts, until one fails for good."""
    sync = Sync({1: UnreachableError("away"), 3: UnreachableError("away again"), 4: StorageError("broken")})
    commit, jobs = start(sync, waits, 0)
    sync.gate.open()
    assert isinstance(failure(jobs[0]), UnreachableError)
    sync.gate.open()
    commit.flush()
    for text in ("away again", "broken", "broken"):
        sync.gate.open()
        with pytest.raises(StorageError, match=text):
            commit.flush()
    assert sync.count == 4


def test_lack_of_memory_is_no_lost_write(waits: Waits) -> None:
    """Those who waited for that sync are told; the next one counts."""
    sync = Sync({2: MemoryError("none left")})
    commit, jobs = start(sync, waits, 3)
    sync.gate.open()
    jobs[0].result()
    sync.gate.reached()
    sync.gate.open()
    for job in jobs[1:]:
        job.join(WAIT)
    assert [type(job.error) for job in jobs[1:]] == [MemoryError] * 3
    assert len({id(job.error) for job in jobs[1:]}) == 3
    sync.gate.open()
    commit.flush()
    assert sync.count == 3


def test_lack_of_memory_while_an_error_is_told_hides_no_lost_write() -> None:
    calls = []

    def sync() -> None:
        calls.append(1)
        try:
            raise OSError(errno.EIO, "no")
        except OSError:
            raise MemoryError from None

    commit = GroupCommit(sync)
    with pytest.raises(MemoryError):
        commit.flush()
    with pytest.raises(StorageError):
        commit.flush()
    assert len(calls) == 1
