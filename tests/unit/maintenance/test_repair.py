"""Scan and repair: every kind of damage, interrupted anywhere, with and without numpy; and random damage."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.crashes import World
from support.patterns import GiB, KiB, MiB
from support.qed_image import F_NEED_CHECK, Built, Geometry, ImageSpec, QedFile, assert_sound, build, read_header

from qedcore.check.cluster_use import READ
from qedcore.check.scan import Damage, Scan, ScanResult
from qedcore.errors import ImageFormatError, QEDError, StorageError
from qedcore.format.geometry import mark_dangling
from qedcore.format.header import read_header as read_qed_header
from qedcore.maintenance.repair import Outcome, Repair
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.file import FileStorage
from qedcore.storage.overlay import Rehearsal
from unit.fakes import CHANGES, Call, FailAt, MemoryStorage, Tap

Image = Callable[..., Built]
HAS_NUMPY = importlib.util.find_spec("numpy") is not None
VECTORS = [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_NUMPY, reason="numpy is not installed"))]
DAMAGED_IMAGES = int(os.environ.get("QED_TEST_DAMAGED", "60"))  # how many random ones
CS = 4 * KiB
SMALL = {"cluster_size": CS, "table_size": 2}
E = Geometry(CS, 2).entries  # 1024: one L2 table maps 4 MiB
TWO: dict[str, Any] = {
    **SMALL,
    "size": 3 * E * CS,
    "layout": {0: "data", 1: "data", 5: "zero", 9: "data", E: "data", E + 1: "data"},
}


SOUND: dict[str, dict[str, Any]] = {
    "empty": {},
    "data": {**SMALL, "layout": "DD-ZZD"},
    "two tables": TWO,
    "reversed": {**TWO, "reverse": True, "l1_last": True},
    "header of 3": {**TWO, "header_size": 3},
    "no header area": {**TWO, "header_size": 0},
    "dirty": {**TWO, "features": F_NEED_CHECK},
    "default geometry": {"size": 8 * GiB, "layout": {0: "data", 32767: "data", 32768: "data", 100000: "zero"}},
    "slices": {"cluster_size": MiB, "table_size": 2, "size": 1 << 40, "layout": {0: "data", 131072: "data"}},
}


# name -> (spec, corruptions, leaks, guest clusters that may read anything afterwards)
DAMAGED: dict[str, tuple[dict[str, Any], int, int, Sequence[int]]] = {
    "leaks": ({**TWO, "leaks": 3}, 0, 3, ()),
    "leaks before the tables": ({**TWO, "reverse": True, "l1_last": True, "entries": {E: 0}}, 0, 1, [E]),
    "leaks between": ({**TWO, "entries": {1: 0, 9: 0}}, 0, 2, [1, 9]),
    "past the end": ({**TWO, "entries": {2: lambda b: b.end, 3: lambda b: b.end + CS}}, 2, 0, [2, 3]),
    "past the end, and shared": (
        {**TWO, "entries": {2: lambda b: b.end, 3: lambda b: b.offsets[0], E + 7: lambda b: b.end}},
        3,
        0,
        [2, E + 7],
    ),
    "misaligned, cluster free": ({**TWO, "entries": {9: lambda b: b.offsets[9] + 512}}, 1, 1, ()),
    "misaligned, cluster in use": ({**TWO, "entries": {2: lambda b: b.offsets[9] + 8}}, 1, 0, [2]),
    "in the header": ({**TWO, "entries": {2: 2}}, 1, 0, [2]),
    "two of a cluster": ({**TWO, "entries": {3: lambda b: b.offsets[0], E + 3: lambda b: b.offsets[0]}}, 2, 0, ()),
    "data in the L1 table": ({**TWO, "entries": {3: CS}}, 1, 0, [3]),
    "data in another table": ({**TWO, "entries": {3: lambda b: b.l2_offsets[1] + CS}}, 1, 0, [3]),
    "data in its own table": ({**TWO, "entries": {3: lambda b: b.l2_offsets[0]}}, 1, 0, [3]),
    "data in a table with damage": (
        {**TWO, "entries": {3: lambda b: b.l2_offsets[1], E + 2: 7, E + 3: lambda b: b.end}},
        3,
        0,
        [3, E + 2, E + 3],
    ),
    "table twice": ({**TWO, "l1_entries": {2: lambda b: b.l2_offsets[0]}}, 2, 0, range(2 * E, 3 * E)),
    "table twice, past the end": ({**TWO, "l1_entries": {7: lambda b: b.l2_offsets[0]}}, 2, 0, ()),
    "tables overlap": ({**TWO, "l1_entries": {2: lambda b: b.l2_offsets[0] + CS}}, 2, 0, range(2 * E, 3 * E)),
    "table on data": ({**TWO, "l1_entries": {2: lambda b: b.offsets[0]}}, -1, 0, range(2 * E, 3 * E)),
    "table past the end": ({**TWO, "l1_entries": {2: lambda b: b.end}}, 1, 0, range(2 * E, 3 * E)),
    "table misaligned": ({**TWO, "l1_entries": {1: lambda b: b.l2_offsets[1] + 8}}, 1, 4, ()),
    "marked": (
        {**TWO, "entries": {2: lambda b: mark_dangling(b.offsets[9]), 9: 0, E + 5: lambda b: mark_dangling(b.end)}},
        2,
        1,
        [2, 9, E + 5],
    ),
    "marked by an older version": ({**TWO, "entries": {2: lambda b: b.offsets[9] | 1, 9: 0}}, 1, 1, [9]),
    "table marked": ({**TWO, "l1_entries": {2: lambda b: mark_dangling(b.end)}}, 1, 0, range(2 * E, 3 * E)),
    "two low bits": ({**TWO, "entries": {9: lambda b: b.offsets[9] + 0x300}}, 1, 1, [9]),
    "a low bit each of two that mean the same": (
        {**TWO, "entries": {2: lambda b: b.offsets[9] + 64, 9: 0, 1000: lambda b: b.offsets[9] + 512}},
        2,
        1,
        [2, 9, 1000],
    ),
    "a low bit in a sector with more damage": (
        {**TWO, "entries": {9: lambda b: b.offsets[9] + 512, 11: 0x123456789ABCDE}},
        2,
        1,
        [9, 11],
    ),
    "several": (
        {
            **TWO,
            "leaks": 2,
            "features": F_NEED_CHECK,
            "entries": {2: 7, 3: lambda b: b.end, 4: lambda b: b.offsets[9], E + 9: lambda b: b.offsets[0]},
            "l1_entries": {2: lambda b: b.l2_offsets[1]},
        },
        6,
        2,
        [2, 3, *range(2 * E, 3 * E)],
    ),
}


HEADERS: dict[str, dict[str, int]] = {
    "cluster_size invalid": {"cluster_size": 5000},
    "cluster_size too large": {"cluster_size": 64 * KiB},
    "table_size invalid": {"table_size": 3},
    "table_size too large": {"table_size": 8},
    "both sizes": {"cluster_size": 1, "table_size": 99},
    "header_size": {"header_size": 1 << 20},
    "l1_table_offset unaligned": {"l1_table_offset": 77},
    "l1_table_offset wrong": {"l1_table_offset": 9 * 16 * KiB},
    "image_size unaligned": {"image_size": 8 * MiB + 4},
    "image_size too large": {"image_size": 8 * MiB + (1 << 60)},
}


def scan(storage: Storage, vectors: bool | None = None) -> tuple[ScanResult, list[str], bytes]:
    """What is found, in words, and the map."""
    header, geometry, bounds = read_qed_header(storage)
    damage: list[Damage] = []
    target = Scan(storage, geometry, bounds, header.l1_table_offset, report=damage.append, vectors=vectors)
    result = target.run()
    return result, [str(d) for d in damage], bytes(byte & ~READ for byte in target.use.map[: target.use.clusters])


def repair(storage: Storage, everything: bool = True, **options: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    return Repair(storage, say=said.append, **options).run(everything), said


def repair_file(path: Path, everything: bool = True, **options: Any) -> tuple[Outcome, list[str]]:
    storage = FileStorage(path, writable=True)
    try:
        return repair(storage, everything, **options)
    finally:
        storage.close()


def guest(path: Path, built: Built, without: Sequence[int] = ()) -> dict[int, bytes]:
    """Guest cluster -> bytes, of those that are mapped, and some neighbours."""
    cs = built.spec.cluster_size
    wanted = {n for cluster in built.kinds for n in (cluster, cluster + 1)}.difference(without)
    with QedFile(path) as file:
        return {n: file.read(n * cs, cs) for n in wanted if (n + 1) * cs <= built.spec.size}


def expected(built: Built, without: Sequence[int] = ()) -> dict[int, bytes]:
    cs = built.spec.cluster_size
    wanted = {n for cluster in built.kinds for n in (cluster, cluster + 1)}.difference(without)
    return {n: built.read(n * cs, cs) for n in wanted if (n + 1) * cs <= built.spec.size}


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("name", SOUND)
def test_sound(image: Image, name: str, vectors: bool) -> None:
    built = image(**SOUND[name])
    found, said, _ = scan(FileStorage(built.path, False), vectors)
    oracle = assert_sound(built.path, leaks=None, need_check=name == "dirty")
    assert found.clean and not said
    assert found.allocated == oracle.allocated
    assert found.tables == oracle.tables
    assert found.end == built.end
    last = max(built.kinds, default=-1)
    assert found.mapped_end == (last + 1) * built.spec.cluster_size


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_counted(image: Image, name: str, vectors: bool) -> None:
    spec, corruptions, leaks, _ = DAMAGED[name]
    built = image(**spec)
    before = built.path.read_bytes()
    found, said, used = scan(FileStorage(built.path, False), vectors)
    assert found.corruptions == corruptions or (corruptions < 0 and found.corruptions > 0)
    assert found.leaks == leaks or (leaks < 0 and found.leaks > 0)
    assert bool(said) is bool(corruptions)
    assert (found, said, used) == scan(FileStorage(built.path, False), None)
    assert built.path.read_bytes() == before


def test_holes_are_not_read(image: Image) -> None:
    """The largest geometry: tables of 1 GiB, nearly all of them holes."""
    built = image(cluster_size=64 * MiB, table_size=16, size=1 << 50, layout={0: "data", 5: "zero"})
    read: list[int] = []

    def note(call: Call) -> None:
        read.append(call.length)

    tap = Tap(FileStorage(built.path, False), note)
    tap.next_data = tap.inner.next_data  # type: ignore[attr-defined]
    found, _, _ = scan(tap)
    assert found.clean and found.allocated == 1
    assert sum(read) <= 8 * MiB and max(read) <= MiB


def test_unreadable_table_is_an_error_of_the_check(image: Image) -> None:
    built = image(**TWO)

    def hook(call: Call) -> None:
        if call.name == "pread" and call.offset == built.l2_offsets[1]:
            raise StorageError("injected", OSError(errno.EIO, "no"))

    found, _, _ = scan(Tap(FileStorage(built.path, False), hook))
    assert (found.check_errors, found.corruptions, found.leaks) == (1, 0, 0)
    assert found.error is not None and found.error.errno == errno.EIO
    before = built.path.read_bytes()
    outcome, _ = repair(Tap(FileStorage(built.path, True), hook))
    assert outcome.last.check_errors == 1
    assert built.path.read_bytes() == before


@pytest.mark.parametrize("name", SOUND)
def test_sound_images_are_left_alone(image: Image, name: str) -> None:
    built = image(**SOUND[name])
    before = built.path.read_bytes() if built.end < 64 * MiB else b""
    outcome, said = repair_file(built.path)
    assert not said and not outcome.corruptions_fixed and not outcome.leaks_fixed
    if name == "dirty":
        assert outcome.need_check_cleared
        assert_sound(built.path)
    elif before:
        assert built.path.read_bytes() == before


@pytest.mark.parametrize("name", DAMAGED)
def test_repair(image: Image, name: str) -> None:
    spec, corruptions, _, anything = DAMAGED[name]
    built = image(**spec)
    outcome, said = repair_file(built.path)
    report = assert_sound(built.path)
    assert not report.leaks
    assert guest(built.path, built, anything) == expected(built, anything)
    assert outcome.corruptions_fixed == outcome.first.corruptions
    assert bool(said) is bool(corruptions)
    once = built.path.read_bytes()
    assert repair_file(built.path)[1] == []
    assert built.path.read_bytes() == once


LOST: dict[str, dict[str, Any]] = {
    "one place for a table": {**TWO, "l1_entries": {1: 77}},  # which may be an old one
    "two places for a table": {**TWO, "l1_entries": {1: 77, 2: 99}},
    "a place for two tables": {**TWO, "layout": {0: "data", E: "data", 2 * E: "data"}, "l1_entries": {1: 77, 2: 0}},
    "and the file grows": {
        **TWO,
        "entries": {3: lambda b: b.offsets[0]},
        "l1_entries": {1: lambda b: b.end, 2: lambda b: b.end + CS},
    },
}


@pytest.mark.parametrize("name", LOST)
def test_table_without_a_certain_place_is_kept(image: Image, name: str) -> None:
    """Its data can still be salvaged afterwards; --force gives it up."""
    built = image(**LOST[name])
    lost = {n: (offset, built.read(n * CS, CS)) for n, offset in built.offsets.items() if n >= E}
    tables = {offset: None for index, offset in built.l2_offsets.items() if index}
    before = built.path.read_bytes()
    for offset in tables:
        tables[offset] = before[offset : offset + 2 * CS]
    for _ in range(2):
        outcome, said = repair_file(built.path)
        assert outcome.last.corruptions and outcome.last.leaks and not outcome.leaks_fixed
        assert sum("nothing proves its place" in line for line in said) == 1
        after = built.path.read_bytes()
        assert all(after[offset : offset + CS] == data for offset, data in lost.values())
        assert all(after[offset : offset + 2 * CS] == table for offset, table in tables.items())
        with QedFile(built.path) as file:
            assert file.read(0, CS) == built.read(0, CS)
            assert not any(file.l1[index] % CS == 0 and file.l1[index] >= CS for index in (1, 2) if index in file.l1)
    outcome, said = repair_file(built.path, force=True)
    assert outcome.last.clean
    assert not assert_sound(built.path).leaks


# name -> damage to an L1 entry that is valid, but behind which a table is hidden
HIDDEN: dict[str, dict[str, Any]] = {
    "on another and on data": {**TWO, "l1_entries": {0: lambda b: b.l2_offsets[1] - CS}},
    "twice": {**TWO, "l1_entries": {1: lambda b: b.l2_offsets[0]}},
    "on data": {**TWO, "l1_entries": {1: lambda b: b.offsets[0]}},
    "in no order": {**TWO, "layout": {0: "data", E + 1: "data", E + 7: "data"}, "reverse": True}
    | {"l1_entries": {1: lambda b: b.l2_offsets[0]}},
    "L1 table": {**TWO, "l1_entries": {1: CS}},
    "L1 table, nothing hidden": {**TWO, "l1_entries": {2: CS}},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_table_that_another_hides_is_kept(image: Image, name: str) -> None:
    built = image(**HIDDEN[name])
    before = built.path.read_bytes()
    outcome, said = repair_file(built.path)
    assert outcome.last.corruptions and len([line for line in said if "tables are left alone" in line]) == 1
    assert built.path.read_bytes() == before
    outcome, said = repair_file(built.path, force=True)
    assert outcome.last.clean
    assert_sound(built.path)


def test_table_that_lost_its_place_to_a_leak_is_kept(image: Image) -> None:
    """The L1 entry leads to an old table in a leak, whose data are another range's by now: they are copied."""
    built = image(**TWO, leaks=2)
    with built.path.open("r+b") as f:
        f.seek(built.end - 2 * CS)
        f.write(struct.pack("<Q", built.offsets[1]))
        f.truncate(built.end)
        f.seek(built.l1_offset + 8)
        f.write(struct.pack("<Q", built.end - 2 * CS))
    table = built.path.read_bytes()[built.l2_offsets[1] :][: 2 * CS]
    outcome, said = repair_file(built.path)
    assert not outcome.last.corruptions and outcome.last.leaks == 4 and len(said) == 2
    assert built.path.read_bytes()[built.l2_offsets[1] :][: 2 * CS] == table
    with QedFile(built.path) as file:
        assert file.read(E * CS, CS) == file.read(CS, CS) == built.read(CS, CS)
    repair_file(built.path, everything=False)
    assert not assert_sound(built.path).leaks


