"""Block status: the runs of a range."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from support.patterns import GiB, KiB, MiB

import qedcore
from qedcore.errors import (
    StorageError,
)
from unit.engine.tapped import CS, Image, Tapped
from unit.fakes import FailAt, Gate, Job, extents


@pytest.mark.parametrize("backing", [0, 3 * CS + 5, MiB])
def test_extents(tapped: Tapped, rng: random.Random, backing: int) -> None:
    layout = "".join(rng.choice("DZ-") for _ in range(20))
    size = 20 * CS - 512
    img, tap, built = tapped(layout=layout, size=size, backing=backing)

    def kind(pos: int) -> str:
        here = built.kinds[pos // CS]
        return "FOUND" if here == "data" or (here == "-" and pos < backing) else "ZERO"

    for _ in range(100):
        pos = rng.randrange(size)
        length = rng.randrange(1, size - pos + 1)
        at = pos
        previous = None
        for n, found in extents(img, pos, length):
            assert n > 0 and found != previous  # neighbours of one kind are joined
            for probe in {at, at + n - 1, at + n // 2}:
                assert found == kind(probe), (pos, length, probe)
            at += n
            previous = found
        assert at == pos + length
    assert tap.log == []


@pytest.mark.parametrize("backing", [0, 40 * CS + 5])
def test_extents_after_every_change(tapped: Tapped, rng: random.Random, backing: int) -> None:
    """What was remembered of a table does not outlive a change of it, nor a failure after which it is read again."""
    clusters = 3000
    img, tap, _ = tapped(layout="D" * 40, size=clusters * CS, backing=backing)
    for turn in range(60):
        first = rng.choice([0, 15, 40, 100, 1000])
        change = [
            lambda: img.pwrite(b"x" * CS, first * CS),  # noqa: B023
            lambda: img.trim(first * CS, (clusters - first) * CS),  # noqa: B023
            lambda: img.zero(first * CS, 50 * CS, may_trim=True),  # noqa: B023
        ][turn % 3]
        if turn % 4 == 3:
            tap.hook = FailAt(rng.choice([1, 2]), ["pwrite"], late=True)
        try:
            change()
        except StorageError:
            pass
        tap.hook = None
        at = 0
        for n, kind in extents(img, 0, img.size):
            for cluster in range(at // CS, (at + n) // CS):
                here = img.lookup(cluster * CS, CS)[0].name
                data = here == "FOUND" or (here != "ZERO" and cluster * CS < backing)
                assert data == (kind == "FOUND") or cluster == backing // CS, (turn, cluster)
            at += n
        assert at == img.size


def test_extents_beside_a_write(tapped: Tapped, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen of a table before it changed is not remembered after."""
    img, _, _ = tapped(layout="-", size=GiB)
    gate = Gate()
    look = img._requests._extents._few_runs

    def slow(start: int) -> Any:
        runs = look(start)
        gate.stop()
        return runs

    monkeypatch.setattr(img._requests._extents, "_few_runs", slow)
    job = Job(img.extents, 0, GiB)
    gate.reached()
    monkeypatch.undo()
    img.pwrite(b"x", 100 * CS)
    gate.open()
    job.result()
    assert extents(img, 0, GiB) == [
        (100 * CS, "ZERO"),
        (CS, "FOUND"),
        (GiB - 101 * CS, "ZERO"),
    ]


@pytest.mark.parametrize("backing", [0, 30 * MiB])
def test_extents_of_long_runs(image: Image, tmp_path: Path, rng: random.Random, backing: int) -> None:
    """Runs of all lengths in many tables, and gaps of many tables, against one cluster after the other."""
    entries, tables = 2048, 80
    reach = entries * 4 * KiB
    size = tables * reach - 512
    base = tmp_path / "base.raw"
    base.write_bytes(b"\1" * backing)  # a hole would not be data
    path = image(
        cluster_size=4 * KiB, table_size=4, size=size, backing=str(base) if backing else None, features=4
    ).path
    start = path.stat().st_size
    present = [*rng.sample(range(4), 2), *rng.sample(range(45, tables), 12), tables - 1]  # a gap of 41 tables
    data = start + len(present) * 16 * KiB
    guest = [0] * (tables * entries)  # the entry of each guest cluster
    for number in present:
        at = number * entries
        while at < (number + 1) * entries:
            n = min(rng.choice([1, 2, 31, 32, 33, 34, 64, 95, 500, entries]), (number + 1) * entries - at)
            kind = rng.randrange(3)
            first = data + rng.randrange(1 << 14) * 4 * KiB
            guest[at : at + n] = [kind] * n if kind < 2 else range(first, first + n * 4 * KiB, 4 * KiB)
            at += n
    with path.open("r+b") as file:
        file.truncate(data + (1 << 26) + entries * 4 * KiB)
        for i, number in enumerate(present):
            file.seek(4 * KiB + number * 8)
            file.write(struct.pack("<Q", start + i * 16 * KiB))
            file.seek(start + i * 16 * KiB)
            file.write(struct.pack(f"<{entries}Q", *guest[number * entries : (number + 1) * entries]))

    def has_data(cluster: int) -> bool:
        return guest[cluster] > 1 or (guest[cluster] == 0 and cluster * 4 * KiB < backing)

    with qedcore.open_image(path) as img:
        edges = [number * reach for number in present] + [4 * reach, 45 * reach, backing, size]
        for _ in range(100):
            pos = min(max(rng.choice(edges) + rng.randrange(-40, 40) * rng.choice([1, 512, 4096]), 0), size - 1)
            length = min(rng.choice([1, 4096, 33 * 4096, reach, 3 * reach, size]), size - pos)
            want: list[tuple[int, bool]] = []
            at = pos
            while at < pos + length:
                n = min(4096 - at % 4096, pos + length - at)
                at += n
                here = has_data((at - 1) // 4096)
                if want and want[-1][1] is here:
                    n += want.pop()[0]
                want.append((n, here))
            assert [(n, kind == "FOUND") for n, kind in extents(img, pos, length)] == want, (pos, length)
            assert [(n, kind == "FOUND") for n, kind in extents(img, pos, length, one=True)] == want[:1]
            kind, offset, n = img.lookup(pos, length)
            cluster, entry = pos // 4096, guest[pos // 4096]
            last = cluster + 1
            end = min(-(-(pos + length) // 4096), (cluster // entries + 1) * entries)
            while last < end and guest[last] == (entry + (last - cluster) * 4096 if entry > 1 else entry):
                last += 1
            assert n == min(last * 4096 - pos, length)
            assert offset == (entry + pos % 4096 if entry > 1 else 0)
