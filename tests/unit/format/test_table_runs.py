"""Runs of table entries: Runs against one entry after the other."""

from __future__ import annotations

import random
from itertools import groupby

import pytest
from support.patterns import KiB, MiB

from qedcore.format.geometry import Bounds, Geometry
from qedcore.format.table import Table, contiguous, empty
from qedcore.format.table_runs import K_NOTHING, K_ZERO, FollowingRuns, Runs, kinds, runs_of_kinds, runs_of_two

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


def kind_of(entry: int, bounds: Bounds) -> int:
    """As kinds(), for one entry; -1 if it is wrong."""
    if entry < 2:
        return entry
    return 2 if bounds.valid_cluster(entry) else -1


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES, ids=lambda size: f"{size // KiB}K")
def test_kinds(cluster_size: int, rng: random.Random) -> None:
    """Every entry is what it is by itself, and one that is wrong in one bit is never called anything."""
    geometry = Geometry(cluster_size, 1)
    for end in (5 << 26, 1 << 40, 1 << 62):
        bounds = Bounds(geometry, 1, end)
        for length in LENGTHS:
            table: Table = empty(length)
            for i in range(length):
                table[i] = rng.choice((0, 0, 1, rng.randrange(1, end // cluster_size) * cluster_size))
            expected = bytes(kind_of(entry, bounds) for entry in table)
            assert kinds(table, bounds) == expected
            two = expected.replace(K_NOTHING, K_ZERO)
            for found, runs in ((expected, runs_of_kinds(expected)), (two, runs_of_two(two))):
                assert runs == [bytes(run) for _, run in groupby(found)]
            for bit in range(64 if length < 100 else 0):
                wrong = rng.randrange(length)
                before = table[wrong]
                table[wrong] ^= 1 << bit
                now = [kind_of(entry, bounds) for entry in table]
                assert kinds(table, bounds) == (None if -1 in now else bytes(now)), f"{table[wrong]:#x}"
                table[wrong] = before


def test_kinds_behind_a_large_header_area() -> None:
    """Clusters inside it are wrong, and not looked for here."""
    assert kinds(empty(4), Bounds(Geometry(64 * KiB, 1), 2, MiB)) is None
