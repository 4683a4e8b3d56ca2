"""Threads that take turns: one runs at a time, and a seed says who goes on wherever another may.

The engine's locks are replaced by ones that tell the scheduler when a thread waits, so a run is reproduced by its
seed, and a deadlock is found at once.  Others may go on at every call of a storage; and, with `share`, between any
two bytecodes of the engine, as real threads may: what takes no lock must bear that.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import CodeType, ModuleType
from typing import Any

import pytest
from support.bytecodes import before_each, stop

_ENGINE = "/qedcore/"  # in the path of each of its modules


class Deadlock(AssertionError):
    """Every thread waits for another."""


def _always() -> bool:
    return True


class _Task:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = _always
        self.over = False


class Scheduler:
    """Runs jobs in threads of their own, in an order that `rng` chooses.

    `share` is that of the engine's bytecodes before which others may go on.
    """

    def __init__(self, rng: random.Random, share: float = 0.0) -> None:
        self._rng = rng
        self._share = share
        self._tasks: list[_Task] = []
        self._current: _Task | None = None
        self._finished = threading.Semaphore(0)
        self._errors: list[BaseException] = []

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Returns when all have ended; raises the first error.  Jobs that wait for ever are left behind."""
        self._tasks = [_Task(job) for job in jobs]
        threads = [threading.Thread(target=self._run_task, args=(task,), daemon=True) for task in self._tasks]
        for thread in threads:
            thread.start()
        self._pass_on()
        self._finished.acquire()
        self._current = None
        for thread in threads:
            stop(thread.ident or 0)
        if self._errors:
            raise self._errors[0]

    def _run_task(self, task: _Task) -> None:
        task.turn.acquire()
        try:
            with before_each(_ENGINE, self._maybe_pause) if self._share else nullcontext():
                task.work()
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self._errors.append(error)
        task.over = True
        self._pass_on()

    def _maybe_pause(self, code: CodeType, position: int) -> None:
        if self._rng.random() < self._share:
            self.pause()

    def _pass_on(self) -> None:
        """Let somebody who can go on do so."""
        waiting = [task for task in self._tasks if not task.over]
        ready = [task for task in waiting if task.ready()]
        if not ready or self._errors:
            if waiting and not self._errors:
                self._errors.append(Deadlock(f"{len(waiting)} threads wait for each other"))
            self._finished.release()
            return
        self._current = self._rng.choice(ready)
        self._current.turn.release()

    def pause(self) -> None:
        """Others may go on here."""
        task = self._current
        if task is not None:
            self._pass_on()
            task.turn.acquire()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        task = self._current
        if condition():
            return
        if task is None:
            raise Deadlock("the only thread waits")
        task.ready = condition
        self.pause()
        task.ready = _always

    @contextmanager
    def locks(self) -> Iterator[None]:
        """The locks that the engine makes meanwhile are this scheduler's."""
        made = ModuleType("threading")
        made.__dict__.update(vars(threading))
        made.__dict__.update(
            Lock=lambda: _Lock(self), Condition=lambda lock: _Condition(self, lock), Event=lambda: _Event(self)
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith("qedcore.") and getattr(module, "threading", None) is threading:
                    patch.setattr(module, "threading", made)
            yield


class _Lock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking and self._held:
            return False
        self._scheduler.wait_until(lambda: not self._held)
        self._held = True
        return True

    def locked(self) -> bool:
        return self._held

    def release(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Condition:
    def __init__(self, scheduler: Scheduler, lock: Any) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._calls = 0  # of notify_all()
        self.acquire = lock.acquire
        self.release = lock.release

    def wait(self, timeout: float | None = None) -> bool:
        calls = self._calls
        self._lock.release()
        self._scheduler.wait_until(lambda: self._calls != calls)
        self._lock.acquire()
        return True

    def notify_all(self) -> None:
        self._calls += 1

    notify = notify_all  # a wait may end for no reason

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Event:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self) -> None:
        self._scheduler.wait_until(lambda: self._set)
