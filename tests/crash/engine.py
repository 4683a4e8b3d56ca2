"""Histories: the engine under guests and maintenance, recorded; and what every crash of one must leave.

record():  threads of guest requests | maintenance | threads ... | close      -> a World's log, and the guest's view
check():   each state that a crash may leave: the engine opens and repairs it, and the guest looks; in some it writes
           before it looks, closes the image, and looks again at the next opening, and no space is lost
"""

from __future__ import annotations

import copy
import errno
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crash.guest import SECTOR, Choice, GuestModel, Violation
from crash.schedule import Scheduler
from support.crashes import FILE, Medium, Op, State, World
from support.qed_image import ImageSpec, QedFile, build
from unit.fakes import MemoryStorage

from qedcore.check.image_end import as_file
from qedcore.engine import allocator
from qedcore.engine.chain import open_image
from qedcore.engine.image import DEFAULT_L2_CACHE, QEDImage
from qedcore.errors import CorruptImageError, QEDError, StorageError
from qedcore.maintenance import compact
from qedcore.maintenance.repair import Repair
from qedcore.maintenance.tidy import tidy
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.flush import GroupCommit

KiB, MiB = 1024, 1024 * 1024
IMAGE = "image.qed"
_DEEP = 4  # one state in so many is written to and closed, too
_AGAIN = 24  # in one of so many the repair crashes as well
_AGAIN_STATES = 6
UNREADABLE = b"unreadable"  # what a sector shows whose entry is impossible
_CAPACITY = 1 << 20  # bytes behind the image in a storage whose size is fixed


class Shape(NamedTuple):
    """Geometry and size of an image."""

    cluster_size: int  # bytes
    table_size: int  # clusters
    size: int  # bytes: two or three L2 tables
    backing_size: int  # bytes: ends inside a cluster

    @property
    def table_span(self) -> int:
        """Guest bytes of one L2 table."""
        return self.cluster_size * self.table_size // 8 * self.cluster_size


SHAPES = {
    "4K/1": Shape(4 * KiB, 1, 5 * MiB, 5 * MiB - 701 * SECTOR),
    "4K/2": Shape(4 * KiB, 2, 9 * MiB - 3 * SECTOR, 8 * MiB + 5 * SECTOR),
    "4K/4": Shape(4 * KiB, 4, 17 * MiB + 3 * SECTOR, 8 * MiB + 5 * SECTOR),
    "4K/16": Shape(4 * KiB, 16, 65 * MiB, 512 * KiB - 3 * SECTOR),
    "64K/1": Shape(64 * KiB, 1, 1024 * MiB + 512 * KiB, 512 * KiB - 13 * SECTOR),
    "64K/2": Shape(64 * KiB, 2, 2048 * MiB + 512 * KiB, 512 * KiB - 13 * SECTOR),
    "64K/4": Shape(64 * KiB, 4, 4096 * MiB + 512 * KiB, 512 * KiB - 13 * SECTOR),
    "64K/16": Shape(64 * KiB, 16, 16384 * MiB - 3 * SECTOR, 512 * KiB - 13 * SECTOR),
}
# Of one history: large tables take long to look at.
LIMITS = {"4K/16": 400, "64K/1": 400, "64K/2": 100, "64K/4": 100, "64K/16": 50}  # states


