"""Where new clusters come from, and what becomes of freed ones."""

from __future__ import annotations

import errno
import random
import threading

import pytest

from qedcore.check.cluster_use import DATA, ClusterUse
from qedcore.engine import allocator as alloc
from qedcore.engine import reclaim
from qedcore.engine.allocator import GROWTH_STEP, Allocator
from qedcore.engine.in_flight import InFlight
from qedcore.engine.reclaim import Extent, Reclaimer
from qedcore.errors import StorageError, UnreachableError
from qedcore.format.geometry import Bounds, Geometry
from unit.fakes import WAIT, Call, FailAt, Hook, Job, MemoryStorage, Tap

CS = 4096


def allocator(
    storage: Tap | MemoryStorage, clusters: int = 2, in_flight: InFlight | None = None, counted: bool = True
) -> tuple[Allocator, Reclaimer, Bounds]:
    """With `counted`, the census has found nothing: no clusters are shared, and none are leaked."""
    geometry = Geometry(CS, 1)
    bounds = Bounds(geometry, 1, storage.size())
    assert bounds.end == clusters * CS
    reclaimer = Reclaimer(storage, geometry, bounds, in_flight or InFlight())
    if counted:
        reclaimer.adopt(ClusterUse(0))
    return Allocator(storage, geometry, bounds, reclaimer), reclaimer, bounds


