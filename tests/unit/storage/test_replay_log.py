"""ReplayLog against an array of bytes: the newest version of each byte, and no more memory than it says."""

from __future__ import annotations

import random

import pytest
from support.patterns import KiB, MiB

from qedcore.storage.replay_log import PIECE_BYTES, ReplayLog

Model = dict[int, int]  # offset of a byte -> its newest value


def contents(log: ReplayLog) -> Model:
    """What is in the log; no byte is there twice."""
    found: Model = {}
    end = 0
    for piece in log:
        assert piece.offset >= end and piece.length > 0
        end = piece.end
        assert piece.data is None or len(piece.data) == piece.length <= PIECE_BYTES
        found.update(zip(range(piece.offset, end), piece.data or bytes(piece.length)))
    return found


@pytest.mark.parametrize("n", range(20))
def test_newest_version_of_each_byte(seed: str, n: int) -> None:
    """Writes and zeros that overlap in every way, and flushes that others overtake."""
    rng = random.Random(f"{seed}{n}")
    log, model, flushes = ReplayLog(), Model(), list[tuple[int, Model]]()
    for _ in range(200):
        offset, length = rng.randrange(100), rng.randrange(1, 40)
        kind = rng.random()
        if kind < 0.7:
            data = rng.randbytes(length)
            log.add(offset, length, data)
            model.update(zip(range(offset, offset + length), data))
            covered = range(offset, offset + length)
        elif kind < 0.8:
            log.add(offset, length, None)
            model.update(dict.fromkeys(range(offset, offset + length), 0))
            covered = range(offset, offset + length)
        elif kind < 0.9:
            flushes.append((log.begin_flush(), dict(model)))
            continue
        else:
            covered = range(0)
            if flushes:
                epoch, before = flushes.pop()
                log.flushed(epoch)
                for at in before:
                    model.pop(at, None)
        # What was written again is not covered by a flush that had begun before.
        for _, before in flushes:
            for at in covered:
                before.pop(at, None)
        flushes = [(epoch, {at: v for at, v in before.items() if at in model}) for epoch, before in flushes]
        assert contents(log) == model
        start = rng.randrange(140)
        assert log.overlaps(start, 10) == any(at in model for at in range(start, start + 10))
    log.flushed(log.begin_flush())
    assert not list(log) and log.cost == 0


def test_memory_of_what_is_left_of_large_writes() -> None:
    """Each replaces all but a byte of the one before: no more is kept than what is left."""
    log = ReplayLog()
    for i in range(50):
        log.add(i, 2 * MiB, bytes([i + 1]) * (2 * MiB))
    assert sum(len(piece.data or b"") for piece in log) == 2 * MiB + 49
    assert 2 * MiB + 49 < log.cost < 2 * MiB + 16 * KiB
    assert [piece.data for piece in log][:2] == [b"\1", b"\2"]


def test_large_zeros_are_one_piece() -> None:
    log = ReplayLog()
    log.add(0, 32 * MiB, None)
    log.add(MiB, 10, b"x" * 10)
    assert [(p.offset, p.length, p.data is None) for p in log] == [
        (0, MiB, True),
        (MiB, 10, False),
        (MiB + 10, 31 * MiB - 10, True),
    ]
    assert log.cost < KiB
