"""A flush that an exception of a signal ends, at every point where one may come: nobody hangs or is told a lie."""

from __future__ import annotations

import dis
import random
from types import CodeType

import pytest
from crash.schedule import Scheduler
from support.bytecodes import before_each

from qedcore.errors import StorageError
from qedcore.storage import flush
from qedcore.storage.flush import GroupCommit


class Interrupt(BaseException):
    """What a signal's handler raises."""


class Interrupter:
    """Raises Interrupt at the n-th point of a thread where the interpreter looks for signals: calls and entries."""

    def __init__(self, n: int) -> None:
        self.left = n
        self._last = ""
        self._code: CodeType | None = None

    def __call__(self, code: CodeType, position: int) -> None:
        if self.left and (self._last.startswith(("CALL", "RESUME")) or code is not self._code):
            self.left -= 1
            if not self.left:
                raise Interrupt
        self._code, self._last = code, dis.opname[code.co_code[position]]


class Run:
    """Four threads flush, one of which is interrupted; then another one does."""

    def __init__(self, point: int, seed: int, fails: int) -> None:
        self._started = 0  # syncs
        self._succeeded: set[int] = set()  # their numbers
        self._fails = fails  # number of the sync that does
        self.interrupter = Interrupter(point)
        self._scheduler = Scheduler(random.Random(seed))
        with self._scheduler.locks():
            self._commit = GroupCommit(self._sync)
            self._scheduler.run([self._interrupted, self._flush, self._flush, self._flush])
            self._scheduler.run([self._flush])

    def _sync(self) -> None:
        self._started += 1
        number = self._started
        self._scheduler.pause()
        assert number == self._started, "two syncs at once"
        if number == self._fails:
            raise StorageError("broken")
        self._succeeded.add(number)

    def _flush(self) -> None:
        started = self._started
        try:
            self._commit.flush()
        except StorageError:
            return
        assert self._succeeded and max(self._succeeded) > started, "told that it is durable"
        assert not self._fails or min(self._succeeded) < self._fails or started >= self._fails

    def _interrupted(self) -> None:
        try:
            with before_each(flush.__file__, self.interrupter):
                self._flush()
        except Interrupt:
            pass


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_interrupted_anywhere(fails: int) -> None:
    for seed in range(20):
        point = 0
        left = 0
        while not left:
            point += 1
            left = Run(point, seed, fails).interrupter.left
        assert point > 5, "hardly interrupted"
