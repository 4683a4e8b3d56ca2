"""Runs of table entries: Runs against one entry after the other."""

from __future__ import annotations

import random

import pytest
from support.patterns import KiB, MiB

from qedcore.runs import FollowingRuns, Runs
from qedcore.table import contiguous, empty

CLUSTER_SIZES = [4 * KiB << n for n in range(15)]
LENGTHS = [1, 2, 31, 32, 33, 95, 96, 97, 511, 4096, 4097, 10000]


@pytest.mark.parametrize("kind", [Runs, FollowingRuns])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES, ids=lambda size: f"{size // KiB}K")
def test_a_run_ends_where_it_ends(kind: type[Runs], cluster_size: int, rng: random.Random) -> None:
    """Wherever the low bytes of the offsets run over, and wherever an entry is wrong in one bit."""
    runs = kind(cluster_size)
    assert cluster_size <= 64 * MiB
    for length in LENGTHS:
        for edge in (1 << 24, 1 << 32, 1 << 40, 1 << 56, rng.randrange(1 << 60)):
            first = max((edge // cluster_size - rng.randrange(length + 1)) * cluster_size, cluster_size)
            table = contiguous(first, length, cluster_size)
            assert runs.is_run(table, 0, length, first)
            assert runs.end_of_run(table, 0, length, first) == length
            wrong = rng.randrange(length)
            table[wrong] ^= 1 << rng.randrange(64)
            assert not runs.is_run(table, 0, length, first)
            for start in {0, wrong // 2, wrong}:
                value = first + start * cluster_size
                assert runs.end_of_run(table, start, length, value) == wrong
                assert runs.end_of_run(table, start, max(wrong - 1, start), value) == max(wrong - 1, start)


@pytest.mark.parametrize("value", [0, 1])
def test_equal_entries_end_where_they_end(value: int, rng: random.Random) -> None:
    runs = Runs(64 * KiB)
    for length in LENGTHS:
        table = empty(1)
        table[0] = value
        table *= length
        assert runs.end_of_same(table, 0, length, value) == length
        wrong = rng.randrange(length)
        table[wrong] ^= 1 << rng.randrange(64)
        for start in {0, wrong // 2, wrong}:
            assert runs.end_of_same(table, start, length, value) == wrong
