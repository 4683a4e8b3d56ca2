"""Compaction and packing: order, density, crashes and errors at every step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from support.crashes import World, check_crashes, guest
from support.patterns import KiB, MiB, random_ops, stamp
from support.qed_image import F_NEED_CHECK, ZERO, Built, Geometry, QedFile, assert_sound, read_header

import qedcore
from qedcore.errors import CorruptImageError, QEDError, ReadOnlyError, ShutdownError, StorageError
from qedcore.format.geometry import mark_dangling
from qedcore.maintenance import compact as module
from qedcore.maintenance import move
from qedcore.maintenance.compact import compact, pack
from qedcore.maintenance.resize import resize
from qedcore.maintenance.tidy import tidy
from qedcore.server.shared_image import SharedImage
from unit.fakes import FailAt, open_tapped

CS = 4 * KiB
SMALL = {"cluster_size": CS, "table_size": 1}  # 512 entries: 2 MiB for one L2 table
Image = Callable[..., Built]

LAYOUTS: dict[str, dict[str, Any]] = {
    "in order": {"layout": "DDDD"},
    "reversed": {"layout": "DDDDDDDDDDDD", "reverse": True},
    "leaks": {"layout": "DDZ-D", "leaks": 5},
    "tables last": {"layout": dict.fromkeys((0, 3, 5, 600, 601, 1100), "data"), "reverse": True, "l1_last": True},
    "three tables": {"layout": {0: "data", 1: "zero", 511: "data", 512: "data", 1025: "data"}},
    "large header": {"layout": "D D", "header_size": 3},
    "no data": {"layout": "-"},
    "nothing": {},
    "nothing, L1 late": {"layout": "", "l1_last": True, "leaks": 3},
}


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 4 * CS)
    monkeypatch.setattr(move, "COPY_STEP", 2 * CS)


def backing_file(tmp_path: Path, size: int) -> None:
    (tmp_path / "base").write_bytes(stamp(9, 0, size))


def spec_of(layout: dict[str, Any], tmp_path: Path, backing: bool, size: int = 5 * 1024 * KiB) -> dict[str, Any]:
    spec = dict(SMALL, size=size, **layout)
    if backing:
        backing_file(tmp_path, size)
        spec.update(backing="base", no_probe=True)
    return spec


def assert_in_order(path: Path) -> None:
    """Header, L1 table, then each L2 table with its data in guest order, and nothing else."""
    assert_sound(path)
    with QedFile(path) as image:
        cs, table = image.geometry.cluster_size, image.geometry.table_bytes
        offset = max(1, image.header["header_size"]) * cs
        assert image.header["l1_table_offset"] == offset
        offset += table
        for _, l2 in sorted(image.l1.items()):
            assert l2 == offset
            offset += table
            for _, entry in sorted(image.l2_table(l2).items()):
                if entry != ZERO:
                    assert entry == offset
                    offset += cs
        assert image.length == offset


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_order(image: Image, tmp_path: Path, small_window: None, layout: dict[str, Any], backing: bool) -> None:
    path = image(**spec_of(layout, tmp_path, backing)).path
    before = guest(path)
    with qedcore.open_image(path) as img:
        compact(img)
        assert img.pread(img.size, 0) == before  # with the tables of the open image, too
    assert guest(path) == before
    if layout.get("layout") != "-":
        assert_in_order(path)


@pytest.mark.parametrize(
    "geometry", [Geometry(CS, 1), Geometry(CS, 2), Geometry(CS, 16), Geometry(64 * KiB, 4)], ids=str
)
def test_after_random_writes(tmp_path: Path, rng: random.Random, small_window: None, geometry: Geometry) -> None:
    """In any order, over several tables; then written to again, and compacted again."""
    path = tmp_path / "image.qed"
    size = 3 * geometry.l2_span if geometry.l2_span < 8 << 20 else 40 << 20
    qedcore.create(path, size, cluster_size=geometry.cluster_size, table_size=geometry.table_size)
    for _ in range(2):
        with qedcore.open_image(path, cache="unsafe") as img:
            for op in random_ops(rng, size, geometry.cluster_size, 40, max_length=40 * KiB):
                img.zero(op.pos, op.length) if op.kind == "zero" else img.pwrite(op.data, op.pos)
        before = guest(path)
        with qedcore.open_image(path, cache="unsafe") as img:
            compact(img)
        assert_in_order(path)
        assert guest(path) == before


def test_second_run_changes_nothing(image: Image, tmp_path: Path) -> None:
    path = image(**spec_of(LAYOUTS["three tables"], tmp_path, False)).path
    with qedcore.open_image(path) as img:
        compact(img)
    first = path.read_bytes()
    world = World(path)
    with qedcore.open_image(path, opener=world.open) as img:
        compact(img)
    assert [op for op in world.log if op.data and op.offset] == []
    assert world.files[str(path)] == first


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
def test_drops_zeros(image: Image, tmp_path: Path, backing: bool) -> None:
    path = image(**spec_of({"layout": "DDDD"}, tmp_path, backing)).path
    with QedFile(path) as oracle:
        offset = oracle.entry(1)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(CS))
    before = guest(path)
    with qedcore.open_image(path) as img:
        compact(img)
    assert assert_sound(path).allocated == 4  # not asked for
    with qedcore.open_image(path) as img:
        compact(img, zeros=True)
    report = assert_sound(path)
    assert (report.allocated, report.zero) == (3, int(backing))
    assert_in_order(path)
    assert guest(path) == before


def test_drops_empty_tables_and_what_is_past_the_end(image: Image, tmp_path: Path) -> None:
    size = 2 * 1024 * KiB + 5 * CS + 512
    layout = {0: "data", 516: "-", 517: "data", 518: "data", 600: "zero", 1030: "data"}
    path = image(**dict(SMALL, size=size, layout=layout)).path
    before = guest(path)
    with qedcore.open_image(path) as img:
        compact(img)
    with QedFile(path) as oracle:
        assert sorted(oracle.entries()) == [0, 517]
    assert_in_order(path)
    assert guest(path) == before
    path = image(**dict(SMALL, layout={0: "data", 700: "-"})).path
    with qedcore.open_image(path) as img:
        compact(img)
    assert assert_sound(path).tables == 1


def test_progress_and_extra_space(image: Image, tmp_path: Path, small_window: None) -> None:
    path = image(**dict(SMALL, layout=dict.fromkeys(range(0, 1200, 7), "data"), reverse=True)).path
    length = path.stat().st_size
    world = World(path)
    seen: list[int] = []
    with qedcore.open_image(path, opener=world.open) as img:
        compact(img, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == len(world.files[str(path)]) == length
    end = max(op.offset + len(op.data) for op in world.log if op.data)
    assert end <= length + module.WINDOW + 3 * CS  # a window and the L2 tables


DAMAGE: dict[str, dict[str, Any]] = {
    "shared": {"layout": "DD", "entries": {2: lambda built: built.offsets[0]}},
    "shared table": {"layout": "DD", "l1_entries": {1: lambda built: built.l2_offsets[0]}},
    "misaligned": {"layout": "DD", "entries": {2: 0x5001}},
    "past the end": {"layout": "DD", "entries": {2: 1 << 40}},
    "table past the end": {"layout": "DD", "l1_entries": {1: 1 << 40}},
    "data in a table": {"layout": "DD", "entries": {2: lambda built: built.l2_offsets[0]}},
}


@pytest.mark.parametrize("spec", DAMAGE.values(), ids=DAMAGE)
def test_damaged_image_is_refused(image: Image, spec: dict[str, Any]) -> None:
    path = image(**SMALL, **spec).path
    before = path.read_bytes()
    with pytest.raises(CorruptImageError, match="repair it first"), qedcore.open_image(path) as img:
        compact(img)
    after = path.read_bytes()
    # Before anything is allocated, an entry that points past the end is marked (census.py); nothing else has changed.
    changed = {i // 8 for i in range(64, len(before)) if after[i] != before[i]}
    assert not changed or (spec in (DAMAGE["past the end"], DAMAGE["table past the end"]) and len(changed) == 1)


def test_read_only(image: Image) -> None:
    with qedcore.open_image(image(**SMALL).path, writable=False) as img, pytest.raises(ReadOnlyError):
        compact(img)


# -- pack ----------------------------------------------------------------------------------------------------------


def run_pack(img: qedcore.QEDImage) -> None:
    with img.maintenance() as metadata:
        pack(metadata)


def unlink(path: Path, clusters: list[int]) -> None:
    """Make clusters leaks."""
    with QedFile(path) as oracle, path.open("r+b") as file:
        for cluster in clusters:
            index, slot = divmod(cluster, oracle.geometry.entries)
            file.seek(oracle.l1[index] + slot * 8)
            file.write(bytes(8))


PACK = {
    "tail data": ({"layout": "DDDDDDDD"}, [1, 2, 3]),
    "table in the tail": ({"layout": "DDDDDDDD", "reverse": True}, [1, 2]),
    "L1 in the tail": ({"layout": "DDDDDDDD", "reverse": True, "l1_last": True}, [0, 5, 6]),
    "all holes": ({"layout": "DDDD", "l1_last": True}, [0, 1, 2, 3]),
    "tables between": ({"layout": {i * 512: "data" for i in range(8)}}, [0, 512, 1024]),
    "only tables": ({"layout": {i * 512: "data" for i in range(8)}, "reverse": True}, [i * 512 for i in range(8)]),
    "nothing to do": ({"layout": "DDDD"}, []),
}


@pytest.mark.parametrize("table_size", [1, 4])
@pytest.mark.parametrize("layout, holes", PACK.values(), ids=PACK)
def test_pack(image: Image, small_window: None, layout: dict[str, Any], holes: list[int], table_size: int) -> None:
    path = image(**dict(layout, cluster_size=CS, table_size=table_size)).path
    unlink(path, holes)
    before = guest(path)
    with qedcore.open_image(path) as img:
        run_pack(img)
        assert img.pread(img.size, 0) == before
    assert_sound(path)
    assert guest(path) == before


@pytest.mark.parametrize("work", [compact, run_pack])
def test_writes_before_and_after(tmp_path: Path, work: Callable[[qedcore.QEDImage], None]) -> None:
    """The allocator of the open image notices that the file got shorter."""
    path = tmp_path / "image.qed"
    qedcore.create(path, 3 * 512 * CS, cluster_size=CS, table_size=1)
    tables = [10, 600, 1200]
    with qedcore.open_image(path) as img:
        for cluster in tables:
            img.pwrite(stamp(1, cluster * CS, 512), cluster * CS)
        unlinked = [10, 1200]
        unlink(path, unlinked)
        work(img)
        for cluster in [11, *unlinked, 1300]:
            img.pwrite(stamp(2, cluster * CS, 512), cluster * CS)
        assert path.stat().st_size >= img.storage.size() >= 14 * CS
        before = img.pread(img.size, 0)
    assert_sound(path)
    assert guest(path) == before


def test_pack_moves_little(image: Image) -> None:
    path = image(**SMALL, layout="D" * 100).path
    unlink(path, [3, 50])
    world = World(path)
    with qedcore.open_image(path, opener=world.open) as img:
        run_pack(img)
    assert sum(len(op.data) for op in world.log if op.data and any(op.data)) < 6 * CS
    # the table and the last cluster fill the two holes, with at most one cluster moved out of the way


# -- crashes -------------------------------------------------------------------------------------------------------

CRASHES = {
    "reversed": {"layout": "DDDDDDDD", "reverse": True},
    "L1 moves": {"layout": {0: "data", 1: "zero", 2: "data", 513: "data"}, "reverse": True, "l1_last": True},
    "leaks": {"layout": {0: "data", 3: "data", 512: "data", 1024: "-", 1400: "data"}, "leaks": 3},
}


@pytest.mark.parametrize(
    "table_size, backing", [(1, False), (1, True), (2, False)], ids=["alone", "overlay", "larger tables"]
)
@pytest.mark.parametrize("layout", CRASHES.values(), ids=CRASHES)
def test_crash_in_compact(
    image: Image, tmp_path: Path, small_window: None, layout: dict[str, Any], table_size: int, backing: bool
) -> None:
    size = 1200 * CS
    path = image(**{**spec_of(layout, tmp_path, backing, size), "table_size": table_size}).path
    before = guest(path)
    world = World(path, *([tmp_path / "base"] if backing else []))
    with qedcore.open_image(path, opener=world.open) as img:
        compact(img, zeros=True)
    assert check_crashes(world, path, [before]) > 20
    world.save()
    assert_in_order(path)


@pytest.mark.parametrize("table_size", [1, 2])
@pytest.mark.parametrize("name", ["tail data", "L1 in the tail", "tables between", "only tables"])
def test_crash_in_pack(image: Image, small_window: None, name: str, table_size: int) -> None:
    layout, holes = PACK[name]
    size = 4096 * CS if "tables" in name else 100 * CS
    path = image(cluster_size=CS, table_size=table_size, size=size, **layout).path
    unlink(path, holes)
    before = guest(path)
    world = World(path)
    with qedcore.open_image(path, opener=world.open) as img:
        run_pack(img)
    assert check_crashes(world, path, [before]) > 5


def test_crash_after_dropping(image: Image, small_window: None) -> None:
    """What was dropped is overwritten only when nothing leads to it any more."""
    size = 1100 * CS
    layout = dict.fromkeys([*range(8), 600], "data")
    path = image(**SMALL, size=size, layout=layout, reverse=True).path
    with QedFile(path) as oracle, path.open("r+b") as file:
        for cluster in (1, 6, 7, 600):
            file.seek(oracle.entry(cluster))
            file.write(bytes(CS))
    before = guest(path)
    world = World(path)
    with qedcore.open_image(path, opener=world.open) as img:
        compact(img, zeros=True)
    assert check_crashes(world, path, [before]) > 20
    world.save()
    assert_in_order(path)
    assert assert_sound(path).allocated == 5


def test_crash_after_freeing(image: Image, small_window: None) -> None:
    """A crash may bring back the entry of a cluster that was just freed: nothing is moved there before it cannot."""
    path = image(**SMALL, size=100 * CS, layout="D").path
    with qedcore.open_image(path) as img:
        img.pwrite(stamp(5, CS, 5 * CS), CS)  # at the end of the file
    before = guest(path)
    world = World(path)
    with qedcore.open_image(path, opener=world.open) as img:
        img.trim(CS, CS)
        run_pack(img)
    assert check_crashes(world, path, [before, before[:CS] + bytes(CS) + before[2 * CS :]]) > 5


@pytest.mark.parametrize("kind", [StorageError, KeyboardInterrupt])
def test_stopped_anywhere(image: Image, small_window: None, kind: type[BaseException]) -> None:
    """An error or Ctrl-C at any op: nothing is lost, NEED_CHECK asks for the repair, and the next run finishes."""
    path = image(**SMALL, size=1200 * CS, layout={0: "data", 2: "data", 600: "data"}, reverse=True, l1_last=True).path
    content, before = path.read_bytes(), guest(path)
    stop_at = 0
    while True:
        path.write_bytes(content)
        world = World(path)
        world.stop_at(stop_at, kind("injected"))
        stopped = world.before
        # A hole that cannot be punched is no reason to stop.
        with suppress(QEDError, KeyboardInterrupt), qedcore.open_image(path, opener=world.open) as img:
            compact(img)
        if world.before is stopped:
            break
        world.save()
        with QedFile(path) as oracle:
            assert not oracle.verify().errors
            assert oracle.read(0, oracle.size) == before
        with qedcore.open_image(path, cache="unsafe") as img:
            compact(img)
        assert_in_order(path)
        assert guest(path) == before
        stop_at += 1
    assert stop_at > 15


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("idle", [False, True], ids=["dirty", "clean already"])
def test_tidy(image: Image, tmp_path: Path, backing: bool, idle: bool) -> None:
    """What freeing left inside the file is filled from its end."""
    path = image(**spec_of({"layout": dict.fromkeys(range(100), "data")}, tmp_path, backing)).path
    with qedcore.open_image(path) as img:
        end = path.stat().st_size
        for cluster in (3, 4, 50, 99):
            img.trim(cluster * CS, CS)
        img.pwrite(b"x" * CS, 4 * CS)
        if idle:
            assert img._gate is not None and img._gate.clear()
        before = img.pread(img.size, 0)
        assert tidy(img) == 0
        assert img.pread(img.size, 0) == before
        img.pwrite(b"y" * CS, 50 * CS)  # and it goes on
    assert path.stat().st_size == end - 2 * CS
    assert_sound(path)
    assert guest(path) == before[: 50 * CS] + b"y" * CS + before[51 * CS :]


@pytest.mark.parametrize("work", [tidy, compact], ids=["tidy", "compact"])
def test_after_a_failure(image: Image, work: Callable[[qedcore.QEDImage], object]) -> None:
    """Once clusters may be in other places than this opening knows, it takes no requests any more."""
    refused = []
    for step in itertools.count(1):
        path = image(**SMALL, size=100 * CS, layout=dict.fromkeys(range(10), "data")).path
        img, tap = open_tapped(path)
        img.trim(3 * CS, 2 * CS)
        img.flush()
        img.trim(6 * CS, CS)  # free with the next flush
        want = img.pread(100 * CS, 0)
        tap.hook = fault = FailAt(step, late=step % 2 == 0)
        with suppress(StorageError):
            work(img)
        tap.hook = None
        if fault.hit is None:
            break
        try:
            img.pwrite(b"x" * CS, 9 * CS)
            want = want[: 9 * CS] + b"x" * CS + want[10 * CS :]
            refused.append(False)
        except ShutdownError:
            refused.append(True)
            for request in (lambda: img.pread(1, 0), lambda: img.trim(9 * CS, CS)):  # noqa: B023
                with pytest.raises(ShutdownError):
                    request()
        img.flush()
        with suppress(StorageError):
            img.close()
        with qedcore.open_image(path) as again:
            assert again.pread(100 * CS, 0) == want
        assert_sound(path, leaks=None)
    img.close()
    assert refused.count(True) > 5


def test_tidy_leaves_much_work(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedcore.maintenance.tidy.TIDY_BYTES", 2 * CS)
    path = image(**SMALL, size=100 * CS, layout=dict.fromkeys(range(100), "data")).path
    lines: list[str] = []
    shared = SharedImage(
        lambda writable, opener, in_flight: qedcore.open_image(path, writable, in_flight=in_flight), lines.append
    )
    shared.enter(readonly=False)
    shared.image.trim(10 * CS, 3 * CS)
    shared.close()
    assert lines == [f"{path}: 3 clusters inside the file are free: give them back with qed check -r leaks"]
    assert len(assert_sound(path, leaks=3).leaks) == 3


@pytest.mark.parametrize("work", [tidy, compact], ids=["tidy", "compact"])
def test_damage_alone_asks_for_no_repair(image: Image, work: Callable[[qedcore.QEDImage], object]) -> None:
    """The repair at open would drop entries from which data may still be salvaged."""
    damage = {"entries": {200: lambda built: built.offsets[7] + 1}}
    path = image(**SMALL, size=256 * CS, layout=dict.fromkeys(range(9), "data"), **damage).path
    with QedFile(path) as file:
        entry = file.entries()[200]
    with qedcore.open_image(path) as img:
        img.trim(3 * CS, CS)
        img.flush()
        with pytest.raises(CorruptImageError) if work is compact else nullcontext():
            work(img)
    assert not read_header(path)["features"] & F_NEED_CHECK
    with qedcore.open_image(path):
        pass
    with QedFile(path) as file:
        assert file.entries()[200] == entry


def test_tidy_with_nothing_to_do_changes_nothing(image: Image) -> None:
    path = image(**SMALL, size=100 * CS, layout="DDD").path
    content = path.read_bytes()
    with qedcore.open_image(path) as img:
        assert tidy(img) == 0
    assert path.read_bytes() == content


def test_tidy_gives_back_what_another_program_has_leaked(image: Image) -> None:
    """Nothing was allocated in this opening, and NEED_CHECK was clear."""
    built = image(**SMALL, size=100 * CS, layout="DDD", leaks=2)
    before = guest(built.path)
    with qedcore.open_image(built.path) as img:
        assert tidy(img) == 0
    assert_sound(built.path)
    assert guest(built.path) == before


@pytest.mark.parametrize("table", ["L1", "L2"])
@pytest.mark.parametrize(
    "work", [tidy, compact, lambda img: compact(img, zeros=True), lambda img: resize(img, img.size // 2)]
)
def test_entries_made_invalid_for_good_are_no_obstacle(
    image: Image, table: str, work: Callable[[qedcore.QEDImage], object]
) -> None:
    """They lead to nothing that could move, and stay what they are."""
    entries = {3: lambda built: mark_dangling(built.end)}
    wrong: dict[str, Any] = {"entries": entries} if table == "L2" else {"l1_entries": entries}
    built = image(
        size=16 * MiB, cluster_size=CS, table_size=1, layout="DD-", litter=lambda behind: [b"", b""], **wrong
    )
    with qedcore.open_image(built.path) as img:
        work(img)
    report = QedFile(built.path).verify()
    assert len(report.impossible) == len(report.errors) == 1
    assert not report.leaks
    lost = 3 * CS if table == "L2" else 3 * built.spec.geometry.l2_span
    with qedcore.open_image(built.path, writable=False) as img:
        assert img.pread(2 * CS, 0) == built.read(0, 2 * CS)
        with pytest.raises(CorruptImageError):
            img.pread(1, lost)


@pytest.mark.parametrize("hole", [0, 1], ids=["behind the L1 table", "behind the first cluster"])
def test_tidy_shifts_a_table_over_its_own_place(image: Image, hole: int) -> None:
    """One free cluster, and a table at the end that has no room anywhere else; crashes at every step."""
    calls = itertools.count()
    litter = lambda behind: [b""] if next(calls) == hole else []  # noqa: E731
    built = image(size=MiB, cluster_size=CS, table_size=4, layout="DD", litter=litter)
    before = guest(built.path)
    world = World(built.path)
    with qedcore.open_image(built.path, opener=world.open) as img:
        assert tidy(img) == 0
    assert check_crashes(world, built.path, [before]) > 10
    world.save()
    assert_sound(built.path)
    assert guest(built.path) == before