def test_each_range_keeps_its_bytes(image: Image) -> None:
    """Two tables' worth of shared clusters are copied, not given to one of the two."""
    built = image(**{**TWO, "l1_entries": {2: lambda b: b.l2_offsets[0]}, "entries": {3: lambda b: b.offsets[9]}})
    repair_file(built.path)
    with QedFile(built.path) as file:
        for cluster in (0, 1, 5, 9):
            assert file.read((2 * E + cluster) * CS, CS) == built.read(cluster * CS, CS)
        assert file.read(3 * CS, CS) == built.read(9 * CS, CS)


@pytest.mark.parametrize("name", DAMAGED)
def test_leaks_only(image: Image, name: str) -> None:
    """-r leaks gives leaks back, but never where an entry is damaged, and never rewrites one (B11)."""
    spec, corruptions, leaks, _ = DAMAGED[name]
    built = image(**spec)
    before = built.path.read_bytes()
    outcome, _ = repair_file(built.path, everything=False)
    if corruptions:
        assert built.path.read_bytes() == before
        assert not outcome.leaks_fixed
    else:
        assert outcome.leaks_fixed == leaks
        assert not assert_sound(built.path).leaks
        assert built.path.stat().st_size == len(before) - leaks * CS
        assert guest(built.path, built, DAMAGED[name][3]) == expected(built, DAMAGED[name][3])