def stamp(tag: int, sector: int) -> bytes:
    return (tag << 32 | sector + 1).to_bytes(8, "little") * (SECTOR // 8)


class Disk(MemoryStorage):
    """A storage of a Medium."""

    def __init__(self, data: bytes | bytearray, medium: Medium = FILE) -> None:
        super().__init__(name=IMAGE)
        self.data = data if isinstance(data, bytearray) else bytearray(data)
        self.fixed_size = medium.fixed
        self._medium = medium

    def truncate(self, size: int) -> None:
        self._medium.check(self.size(), size)
        super().truncate(size)

    def punch(self, offset: int, length: int) -> bool:
        return self._medium.holes and super().punch(offset, length)


class Setup:
    """An image to crash: its first content, its backing file, and how to open a state of it."""

    counts = True  # the image is not too large for its leaks to be found

    def __init__(self, directory: Path, shape: Shape, backing: bool, *, medium: Medium = FILE, **spec: Any) -> None:
        self.shape = shape
        self.sectors = shape.size // SECTOR
        self.backing = backing
        self.medium = medium
        self.base = MemoryStorage(b"".join(stamp(0xBA5E, s) for s in range(shape.backing_size // SECTOR)), "base")
        (directory / "base").write_bytes(self.base.data)
        if backing:
            spec.update(backing="base", no_probe=True)
        second = shape.table_span // shape.cluster_size  # guest cluster
        layout = {0: "data", 1: "zero", 2: "-", 3: "data", second - 1: "data", second: "data", second + 2: "zero"}
        spec.setdefault("layout", layout)
        built = build(
            directory / "first.qed",
            ImageSpec(cluster_size=shape.cluster_size, table_size=shape.table_size, size=shape.size, **spec),
        )
        self.path = Path(built.path)
        self.scratch = directory / "state.qed"
        self.watched: frozenset[int] = frozenset()  # sectors to look at, whatever else happens to them
        content = self.path.read_bytes()
        if medium.fixed:  # what was there before: anything, also what looks like tables
            content += (content[shape.cluster_size :] * (1 + _CAPACITY // len(content)))[:_CAPACITY]
            self.path.write_bytes(content)
        self._begin(content)

    def _begin(self, content: bytes) -> None:
        self.first = content
        self._initial: dict[int, tuple[bytes, bool]] = {}  # cluster -> content, and whether it is lost
        with QedFile(self.path) as image:
            self.damaged = bool(image.verify().impossible)

    def after(self, content: bytes, watched: Iterable[int]) -> Setup:
        """The image as one life has left it, for the next; `watched` are sectors that were in use."""
        setup = copy.copy(self)
        setup.path = self.path.with_name(f"{self.path.stem}+.qed")
        setup.path.write_bytes(content)
        setup.watched = self.watched | frozenset(watched)
        setup._begin(bytes(content))
        return setup

    def initial(self, sector: int) -> list[bytes]:
        """What the guest may find, as the independent reader sees it.

        Where an entry is impossible that is nothing, or what would be there without it: never anything else.
        """
        cluster, at = divmod(sector * SECTOR, self.shape.cluster_size)
        if cluster not in self._initial:
            pos, size = cluster * self.shape.cluster_size, self.shape.cluster_size
            with QedFile(self.path) as image:
                lost = image.is_lost(cluster)
                content = image.backing()(pos, size) if lost else image.read(pos, size)
                self._initial[cluster] = content, lost
        content, lost = self._initial[cluster]
        value = content[at : at + SECTOR]
        return [value, bytes(SECTOR), UNREADABLE] if lost else [value]

    def open(self, storage: Storage, writable: bool = True, l2_cache: int = DEFAULT_L2_CACHE) -> QEDImage:
        def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
            return storage if path == IMAGE else self.base

        return open_image(IMAGE, writable, opener=opener, l2_cache=l2_cache)

    @staticmethod
    def as_file(storage: Storage) -> Storage:
        """As what is not an open image wants it."""
        return as_file(storage, writable=True)

    def disk(self, content: bytes | bytearray) -> Disk:
        return Disk(content, self.medium)

    def judge(self, content: bytes | bytearray, name: str, space: bool = True) -> None:
        """The independent verifier on a closed image: sound, clean, without leaks if `space`.  Raises Violation."""
        self.scratch.write_bytes(content)
        with QedFile(self.scratch) as image:
            report = image.verify()
            last = max(image.in_use(), default=0)
        if len(report.impossible) < len(report.errors) or (report.errors and not self.damaged):
            raise Violation(f"{name}: {report.errors[:3]}")
        if report.need_check:
            raise Violation(f"{name}: not clean after a clean close")
        # No leak is what follows the last whole cluster; nor, where the size is fixed, the last one in use.
        end = last if self.medium.fixed else len(content) // self.shape.cluster_size
        leaks = [cluster for cluster in report.leaks if cluster < end]
        if space and leaks and self.counts:
            raise Violation(f"{name}: clusters {leaks[:5]} leak, {len(leaks)} in all")

    def hot(self, rng: random.Random) -> list[int]:
        """Sectors where guests like to write: around the borders of clusters, tables and files."""
        cluster, table = self.shape.cluster_size // SECTOR, self.shape.table_span // SECTOR
        end = min(self.shape.backing_size, self.shape.size) // SECTOR
        middle = rng.randrange(self.sectors // cluster) * cluster
        return [
            0,
            cluster,
            5 * cluster,
            table - cluster,
            table + 3 * cluster,
            end - 4,
            self.sectors - 2 * cluster,
            middle,
        ]


class CommittedFlushes:
    """A storage whose flushes are shared, as those of a file are."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._commit = GroupCommit(storage.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def flush(self) -> None:
        if self.heard():
            self._commit.flush()

    @staticmethod
    def heard() -> bool:
        """False: this flush is left out.  For hazards."""
        return True


class History:
    """What was done to an image, and what its guest was told: (ops before it, a method of GuestModel, arguments)."""

    def __init__(self, setup: Setup) -> None:
        self.world = World(files={IMAGE: setup.first}, medium=setup.medium)
        self.model = GuestModel(setup.initial, setup.sectors)
        self.model.watch(setup.watched)
        self.events: list[tuple[int, str, tuple[Any, ...]]] = []

    def tell(self, method: str, *args: Any) -> Any:
        result = getattr(self.model, method)(*args)
        self.events.append((len(self.world.log), method, args))
        return result


@contextmanager
def small_steps(shape: Shape) -> Iterator[None]:
    """Growth and maintenance in steps of a few clusters: more happens in small files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocator, "GROWTH_STEP", 8 * shape.cluster_size)
        patch.setattr(compact, "WINDOW", 4 * shape.cluster_size)
        yield


MIX = (45, 12, 10, 16, 9, 8)  # shares of write, zero, trim, flush, read and the timer


class Guest:
    """Random requests of one thread; `tags` are shared by all."""

    def __init__(
        self,
        setup: Setup,
        history: History,
        image: QEDImage,
        rng: random.Random,
        tags: Iterator[int],
        may_fail: bool = False,
    ) -> None:
        # What the guest bears: the storage fails, or an entry is impossible.
        self._bears = (StorageError,) * may_fail + (CorruptImageError,) * setup.damaged
        self._setup = setup
        self._tell = history.tell
        self._model = history.model
        self._image = image
        self._rng = rng
        self._tags = tags
        self._hot = setup.hot(rng)
        self.failed = 0  # changes

    def run(self, requests: int, mix: Sequence[int]) -> None:
        kinds = (self._write, self._zero, self._trim, self._flush, self._read, self._idle)
        for _ in range(requests):
            self._rng.choices(kinds, mix)[0]()

    def _range(self, lengths: tuple[int, ...]) -> tuple[int, int]:
        """(first, n) sectors."""
        n = self._rng.choice(lengths)
        first = min(self._rng.choice(self._hot) + self._rng.randrange(20), self._setup.sectors - n)
        return first, n

    def _clusters(self) -> tuple[int, int]:
        """(first, n) sectors, often of whole clusters."""
        cluster = self._setup.shape.cluster_size // SECTOR
        first, n = self._range((cluster, 2 * cluster, 3 * cluster, cluster + 3))
        return (first - first % cluster if self._rng.random() < 0.7 else first), n

    def _write(self) -> None:
        first, n = self._range((1, 1, 2, 8, 9, 30))
        tag = next(self._tags)
        data = b"".join(stamp(tag, sector) for sector in range(first, first + n))
        fua = self._rng.random() < 0.15
        self._change(first, data, True, fua, lambda: self._image.pwrite(data, first * SECTOR, fua=fua))

    def _zero(self) -> None:
        first, n = self._clusters() if self._rng.random() < 0.6 else self._range((1, 2, 8, 9, 30))
        fua, may_trim = self._rng.random() < 0.15, self._rng.random() < 0.5
        request = lambda: self._image.zero(first * SECTOR, n * SECTOR, fua, may_trim=may_trim)  # noqa: E731
        self._change(first, bytes(n * SECTOR), True, fua, request)

    def _trim(self) -> None:
        """Which of it is freed is the engine's choice; from then on it is what reads back."""
        first, n = self._clusters()
        fua = self._rng.random() < 0.15
        request = lambda: self._image.trim(first * SECTOR, n * SECTOR, fua)  # noqa: E731
        write = self._change(first, bytes(n * SECTOR), False, fua, request)
        if write is not None and self._model.alone(write):
            try:
                found = self._image.pread(n * SECTOR, first * SECTOR)
            except self._bears:
                return
            if self._model.alone(write):
                self._tell("settle", write, found, fua)

    def _change(self, first: int, data: bytes, certain: bool, fua: bool, request: Callable[[], None]) -> int | None:
        """The number of the write that `request` makes; None if it failed."""
        write: int = self._tell("begin", first, data, certain)
        try:
            request()
        except self._bears:
            self._tell("fail", write)
            self.failed += 1
            return None
        self._tell("end_fua" if fua else "end", write)
        return write

    def _flush(self) -> None:
        began = self._tell("begin_flush")
        try:
            self._image.flush()
        except self._bears:
            pass
        else:
            self._tell("end_flush", began)

    def _read(self) -> None:
        first, n = self._range((1, 8, 30))
        read = self._model.begin_read(range(first, first + n))
        with suppress(*self._bears):
            self._model.check_read(read, self._image.pread(n * SECTOR, first * SECTOR))

    def _idle(self) -> None:
        """The timer fires."""
        assert self._image._gate is not None
        with suppress(*self._bears):
            self._image._gate.clear()


def record(
    setup: Setup,
    rng: random.Random,
    threads: int = 3,
    requests: int = 12,
    phases: int = 2,
    share: float = 0.0,
    mix: Sequence[int] = MIX,
    errors: float = 0.0,
) -> History:
    """Run guests, `requests` of each thread in each phase, with maintenance between.  Raises Violation.

    `share` is the Scheduler's.  `errors` is the share of the changes, flushes and reads of the file that fail while
    guests run or the image is closed: of the changes some have been done all the same, or in part.  What was written
    may be given up when a flush fails.
    """
    history = History(setup)
    world = history.world
    scheduler = Scheduler(rng, share)
    world.pause = scheduler.pause
    tags = iter(range(1, 1 << 32))
    armed = False

    def fail(number: int = 0) -> None:
        if armed and rng.random() < errors / 2:
            raise StorageError("injected", code=rng.choice((errno.EIO, errno.ENOSPC)))

    def shorten(op: Op) -> Op | None:
        """Some of the sectors were written, then it failed."""
        if op.data and armed and rng.random() < errors / 2:
            return op._replace(data=op.data[: rng.randrange(len(op.data)) // SECTOR * SECTOR])
        return None

    given_up = False

    def give_up(path: str) -> None:
        nonlocal given_up
        given_up = True
        share = rng.choice((0.2, 0.8, 1.0))
        world.give_up(path, lambda: rng.random() < share)

    if errors:
        world.before = world.after = fail
        world.before_read = fail
        world.shorten = shorten
        world.flush_failed = give_up

    def look_again() -> None:
        """The cache may be dropped now, when the image is closed or opened: what shows then is what the disk has."""
        nonlocal given_up
        if given_up:
            history.tell("lose")
            given_up = False

    def reopened() -> QEDImage:
        look_again()
        storage = CommittedFlushes(world.open(IMAGE, True, CacheMode()))
        return setup.open(storage, l2_cache=rng.choice((0, DEFAULT_L2_CACHE)))

    def close(image: QEDImage) -> None:
        nonlocal armed
        began = history.tell("begin_flush")
        armed = True
        try:
            try:
                if rng.random() < 0.7:
                    with suppress(*(CorruptImageError,) * setup.damaged):
                        tidy(image)
            finally:
                image.close()
        except StorageError:
            if not errors:
                raise
        else:
            history.tell("end_flush", began)
        armed = False
        look_again()

    with small_steps(setup.shape), scheduler.locks():
        image = reopened()
        for phase in range(phases):
            if phase:
                # After an error a flush may fail for ever, and with it what is done to the open image.
                whatever = ("nothing", "kill", "reopen", "leaks", "all", "compact", "tidy")
                todo = rng.choice(whatever[: 5 if errors else 7])
                if todo == "kill":
                    image = reopened()
                elif todo == "compact":
                    compact.compact(image, zeros=rng.random() < 0.5)
                elif todo == "tidy":
                    tidy(image)
                elif todo != "nothing":
                    close(image)
                    if todo != "reopen":
                        Repair(setup.as_file(world.open(IMAGE, True, CacheMode()))).run(everything=todo == "all")
                    image = reopened()
            guests = [Guest(setup, history, image, rng, tags, errors > 0) for _ in range(threads)]
            armed = True
            scheduler.run([lambda guest=guest: guest.run(requests, mix) for guest in guests])  # type: ignore[misc]
            armed = False
        close(image)
    left = setup.disk(world.files[IMAGE])
    if errors:
        setup.open(left).close()  # which repairs it, if need be
    setup.judge(left.data, "closed", space=False)
    _compare(setup.open(left, writable=False), history.model.after_kill, "closed")
    return history


def check(
    setup: Setup,
    history: History,
    rng: random.Random,
    subsets: int = 4,
    limit: int = 1 << 62,
    part: float = 1.0,
    keep: list[State] | None = None,
) -> int:
    """Look at this part of the states that crashes may leave, `limit` at most; how many.  Raises Violation.

    One of them, any, is put into `keep`.
    """
    model = GuestModel(setup.initial, setup.sectors)
    model.watch(setup.watched)
    events = iter([*history.events, (1 << 62, "", ())])
    ops, method, args = next(events)
    states = 0
    with small_steps(setup.shape):
        for state in history.world.crash_states(rng, subsets, part):
            while ops <= state.ops:
                getattr(model, method)(*args)
                ops, method, args = next(events)
            if keep is not None and rng.randrange(states + 1) == 0:
                keep[:] = [state._replace(files={path: bytearray(data) for path, data in state.files.items()})]
            states += _check_state(setup, state, model.after_kill if state.whole else model.after_crash, rng)
            if states >= limit:
                break
    return states


def _check_state(setup: Setup, state: State, choices: Mapping[int, list[Choice]], rng: random.Random) -> int:
    states = 1
    try:
        if rng.randrange(_AGAIN) == 0:
            for again in _crashes_of_recovery(setup, state, rng):
                states += 1
                _check_open(setup, again, choices, rng)
        _check_open(setup, state, choices, rng)
    except QEDError as error:
        raise Violation(f"{state.name}: {error}") from error
    return states


def _crashes_of_recovery(setup: Setup, state: State, rng: random.Random) -> list[State]:
    """Some states that a crash during the opening of this state may leave."""
    world = World(files={IMAGE: bytes(state.files[IMAGE])}, medium=setup.medium)
    setup.open(world.open(IMAGE, True, CacheMode()))
    states = list(world.crash_states(rng))
    chosen = rng.sample(states, min(_AGAIN_STATES, len(states)))
    return [found._replace(name=f"{state.name}; opened; {found.name}") for found in chosen]


def _check_open(setup: Setup, state: State, choices: Mapping[int, list[Choice]], rng: random.Random) -> None:
    """Open a state as a user would and compare; or use it first, and compare then and at the next opening."""
    disk = setup.disk(state.files[IMAGE])
    image = setup.open(disk)
    if rng.randrange(_DEEP):
        _compare(image, choices, state.name)
        return
    look_first = rng.random() < 0.5
    if look_first:
        _compare(image, choices, state.name)
    # New allocations must not land on anything that is in use, nor on what nobody has looked at yet.
    expected: dict[int, list[Choice]] = dict(choices)
    bears = (CorruptImageError,) * setup.damaged
    for tag in range(rng.choice((1, 3, 12))):
        sector = rng.randrange(setup.sectors)
        value = stamp(0xF00 + tag, sector)
        try:
            image.pwrite(value, sector * SECTOR)
        except bears:
            continue
        if sector in expected:
            expected[sector] = [(value, expected[sector][0][1])]
    _compare(image, expected, f"{state.name}; written to after the crash")
    shown = dict(_show(image, expected))
    _close_as_the_server_does(image, bears)
    setup.judge(disk.data, f"{state.name}; opened, closed")
    again = setup.open(disk, writable=rng.random() < 0.5)
    for sector, value in _show(again, expected):
        if value != shown[sector]:
            raise Violation(f"{state.name}; opened, closed, opened: sector {sector} has changed")
    again.close()


def _close_as_the_server_does(image: QEDImage, bears: tuple[type[QEDError], ...]) -> None:
    with suppress(*bears):
        tidy(image)
    image.close()


def _runs(sectors: Iterable[int]) -> list[range]:
    """The same sectors, neighbours together."""
    runs: list[range] = []
    for sector in sorted(sectors):
        if runs and runs[-1].stop == sector:
            runs[-1] = range(runs[-1].start, sector + 1)
        else:
            runs.append(range(sector, sector + 1))
    return runs


def _show(image: QEDImage, sectors: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """(sector, content) of each; UNREADABLE where an entry is impossible."""
    per_cluster = image.geometry.cluster_size // SECTOR
    for run in _runs(sectors):
        try:
            found = image.pread(len(run) * SECTOR, run.start * SECTOR)
        except CorruptImageError:
            if len(run) == 1 or run.start // per_cluster == (run.stop - 1) // per_cluster:
                yield from ((sector, UNREADABLE) for sector in run)
            else:
                border = (run.start // per_cluster + 1) * per_cluster
                yield from _show(image, range(run.start, border))
                yield from _show(image, range(border, run.stop))
        else:
            for i, sector in enumerate(run):
                yield sector, found[i * SECTOR : (i + 1) * SECTOR]


def _compare(image: QEDImage, choices: Mapping[int, list[Choice]], name: str) -> None:
    for sector, value in _show(image, choices):
        if not any(value == choice for choice, _ in choices[sector]):
            raise Violation(f"{name}: sector {sector} holds {value.lstrip(bytes(1))[:8].hex()}, which it may not")
