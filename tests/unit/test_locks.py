"""Ranked locks: wrong orders raise, and locks per key come and go."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qedcore import locks
from qedcore.locks import KeyedLocks, LockOrderError, Rank, RankedLock, ranked_condition, ranked_lock
from unit.fakes import WAIT, Gate, Job, Waits

ROOT = Path(__file__).resolve().parents[2]


def test_tests_run_with_checks() -> None:
    assert isinstance(ranked_lock(Rank.L1), RankedLock)


@pytest.mark.parametrize(("value", "checked"), [("1", True), ("0", False), ("", False)])
def test_checks_are_asked_for_by_the_environment(value: str, checked: bool) -> None:
    code = "from qedcore.locks import *; print(type(ranked_lock(Rank.L1)) is RankedLock)"
    env = {**os.environ, "QEDCORE_CHECK_LOCKS": value, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(checked)


@pytest.mark.parametrize(("held", "wanted"), itertools.product(Rank, Rank), ids=lambda rank: rank.name)
def test_order(held: Rank, wanted: Rank) -> None:
    """Rising only: not even two of one rank."""
    with ranked_lock(held):
        lock = ranked_lock(wanted)
        if wanted > held:
            with lock:
                pass
        else:
            with pytest.raises(LockOrderError, match=f"{wanted.name} taken while holding.*{held.name}"):
                lock.acquire()
    with lock:  # neither lock nor thread remembers the failure
        pass


def test_order_is_that_of_all_locks_held() -> None:
    with ranked_lock(Rank.GATE), ranked_lock(Rank.HEADER):
        with pytest.raises(LockOrderError):
            ranked_lock(Rank.L1).acquire()


def test_release_in_any_order() -> None:
    low, high = ranked_lock(Rank.L1), ranked_lock(Rank.CACHE)
    low.acquire()
    high.acquire()
    low.release()
    with pytest.raises(LockOrderError):
        ranked_lock(Rank.HEADER).acquire()
    high.release()
    with ranked_lock(Rank.LIFECYCLE):
        pass


def test_threads_do_not_count_each_others_locks() -> None:
    with ranked_lock(Rank.CACHE):
        Job(lambda: ranked_lock(Rank.L1).acquire()).result()


def test_lock_that_was_not_got_is_not_held() -> None:
    lock = ranked_lock(Rank.CACHE)
    with lock:

        def other() -> None:
            assert not lock.acquire(blocking=False)
            with ranked_lock(Rank.L1):
                pass

        Job(other).result()


def test_exception_releases() -> None:
    lock = ranked_lock(Rank.L1)
    with pytest.raises(ZeroDivisionError):
        with lock:
            raise ZeroDivisionError
    with lock:
        pass


def test_condition() -> None:
    """A condition gives its lock away while it waits, and has it again afterwards."""
    cond = ranked_condition(Rank.GATE)
    waits = Waits(cond)
    ready = []

    def wait() -> None:
        with cond:
            while not ready:
                cond.wait()
            with pytest.raises(LockOrderError):
                ranked_lock(Rank.GATE).acquire()

    job = Job(wait)
    waits.come()
    with cond:  # free while the other waits
        ready.append(1)
        cond.notify_all()
    job.result()
    with pytest.raises(RuntimeError):
        cond.notify_all()  # not held


# KeyedLocks


def test_one_holder_per_key() -> None:
    keyed = KeyedLocks(Rank.L2_TABLE)
    gate = Gate()

    def work() -> None:
        with keyed.hold(7):
            gate.stop()

    jobs = [Job(work) for _ in range(3)]
    for _ in jobs:
        gate.reached()
        gate.avoided()  # by the others, while one is inside
        gate.open()
    for job in jobs:
        job.result()


def test_keys_do_not_wait_for_each_other() -> None:
    keyed = KeyedLocks(Rank.L2_TABLE)
    meet = threading.Barrier(5)

    def work(key: int) -> None:
        with keyed.hold(key):
            meet.wait(WAIT)  # breaks unless all are inside at once

    for job in [Job(work, key) for key in (0, 1, 2, 3, 1 << 40)]:
        job.result()


def test_all_who_are_first_get_the_same_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that both find no lock for a key make one each: all but one are dropped."""
    meet = threading.Barrier(4)

    def slow(rank: Rank) -> RankedLock:
        meet.wait(WAIT)  # everybody has found none
        return RankedLock(rank)

    monkeypatch.setattr(locks, "ranked_lock", slow)
    keyed = KeyedLocks(Rank.L2_TABLE)
    jobs = [Job(keyed.hold, 1) for _ in range(4)]
    assert len({id(job.result()) for job in jobs}) == 1


def test_keyed_locks_have_a_rank() -> None:
    keyed = KeyedLocks(Rank.L2_TABLE)
    with ranked_lock(Rank.L1), pytest.raises(LockOrderError):
        with keyed.hold(1):
            pass
    with keyed.hold(1), pytest.raises(LockOrderError):
        with keyed.hold(2):  # a request never holds two L2 locks
            pass


def test_a_ranked_lock_tells_whether_it_is_held() -> None:
    """threading.Condition of CPython 3.14 wants a lock that can say so."""
    lock = RankedLock(Rank.L1)
    assert lock.locked() is False
    with lock:
        assert lock.locked() is True
    assert lock.locked() is False