@pytest.mark.parametrize("name", HEADERS)
def test_header_is_proven_by_the_tables(image: Image, name: str) -> None:
    spec = {"cluster_size": 16 * KiB, "table_size": 4, "size": 8 * MiB, "layout": "DDDD-DZDDDDD"}
    right = image("right.qed", **spec)
    built = image(**spec, header=HEADERS[name])
    outcome, said = repair_file(built.path)
    assert built.path.read_bytes() == right.path.read_bytes()
    assert outcome.corruptions_fixed >= 1
    assert [line for line in said if next(iter(HEADERS[name])) in line]


@pytest.mark.parametrize("name", ["table_size too large", "l1_table_offset wrong"])
def test_wrong_header_is_not_believed(image: Image, name: str) -> None:
    """With these, much of the file looks unused: giving that back would be the end of it."""
    built = image(cluster_size=16 * KiB, table_size=4, size=8 * MiB, layout="DDDD", header=HEADERS[name])
    before = built.path.read_bytes()
    with pytest.raises(ImageFormatError, match=HEADERS[name].copy().popitem()[0]):
        repair_file(built.path, everything=False)
    assert built.path.read_bytes() == before


def behind_tables(content: str) -> dict[str, Any]:
    """A sound image that looks like one with tables twice as long: behind each lie leaks, a table's worth."""
    # Clusters 1, 2: L1; 3, 4: leaks; 5: data; 6, 7: L2; 8, 9: leaks; 10: data; 11, 12: L2; 13 to 17: leaks.
    old = struct.pack("<3Q", 15 * CS, 16 * CS, 17 * CS).ljust(CS, b"\0")
    contents = {
        "holes": [b"", b""],
        "zeros": [bytes(CS)] * 2,
        "old tables": [bytes(CS), old],
        "old table": [old, b""],
    }
    behind = iter([contents["zeros"], contents[content], contents["zeros" if content == "old tables" else content]])
    return {
        **SMALL,
        "size": 8 * E * CS,
        "layout": {0: "data", E: "data"},
        "litter": lambda what: next(behind) if what == "table" else [],
        "leaks": 3 if content.startswith("old") else 0,
    }


