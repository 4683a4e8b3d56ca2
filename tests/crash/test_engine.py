"""The promises P1, P2 and P4 under power loss at every step, and that the simulator would notice if they broke.

QED_CRASH_ROUNDS in the environment multiplies the workloads.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from crash.simulator import SECTOR, Disk, GuestModel, RecordingStorage, crash_states
from support.qed_image import ImageSpec, build

from qedcore.alloc import Allocator, Extent, NeedCheckGate
from qedcore.chain import open_image
from qedcore.claims import Claim
from qedcore.cluster import NO_CLUSTER, NO_TABLE
from qedcore.errors import QEDError
from qedcore.header import FEATURE_NEED_CHECK
from qedcore.image import QEDImage
from qedcore.request import WritableRequests
from qedcore.scan import Damage, Scan, ScanResult
from qedcore.table import Table, TableIO

KiB = 1024
ROUNDS = int(os.environ.get("QED_CRASH_ROUNDS", "1"))
STEPS = 40  # guest operations in a workload
SIZE = 5 * 1024 * KiB  # bytes: three L2 tables at 4 KiB / 1
BACKING_SIZE = SIZE - 701 * SECTOR  # ends inside the third table


class Violation(AssertionError):
    """A promise was broken in a crash state."""


def stamp(tag: int, sector: int) -> bytes:
    return (tag << 32 | sector + 1).to_bytes(8, "little") * (SECTOR // 8)


class Setup:
    """An image to crash: its first content, its backing file, and how to open a state of it."""

    def __init__(self, tmp_path: Path, backing: bool, **spec: Any) -> None:
        base = tmp_path / "base"
        base.write_bytes(b"".join(stamp(0xBA5E, s) for s in range(BACKING_SIZE // SECTOR)))
        layout = {0: "data", 1: "zero", 2: "-", 3: "data", 600: "data", 601: "zero"}
        if backing:
            spec.update(backing="base", no_probe=True)
        built = build(
            tmp_path / "first.qed",
            ImageSpec(cluster_size=4 * KiB, table_size=1, size=SIZE, layout=layout, **spec),
        )
        content = Path(built.path).read_bytes()
        sectors = {i: content[i * SECTOR : (i + 1) * SECTOR] for i in range(-(-len(content) // SECTOR))}
        self.first = Disk({i: data for i, data in sectors.items() if any(data)}, len(content))
        self.backing = backing
        base_disk = base.read_bytes()
        self.base = Disk(
            {i: base_disk[i * SECTOR : (i + 1) * SECTOR] for i in range(len(base_disk) // SECTOR)}, len(base_disk)
        )
        self.base_storage = RecordingStorage(self.base, "base")
        with self.open(RecordingStorage(self.first)) as image:
            self.content = image.pread(SIZE, 0)

    def open(self, storage: RecordingStorage, writable: bool = True) -> QEDImage:
        return open_image(
            "image.qed", writable, opener=lambda path, w, mode: storage if path == "image.qed" else self.base_storage
        )

    def initial(self, sector: int) -> bytes:
        return self.content[sector * SECTOR : (sector + 1) * SECTOR]


def in_thread(work: Callable[[], None]) -> None:
    """Run work() in a thread of its own; raises what it raises."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def check_state(setup: Setup, disk: Disk, model: GuestModel, rng: random.Random, name: str) -> RecordingStorage:
    """Open a crash state as a user would, compare it with the model, write to it and compare again."""
    storage = RecordingStorage(disk)
    image = setup.open(storage)
    check_content(image, model, name)
    others = {sector: image.pread(SECTOR, sector * SECTOR) for sector in model.sectors()}
    # New allocations must not land on anything that is in use.
    for tag in range(3):
        sector = rng.randrange(SIZE // SECTOR)
        image.pwrite(stamp(0xF00 + tag, sector), sector * SECTOR)
        others[sector] = stamp(0xF00 + tag, sector)
    for sector, value in others.items():
        if image.pread(SECTOR, sector * SECTOR) != value:
            raise Violation(f"{name}: sector {sector} changed when others were written after the crash")
    image.close()
    if storage.disk.read(16, 1)[0] & FEATURE_NEED_CHECK:
        raise Violation(f"{name}: not clean after a clean close")
    damage: list[Damage] = []
    scan(image, damage.append)  # leaks in the middle of the file are allowed: later entries may survive earlier ones
    if damage:
        raise Violation(f"{name}: {[str(found) for found in damage]}")
    return storage


def scan(image: QEDImage, report: Callable[[Damage], None]) -> ScanResult:
    return Scan(image.storage, image.geometry, image._bounds, image.header.l1_table_offset, report=report).run()


def check_content(image: QEDImage, model: GuestModel, name: str) -> None:
    near = {s for sector in model.sectors() for s in range(sector - 1, sector + 2) if 0 <= s < SIZE // SECTOR}
    for sector in near:
        found = image.pread(SECTOR, sector * SECTOR)
        if found not in model.allowed(sector):
            raise Violation(f"{name}: sector {sector} holds {found[:8].hex()}, which it may not")


def workload(setup: Setup, rng: random.Random, subsets: int, states: list[int], every: int = 1) -> RecordingStorage:
    """Run random guest operations; at every op of the storage check the states that a crash would leave there."""
    storage = RecordingStorage(setup.first)
    model = GuestModel(setup.initial)
    image = setup.open(storage)
    count = 0

    def crash() -> None:
        """Called inside the engine, with its locks held: look at the states from a thread that holds none."""
        nonlocal count
        count += 1
        if count % every == 0:
            in_thread(check_states)

    def check_states() -> None:
        for name, disk in crash_states(storage, rng, subsets):
            states.append(1)
            recovered = check_state(setup, disk, model, rng, f"op {len(storage.log)}, {name}")
            if rng.random() < 0.05:  # a crash during the recovery, or the writes after it
                check_recovery(setup, recovered, model.copy(), rng)

    storage.on_op = crash
    hot = [rng.randrange(SIZE // SECTOR - 64) for _ in range(6)] + [0, 8, 16, 4800, 8188, 9000, 9530]
    for step in range(STEPS):
        choice = rng.random()
        if choice < 0.2:
            image.flush()
            model.flushed()
            continue
        n = rng.choice((1, 1, 2, 8, 9, 30))
        sector = min(rng.choice(hot) + rng.randrange(20), SIZE // SECTOR - n)
        if choice < 0.35:
            model.begin(sector * SECTOR, bytes(n * SECTOR))
            image.zero(sector * SECTOR, n * SECTOR, may_trim=choice < 0.28)
        elif choice < 0.45:
            n *= 8
            sector = min(sector, SIZE // SECTOR - n)
            model.begin(sector * SECTOR, bytes(n * SECTOR))
            image.trim(sector * SECTOR, n * SECTOR)
            # Which of it was freed is the engine's choice; from now on it is what reads back.
            model.begin(sector * SECTOR, image.pread(n * SECTOR, sector * SECTOR))
        else:
            data = b"".join(stamp(step + 1, s) for s in range(sector, sector + n))
            model.begin(sector * SECTOR, data)
            image.pwrite(data, sector * SECTOR, fua=False)
        if choice > 0.85:
            image._gate.clear()  # type: ignore[union-attr]  # the idle timer fires
    storage.on_op = lambda: None
    image.close()
    model.flushed()
    assert scan(image, lambda damage: None).leaks == image._allocator.free_clusters, "leaks without a crash"
    for name, disk in crash_states(storage, rng, subsets):
        check_state(setup, disk, model, rng, f"after close, {name}")
    return storage


def check_recovery(setup: Setup, recovered: RecordingStorage, model: GuestModel, rng: random.Random) -> None:
    """Crash at a random op of the recovery itself: the image opens again and holds no more and no less."""
    cut = rng.randrange(len(recovered.log) + 1)
    again = recovered.cut(cut)
    for tag in range(3):  # what check_state wrote
        for sector in range(SIZE // SECTOR):
            model.pending.setdefault(sector, []).append(stamp(0xF00 + tag, sector))
    for name, disk in crash_states(again, rng, 1):
        with setup.open(RecordingStorage(disk)) as image:
            for sector in range(0, SIZE // SECTOR, 7):
                if image.pread(SECTOR, sector * SECTOR) not in model.allowed(sector):
                    raise Violation(f"crash in recovery at {cut}, {name}: sector {sector}")


@pytest.mark.parametrize("round_number", range(ROUNDS))
@pytest.mark.parametrize("trailing", [b"", b"trailing" * 448], ids=["whole clusters", "partial last cluster"])
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_power_loss(tmp_path: Path, backing: bool, trailing: bytes, round_number: int, seed: str) -> None:
    rng = random.Random(f"{seed}/{round_number}")
    states: list[int] = []
    workload(Setup(tmp_path, backing, trailing=trailing), rng, 2, states, every=1 if ROUNDS > 1 else 3)
    assert len(states) > 100, "hardly anything was tried"


# -- the hazards of QEMU's driver, put back one by one: each must be caught -----------------------------------------


class DeafStorage:
    """A storage whose flushes do nothing: for the one place whose flush a hazard leaves out."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def flush(self) -> None:
        pass


def no_flush_after_need_check(patch: pytest.MonkeyPatch) -> None:
    enter = NeedCheckGate.__enter__

    def forgetful(gate: NeedCheckGate) -> None:
        storage, gate._storage = gate._storage, DeafStorage(gate._storage)
        try:
            enter(gate)
        finally:
            gate._storage = storage

    patch.setattr(NeedCheckGate, "__enter__", forgetful)


def clear_without_flush(patch: pytest.MonkeyPatch) -> None:
    clear = NeedCheckGate.clear

    def forgetful(gate: NeedCheckGate, idle: float = 0.0) -> bool:
        storage, gate._storage = gate._storage, DeafStorage(gate._storage)
        try:
            return clear(gate, idle)
        finally:
            gate._storage = storage

    patch.setattr(NeedCheckGate, "clear", forgetful)


def l1_before_l2(patch: pytest.MonkeyPatch) -> None:
    link = WritableRequests._link_new_table

    def forgetful(requests: WritableRequests, *args: Any) -> None:
        storage, requests._storage = requests._storage, DeafStorage(requests._storage)
        try:
            link(requests, *args)
        finally:
            requests._storage = storage

    patch.setattr(WritableRequests, "_link_new_table", forgetful)


def no_flush_before_entry(patch: pytest.MonkeyPatch) -> None:
    write = WritableRequests._allocating_write

    def forgetful(requests: WritableRequests, claim: Claim, view: memoryview, pos: int) -> int:
        storage = requests._storage
        if claim.kind is not NO_TABLE:
            requests._storage = DeafStorage(storage)
        try:
            return write(requests, claim, view, pos)
        finally:
            requests._storage = storage

    patch.setattr(WritableRequests, "_allocating_write", forgetful)


def prefill_zero_cluster_from_backing(patch: pytest.MonkeyPatch) -> None:
    fill = WritableRequests._fill
    patch.setattr(WritableRequests, "_fill", lambda requests, kind, *args: fill(requests, NO_CLUSTER, *args))


def publish_before_write(patch: pytest.MonkeyPatch) -> None:
    write = TableIO.write

    def lazy(tables: TableIO, offset: int, table: Table, index: int, entries: Table) -> None:
        """Half of the sectors never reach the disk."""
        if index % 128 < 64:
            write(tables, offset, table, index, entries)

    patch.setattr(TableIO, "write", lazy)


def reuse_before_durable(patch: pytest.MonkeyPatch) -> None:
    """Freed clusters are handed out again while a crash may bring the entry back that points to them."""

    def eager(allocator: Allocator, extent: Extent) -> None:
        allocator._storage.punch(extent.offset, extent.n << allocator._geometry.l2_shift)
        allocator.release(extent)

    patch.setattr(Allocator, "free", eager)


def reuse_before_hole_is_durable(patch: pytest.MonkeyPatch) -> None:
    """A crash may fill the hole with what was there, under a cluster that counts as fresh."""
    flush = Allocator.flush

    def eager(allocator: Allocator) -> None:
        allocator._storage.flush()
        storage, allocator._storage = allocator._storage, DeafStorage(allocator._storage)
        try:
            flush(allocator)
        finally:
            allocator._storage = storage

    patch.setattr(Allocator, "flush", eager)


HAZARDS = {
    # hazard -> whether it needs a backing file to show
    no_flush_after_need_check: False,
    clear_without_flush: False,
    l1_before_l2: True,
    no_flush_before_entry: True,
    prefill_zero_cluster_from_backing: True,
    publish_before_write: False,
    reuse_before_durable: False,
    reuse_before_hole_is_durable: False,
}


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.__name__)
def test_simulator_catches(
    hazard: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path, HAZARDS[hazard])
    hazard(monkeypatch)
    # Fixed seeds: whether it is caught must not depend on luck.  QEDError: the state did not even open or read.
    with pytest.raises((Violation, QEDError)):
        for number in range(8):
            workload(setup, random.Random(number), 3, [])
