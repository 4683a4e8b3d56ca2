"""The scan of all tables, and the repair after a crash, on images of the independent builder."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.patterns import GiB, KiB, MiB, assert_same
from support.qed_image import F_NEED_CHECK, Built, QedFile, assert_sound

import qedcore
from qedcore.check.cluster_use import DATA, METADATA, SHARED, ClusterUse
from qedcore.check.scan import Damage, Scan, ScanResult
from qedcore.errors import QEDError
from qedcore.format.header import read_header
from qedcore.storage.file import FileStorage
from unit.fakes import CHANGES, FailAt, open_tapped

Image = Callable[..., Built]


def scan(path: Path) -> tuple[ScanResult, list[Damage]]:
    """What is found, and the damage in the order of guest positions."""
    damage: list[Damage] = []
    storage = FileStorage(path, writable=False)
    try:
        header, geometry, bounds = read_header(storage)
        target = Scan(storage, geometry, bounds, header.l1_table_offset, report=damage.append, vectors=False)
        return target.run(), sorted(damage, key=lambda found: found.pos)
    finally:
        storage.close()


CS = 64 * KiB
REACH = 2 * GiB  # of one L2 table at the default geometry

SOUND: dict[str, dict[str, Any]] = {
    "empty": {},
    "data": {"layout": "DDD"},
    "mixed": {"layout": "D-ZZ-DD"},
    "reversed": {"layout": "DDDD", "reverse": True},
    "several tables": {"size": 8 * GiB, "layout": {0: "data", 32767: "data", 32768: "data", 100000: "zero"}},
    "L1 last": {"layout": "DD", "l1_last": True},
    "header of 3": {"layout": "D", "header_size": 3},
    "table of 1": {"cluster_size": 4096, "table_size": 1, "layout": {0: "data", 511: "data", 512: "data"}},
    "past the end of the device": {"size": 2 * CS, "layout": "DDDD"},
    "leaks": {"layout": "D", "leaks": 3},
    "several slices": {
        "cluster_size": MiB,
        "table_size": 2,
        "size": 1 << 40,
        "layout": {0: "data", 131071: "data", 131072: "zero", 200000: "data"},
    },
}


@pytest.mark.parametrize("name", SOUND)
def test_sound(image: Image, name: str) -> None:
    built = image(**SOUND[name])
    found, damage = scan(built.path)
    oracle = assert_sound(built.path, leaks=None)
    assert not damage and not found.corruptions
    assert found.allocated == oracle.allocated == len(built.offsets)
    assert found.leaks == len(oracle.leaks)
    assert found.end == built.end - built.spec.leaks * built.spec.cluster_size


# layout options -> data clusters that do not follow the one before
FRAGMENTED = (
    ({"layout": "DDD"}, 0),
    ({"layout": "D--D"}, 0),
    ({"layout": "DDDD", "reverse": True}, 3),
    ({"layout": "D-Z", "leaks": 3, "entries": {3: lambda b: b.end - CS}}, 1),
)


@pytest.mark.parametrize(("changes", "count"), FRAGMENTED)
def test_fragmented(image: Image, changes: dict[str, Any], count: int) -> None:
    assert scan(image(**changes).path)[0].fragmented == count


@dataclass(frozen=True)
class Bad:
    """A damaged entry that the scan must find: guest position, table and kind."""

    table: str
    pos: int
    kind: str  # "crash" (past the end), "shared" or "wild"


def kind_of(damage: Any) -> str:
    return "shared" if damage.shared else "crash" if damage.past_end else "wild"


# name -> (spec, damage in the order of guest positions)
DAMAGED: dict[str, tuple[dict[str, Any], list[Bad]]] = {
    "L2 at the end": ({"layout": "D", "entries": {1: lambda b: b.end}}, [Bad("L2", CS, "crash")]),
    "L2 far past the end": ({"layout": "D", "entries": {7: 1 << 40}}, [Bad("L2", 7 * CS, "crash")]),
    "L2 at 2**64 - 1 cluster": ({"entries": {0: 2**64 - CS}}, [Bad("L2", 0, "crash")]),
    "L2 unaligned": ({"layout": "D", "entries": {1: 6 * CS + 512}}, [Bad("L2", CS, "wild")]),
    "L2 unaligned past the end": ({"entries": {1: (1 << 40) + 1}}, [Bad("L2", CS, "wild")]),
    "L2 is 2": ({"entries": {0: 2}}, [Bad("L2", 0, "wild")]),
    "L2 in the header": ({"header_size": 2, "entries": {0: CS}}, [Bad("L2", 0, "wild")]),
    "L2 in the L1 table": ({"entries": {0: 4 * CS}}, [Bad("L2", 0, "shared")]),
    "L2 in its own table": ({"entries": {0: lambda b: b.l2_offsets[0] + CS}}, [Bad("L2", 0, "shared")]),
    "two L2 on one cluster": ({"layout": "D", "entries": {9: lambda b: b.offsets[0]}}, [Bad("L2", 9 * CS, "shared")]),
    "last entry of a table": (
        {"size": 4 * GiB, "layout": {32768: "data"}, "entries": {32767: lambda b: b.end}},
        [Bad("L2", REACH - CS, "crash")],
    ),
    "past the end of the device": (
        {"size": 2 * CS, "layout": "D", "entries": {30000: lambda b: b.offsets[0], 30001: 3}},
        [Bad("L2", 30000 * CS, "shared"), Bad("L2", 30001 * CS, "wild")],
    ),
    "L1 at the end": ({"size": 4 * GiB, "l1_entries": {1: lambda b: b.end}}, [Bad("L1", REACH, "crash")]),
    "L1 straddles the end": (
        {"size": 4 * GiB, "leaks": 3, "l1_entries": {1: lambda b: b.end - 3 * CS}},
        [Bad("L1", REACH, "crash")],
    ),
    "L1 ends with the file": ({"size": 4 * GiB, "leaks": 4, "l1_entries": {1: lambda b: b.end - 4 * CS}}, []),
    "L1 at 2**64 - 1 table": ({"l1_entries": {0: 2**64 - 4 * CS}}, [Bad("L1", 0, "crash")]),
    "L1 is 1": ({"layout": "", "l1_entries": {0: 1}}, [Bad("L1", 0, "wild")]),
    "L1 unaligned": ({"layout": "D", "l1_entries": {1: 6 * CS + 8}}, [Bad("L1", REACH, "wild")]),
    "L1 in the header": ({"header_size": 2, "l1_entries": {5: CS}}, [Bad("L1", 5 * REACH, "wild")]),
    "L1 on the L1 table": ({"l1_entries": {0: CS}}, [Bad("L1", 0, "shared")]),
    "two L1 on one table": (
        {"size": 4 * GiB, "layout": "D", "l1_entries": {1: lambda b: b.l2_offsets[0]}},
        [Bad("L1", REACH, "shared")],
    ),
    "L1 overlaps a table": (
        {"size": 4 * GiB, "layout": "D", "leaks": 4, "l1_entries": {1: lambda b: b.l2_offsets[0] + CS}},
        [Bad("L1", REACH, "shared")],
    ),
    "L1 on data": (
        {"size": 4 * GiB, "layout": "D", "l1_entries": {1: lambda b: b.offsets[0]}},
        [Bad("L2", 0, "shared"), Bad("L1", REACH, "shared")],
    ),
    "L1 past the end of the device": ({"size": CS, "l1_entries": {9: 1 << 40}}, [Bad("L1", 9 * REACH, "crash")]),
    "data on a table that comes later": (
        {"size": 4 * GiB, "layout": {0: "data", 32768: "data"}, "entries": {1: lambda b: b.l2_offsets[1] + CS}},
        [Bad("L2", CS, "shared")],  # tables come first
    ),
    "in a later slice": (
        {
            "cluster_size": MiB,
            "table_size": 2,
            "size": 1 << 40,
            "layout": {0: "data"},
            "entries": {131071: 5, 131072: lambda b: b.offsets[0], 262143: lambda b: b.end},
        },
        [Bad("L2", 131071 * MiB, "wild"), Bad("L2", 131072 * MiB, "shared"), Bad("L2", 262143 * MiB, "crash")],
    ),
    "clusters at multiples of cluster_size - 1": (  # QEMU misses a table that straddles one (B12)
        {
            "cluster_size": 4096,
            "table_size": 2,
            "size": 2 * 4 * MiB,
            "layout": dict.fromkeys(range(1024), "data"),
            "leaks": 3200,
            "l1_entries": {1: 4094 * 4096},
            "entries": {5: 4095 * 4096},
        },
        [Bad("L2", 5 * 4096, "shared")],
    ),
    "several": (
        {"layout": "DD", "entries": {2: 7, 3: lambda b: b.end, 4: lambda b: b.offsets[1]}},
        [Bad("L2", 2 * CS, "wild"), Bad("L2", 3 * CS, "crash"), Bad("L2", 4 * CS, "shared")],
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage(image: Image, name: str) -> None:
    spec, bad = DAMAGED[name]
    built = image(**spec)
    before = built.path.read_bytes() if built.end < 32 * MiB else b""
    _, found = scan(built.path)
    assert [Bad(damage.table, damage.pos, kind_of(damage)) for damage in found] == bad
    with QedFile(built.path) as oracle:
        assert bool(oracle.verify().errors) is bool(bad)
        for damage in found:  # place and value are those in the file
            index, slot = divmod(damage.pos // built.spec.cluster_size, built.spec.geometry.entries)
            at = damage.table_offset
            want = (built.l1_offset, index) if damage.table == "L1" else (oracle.l1[index], slot)
            assert (at, damage.index) == want
            value = oracle.l1[index] if damage.table == "L1" else oracle.l2_table(at)[slot]
            assert damage.value == value
            text = str(damage)
            assert f"{damage.table} entry {damage.index} at {at + damage.index * 8:#x}" in text
            assert f"{value:#x}" in text and f"{damage.pos:#x}" in text and "\n" not in text
    assert not before or built.path.read_bytes() == before


# Repair: what a writable open of an image with NEED_CHECK does


def entries(path: Path) -> tuple[dict[int, int], dict[int, int]]:
    """Nonzero L1 entries, and L2 entries by guest cluster where there is a table."""
    with QedFile(path) as file:
        first = file.header["header_size"] * file.geometry.cluster_size
        found = {}
        for index, offset in file.l1.items():
            aligned = offset % file.geometry.cluster_size == 0
            if aligned and first <= offset <= file.length - file.geometry.table_bytes:
                for slot, value in file.l2_table(offset).items():
                    found[index * file.geometry.entries + slot] = value
        return dict(file.l1), found


def repair(path: Path) -> list[str]:
    """Open for writing and close; the notices."""
    notices: list[str] = []
    qedcore.open_image(path, log=notices.append).close()
    return notices


def dirty(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "features": F_NEED_CHECK}


@pytest.mark.parametrize("name", DAMAGED)
def test_repair(image: Image, name: str) -> None:
    """What points past the end goes, shared clusters stay with NEED_CHECK, all else is untouched."""
    spec, bad = DAMAGED[name]
    built = image(**dirty(spec))
    length = built.path.stat().st_size
    l1, l2 = entries(built.path)
    end = scan(built.path)[0].end
    notices = repair(built.path)
    for damage in bad:
        if damage.kind == "crash":
            index = damage.pos // built.spec.cluster_size
            table = l1 if damage.table == "L1" else l2
            del table[index // built.spec.geometry.entries if damage.table == "L1" else index]
    assert entries(built.path) == (l1, l2)
    kinds = {damage.kind for damage in bad}
    with QedFile(built.path) as file:
        assert file.need_check is ("shared" in kinds)
    assert built.path.stat().st_size == (end if kinds <= {"crash"} else length)
    text = "\n".join(notices)
    for damage in bad:
        assert f"guest position {damage.pos:#x}" in text
    assert ("cannot repair" in text) is (not kinds <= {"crash"})
    if kinds <= {"crash"}:
        assert_sound(built.path, leaks=None)
    if "shared" not in kinds:
        before = built.path.read_bytes() if length < 32 * MiB else b""
        assert repair(built.path) == []  # once is enough
        assert not before or built.path.read_bytes() == before


# (leaks, trailing bytes, cut) of an image without damage -> it loses all unreferenced bytes
TAILS = {"nothing": (0, 0, 0), "leaks": (3, 0, 0), "partial": (0, 777, 0), "both": (2, 5000, 0), "cut": (0, 0, 511)}


@pytest.mark.parametrize("name", TAILS)
def test_tail_of_a_crash_is_given_back(image: Image, name: str) -> None:
    leaks, trailing, cut = TAILS[name]
    spec = {"layout": "D-ZD", "leaks": leaks, "trailing": b"t" * trailing}
    built = image(**dirty(spec))
    end = built.end - leaks * CS
    if cut:
        with built.path.open("r+b") as f:
            f.truncate(end - cut)
    repair(built.path)
    assert built.path.stat().st_size == end - cut
    report = assert_sound(built.path) if not cut else None
    assert report is None or report.leaks == []
    with qedcore.open_image(built.path, writable=False) as img:
        assert not img.header.need_check
        assert_same(img.pread(MiB, 0), built.read(0, MiB))


def test_clusters_after_the_repair_do_not_collide(image: Image) -> None:
    """The allocator goes on where the repaired file ends, not where it ended before."""
    spec = {"layout": "DD", "leaks": 5, "entries": {2: lambda b: b.end}}
    built = image(**dirty(spec))
    with qedcore.open_image(built.path) as img:
        img.pwrite(b"n" * CS, 3 * CS)
        img.pwrite(b"m" * CS, 2 * CS)
        assert_same(img.pread(2 * CS, 0), built.read(0, 2 * CS))
    assert_sound(built.path)
    with QedFile(built.path) as file:
        assert_same(file.read(2 * CS, 2 * CS), b"m" * CS + b"n" * CS)
        assert_same(file.read(0, 2 * CS), built.read(0, 2 * CS))


@pytest.mark.parametrize(
    ("entries", "cut", "cleared"),
    [({}, True, True), ({3: lambda b: b.end, 70: lambda b: b.end}, True, True), ({3: 5}, False, True),
     ({3: lambda b: b.offsets[0]}, False, False)],
    ids=["tail", "crash", "wild", "shared"],
)  # fmt: skip
def test_order_of_repair(image: Image, entries: dict[int, Any], cut: bool, cleared: bool) -> None:
    """What is there is durable before anything is read, the repair before the flag that asks for it goes, and that
    before anything else is done.
    """
    built = image(**dirty({"layout": "DD", "leaks": 2, "entries": entries}))
    img, tap = open_tapped(built.path)
    fixed = int(bool(entries) and cut)  # those of one table with one write
    want = ["flush", *["pwrite"] * fixed, *["truncate"] * cut, "flush", *["pwrite", "flush"] * cleared]
    assert [call.name for call in tap.log] == want
    assert [call.offset for call in tap.log if call.name == "pwrite"][fixed:] == [0] * cleared
    img.close()


def test_repair_reads_what_is_on_disk(image: Image) -> None:
    """After a failed flush the cache may show, as clean, what was not written."""
    built = image(**dirty({"layout": "DD", "leaks": 2}))
    calls: list[str] = []
    img, _ = open_tapped(built.path, lambda call: calls.append(call.name))
    first = calls.index("flush")
    assert calls[first + 1] == "drop_cache"
    assert "pread" in calls[first + 2 : calls.index("truncate")]  # the tables
    img.close()


def test_readers_repair_nothing(image: Image) -> None:
    built = image(**dirty({"layout": "D", "entries": {1: lambda b: b.end}, "leaks": 1}))
    before = built.path.read_bytes()
    qedcore.open_image(built.path, writable=False).close()
    assert built.path.read_bytes() == before


def test_clean_images_are_not_walked(image: Image) -> None:
    """Damage without NEED_CHECK is for `qed check`."""
    built = image(layout="D", entries={1: lambda b: b.end}, leaks=1)
    before = built.path.read_bytes()
    assert repair(built.path) == []
    assert built.path.read_bytes() == before


INTERRUPTED = {
    "crash": {"layout": "DD", "leaks": 2, "entries": {n: lambda b: b.end for n in (3, 70, 5000)}},
    "crash in two tables": {
        "size": 6 * GiB,
        "layout": {0: "data", 32768: "data"},
        "l1_entries": {2: lambda b: b.end},
        "entries": {9: lambda b: b.end + CS, 32769: lambda b: b.end + 2 * CS},
        "trailing": b"t" * 5000,
    },
    "wild": {"layout": "DD", "leaks": 2, "entries": {3: 5, 70: 6 * CS + 1}},
    "shared": {"layout": "DD", "leaks": 2, "entries": {3: lambda b: b.offsets[0], 70: lambda b: b.end}},
    "wild and crash": {"layout": "DD", "leaks": 2, "entries": {3: 5, 70: lambda b: b.end}},
    "crash and wild": {"layout": "DD", "leaks": 2, "entries": {3: lambda b: b.end, 70: 5}},
    "no damage": {"layout": "D", "leaks": 2},
    "autoclear": {"layout": "D", "leaks": 2, "autoclear_features": 9, "entries": {3: lambda b: b.end}},
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_repair_is_repeated(image: Image, tmp_path: Path, name: str, late: bool) -> None:
    """Whichever change fails (undone or done), the next open ends where one without failure does."""
    built = image(**dirty(INTERRUPTED[name]))
    expected = tmp_path / "expected.qed"
    shutil.copy(built.path, expected)
    repair(expected)
    want = expected.read_bytes()
    wrong = []
    for n in range(1, 100):
        victim = tmp_path / "victim.qed"
        shutil.copy(built.path, victim)
        fault = FailAt(n, CHANGES, errno.ENOSPC, late)
        try:
            img, _ = open_tapped(victim, fault)
        except QEDError as error:
            assert error.errno == errno.ENOSPC
        else:
            fault.armed = False
            img.close()
            assert fault.hit is None, "the failure of a repair must fail the open"
            break
        with QedFile(victim) as file:
            # Only the very last steps may have cleared it.
            assert file.need_check or (late and fault.hit.name == "pwrite") or fault.hit.name == "flush"
        repair(victim)
        found = victim.read_bytes()
        # A cleared wild entry no longer says that there may be something to salvage behind it: the tail may go.
        if found != want and not ("wild" in name and want.startswith(found)):
            wrong.append((n, fault.hit, victim.stat().st_size, len(want)))
    assert n > 2
    assert not wrong


def test_read_error_keeps_need_check(image: Image) -> None:
    """Not even the good half is changed when a table cannot be read."""
    entries = {1: 1 << 40, 32769: 1 << 41}
    built = image(**dirty({"size": 4 * GiB, "layout": {0: "data", 32768: "data"}, "entries": entries}))
    before = built.path.read_bytes()
    failed = 0
    for n in range(1, 50):
        fault = FailAt(n, ["pread"])
        try:
            img, _ = open_tapped(built.path, fault)
        except QEDError as error:
            assert error.errno == errno.EIO
            failed += 1
        else:
            img.close()
            break
        with QedFile(built.path) as file:
            assert file.need_check
        if fault.hit.offset < built.l2_offsets[1]:
            assert built.path.read_bytes() == before
    assert failed >= 4
    assert_sound(built.path)


# Whatever the image, memory and the log have a limit.


def test_many_damaged_entries(image: Image) -> None:
    """Half a million entries of one table: no object is kept for each, one write per slice, a short log."""
    built = image(cluster_size=MiB, table_size=4, layout="D", features=F_NEED_CHECK)
    n = built.spec.geometry.entries
    with built.path.open("r+b") as file:
        file.seek(built.l2_offsets[0] + 8)
        file.write(b"\0\0\0\0\0\0\xff\xff" * (n - 1))
    notices: list[str] = []
    tracemalloc.start()
    try:
        img, tap = open_tapped(built.path, log=notices.append)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    img.close()
    assert peak < 32 * MiB  # a slice's copies, and a number for each of its entries
    assert [call.name for call in tap.log] == [
        *["flush", *["pwrite"] * 4, "flush", "pwrite", "flush", "flush"],
    ]
    assert len(notices) == 22 and f"and {n - 21} more damaged entries" in notices[-1]
    assert f"findings: {n - 1}" in notices[0]
    assert entries(built.path) == ({0: built.l2_offsets[0]}, {0: built.offsets[0]})
    assert_sound(built.path)


def lengthen(built: Built, size: int) -> None:
    """Give the file a hole at its end."""
    try:
        os.truncate(built.path, size)
    except OSError as error:
        pytest.skip(f"no files of {size} bytes here: {error}")


HUGE = 8 << 40  # bytes: at 4 KiB, 16 times as many clusters as the map has
EVERYWHERE: dict[str, Any] = {
    "cluster_size": 4 * KiB,
    "table_size": 16,
    "size": 64 * MiB,
    "entries": {n: n * (HUGE >> 14) + MiB for n in range(8192)},
}


def test_huge_file_of_a_small_image(image: Image) -> None:
    built = image(cluster_size=4 * KiB, layout="DZD", features=F_NEED_CHECK)
    end = built.path.stat().st_size
    lengthen(built, HUGE)
    assert any("truncated" in line for line in repair(built.path))
    assert built.path.stat().st_size == end
    assert_sound(built.path)


def test_clusters_that_cannot_be_compared(image: Image) -> None:
    """Nothing is believed and nothing changed, but the image is served, and grows behind the end of the file."""
    built = image(**dirty({**EVERYWHERE, "layout": "DDD", "entries": {1: HUGE - MiB, 2: 5}}))
    lengthen(built, HUGE)
    before = entries(built.path)
    notices: list[str] = []
    with qedcore.open_image(built.path, log=notices.append) as img:
        assert_same(img.pread(4 * KiB, 0), built.read(0, 4 * KiB))
        assert img.pread(4 * KiB, 4 * KiB) == bytes(4 * KiB)
        img.pwrite(b"n" * 4 * KiB, 3 * 4 * KiB)
    text = "\n".join(notices)
    assert "cannot repair: L2 entry 2" in text and "nothing was changed: 1 references" in text
    after = entries(built.path)
    assert after[0] == before[0] and after[1] == {**before[1], 3: HUGE}
    with QedFile(built.path) as file:
        assert file.need_check


def test_table_that_cannot_be_compared(image: Image) -> None:
    built = image(**dirty({"cluster_size": 4 * KiB, "layout": "D", "l1_entries": {1: HUGE - MiB}}))
    lengthen(built, HUGE)
    assert any("nothing was changed" in line for line in repair(built.path))
    assert built.path.stat().st_size == HUGE
    with QedFile(built.path) as file:
        assert file.need_check


def test_memory_has_a_limit(image: Image) -> None:
    """Clusters all over a huge file, so that each touches a page of its own."""
    built = image(**dirty(EVERYWHERE))
    lengthen(built, HUGE)
    code = f"""if True:
        import qedcore, resource
        limit = 512 << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        qedcore.open_image({str(built.path)!r}).close()
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    root = str(Path(qedcore.__file__).parents[1])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 192 * KiB  # KiB of resident memory


