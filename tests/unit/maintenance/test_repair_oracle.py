"""P8, with random images: what a read-only opening shows before a repair, it shows after it.

Sound images are full of what may be taken for damage, or for something lost: leaks of all kinds behind tables and
data, old tables among them whose data are leaks as well, holes, zeros, and guest data that looks like tables.
"""

from __future__ import annotations

import os
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest
from support.litter import littering
from support.patterns import KiB, stamp
from support.qed_image import (
    F_NEED_CHECK,
    FIELDS,
    Built,
    Geometry,
    ImageSpec,
    QedFile,
    assert_sound,
    build,
    read_header,
)

from qedcore.engine.chain import open_image
from qedcore.engine.raw import RawImage
from qedcore.errors import ImageFormatError, QEDError
from qedcore.format.geometry import mark_dangling
from qedcore.maintenance.repair import Repair
from qedcore.maintenance.salvage import GOOD, GUESSED, Salvage
from qedcore.storage.file import FileStorage

SOUND = int(os.environ.get("QED_TEST_SOUND", "15"))  # how many random images
DAMAGED = int(os.environ.get("QED_TEST_DAMAGED", "30"))
SHAPES = ((4 * KiB, 1), (4 * KiB, 2), (4 * KiB, 4), (8 * KiB, 1))

MOST = 8192  # clusters of a device that are looked at: a damaged size may be huge

View = dict[int, "bytes | None"]  # by guest cluster; None: unreadable


