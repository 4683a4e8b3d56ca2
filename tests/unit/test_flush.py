"""GroupCommit: how many syncs, who waits for which, and that a failed one is never forgotten."""

from __future__ import annotations

import errno

import pytest
from fakes import Gate, Job, Waits

from qedcore.errors import StorageError, UnreachableError
from qedcore.storage.flush import GroupCommit


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


def start(sync: Sync, waiters: int) -> tuple[GroupCommit, Waits, list[Job]]:
    """A flush that is in its sync, and others that were asked for meanwhile."""
    commit = GroupCommit(sync)
    waits = Waits(commit._cond)
    jobs = [Job(commit.flush)]
    sync.gate.reached()
    for _ in range(waiters):
        jobs.append(Job(commit.flush))
        waits.come()
    return commit, waits, jobs


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
def test_one_sync_for_all_that_wait(waiters: int) -> None:
    sync = Sync()
    _, _, jobs = start(sync, waiters)
    sync.gate.open()
    jobs[0].result()
    sync.gate.reached()  # the second sync
    assert all(job.is_alive() for job in jobs[1:])
    sync.gate.open()
    for job in jobs:
        job.result()
    assert sync.count == 2


def test_flush_during_a_sync_waits_for_the_next() -> None:
    """The running sync may have missed what was written before the later flush was asked for."""
    sync = Sync()
    commit, waits, (a, b) = start(sync, 1)
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


def test_lock_is_free_during_the_sync() -> None:
    sync = Sync()
    commit, _, (a,) = start(sync, 0)
    with commit._cond:
        pass
    sync.gate.open()
    a.result()


@pytest.mark.parametrize("waiters", [0, 1, 5])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failure_is_sticky(waiters: int, code: int) -> None:
    sync = Sync({1: StorageError("cannot flush x", OSError(code, "no"))})
    commit, _, jobs = start(sync, waiters)
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


def test_failure_of_a_later_sync() -> None:
    """Who was served by the first sync keeps its success, all others fail."""
    sync = Sync({2: StorageError("broken", code=errno.EIO)})
    commit, waits, (a, b, c) = start(sync, 2)
    sync.gate.open()
    a.result()
    sync.gate.reached()
    d = Job(commit.flush)
    waits.come()
    sync.gate.open()
    for job in (b, c, d):
        assert failure(job).errno == errno.EIO
    assert sync.count == 2


def test_unexpected_exception_is_nobodys_success() -> None:
    """Whatever ends a sync early, those who waited for that sync were not served by it."""
    sync = Sync({2: MemoryError("out of memory")})
    _, _, jobs = start(sync, 2)
    sync.gate.open()
    jobs[0].result()
    sync.gate.reached()
    sync.gate.open(2)  # room for a third sync, if the one that is left tries itself
    for job in jobs[1:]:
        job.join(20)
    failed = [job for job in jobs[1:] if job.error is not None]
    assert isinstance(failed[0].error, (MemoryError, StorageError))
    assert len(failed) == 2 or sync.count == 3


def test_unreachable_server_is_no_lost_write() -> None:
    """Everybody who waited for that sync is told; the next one counts, until one fails for good."""
    sync = Sync({1: UnreachableError("away"), 3: UnreachableError("away again"), 4: StorageError("broken")})
    commit, waits, jobs = start(sync, 0)
    sync.gate.open()
    assert isinstance(failure(jobs[0]), UnreachableError)
    sync.gate.open()
    commit.flush()
    for text in ("away again", "broken", "broken"):
        sync.gate.open()
        with pytest.raises(StorageError, match=text):
            commit.flush()
    assert sync.count == 4