def test_data_behind_a_stray_table_is_not_written_to(image: Image) -> None:
    """An L1 entry that leads to data, and comes first: what is there are no entries to be cleared."""
    cs = 4 * KiB
    built = image(
        **dirty({"cluster_size": cs, "table_size": 1, "size": 8 * MiB, "layout": {512: "data", 513: "data"}}),
        l1_entries={0: lambda b: b.offsets[512]},
    )
    with built.path.open("r+b") as file:
        file.seek(built.offsets[512])
        file.write(b"Q" * cs)
    notices = repair(built.path)
    with built.path.open("rb") as file:
        file.seek(built.offsets[512])
        assert file.read(cs) == b"Q" * cs
    with QedFile(built.path) as oracle:
        assert oracle.need_check
    assert not any("cleared" in line for line in notices) and any("cannot repair" in line for line in notices)


def test_cluster_use() -> None:
    use = ClusterUse(1 << 51, 1000)
    assert (
        use.claim(3, DATA) and use.claim(999, METADATA) and use.claim(1000, DATA) and use.claim((1 << 51) - 1, DATA)
    )
    assert use.unmapped == 2
    assert not use.claim(3, METADATA) and not use.claim_free(999, DATA) and not use.claim_free(1000, DATA)
    assert use.marks(3) == bytes([DATA | METADATA | SHARED]) and use.marks(999, 2) == bytes([METADATA])
    assert use.claim_run(10, 5, DATA) and not use.claim_run(14, 2, DATA) and not use.claim_run(999, 2, DATA)
    assert use.marks(9, 7) == bytes([0, DATA, DATA, DATA, DATA, DATA, 0])
    assert [use.next_free(n) for n in (3, 10, 999, 5000)] == [4, 15, 1000, 5000]
    assert [use.next_used(n) for n in (0, 4, 1000)] == [3, 10, 1 << 51]
    assert (use.count(), use.last()) == (7, 1000)