@pytest.mark.parametrize("content", ["holes", "zeros", "old tables", "old table"])
def test_header_of_a_sound_image_is_believed(image: Image, content: str) -> None:
    built = image(**behind_tables(content))
    assert built.l2_offsets == {0: 6 * CS, 1: 11 * CS}
    for everything in (False, True):
        image(**behind_tables(content))
        outcome, said = repair_file(built.path, everything)
        assert not said and outcome.leaks_fixed >= 6 and not outcome.corruptions_fixed
        assert (read_header(built.path)["table_size"], assert_sound(built.path).leaks) == (2, [])
        assert guest(built.path, built) == expected(built)


@pytest.mark.parametrize("content", ["holes", "zeros", "old table"])
def test_table_size_that_could_be_another_is_not_invented(image: Image, content: str) -> None:
    built = image(**behind_tables(content), header={"table_size": 3})
    before = built.path.read_bytes()
    with pytest.raises(ImageFormatError, match="table size is invalid"):
        repair_file(built.path)
    assert built.path.read_bytes() == before


def test_image_size_with_several_wrong_bits_is_not_invented(image: Image) -> None:
    built = image(**TWO, header={"image_size": 3 * E * CS + 3})
    with pytest.raises(ImageFormatError, match="image size is invalid"):
        repair_file(built.path)


