"""Writes beside other requests, and the short way of those that need one fresh cluster."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from support.patterns import GiB, KiB, MiB, assert_same, stamp
from support.qed_image import QedFile, assert_sound, raw_reader

import qedcore
from qedcore.errors import (
    StorageError,
)
from unit.engine.tapped import BASE, CS, FLUSH, GROW, SET, Image, Tapped, logged, stop_at
from unit.fakes import CHANGES, Call, FailAt, Gate, Interrupted, Job, Waits


@pytest.mark.parametrize("layout", ["", "D--", "DZZ"])
@pytest.mark.parametrize("backing", [0, MiB])
def test_two_writes_to_one_new_cluster(tapped: Tapped, layout: str, backing: int) -> None:
    """The second waits for the first, looks again, and writes in place."""
    gate, second_gate = Gate(), Gate()
    img, tap, built = tapped(backing=backing, layout=layout)
    before = img.pread(CS, CS)
    hook = stop_at(gate, lambda call: call.name.startswith("pwrite") and call.offset >= built.end)

    def either(call: Call) -> None:
        if call.offset >= built.end and call.name.startswith("pwrite") and second:
            second_gate.stop()
        hook(call)

    second: list[int] = []
    tap.hook = either
    jobs = [Job(img.pwrite, b"1" * 100, CS + 200)]
    gate.reached()
    second.append(1)
    jobs.append(Job(img.pwrite, b"2" * 100, CS + 900))
    second_gate.avoided()
    tap.hook = None
    second_gate.open(9)
    gate.open()
    for job in jobs:
        job.result()
    want = before[:200] + b"1" * 100 + before[300:900] + b"2" * 100 + before[1000:]
    assert_same(img.pread(CS, CS), want)
    img.close()
    assert_sound(built.path)
    with QedFile(built.path) as file:
        assert_same(file.read(CS, CS), want)


def test_tables_do_not_wait_for_each_other(tapped: Tapped) -> None:
    gate = Gate()
    img, tap, built = tapped(size=8 * GiB)
    tap.hook = stop_at(gate, lambda call: call.name.startswith("pwrite") and call.offset >= built.end)
    first = Job(img.pwrite, b"1" * 100, 200)
    gate.reached()
    Job(img.pwrite, b"2" * 100, 2 * GiB + 200).result()  # done while the first is stopped
    assert img.pread(100, 2 * GiB + 200) == b"2" * 100
    assert img.pread(100, 200) == bytes(100)
    gate.open()
    first.result()
    assert img.pread(100, 200) == b"1" * 100


@pytest.mark.parametrize("backing", [0, MiB])
@pytest.mark.parametrize("layout", ["", "D--", "DZZ"])
def test_nothing_is_seen_before_it_is_linked(tapped: Tapped, layout: str, backing: int) -> None:
    """I1: at every write of an allocating write, readers still see what was there before."""
    img, tap, built = tapped(backing=backing, layout=layout)
    before = img.pread(3 * CS, 0)
    gate = Gate()
    tap.hook = lambda call: gate.stop() if call.name in CHANGES else None
    job = Job(img.pwrite, b"1" * CS, CS)
    for _ in range(99):
        gate.reached()
        assert_same(Job(img.pread, 3 * CS, 0).result(), before)
        last = tap.log[-1]
        if last.length == 512 and last.offset in (built.l1_offset, built.l2_offsets.get(0)):
            break
        gate.open()
    gate.open()
    job.result()
    assert_same(img.pread(3 * CS, 0), before[:CS] + b"1" * CS + before[2 * CS :])
    tap.hook = None


def test_readers_and_writers_in_place_do_not_wait(tapped: Tapped) -> None:
    gate = Gate()
    img, tap, built = tapped(layout="DD--")
    tap.hook = stop_at(gate, lambda call: call.name.startswith("pwrite") and call.offset >= built.end)
    first = Job(img.pwrite, b"1" * 100, 2 * CS + 200)
    gate.reached()
    Job(img.pwrite, b"2" * 100, 5).result()
    assert Job(img.pread, 100, 5).result() == b"2" * 100
    Job(img.zero, CS, 100).result()
    Job(img.flush).result()
    gate.open()
    first.result()


@pytest.mark.parametrize("layout", ["D--", "DZZ"])
def test_one_fresh_cluster(tapped: Tapped, layout: str) -> None:
    """The flag, durable; then for each write its data, and its entry after it."""
    img, tap, built = tapped(layout=layout)
    table = ("pwrite", built.l2_offsets[0], 512)
    img.pwrite(b"1" * 700, CS + 100)
    assert logged(tap) == [SET, FLUSH, GROW, ("pwrite", built.end + 100, 700), table]
    img.pwrite(b"2" * CS, 2 * CS)
    assert logged(tap) == [("pwrite", built.end + CS, CS), table]
    assert img._gate.clear()
    tap.log.clear()
    img.pwrite(b"3" * 700, 3 * CS)  # and again in the next dirty period
    assert logged(tap) == [SET, FLUSH, GROW, ("pwrite", built.end + 2 * CS, 700), table]
    assert_same(
        img.pread(3 * CS, CS), bytes(100) + b"1" * 700 + bytes(CS - 800) + b"2" * CS + b"3" * 700 + bytes(CS - 700)
    )


def test_a_cluster_that_another_has_written_meanwhile(dirty: Tapped) -> None:
    """It had no data when the write first looked: it looks again, and writes in place."""
    img, _, _ = dirty(layout="D--")
    end = img._bounds.end
    img._gate.inside = Interrupted(lambda: Job(img.pwrite, b"2" * 100, CS + 900).result(), before=False)
    img.pwrite(b"1" * 100, CS + 200)
    assert img._bounds.end == end + CS
    assert_same(img.pread(CS, CS), bytes(200) + b"1" * 100 + bytes(600) + b"2" * 100 + bytes(CS - 1000))
    assert not img._gate.inside and not img._requests._claims.claimed


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_fresh_cluster_whose_data_failed_is_used_again(dirty: Tapped, late: bool) -> None:
    img, tap, built = dirty(layout="D--")
    end = img._bounds.end
    tap.hook = FailAt(1, ["pwrite"], errno.ENOSPC, late)
    with pytest.raises(StorageError):
        img.pwrite(b"old" * 300, CS + 100)
    assert not img._gate.inside and not img._requests._claims.claimed
    img.pwrite(b"new", 2 * CS + 500)
    assert img._bounds.end == end + CS
    assert_same(img.pread(2 * CS, CS), bytes(CS + 500) + b"new" + bytes(CS - 503))
    img.close()
    assert_sound(built.path)


def test_who_waits_for_a_fresh_cluster_goes_on(dirty: Tapped) -> None:
    img, tap, built = dirty(layout="D--")
    gate, waits = Gate(), Waits(img._requests._claims._given_up)
    tap.hook = stop_at(gate, lambda call: call.name == "pwrite" and call.offset >= built.end)
    jobs = [Job(img.pwrite, b"1" * 100, CS + 200)]
    gate.reached()
    jobs.append(Job(img.pwrite, b"2" * 100, CS + 900))
    waits.come()
    gate.open()
    for job in jobs:
        job.result()
    assert_same(img.pread(CS, CS), bytes(200) + b"1" * 100 + bytes(600) + b"2" * 100 + bytes(CS - 1000))
    assert not img._requests._claims.claimed


def test_entries_of_fresh_clusters_are_written_one_by_one(dirty: Tapped) -> None:
    """They share a sector: who writes it has the other's entry in it."""
    img, tap, built = dirty(layout="D--")
    first, second = Gate(), Gate()
    is_table = lambda call: call.offset == built.l2_offsets[0]  # noqa: E731
    tap.hook = stop_at(first, is_table)
    jobs = [Job(img.pwrite, b"1" * 100, CS)]
    first.reached()
    tap.hook = stop_at(second, is_table)
    jobs.append(Job(img.pwrite, b"2" * 100, 2 * CS))
    second.avoided()
    first.open()
    second.open()
    for job in jobs:
        job.result()
    img.close()
    with QedFile(built.path) as file:
        assert_same(file.read(CS, 2 * CS), b"1" * 100 + bytes(CS - 100) + b"2" * 100 + bytes(CS - 100))


