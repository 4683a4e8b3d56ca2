"""Ranges of blocks that are being written: who waits for whom."""

from __future__ import annotations

import pytest

from qedcore.storage.ranges import BusyRanges
from unit.fakes import Gate, Job, Waits


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        ((0, 8, False), (0, 8, False), False),  # neither reads first: the system orders them
        ((0, 8, True), (4, 12, False), True),
        ((0, 8, False), (4, 12, True), True),
        ((0, 8, True), (0, 8, True), True),
        ((0, 8, True), (8, 16, True), False),  # neighbours
        ((8, 16, True), (0, 8, True), False),
        ((0, 16, True), (4, 5, False), True),
    ],
)
def test_who_waits(first: tuple[int, int, bool], second: tuple[int, int, bool], waits: bool) -> None:
    busy = BusyRanges()
    waiting = Waits(busy._cond)
    gate = Gate()

    def work() -> None:
        with busy.hold(*second):
            gate.stop()

    with busy.hold(*first):
        other = Job(work)
        if waits:
            waiting.come()
            gate.avoided()
        else:
            gate.reached()
    if waits:
        gate.reached()
    gate.open()
    other.result()
    assert not busy._busy


def test_a_failed_write_leaves_nothing() -> None:
    busy = BusyRanges()
    with pytest.raises(OSError), busy.hold(0, 8, True):
        raise OSError
    with busy.hold(0, 8, True):
        pass