def test_header_that_fits_badly_is_not_believed(image: Image) -> None:
    """A stray L1 entry speaks against the true header; with the other one, nearly all entries are wrong."""
    built = image(
        **SMALL,
        size=E * CS,
        layout=dict.fromkeys((2, 472, 788, 1023), "data"),
        reverse=True,
        l1_entries={1: lambda b: b.offsets[472]},
        entries={472: lambda b: b.offsets[1023]},
        header={"table_size": 156},
    )
    before = built.path.read_bytes()
    with pytest.raises(ImageFormatError):
        repair_file(built.path)
    assert built.path.read_bytes() == before


def test_header_that_nothing_proves(image: Image) -> None:
    built = image(header={"cluster_size": 9})  # no data at all
    before = built.path.read_bytes()
    with pytest.raises(ImageFormatError, match="cluster size is invalid"):
        repair_file(built.path)
    assert built.path.read_bytes() == before


def test_old_data_of_the_backing_file_is_announced(image: Image, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * (16 * CS))
    built = image(**SMALL, size=16 * CS, layout="DD", entries={3: 5, 500: 6}, backing="base", no_probe=True)
    _, said = repair_file(built.path)
    assert len(said) == 2
    assert "backing file reappears at guest range 0x3000..0x4000" in said[0]
    assert "reappears" not in said[1]  # past the end of the device