def test_tables_of_fresh_clusters_stay_in_the_cache(image: Image) -> None:
    """One that is written to all the time is not the one that goes."""
    reach = 512 * 4 * KiB
    built = image(cluster_size=4 * KiB, table_size=1, size=3 * reach, layout={0: "data", 512: "zero", 1024: "zero"})
    with qedcore.open_image(built.path, l2_cache=0) as img:  # room for two
        img.pwrite(b"x", 100 * 4 * KiB)
        img.pread(1, reach)
        assert list(img._clusters.cache.slices) == [0, 1]
        img.pwrite(b"x", 101 * 4 * KiB)
        img.pread(1, 2 * reach)
        assert list(img._clusters.cache.slices) == [0, 2]


@pytest.mark.parametrize("layout", ["", "D--"], ids=["no table", "no cluster"])
def test_what_a_zero_overtook_is_used_again(tapped: Tapped, layout: str) -> None:
    """A write has filled its cluster from the backing file, which is hidden meanwhile: nothing leaks."""
    img, tap, built = tapped(layout=layout, backing=MiB)
    gate = Gate()
    tap.hook = stop_at(gate, lambda call: call.name in ("pwrite", "pwritev") and call.offset >= built.end)
    job = Job(img.pwrite, b"new", CS + 100)
    gate.reached()
    img.zero(CS, CS)
    gate.open()
    job.result()
    clusters = 1 if layout else 1 + built.spec.table_size
    assert img._bounds.end == built.end + clusters * CS
    assert_same(
        img.pread(3 * CS, 0),
        built.read(0, CS, raw_reader(Path(built.path).with_name("base.raw")))
        + bytes(100)
        + b"new"
        + bytes(CS - 103)
        + stamp(BASE, 2 * CS, CS),
    )
    img.close()
    assert_sound(built.path)
