"""The repair after a crash, on images of the independent builder."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.patterns import GiB, KiB, MiB, assert_same
from support.qed_image import F_NEED_CHECK, Built, QedFile, assert_sound

import qedcore
from qedcore.engine.chain import open_image
from qedcore.errors import QEDError
from unit.check.damaged import CS, DAMAGED
from unit.check.scanned import Image, entries, scan
from unit.fakes import CHANGES, FailAt, open_tapped


def repair(path: Path) -> list[str]:
    """Open for writing and close, without tidying; the notices."""
    notices: list[str] = []
    open_image(path, log=notices.append).close()
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
