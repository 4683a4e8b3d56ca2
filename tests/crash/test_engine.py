"""The promises P1 to P4 under power loss at every step, and that the simulator would notice if they broke.

`make crash` tries many more states.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crash.engine import IMAGE, LIMITS, MIX, SHAPES, CommittedFlushes, History, Setup, check, record, stamp
from crash.guest import SECTOR
from crash.offline import KINDS, Offline
from crash.schedule import Deadlock, Scheduler, _Condition
from support.crashes import RecordedFile

from qedcore.engine import cluster_locks as claims
from qedcore.engine.allocator import Allocator
from qedcore.engine.cluster_locks import Claims
from qedcore.engine.cluster_map import NO_CLUSTER, NO_TABLE, ClusterMap, Kind
from qedcore.engine.free_map import CLEAN
from qedcore.engine.image import QEDImage
from qedcore.engine.in_flight import InFlight
from qedcore.engine.need_check import NeedCheckGate
from qedcore.engine.reclaim import Extent, Reclaimer
from qedcore.engine.write import WritableRequests
from qedcore.errors import QEDError, StorageError
from qedcore.format.table import Table, TableIO
from qedcore.locks import KeyedLocks
from qedcore.maintenance.move import Mover
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.flush import GroupCommit


@pytest.mark.parametrize("trailing", [b"", b"trailing" * 448], ids=["whole clusters", "partial last cluster"])
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("shape", SHAPES)
def test_power_loss(tmp_path: Path, shape: str, backing: bool, trailing: bytes, seed: str) -> None:
    setup = Setup(tmp_path, SHAPES[shape], backing, trailing=trailing)
    rng = random.Random(seed)
    few = LIMITS.get(shape, 1000)
    history = record(setup, rng, requests=8 if few > 100 else 4, share=rng.choice((0.0, 0.02, 0.2)))
    assert check(setup, history, rng, subsets=1, limit=few) > few // 3, "hardly anything was tried"


@pytest.mark.parametrize("errors", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("shape", ["4K/1", "4K/4"])
def test_power_loss_after_errors(tmp_path: Path, shape: str, backing: bool, errors: float, seed: str) -> None:
    """Changes and flushes of the file fail, done or not, under threads that take turns."""
    rng = random.Random(seed)
    setup = Setup(tmp_path, SHAPES[shape], backing)
    history = record(setup, rng, share=rng.choice((0.0, 0.02, 0.1)), errors=errors)
    check(setup, history, rng, subsets=1, limit=150, part=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_power_loss_offline(tmp_path: Path, kind: str, seed: str) -> None:
    rng = random.Random(seed)
    states = 0
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        states += Offline(tmp_path / str(number), rng, kind).check(subsets=1)
    assert states > 4


def test_power_loss_after_a_kill(tmp_path: Path, rng: random.Random) -> None:
    """The repair cuts off what the killed server had unlinked; its entry may come back all the same."""
    setup = Setup(tmp_path, SHAPES["4K/1"], True, layout=dict.fromkeys(range(8), "data"))
    history = History(setup)
    sectors = range(8 * 8, 9 * 8)

    def change(data: bytes, request: Callable[[bytes], None]) -> None:
        write = history.tell("begin", sectors.start, data)
        request(data)
        history.tell("end", write)

    image = setup.open(history.world.open(IMAGE, True, CacheMode()))
    pos = sectors.start * SECTOR
    change(b"".join(stamp(1, sector) for sector in sectors), lambda data: image.pwrite(data, pos))
    began = history.tell("begin_flush")
    image.flush()
    history.tell("end_flush", began)
    change(bytes(len(sectors) * SECTOR), lambda data: image.zero(pos, len(data), may_trim=True))
    size = len(history.world.files[IMAGE])
    setup.open(history.world.open(IMAGE, True, CacheMode())).close()
    assert len(history.world.files[IMAGE]) < size
    check(setup, history, rng)


# -- hazards, most of them of QEMU's driver, put in one by one: each must be caught ----------------------------------


def deaf(
    patch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    which: int = 0,
    when: Callable[..., bool] = lambda *args: True,
) -> None:
    """The flushes in a method do nothing, or only flush number `which`; if when(*args)."""
    original = getattr(owner, method)
    local = threading.local()

    def forgetful(*args: Any) -> Any:
        before = getattr(local, "flushes", None)
        local.flushes = 0 if when(*args) else None
        try:
            return original(*args)
        finally:
            local.flushes = before

    def heard() -> bool:
        if getattr(local, "flushes", None) is None:
            return True
        local.flushes += 1
        return which not in (0, local.flushes)

    patch.setattr(owner, method, forgetful)
    patch.setattr(CommittedFlushes, "heard", staticmethod(heard))


def no_flush_after_need_check(patch: pytest.MonkeyPatch) -> None:
    deaf(patch, NeedCheckGate, "__enter__")


def no_flush_before_clearing(patch: pytest.MonkeyPatch) -> None:
    deaf(patch, NeedCheckGate, "clear")


def clear_under_requests(patch: pytest.MonkeyPatch) -> None:
    """The timer does not see that allocating requests are in flight."""
    shut = NeedCheckGate._shut

    def blind(gate: NeedCheckGate, idle: float) -> bool:
        gate.inside, before = [], gate.inside
        try:
            return shut(gate, idle)  # no other thread runs meanwhile
        finally:
            gate.inside = before

    patch.setattr(NeedCheckGate, "_shut", blind)


def l1_before_l2(patch: pytest.MonkeyPatch) -> None:
    deaf(patch, WritableRequests, "_link_new_table")


def link_before_data(patch: pytest.MonkeyPatch) -> None:
    """Over a backing file, or in a reused cluster that is not clean."""

    def table_exists(requests: WritableRequests, kind: Kind, view: memoryview, pos: int) -> bool:
        return kind is not NO_TABLE

    deaf(patch, WritableRequests, "_allocating_write", when=table_exists)


def link_before_data_when_another_made_the_table(patch: pytest.MonkeyPatch) -> None:
    """Two allocating writes want one new table: the one that comes second must flush its own data."""
    link = WritableRequests._link_data
    patch.setattr(WritableRequests, "_link_data", lambda requests, *args: link(requests, *args[:-1], False))


def claim_ignored(patch: pytest.MonkeyPatch) -> None:
    class Deaf(dict[int, int]):
        def setdefault(self, cluster: int, thread: int = 0) -> int:
            self[cluster] = thread
            return thread

    make = Claims.__init__

    def all_mine(claims: Claims) -> None:
        make(claims)
        claims.claimed = Deaf()

    patch.setattr(Claims, "__init__", all_mine)


def new_zero_cluster_ignored(patch: pytest.MonkeyPatch) -> None:
    """Who has filled a cluster from the backing file links it over a zero that came meanwhile."""
    patch.setattr(WritableRequests, "_hidden", lambda requests, *args: False)


def prefill_zero_cluster_from_backing(patch: pytest.MonkeyPatch) -> None:
    fill = WritableRequests.surround
    patch.setattr(WritableRequests, "surround", lambda requests, kind, *args: fill(requests, NO_CLUSTER, *args))


def entries_stay_in_memory(patch: pytest.MonkeyPatch) -> None:
    write = TableIO.write

    def lazy(tables: TableIO, offset: int, table: Table, index: int, entries: Table) -> None:
        """Half of the sectors never reach the disk."""
        if index % 128 < 64:
            write(tables, offset, table, index, entries)

    patch.setattr(TableIO, "write", lazy)


def publish_before_write(patch: pytest.MonkeyPatch) -> None:
    """Others write in place, and flush, through an entry that is not on disk yet."""
    link = ClusterMap.link

    def eager(clusters: ClusterMap, pos: int, entries: Table) -> None:
        table = clusters.slice_at(pos)
        assert table is not None
        index = (pos >> clusters.geometry.l2_shift) & clusters.geometry.slice_mask
        table[index : index + len(entries)] = entries
        link(clusters, pos, entries)

    patch.setattr(ClusterMap, "link", eager)


def links_race_for_a_sector(patch: pytest.MonkeyPatch) -> None:
    """Nobody locks a table: a sector is written with a neighbour that has changed since."""
    patch.setattr(KeyedLocks, "hold", lambda locks, key: nullcontext())


def reuse_before_durable(patch: pytest.MonkeyPatch) -> None:
    """Freed clusters are handed out again while a crash may bring the entry back that points to them."""

    def eager(reclaimer: Reclaimer, extent: Extent) -> None:
        shift = reclaimer._geometry.l2_shift
        reclaimer._storage.punch(extent.offset, extent.n << shift)
        reclaimer._free.add(extent.offset >> shift, extent.n, CLEAN)

    patch.setattr(Reclaimer, "free", eager)


def reuse_before_hole_is_durable(patch: pytest.MonkeyPatch) -> None:
    """A crash may fill the hole with what was there, under a cluster that counts as fresh."""
    flush = Reclaimer.flush

    def early(reclaimer: Reclaimer) -> None:
        reclaimer._storage.flush()
        flush(reclaimer)

    patch.setattr(Reclaimer, "flush", early)
    deaf(patch, Reclaimer, "flush", which=2)


def used_counts_as_clean(patch: pytest.MonkeyPatch) -> None:
    """What failed or freed clusters held before is taken for zeros."""
    patch.setattr(Reclaimer, "_punch", lambda reclaimer, offset, n: True)


def reuse_under_requests(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(InFlight, "oldest", lambda in_flight: in_flight.now.number)


def table_in_a_freed_cluster(patch: pytest.MonkeyPatch) -> None:
    """A new table goes where data was unlinked, which nothing has made durable."""
    allocate = Allocator.allocate_table

    def eager(allocator: Allocator) -> Extent:
        reclaimer = allocator._reclaimer
        for i, (_, extent) in enumerate(reclaimer._unlinked):
            if extent.n >= allocator._geometry.table_size:
                del reclaimer._unlinked[i]
                reclaimer.pending -= extent.n
                return extent._replace(n=allocator._geometry.table_size)
        return allocate(allocator)

    patch.setattr(Allocator, "allocate_table", eager)


def move_linked_before_copied(patch: pytest.MonkeyPatch) -> None:
    deaf(patch, Mover, "_move", which=1)


def source_free_before_move_is_durable(patch: pytest.MonkeyPatch) -> None:
    deaf(patch, Mover, "_move", which=2)


def fua_without_flush(patch: pytest.MonkeyPatch) -> None:
    write = QEDImage.pwrite
    patch.setattr(QEDImage, "pwrite", lambda image, buf, pos, fua=False: write(image, buf, pos))


def flush_joins_a_running_sync(patch: pytest.MonkeyPatch) -> None:
    """Which may have missed what was written since it began."""
    lead = GroupCommit._lead

    def joined(commit: GroupCommit, batch: Any, gate: Any) -> None:
        sync = commit._sync

        def open_for_all() -> None:
            commit._next = batch
            sync()

        commit._sync = open_for_all
        try:
            lead(commit, batch, gate)
        finally:
            commit._sync = sync

    patch.setattr(GroupCommit, "_lead", joined)


def leftovers_not_cut_durably(patch: pytest.MonkeyPatch) -> None:
    """What was in a partial last cluster comes back under new data."""
    deaf(patch, Allocator, "_grow")


def clusters_of_a_failed_link_used_again(patch: pytest.MonkeyPatch) -> None:
    """Their entry may be on disk all the same."""
    link = WritableRequests._link_data

    def thrifty(requests: WritableRequests, kind: Kind, pos: int, extents: list[Extent], must_flush: bool) -> bool:
        try:
            return link(requests, kind, pos, extents, must_flush)
        except StorageError:
            requests._release(extents)
            raise

    patch.setattr(WritableRequests, "_link_data", thrifty)


def need_check_not_set_again_after_an_error(patch: pytest.MonkeyPatch) -> None:
    begin = NeedCheckGate._begin

    def hopeful(gate: NeedCheckGate, enter: bool = True) -> None:
        try:
            begin(gate, enter)
        except StorageError:
            gate._settle(dirty=True)
            raise

    patch.setattr(NeedCheckGate, "_begin", hopeful)


def tail_free_before_its_cut_is_durable(patch: pytest.MonkeyPatch) -> None:
    """After a failed flush the tail is appended to again, over what a crash may bring back."""
    trim = Allocator.trim_tail

    def eager(allocator: Allocator) -> None:
        try:
            trim(allocator)
        except StorageError:
            allocator._bounds.end = allocator._grown or allocator._bounds.end
            raise

    patch.setattr(Allocator, "trim_tail", eager)


class Case(NamedTuple):
    """Where a hazard shows."""

    seed: int
    shape: str = "4K/1"
    spec: dict[str, Any] = {}
    threads: int = 3
    share: float = 0.0
    mix: Sequence[int] = MIX
    states: int = 1000  # 1: guests see it
    errors: float = 0.0


OVERLAY: dict[str, Any] = {"backing": True}
NO_TABLES: dict[str, Any] = {"layout": {}}
ONE_TABLE: dict[str, Any] = {"layout": dict.fromkeys(range(8), "data")}
HAZARDS: dict[Callable[[pytest.MonkeyPatch], None], Case] = {
    no_flush_after_need_check: Case(6),
    no_flush_before_clearing: Case(12),
    clear_under_requests: Case(7, threads=6, mix=(60, 10, 5, 5, 0, 20)),
    l1_before_l2: Case(6, spec={**OVERLAY, **NO_TABLES}),
    link_before_data: Case(18, spec=OVERLAY),
    link_before_data_when_another_made_the_table: Case(1, spec={**OVERLAY, **NO_TABLES}, threads=6),
    claim_ignored: Case(16),
    new_zero_cluster_ignored: Case(16, spec=OVERLAY, threads=6, mix=(50, 40, 0, 5, 5, 0), states=1),
    prefill_zero_cluster_from_backing: Case(5, spec=OVERLAY),
    entries_stay_in_memory: Case(5),
    publish_before_write: Case(8, threads=6),
    links_race_for_a_sector: Case(11, threads=6),
    reuse_before_durable: Case(10),
    reuse_before_hole_is_durable: Case(4),
    used_counts_as_clean: Case(13),
    reuse_under_requests: Case(31, threads=8, spec=ONE_TABLE, mix=(30, 0, 20, 15, 35, 0), states=1),
    table_in_a_freed_cluster: Case(2, spec=ONE_TABLE),
    move_linked_before_copied: Case(7, "4K/2"),
    source_free_before_move_is_durable: Case(8, "4K/2"),
    fua_without_flush: Case(4),
    flush_joins_a_running_sync: Case(6),
    clusters_of_a_failed_link_used_again: Case(6, errors=0.1),
    need_check_not_set_again_after_an_error: Case(5, errors=0.1),
    tail_free_before_its_cut_is_durable: Case(24, threads=1, mix=(40, 0, 20, 10, 0, 30), errors=0.25),
    leftovers_not_cut_durably: Case(8, spec={"trailing": b"trailing" * 448}),
}


def setup_of(case: Case, directory: Path) -> Setup:
    spec = dict(case.spec)
    return Setup(directory, SHAPES[case.shape], spec.pop("backing", False), **spec)


def caught(hazard: Callable[[pytest.MonkeyPatch], None], setup: Setup, seed: int) -> str:
    """How, or "" if it was not."""
    with pytest.MonkeyPatch.context() as patch:
        hazard(patch)
        try:
            case = HAZARDS[hazard]
            rng = random.Random(seed)
            history = record(setup, rng, case.threads, share=case.share, mix=case.mix, errors=case.errors)
            check(setup, history, random.Random(seed), subsets=2, limit=case.states)
        except (AssertionError, QEDError) as error:  # QEDError: the engine's own checks failed
            return str(error) or repr(error)
    return ""


@pytest.mark.parametrize("module", ["resize", "commit"])
def test_simulator_catches_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """The flushes of a module do nothing."""
    flush = RecordedFile.flush

    def picky(file: RecordedFile) -> None:
        callers = [sys._getframe(depth).f_code.co_filename for depth in (1, 2, 3)]  # through an image, or not
        if module not in (Path(caller).stem for caller in callers):
            flush(file)

    monkeypatch.setattr(RecordedFile, "flush", picky)
    with pytest.raises((AssertionError, QEDError)):
        for seed in range(20):
            (tmp_path / str(seed)).mkdir()
            Offline(tmp_path / str(seed), random.Random(seed), "grow" if module == "resize" else module).check(2)


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.__name__)
def test_simulator_catches(hazard: Callable[[pytest.MonkeyPatch], None], tmp_path: Path) -> None:
    case = HAZARDS[hazard]
    setup = setup_of(case, tmp_path)
    # The known seed first; others for when a change of the engine has changed the order of things.
    assert any(caught(hazard, setup, seed) for seed in (case.seed, *range(1000, 1100)))


def test_a_seed_gives_the_same_history(tmp_path: Path) -> None:
    setup = Setup(tmp_path, SHAPES["4K/1"], True)
    for share in (0.0, 0.1):
        first, second = (record(setup, random.Random(5), threads=4, share=share) for _ in range(2))
        assert first.world.log == second.world.log
        assert first.events == second.events


def test_deadlock_is_found() -> None:
    scheduler = Scheduler(random.Random(0))
    with scheduler.locks():
        one, two = claims.threading.Lock(), claims.threading.Lock()

    def take(first: Any, second: Any) -> None:
        first.acquire()
        scheduler.pause()
        second.acquire()
        second.release()
        first.release()

    with pytest.raises(Deadlock):
        for _ in range(20):
            scheduler.run([lambda: take(one, two), lambda: take(two, one)])


@pytest.mark.parametrize(("cls", "method"), [(_Condition, "notify_all"), (GroupCommit, "_pass_on")])
def test_a_lost_wakeup_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type[object], method: str
) -> None:
    monkeypatch.setattr(cls, method, lambda *args: None)
    setup = Setup(tmp_path, SHAPES["4K/1"], True)
    with pytest.raises(Deadlock):
        for seed in range(20):
            record(setup, random.Random(seed), threads=4)