def test_autoclear_features_are_cleared(image: Image) -> None:
    built = image(**TWO, autoclear_features=5)
    repair_file(built.path)
    assert read_header(built.path)["autoclear_features"] == 0


@pytest.mark.parametrize("name", [*DAMAGED, *HEADERS])
def test_dry_run(image: Image, name: str) -> None:
    """A rehearsal changes nothing, and says what the repair then does."""
    if name in HEADERS:
        built = image(cluster_size=16 * KiB, table_size=4, size=8 * MiB, layout="DDDD", header=HEADERS[name])
    else:
        built = image(**DAMAGED[name][0])
    before = built.path.read_bytes()
    storage = FileStorage(built.path, writable=False)
    outcome, said = repair(Rehearsal(storage), rehearse=True)
    storage.close()
    assert built.path.read_bytes() == before
    done, really = repair_file(built.path)
    assert [line for line in said if "leaked clusters:" not in line] == really
    assert outcome.corruptions_fixed == done.corruptions_fixed
    assert outcome.leaks_fixed == done.leaks_fixed


class Interrupted:
    """An image whose repair was interrupted, and what must hold for it."""

    def __init__(self, image: Image, directory: Path, name: str) -> None:
        if name in HEADERS:
            anything: Sequence[int] = ()
            self.built = image(cluster_size=16 * KiB, table_size=4, size=8 * MiB, layout="DDDD", header=HEADERS[name])
        else:
            anything = DAMAGED[name][3]
            self.built = image(**DAMAGED[name][0])
        self.start = self.built.path.read_bytes()
        self._anything = anything
        self._path = directory / "after.qed"
        self._path.write_bytes(self.start)
        self._readable = readable(self._path, self.built) if name in DAMAGED else set()
        repair_file(self._path)
        self._size = self._path.stat().st_size
        self._intact = expected(self.built, anything)
        want = guest(self._path, self.built)
        assert {cluster: want[cluster] for cluster in self._intact} == self._intact
        # There, an entry for a cluster past the end cannot be cleared in place: the grown file may have that cluster.
        self._may_grow = name == "data in a table with damage"

    def check(self, content: bytes, when: object) -> None:
        """Nothing intact is lost, and a second repair ends as the first one does."""
        self._path.write_bytes(content)
        assert readable(self._path, self.built) >= self._readable, when
        if content[16:17] != self.start[16:17]:  # NEED_CHECK was cleared: all the rest is durable
            assert_sound(self._path)
        again = MemoryStorage(content)
        repair(again)
        self._path.write_bytes(again.data)
        assert not assert_sound(self._path).leaks, when
        assert guest(self._path, self.built, self._anything) == self._intact, when
        assert self._may_grow or self._path.stat().st_size == self._size, when