@pytest.fixture
def small_step(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(alloc, "GROWTH_STEP", 8 * CS)
    monkeypatch.setattr(reclaim, "_STEP", 8 * CS)
    return 8 * CS


def test_clusters_follow_the_end() -> None:
    tap = Tap(MemoryStorage(bytes(2 * CS)))
    target, reclaimer, bounds = allocator(tap)
    assert target.allocate(1) == Extent(2 * CS, 1, True)
    assert target.allocate(3) == Extent(3 * CS, 3, True)
    assert bounds.end == 6 * CS
    assert tap.log == [Call("truncate", 3 * CS + GROWTH_STEP)]  # one step serves them all
    assert tap.size() >= bounds.end


def test_nothing_grows_into_what_is_in_doubt(small_step: int) -> None:
    """A growth that met no answer may still make zeros, under what was put there since."""
    storage = MemoryStorage(bytes(2 * CS))
    doubt = range(3 * CS, 7 * CS)
    storage.in_doubt = lambda offset, length: offset < doubt.stop and offset + length > doubt.start  # type: ignore[attr-defined]
    target, _, bounds = allocator(storage)
    offsets = [target.allocate(n).offset for n in (1, 1, 2, 9)]
    assert offsets == [7 * CS, 8 * CS, 9 * CS, 11 * CS]
    assert bounds.end == 20 * CS <= storage.size()


def test_growth_steps(small_step: int) -> None:
    """The file always covers what was handed out, and is made longer only when it has to be."""
    tap = Tap(MemoryStorage(bytes(2 * CS)))
    target, reclaimer, bounds = allocator(tap)
    sizes = []
    for n in (1, 8, 1, 30, 8, 1):
        target.allocate(n)
        assert tap.size() >= bounds.end
        sizes.append(tap.size() // CS)
    assert sizes == [11, 11, 20, 50, 50, 59]
    assert len(tap.log) == 4


@pytest.mark.parametrize("code", [errno.EFBIG, errno.ENOSPC, errno.EDQUOT])
def test_step_over_a_limit(small_step: int, code: int) -> None:
    """Over the limit only by the step: exactly what is wanted; more than that fails and changes nothing."""
    limit = 6 * CS

    def hook(call: Call) -> None:
        if call.name == "truncate" and call.offset > limit:
            raise StorageError("too long", OSError(code, ""))

    storage = MemoryStorage(bytes(2 * CS))
    target, reclaimer, bounds = allocator(Tap(storage, hook))
    assert target.allocate(3) == Extent(2 * CS, 3, True)
    assert storage.size() == 5 * CS
    with pytest.raises(StorageError) as caught:
        target.allocate(2)
    assert caught.value.errno == code
    assert (bounds.end, storage.size()) == (5 * CS, 5 * CS)
    assert target.allocate(1) == Extent(5 * CS, 1, True)
    limit = 100 * CS
    assert target.allocate(2) == Extent(6 * CS, 2, True)


# length of the file -> where the first cluster goes; its bytes so far must not show
PARTIAL = {
    2 * CS: 2 * CS,
    2 * CS + 1: 2 * CS,
    2 * CS + 512: 2 * CS,
    3 * CS - 512: 2 * CS,
    3 * CS - 511: 3 * CS,  # counts as a whole cluster, as in QEMU
    3 * CS - 1: 3 * CS,
}


@pytest.mark.parametrize("length", PARTIAL)
def test_partial_last_cluster_reads_as_zeros(length: int) -> None:
    storage = MemoryStorage(b"\xee" * length)
    end = PARTIAL[length]
    target, reclaimer, bounds = allocator(storage, end // CS)
    extent = target.allocate(2)
    assert extent == Extent(end, 2, True)
    assert not any(storage.data[end : end + 2 * CS])
    assert storage.data[: min(length, end)] == b"\xee" * min(length, end)
    assert not any(storage.data[min(length, end) : end])


def test_partial_last_cluster_is_kept_until_something_is_allocated() -> None:
    storage = MemoryStorage(b"\xee" * (2 * CS + 100))
    target, reclaimer, _ = allocator(storage)
    target.trim_tail()
    assert storage.data == b"\xee" * (2 * CS + 100)


@pytest.mark.parametrize(("step", "late"), [("truncate", False), ("truncate", True), ("flush", False)])
def test_failed_growth_of_a_partial_cluster_is_repeated(step: str, late: bool) -> None:
    """And what was cut off must be durable, whoever cut it."""
    storage = MemoryStorage(b"\xee" * (2 * CS + 100))
    tap = Tap(storage, FailAt(1, [step], late=late))
    target, reclaimer, bounds = allocator(tap)
    with pytest.raises(StorageError):
        target.allocate(1)
    assert bounds.end == 2 * CS
    del tap.log[:]
    assert target.allocate(1) == Extent(2 * CS, 1, True)
    assert [call.name for call in tap.log] == ["truncate", "flush", "truncate"]
    assert not any(storage.data[2 * CS : 3 * CS])


def test_released_clusters_are_used_again() -> None:
    """Punched first, several with one flush: a failed request may have written to them."""
    tap = Tap(MemoryStorage(bytes(2 * CS)))
    target, reclaimer, bounds = allocator(tap)
    first, second = target.allocate(3), target.allocate(2)
    tap.inner.pwrite(b"\xee" * (5 * CS), first.offset)
    reclaimer.release(first)
    del tap.log[:]
    assert target.allocate(1) == Extent(2 * CS, 1, True)
    assert tap.log == [Call("punch", first.offset, 3 * CS), Call("flush")]
    assert target.allocate(4) == Extent(3 * CS, 2, True)  # fewer than asked for
    assert flushes(tap) == 1 and not any(tap.inner.data[first.offset : second.offset])  # type: ignore[attr-defined]
    reclaimer.release(second)
    assert target.allocate(2) == second
    assert target.allocate(1).offset == bounds.end - CS


@pytest.mark.parametrize("fault", ["punch", "flush"])
def test_released_clusters_that_cannot_be_cleaned(fault: str) -> None:
    """Without holes they are used as they are; after a failed flush nothing is known of them."""
    tap = Tap(MemoryStorage(bytes(2 * CS)))
    target, reclaimer, _ = allocator(tap)
    extent = target.allocate(3)
    reclaimer.release(extent)
    tap.hook = FailAt(1, [fault])
    if fault == "flush":
        with pytest.raises(StorageError):
            target.allocate(1)
        assert reclaimer.free_clusters == 3
        assert target.allocate(3) == extent
    else:
        assert target.allocate(1) == Extent(extent.offset, 1, False)
        assert target.allocate(4) == Extent(extent.offset + CS, 2, False)
        assert [call.name for call in tap.log].count("punch") == 1  # it is not tried again


def test_leaks_are_used_before_the_file_grows() -> None:
    storage = MemoryStorage(b"\xee" * (9 * CS))
    target, reclaimer, bounds = allocator(tap := Tap(storage), 9, counted=False)
    use = ClusterUse(9)
    for n in (0, 1, 4, 5, 8):
        use.claim(n, DATA)
    reclaimer.adopt(use)
    assert reclaimer.free_clusters == 4
    assert [target.allocate(3) for _ in range(3)] == [
        Extent(2 * CS, 2, True),
        Extent(6 * CS, 2, True),
        Extent(9 * CS, 3, True),
    ]
    assert not any(storage.data[2 * CS : 4 * CS]) and not any(storage.data[6 * CS : 8 * CS])
    assert storage.data[4 * CS : 6 * CS] == b"\xee" * (2 * CS)
    assert flushes(tap) == 1


def test_tables_are_appended() -> None:
    target, reclaimer, bounds = allocator(MemoryStorage(bytes(2 * CS)))
    reclaimer.release(target.allocate(3))
    assert target.allocate_table() == Extent(5 * CS, 1, True)


def flushes(tap: Tap) -> int:
    return [call.name for call in tap.log].count("flush")


def filled(
    n: int, in_flight: InFlight | None = None, hook: Hook | None = None, counted: bool = True
) -> tuple[Tap, Allocator, Reclaimer, Extent]:
    """n clusters of data, after a header and a table."""
    tap = Tap(MemoryStorage(bytes(2 * CS)), hook)
    target, reclaimer, _ = allocator(tap, in_flight=in_flight, counted=counted)
    extent = target.allocate(n)
    tap.inner.pwrite(b"\xee" * (n * CS), extent.offset)
    del tap.log[:]
    return tap, target, reclaimer, extent


def test_freed_clusters_are_punched_and_used_again_as_fresh() -> None:
    tap, target, reclaimer, extent = filled(4)
    reclaimer.free(Extent(extent.offset + 2 * CS, 2, False))
    reclaimer.free(Extent(extent.offset, 1, False))
    reclaimer.free(Extent(extent.offset + CS, 1, False))
    assert tap.log == [] and reclaimer.pending == 4
    assert target.allocate(9) == Extent(extent.offset, 4, True)
    assert tap.log == [Call("punch", extent.offset, 4 * CS), Call("flush")]
    assert reclaimer.pending == 0
    assert bytes(4 * CS) == tap.inner.data[extent.offset :][: 4 * CS]  # type: ignore[attr-defined]
    assert target.allocate(1).offset > extent.offset + 3 * CS


def test_flushes_of_clients_do_the_work() -> None:
    tap, target, reclaimer, extent = filled(4)
    reclaimer.free(extent)
    reclaimer.flush()
    assert tap.log == [Call("punch", extent.offset, 4 * CS), Call("flush")] and reclaimer.pending == 0
    del tap.log[:]
    assert target.allocate(4) == Extent(extent.offset, 4, True)
    reclaimer.flush()
    assert tap.log == [Call("flush")]


def test_nothing_is_punched_or_reused_under_a_request() -> None:
    in_flight = InFlight()
    tap, target, reclaimer, extent = filled(4, in_flight)
    with in_flight.request():  # it may have looked the clusters up
        reclaimer.free(extent)
        for _ in range(3):
            reclaimer.flush()
        assert not target.allocate(4).offset == extent.offset
        assert "punch" not in [call.name for call in tap.log]
    assert target.allocate(4) == Extent(extent.offset, 4, True)


def test_requests_that_came_later_do_not_matter() -> None:
    in_flight = InFlight()
    tap, target, reclaimer, extent = filled(4, in_flight)
    reclaimer.free(extent)
    with in_flight.request():
        assert target.allocate(4) == Extent(extent.offset, 4, True)


def test_what_cannot_be_punched_is_used_as_it_is() -> None:
    tap, target, reclaimer, extent = filled(4, hook=FailAt(1, ["punch"]))
    reclaimer.free(extent)
    assert target.allocate(4) == Extent(extent.offset, 4, False)


def test_nothing_is_reused_after_a_failed_flush() -> None:
    tap, target, reclaimer, extent = filled(4, hook=FailAt(1, ["flush"]))
    reclaimer.free(extent)
    with pytest.raises(StorageError):
        reclaimer.flush()
    for _ in range(9):
        assert target.allocate(1).offset > extent.offset + 3 * CS
        reclaimer.flush()


@pytest.mark.parametrize(
    ("failing", "error"), [("flush", UnreachableError("away")), ("flush", MemoryError()), ("punch", MemoryError())]
)
def test_freed_clusters_wait_for_a_server_or_memory(failing: str, error: Exception) -> None:
    """Nothing was lost then: the next flush makes them free."""
    away = [error]

    def hook(call: Call) -> None:
        if call.name == failing and away:
            raise away.pop()

    tap, target, reclaimer, extent = filled(3, hook=hook)
    reclaimer.free(extent)
    with pytest.raises(type(error)):
        reclaimer.flush()
    assert (reclaimer.pending, reclaimer.free_clusters) == (3, 0)
    reclaimer.flush()
    assert (reclaimer.pending, reclaimer.free_clusters) == (0, 3)
    assert target.allocate(3) == extent


def test_a_damaged_image_reuses_nothing() -> None:
    """Another entry may point to the same cluster."""
    tap, target, reclaimer, extent = filled(4, counted=False)
    reclaimer.give_up()
    reclaimer.free(extent)
    reclaimer.flush()
    assert target.allocate(4).offset > extent.offset and "punch" not in [call.name for call in tap.log]


def test_nothing_is_adopted_after_another_writer_was_noticed() -> None:
    tap, target, reclaimer, extent = filled(4, counted=False)
    reclaimer.give_up()
    reclaimer.adopt(ClusterUse(6))
    assert reclaimer.free_clusters == 0 and target.allocate(1).offset == extent.offset + 4 * CS


@pytest.mark.parametrize("counted", [True, False])
def test_unlinking_waits_until_all_is_counted(counted: bool) -> None:
    _, _, reclaimer, _ = filled(1, counted=False)
    order: list[str] = []

    def unlink() -> None:
        started.set()
        reclaimer.wait()
        order.append("unlinks")

    started = threading.Event()
    waiter = Job(unlink)
    assert started.wait(WAIT) and not reclaimer.decided
    order.append("counted")
    if counted:
        reclaimer.adopt(ClusterUse(0))
    else:
        reclaimer.give_up()
    waiter.result()
    assert order == ["counted", "unlinks"]


def test_few_freed_clusters_wait(small_step: int) -> None:
    """A flush is made for as much as is worth it, not for every cluster."""
    tap, target, reclaimer, extent = filled(64 * 32)
    for n in range(64 - 1):
        reclaimer.free(Extent(extent.offset + n * CS, 1, False))
        if n == 3:
            target.allocate(1)
            assert flushes(tap) == 0
    reclaimer.free(Extent(extent.offset + 63 * CS, 1, False))
    assert target.allocate(100).n == 64
    assert flushes(tap) == 1


def test_a_full_disk_takes_what_was_freed() -> None:
    full = False

    def hook(call: Call) -> None:
        if full and call.name == "truncate":
            raise StorageError("full", OSError(errno.ENOSPC, ""))

    tap, target, reclaimer, extent = filled(64 * 32, hook=hook)
    tap.inner.truncate(target._bounds.end)
    target._grown, full = target._bounds.end, True
    with pytest.raises(StorageError) as caught:
        target.allocate(1)
    assert caught.value.errno == errno.ENOSPC
    reclaimer.free(Extent(extent.offset, 1, False))
    assert target.allocate(2) == Extent(extent.offset, 1, True)
    with pytest.raises(StorageError):
        target.allocate(1)


def test_the_file_shrinks_when_its_tail_was_freed() -> None:
    tap, target, reclaimer, extent = filled(8)
    reclaimer.free(Extent(extent.offset + 5 * CS, 3, False))
    reclaimer.free(Extent(extent.offset + 2 * CS, 1, False))
    reclaimer.flush()
    target.trim_tail()
    assert tap.size() == target._bounds.end == extent.offset + 5 * CS
    assert target.allocate(1) == Extent(extent.offset + 2 * CS, 1, True)
    assert target.allocate(1) == Extent(extent.offset + 5 * CS, 1, True)


def test_the_file_shrinks_also_when_it_has_not_grown() -> None:
    tap = Tap(MemoryStorage(b"\xee" * (6 * CS)))
    target, reclaimer, bounds = allocator(tap, 6)
    reclaimer.free(Extent(4 * CS, 2, False))
    reclaimer.flush()
    target.trim_tail()
    assert tap.size() == bounds.end == 4 * CS


def test_many_freed_runs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "_MAX_UNLINKED", 10)
    tap, target, reclaimer, extent = filled(64 * 32)
    for n in range(0, 100, 2):
        reclaimer.free(Extent(extent.offset + n * CS, 1, False))
    assert flushes(tap) == 5 and len(reclaimer._unlinked) < 10


def test_flushes_that_would_free_nothing_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "_MAX_UNLINKED", 10)
    in_flight = InFlight()
    tap, target, reclaimer, extent = filled(64 * 32, in_flight)
    with in_flight.request():  # it takes long
        for n in range(0, 100, 2):
            reclaimer.free(Extent(extent.offset + n * CS, 1, False))
    assert flushes(tap) == 0
    reclaimer.free(Extent(extent.offset + 100 * CS, 1, False))
    assert flushes(tap) == 1 and reclaimer.pending == 0


def test_trim_tail() -> None:
    storage = MemoryStorage(bytes(2 * CS))
    target, reclaimer, bounds = allocator(storage)
    kept, a, b, c = (target.allocate(n) for n in (1, 2, 1, 3))
    for extent in (b, a, c):  # in any order: they lie one behind the other
        reclaimer.release(extent)
    target.trim_tail()
    assert bounds.end == storage.size() == kept.offset + CS
    assert target.allocate(2) == Extent(a.offset, 2, True)  # fresh again: the file was cut
    assert not any(storage.data[a.offset :])


def test_trim_tail_keeps_what_lies_below_a_used_cluster() -> None:
    storage = MemoryStorage(bytes(2 * CS))
    target, reclaimer, bounds = allocator(storage)
    below = target.allocate(2)
    used = target.allocate(1)
    reclaimer.release(below)
    target.trim_tail()
    assert bounds.end == storage.size() == used.offset + CS
    assert target.allocate(1) == Extent(below.offset, 1, True)


def test_trim_tail_of_an_untouched_file_only_flushes() -> None:
    tap = Tap(MemoryStorage(bytes(2 * CS + 77)))
    allocator(tap)[0].trim_tail()
    assert tap.log == [Call("flush")]


FAILED_TRIMS = [("truncate", False), ("truncate", True), ("flush", False)]


@pytest.mark.parametrize("clean", [False, True], ids=["used", "clean"])
@pytest.mark.parametrize(("fault", "late"), FAILED_TRIMS)
def test_after_a_failed_trim(fault: str, late: bool, clean: bool) -> None:
    """The tail is cut off, or not, or not for good: the file must cover what is handed out, and fresh means zeros."""
    storage = MemoryStorage(bytes(2 * CS))
    target, reclaimer, _ = allocator(tap := Tap(storage))
    extent = target.allocate(2)
    storage.pwrite(b"\xee" * (2 * CS), extent.offset)
    if clean:
        reclaimer.free(extent)
        reclaimer.flush()
    else:
        reclaimer.release(extent)
    before = bytes(storage.data)  # comes back if the cut is lost
    tap.hook = FailAt(1, [fault], late=late)
    with pytest.raises(StorageError):
        target.trim_tail()
    for n in (1, 1, 3):
        found = target.allocate(n)
        assert storage.size() >= found.offset + n * CS
        content = before[found.offset :][: n * CS] + bytes(storage.data[found.offset :][: n * CS])
        assert not found.fresh or not any(content)


@pytest.mark.parametrize(("fault", "late"), FAILED_TRIMS)
def test_leftovers_after_a_failed_trim(fault: str, late: bool) -> None:
    """They are still to be cut off, durably, before the file grows."""
    storage = MemoryStorage(b"\xee" * (3 * CS + 100))
    target, reclaimer, _ = allocator(tap := Tap(storage), 3)
    reclaimer.free(Extent(2 * CS, 1, False))
    reclaimer.flush()
    tap.hook = FailAt(1, [fault], late=late)
    with pytest.raises(StorageError):
        target.trim_tail()
    del tap.log[:]
    found = target.allocate(2)
    assert [call.name for call in tap.log] == ["truncate", "flush", "truncate"]
    assert found.fresh and not any(storage.data[found.offset : found.offset + 2 * CS])


def test_random_life(rng: random.Random, small_step: int) -> None:
    """Never a cluster twice; fresh means zeros; the file covers everything that is in use, and is not too long."""
    storage = MemoryStorage(b"\xee" * (2 * CS + 600))
    target, reclaimer, bounds = allocator(storage)
    held: list[Extent] = []
    for step in range(600):
        action = rng.random()
        if action < 0.6 or not step:  # until the file has grown once, its end is left alone
            extent = target.allocate(rng.randint(1, 5))
            mine = set(range(extent.offset // CS, extent.offset // CS + extent.n))
            for other in held:
                assert not mine & set(range(other.offset // CS, other.offset // CS + other.n))
            span = slice(extent.offset, extent.offset + extent.n * CS)
            assert extent.offset % CS == 0 and extent.offset >= 2 * CS
            assert storage.size() >= span.stop and bounds.end >= span.stop
            if extent.fresh:
                assert not any(storage.data[span])
            storage.data[span] = b"\xdd" * (extent.n * CS)
            held.append(extent)
        elif action < 0.8 and held:
            reclaimer.release(held.pop(rng.randrange(len(held))))
        elif action < 0.92 and held:
            reclaimer.free(held.pop(rng.randrange(len(held))))
        elif action < 0.95:
            reclaimer.flush()
        elif action >= 0.95:
            reclaimer.flush()
            target.trim_tail()
            top = max((extent.offset + extent.n * CS for extent in held), default=2 * CS)
            assert storage.size() == bounds.end == top
    assert storage.data[: 2 * CS] == b"\xee" * (2 * CS)


def test_threads_get_different_clusters(small_step: int) -> None:
    storage = MemoryStorage(bytes(2 * CS))
    target, reclaimer, bounds = allocator(storage)

    def work(n: int) -> list[Extent]:
        return [target.allocate(n) for _ in range(100)]

    extents = sorted(extent for job in [Job(work, n) for n in (1, 2, 3)] for extent in job.result())
    assert [extent.offset for extent in extents[1:]] == [e.offset + e.n * CS for e in extents[:-1]]
    assert bounds.end == (2 + 600) * CS <= storage.size()