class Case:
    """A sound image, made from a seed."""

    def __init__(self, rng: random.Random, directory: Path) -> None:
        self.rng = rng
        self.path = directory / "image.qed"
        self.geometry = Geometry(*rng.choice(SHAPES))
        cs, entries = self.geometry.cluster_size, self.geometry.entries
        tables = rng.randint(1, 3 if self.geometry.entries < 2048 else 2)
        clusters = (tables - 1) * entries + rng.choice((entries // 2, entries))
        layout = {}
        for index in range(tables):
            first = index * entries
            density = rng.choice((0.0, 0.01, 0.3))
            for n in range(first, min(first + entries, clusters)):
                if rng.random() < density:
                    layout[n] = rng.choice(("data", "data", "zero", "-"))
            if rng.random() < 0.8:
                layout[min(first + rng.choice((0, entries // 2, entries - 1)), clusters - 1)] = "data"
        self.backing: bytes | None = None
        if rng.random() < 0.4:
            self.backing = stamp(77, 0, clusters * cs // rng.choice((1, 3)))
            (directory / "base").write_bytes(self.backing)
        self.built: Built = build(
            self.path,
            ImageSpec(
                size=clusters * cs - rng.choice((0, 512)),
                cluster_size=cs,
                table_size=self.geometry.table_size,
                layout=layout,
                header_size=rng.choice((1, 1, 1, 2)),
                l1_last=rng.random() < 0.3,
                reverse=rng.random() < 0.3,
                backing="base" if self.backing is not None else None,
                no_probe=True,
                features=rng.choice((0, 0, F_NEED_CHECK)),
                litter=littering(rng, cs, self.geometry.table_size) if rng.random() < 0.7 else lambda behind: (),
                leaks=rng.choice((0, 0, 1, 20)),
            ),
        )
        self._look_like_tables()
        self.truth = view(self.path)

    def _look_like_tables(self) -> None:
        """Put tables into leaks, whose data are leaks, and a nested image's tables and header into guest data."""
        cs, rng = self.geometry.cluster_size, self.rng
        with QedFile(self.path) as file:
            used = file.in_use()
        leaks = [n for n in range(self.built.end // cs) if n not in used]
        with self.path.open("r+b") as f:
            f.truncate(self.built.end)
            places = rng.sample(leaks, min(len(leaks), rng.choice((0, 1, 3))))
            for place in places:
                targets = sorted(rng.sample(leaks, rng.randint(1, len(leaks))))
                table = bytearray(cs)
                for slot, target in zip(rng.sample(range(cs // 8), min(len(targets), cs // 8)), targets):
                    struct.pack_into("<Q", table, slot * 8, target * cs)
                f.seek(place * cs)
                f.write(table)
            for offset in self.built.offsets.values():
                if rng.random() < 0.1:
                    f.seek(offset)
                    if rng.random() < 0.3:
                        f.write(struct.pack("<4I5Q2I", 0x444551, cs, 4, 1, 0, 0, 0, cs, 64 * cs, 0, 0))
                    else:
                        numbers = [*leaks, *range(2, 40)]
                        f.write(struct.pack("<64Q", *(rng.choice((0, rng.choice(numbers) * cs)) for _ in range(64))))

    def blank(self, cluster: int) -> bytes:
        """What the range of an entry that was cleared reads."""
        pos = cluster * self.geometry.cluster_size
        length = len(self.truth.get(cluster) or b"")
        return (self.backing or b"")[pos : pos + length].ljust(length, b"\0")


def view(path: Path) -> View:
    """What a read-only opening shows.  Raises QEDError if there is none."""
    shown: View = {}
    with open_image(path, writable=False) as image:
        cs = read_header(path)["cluster_size"]

        def read(first: int, n: int) -> None:
            pos, end = first * cs, min((first + n) * cs, image.size)
            try:
                data = bytes(image.pread(end - pos, pos))
                shown.update({first + i: data[i * cs : (i + 1) * cs] for i in range(-(-len(data) // cs))})
            except QEDError:
                if n == 1:
                    shown[first] = None
                else:
                    for cluster in range(first, -(-end // cs)):
                        read(cluster, 1)

        for cluster in range(0, min(-(-image.size // cs), MOST), 64):
            read(cluster, 64)
    return shown


def repair(path: Path, everything: bool, force: bool = False) -> list[str]:
    said: list[str] = []
    storage = FileStorage(path, writable=True)
    try:
        Repair(storage, say=said.append, force=force).run(everything)
    finally:
        storage.close()
    return said


def salvage(path: Path, out: Path) -> tuple[list[tuple[int, int, str, str]], bytes]:
    """(ranges, the raw file as far as it is looked at)."""
    out.write_bytes(b"")
    source, target = FileStorage(path, writable=False), FileStorage(out, writable=True)
    try:
        search = Salvage(source)
        found = search.search()
        target.truncate(found.image_size)
        ranges = search.write(found, RawImage(target, writable=True))
    finally:
        source.close()
        target.close()
    with out.open("rb") as f:
        return [tuple(piece) for piece in ranges], f.read(MOST * 8 * KiB)


@pytest.mark.parametrize("number", range(SOUND))
def test_sound(tmp_path: Path, rng: random.Random, number: int) -> None:
    """Nothing changes but leaks and NEED_CHECK: -r leaks, -r all, and what salvage finds."""
    case = Case(rng, tmp_path)
    header, content = read_header(case.path), case.path.read_bytes()
    ranges, raw = salvage(case.path, tmp_path / "out")
    assert len(raw) == case.built.spec.size and not any(why == GUESSED for *_, why in ranges)
    cs = case.geometry.cluster_size
    for cluster, shown in case.truth.items():
        assert shown is not None
        got = raw[cluster * cs :][: len(shown)]
        assert got == shown or (not any(got) and shown == case.blank(cluster)), cluster
    for everything in (False, True):
        case.path.write_bytes(content)
        said = repair(case.path, everything)
        assert not said
        assert view(case.path) == case.truth
        assert_sound(case.path)
        now = read_header(case.path)
        for name in FIELDS:
            moved = name == "l1_table_offset" and now[name] < header[name]  # to where a leak was
            assert moved or now[name] == header[name] & ~(F_NEED_CHECK if name == "features" else 0), name


class Damage:
    """Hits an image in one place or a few."""

    def __init__(self, case: Case) -> None:
        self._rng, self._case = case.rng, case
        self._raw = bytearray(case.path.read_bytes())
        self.said: list[str] = []
        kinds: list[Callable[[], None]] = [
            self._l2_entry,
            self._l2_entry,
            self._l1_entry,
            self._header,
            self._sector,
            self._swap,
        ]
        for _ in range(self._rng.choice((1, 1, 2, 3))):
            self._rng.choice(kinds)()
        if self._rng.random() < 0.1:
            del self._raw[len(self._raw) - self._rng.randrange(1, 3 * case.geometry.cluster_size) :]
            self.said.append("cut")
        case.path.write_bytes(self._raw)

    def _at(self, at: int, value: int) -> None:
        struct.pack_into("<Q", self._raw, at, value)
        self.said.append(f"{at:#x}: {value:#x}")

    def _value(self, before: int) -> int:
        rng, cs = self._rng, self._case.geometry.cluster_size
        return rng.choice(
            (
                before ^ 1 << rng.randrange(64),
                before ^ 1 << rng.randrange(12),
                before | rng.randrange(cs),
                before | 1,
                mark_dangling(before),
                rng.randrange(0, self._case.built.end, cs),
                rng.randrange(0, self._case.built.end, 512),
                self._case.built.end + rng.randrange(3) * cs,
                self._case.built.l1_offset,
                rng.choice([0, *self._case.built.l2_offsets.values()]),
                rng.choice([0, *self._case.built.offsets.values()]),
                rng.getrandbits(64),
            )
        )

    def _l2_entry(self) -> None:
        if self._case.built.kinds:
            index, slot = divmod(self._rng.choice([*self._case.built.kinds]), self._case.geometry.entries)
            at = self._case.built.l2_offsets[index] + slot * 8
            self._at(at, self._value(struct.unpack_from("<Q", self._raw, at)[0]))

    def _l1_entry(self) -> None:
        at = self._case.built.l1_offset + self._rng.randrange(4) * 8
        self._at(at, self._value(struct.unpack_from("<Q", self._raw, at)[0]))

    def _header(self) -> None:
        at = self._rng.choice([*range(16), *range(40, 64)])
        self._raw[at] = self._rng.choice((self._raw[at] ^ 1 << self._rng.randrange(8), self._rng.randrange(256)))
        self.said.append(f"header byte {at}: {self._raw[at]}")

    def _sector(self) -> None:
        built, rng = self._case.built, self._rng
        at = rng.choice([built.l1_offset, *built.l2_offsets.values()])
        at += rng.choice((0, rng.randrange(0, self._case.geometry.table_bytes, 512)))
        other = rng.randrange(0, built.end, 512)
        self._raw[at : at + 512] = rng.choice((rng.randbytes(512), bytes(512), self._raw[other : other + 512]))
        self.said.append(f"sector {at:#x}")

    def _swap(self) -> None:
        first, second = (self._case.built.l1_offset + self._rng.randrange(4) * 8 for _ in range(2))
        values = [struct.unpack_from("<Q", self._raw, at)[0] for at in (second, first)]
        self._at(first, values[0])
        self._at(second, values[1])


@pytest.mark.parametrize("number", range(DAMAGED))
def test_damaged(tmp_path: Path, rng: random.Random, number: int) -> None:
    """What was shown stays; what was not, becomes what it was before the damage, or is given up: nothing else."""
    case = Case(rng, tmp_path)
    damage = Damage(case)
    content = case.path.read_bytes()
    try:
        before = view(case.path)
        opened = True
    except QEDError:
        before, opened = dict.fromkeys(case.truth), False
    unguessed: View = {}
    with suppress(QEDError):
        ranges, raw = salvage(case.path, tmp_path / "out") if opened else ([], b"")
        size = read_header(case.path)["cluster_size"]
        for start, length, state, why in ranges:
            if state == GOOD and why != GUESSED:
                for cluster in range(-(-start // size), min((start + length) // size, MOST)):
                    if before.get(cluster) is not None:
                        unguessed[cluster] = raw[cluster * size : (cluster + 1) * size]
    assert all(data == before[cluster] for cluster, data in unguessed.items()), damage.said
    assert case.path.read_bytes() == content
    everything, force = rng.random() < 0.8, rng.random() < 0.3
    try:
        said = repair(case.path, everything, force and everything)
    except ImageFormatError:
        assert case.path.read_bytes() == content, damage.said
        return
    try:
        after = view(case.path)
    except QEDError:  # the backing file's name is damaged, too
        assert not opened, damage.said
        return
    why = [*damage.said, *said]
    for cluster, shown in before.items():
        now = after.get(cluster)
        if shown is not None:
            given_up = force and shown != case.truth.get(cluster)  # seen through damage to the L1 table
            assert now == shown or given_up, (cluster, why)
        elif now is not None and len(damage.said) == 1:  # else what was corrected may lead to more damage
            assert now in (case.truth.get(cluster), case.blank(cluster)), (cluster, why)