@pytest.mark.parametrize("name", [*DAMAGED, "l1_table_offset wrong"])
def test_error_anywhere(image: Image, tmp_path: Path, name: str) -> None:
    interrupted = Interrupted(image, tmp_path, name)
    for n in range(1, 200):
        storage = MemoryStorage(interrupted.start)
        fault = FailAt(n, CHANGES)
        with suppress(QEDError):
            repair(Tap(storage, fault))
        if fault.hit is None:
            break
        interrupted.check(bytes(storage.data), (n, fault.hit))
    assert n > 1


@pytest.mark.parametrize("name", [*DAMAGED, "l1_table_offset wrong"])
def test_crash_anywhere(image: Image, tmp_path: Path, rng: random.Random, name: str) -> None:
    interrupted = Interrupted(image, tmp_path, name)
    world = World(files={"image": interrupted.start})
    repair(world.open("image", True, CacheMode()))
    states = list(world.crash_states(rng, subsets=2))
    assert states
    for state in rng.sample(states, min(len(states), 60)):
        interrupted.check(bytes(state.files["image"]), state.name)


def readable(path: Path, built: Built) -> set[int]:
    """Guest clusters that read as they should, in an image that may be damaged."""
    cs = built.spec.cluster_size
    good = set()
    with QedFile(path) as file:
        for cluster, data in expected(built).items():
            with suppress(OSError):
                if file.read(cluster * cs, cs) == data:
                    good.add(cluster)
    return good


class Wreck:
    """A random image, randomly damaged.  `hurt`: guest clusters whose mapping or data was hit."""

    def __init__(self, rng: random.Random, path: Path) -> None:
        self._rng = rng
        self.geometry = Geometry(rng.choice([4 * KiB, 4 * KiB, 16 * KiB, 64 * KiB]), rng.choice([2, 2, 4]))
        self._entries = self.geometry.entries
        self._tables = rng.randint(1, 3)
        layout = {}
        for index in range(self._tables):
            for _ in range(rng.randint(1, 12)):
                slot = rng.choice([0, 1, 2, 3, self._entries - 1, rng.randrange(self._entries)])
                layout[index * self._entries + slot] = rng.choice(["data", "data", "data", "zero", "-"])
        spec = ImageSpec(
            size=self._tables * self.geometry.l2_span,
            cluster_size=self.geometry.cluster_size,
            table_size=self.geometry.table_size,
            layout=layout,
            l1_last=rng.random() < 0.3,
            reverse=rng.random() < 0.3,
            header_size=rng.choice([1, 1, 2]),
            leaks=rng.choice([0, 0, 1, 5]),
            features=rng.choice([0, F_NEED_CHECK]),
        )
        self.built = build(path, spec)
        self.hurt: set[int] = set()
        self.header_hurt = False
        self.raw = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            rng.choice([self._entry, self._entry, self._l1_entry, self._header, self._sector, self._cut])()
        path.write_bytes(self.raw)

    def _value(self) -> int:
        rng, built, cs = self._rng, self.built, self.geometry.cluster_size
        return rng.choice(
            [
                rng.getrandbits(64),
                2,
                rng.choice([*built.offsets.values(), cs]),
                rng.choice([*built.l2_offsets.values()]),
                built.end + cs * rng.randrange(5),
                built.l1_offset,
                rng.randrange(0, built.end, cs),
                rng.randrange(0, built.end, 512),
            ]
        )

    def _entry(self) -> None:
        cluster = self._rng.choice([*self.built.kinds, self._rng.randrange(self._tables * self._entries)])
        index, slot = divmod(cluster, self._entries)
        struct.pack_into("<Q", self.raw, self.built.l2_offsets[index] + slot * 8, self._value())
        self.hurt.add(cluster)

    def _l1_entry(self) -> None:
        index = self._rng.randrange(self._tables + 1)
        struct.pack_into("<Q", self.raw, self.built.l1_offset + index * 8, self._value())
        self.hurt.update(range(index * self._entries, (index + 1) * self._entries))

    def _header(self) -> None:
        self.raw[self._rng.choice([*range(4, 16), *range(40, 56)])] = self._rng.randrange(256)
        self.header_hurt = True

    def _sector(self) -> None:
        index, slot = self._rng.randrange(self._tables), self._rng.randrange(0, self._entries, 64)
        at = self.built.l2_offsets[index] + slot * 8
        noise = bytes(self._rng.getrandbits(8) for _ in range(512))
        self.raw[at : at + 512] = self._rng.choice([noise, b"\xff" * 512, bytes(512)])
        self.hurt.update(range(index * self._entries + slot, index * self._entries + slot + 64))

    def _cut(self) -> None:
        length = len(self.raw) - self._rng.randrange(1, 3 * self.geometry.cluster_size)
        tables = [self.built.l1_offset, *self.built.l2_offsets.values()]
        if length >= max(tables) + self.geometry.table_bytes:
            del self.raw[length:]
            cs = self.geometry.cluster_size
            self.hurt.update(cluster for cluster, at in self.built.offsets.items() if at + cs > length)


@pytest.mark.parametrize("number", range(DAMAGED_IMAGES))
def test_random_damage(tmp_path: Path, seed: str, number: int) -> None:
    """No crash, no hang, nothing lost that was intact, and the result is clean; or nothing was changed."""
    path = tmp_path / "a.qed"
    wreck = Wreck(random.Random(seed), path)
    try:
        _, said = repair_file(path, vectors=bool(number % 2) and HAS_NUMPY)
        if any("give it up with --force" in line or "left alone: -r leaks" in line for line in said):
            repair_file(path, force=True)
    except QEDError as error:
        assert wreck.header_hurt or "uncertain" in str(error)
        assert path.read_bytes() == wreck.raw
        return
    with QedFile(path) as file:
        assert file.geometry == wreck.geometry or wreck.hurt.issuperset(wreck.built.offsets)
        opens = file.geometry.qemu_opens
        # A wrong size of the device cannot be told from a right one, if it is possible: no data is lost by it.
        past_end = [n for n in wreck.built.kinds if (n + 2) * file.geometry.cluster_size > file.size]
    assert not assert_sound(path).leaks
    if opens and shutil.which("qemu-img"):
        qemu.assert_check_clean(path)
    without = [*wreck.hurt, *past_end, *(n + 1 for n in past_end)]
    assert guest(path, wreck.built, without) == expected(wreck.built, without)
