"""Histories of several openings: what one life of an image leaves is where the next begins.

    guests      the engine, which is closed, killed, or loses its power
    qemu        a writer that behaves like QEMU (qemu_writer.py), likewise
    a command   check -r leaks, check -r all, compact, tidy, resize, commit and rebase, likewise

Whatever a life does, the next finds what the guest may find, in every sector that was ever in use: the independent
reader says what that is.  An entry that leads nowhere hides its cluster, and never shows anything else.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crash.engine import (
    IMAGE,
    MIX,
    SECTOR,
    SHAPES,
    CommittedFlushes,
    History,
    Setup,
    check,
    record,
    small_steps,
    stamp,
)
from crash.guest import Violation
from crash.qemu_writer import QemuWriter
from support.crashes import FILE, Medium, State
from support.litter import littering
from support.qed_image import QedFile

from qedcore.errors import QEDError
from qedcore.maintenance import compact
from qedcore.maintenance.repair import Repair
from qedcore.maintenance.resize import resize
from qedcore.maintenance.tidy import tidy
from qedcore.storage.cache_mode import CacheMode

MEDIA = (FILE, FILE, FILE, Medium(holes=False), Medium(fixed=True), Medium(fixed=True, holes=False))
_STATES = 40  # of a life are looked at
_TRIES = 60  # states in which something is looked for


def first(
    directory: Path,
    rng: random.Random,
    shape: str | None = None,
    medium: Medium | None = None,
    backing: bool | None = None,
) -> Setup:
    """An image, sound, and often full of leaks and holes."""
    name = shape or rng.choice(("4K/1", "4K/1", "4K/2", "4K/4"))
    spec: dict[str, Any] = {}
    if rng.random() < 0.6:
        spec["litter"] = littering(rng, SHAPES[name].cluster_size, SHAPES[name].table_size)
    if rng.random() < 0.3:
        spec["layout"] = dict.fromkeys(rng.sample(range(1100), 12), "data")
    spec["l1_last"] = rng.random() < 0.2
    spec["reverse"] = rng.random() < 0.2
    medium = medium or rng.choice(MEDIA)
    if not medium.fixed:
        spec["trailing"] = rng.choice((b"", b"", b"trailing" * 448))
    return Setup(directory, SHAPES[name], rng.random() < 0.4 if backing is None else backing, medium=medium, **spec)


class Life:
    """One of an image: `run` gives its history, and what it has left is `left`."""

    def __init__(self, setup: Setup, rng: random.Random) -> None:
        self.setup = setup
        self.rng = rng

    def open(self, history: History, writable: bool = True) -> Any:
        """The image of this life, for the engine."""
        storage = history.world.open(IMAGE, writable, CacheMode())
        return self.setup.open(CommittedFlushes(storage), writable)

    def run(self) -> tuple[int, State]:
        """(states that were looked at, one of them).  Raises Violation and QEDError."""
        raise NotImplementedError


class Guests(Life):
    """Guests, few or many requests: a table that nobody reads is not noticed."""

    mixes: Sequence[Sequence[int]] = (MIX, (80, 0, 0, 20, 0, 0), (50, 5, 30, 10, 0, 5))

    def run(self) -> tuple[int, State]:
        rng = self.rng
        history = record(
            self.setup,
            rng,
            threads=rng.choice((1, 1, 3)),
            requests=rng.choice((1, 2, 3, 8)),
            phases=1,
            mix=rng.choice(self.mixes),
            errors=rng.choice((0.0, 0.0, 0.0, 0.05)),
        )
        return judged(self.setup, history, rng)


class Qemu(Life):
    """QEMU, as far as the image is not damaged: it would damage it more."""

    def run(self) -> tuple[int, State]:
        setup, rng = self.setup, self.rng
        history = History(setup)
        tags = iter(range(0x100000, 0x200000))

        def below(pos: int, length: int) -> bytes:
            data = bytearray(length)
            setup.base.pread_into(data, pos)
            return bytes(data)

        storage = history.world.open(IMAGE, True, CacheMode())
        writer = QemuWriter(storage, below if setup.backing else None)
        cluster = setup.shape.cluster_size // SECTOR
        for _ in range(rng.randint(0, 4)):
            n = rng.choice((1, 8, cluster, 3 * cluster))
            sector = min(rng.choice(setup.hot(rng)) + rng.randrange(20), setup.sectors - n)
            choice = rng.random()
            if choice < 0.7:
                tag = next(tags)
                writer.write(sector * SECTOR, b"".join(stamp(tag, s) for s in range(sector, sector + n)))
                history.tell("watch", range(sector, sector + n))
            elif choice < 0.85:
                writer.zero_clusters(min(sector, setup.sectors - cluster) // cluster * cluster * SECTOR, 1)
            else:
                writer.flush()
        for _ in range(rng.randint(1, 3)):  # these are what a power loss may tear apart
            sector = rng.choice(setup.hot(rng)) // cluster * cluster
            sector = min(sector + rng.randrange(8) * cluster, setup.sectors - cluster)
            writer.write(sector * SECTOR, b"".join(stamp(next(tags), s) for s in range(sector, sector + 3)))
        if rng.random() < 0.1:
            writer.close()
        return 0, self._left(history)

    def _left(self, history: History) -> State:
        """Often one that says that it is clean, with entries that lead nowhere; none with shared clusters."""
        states = list(history.world.crash_states(self.rng, 8))
        chosen = states[-1]
        for state in self.rng.sample(states, min(_TRIES, len(states))):
            self.setup.scratch.write_bytes(state.files[IMAGE])
            with QedFile(self.setup.scratch) as image:
                report = image.verify()
            if len(report.errors) > len(report.impossible):
                raise Violation(f"the writer has made shared clusters: {report.errors[:3]}")
            chosen = state
            if report.impossible and not report.need_check and self.rng.random() < 0.5:
                break
        return chosen


class Command(Life):
    """A command, on whatever there is: the guest's bytes are the same before and after, and at every crash."""

    name = ""  # one of COMMANDS, or any of them

    def run(self) -> tuple[int, State]:
        setup, rng = self.setup, self.rng
        history = History(setup)
        history.tell("watch", [sector + i for sector in setup.hot(rng) for i in range(8)])
        name = self.name or rng.choice(COMMANDS)
        with small_steps(setup.shape):
            try:
                self._do(name, history)
            except QEDError as error:
                if not setup.damaged:
                    raise Violation(f"{name} of a sound image: {error}") from error
        left = history.world.files[IMAGE]
        if not setup.damaged:
            setup.judge(left, name, space=name not in ("grow", "shrink"))
        try:
            return judged(setup, history, rng)
        except Violation as violation:
            raise Violation(f"{name}: {violation}") from None

    def _do(self, name: str, history: History) -> None:
        if name in ("leaks", "all"):
            storage = self.setup.as_file(history.world.open(IMAGE, True, CacheMode()))
            Repair(storage).run(everything=name == "all")
            return
        with self.open(history) as image:
            if name == "tidy":
                tidy(image)
            elif name in ("compact", "zeros"):
                compact.compact(image, zeros=name == "zeros")
            else:
                resize(image, image.size + 40 * self.setup.shape.cluster_size)
                if name == "shrink":
                    resize(image, self.setup.shape.size)


COMMANDS = ("leaks", "leaks", "all", "all", "compact", "zeros", "tidy", "grow", "shrink")


class CheckAll(Command):
    name = "all"


class Trims(Guests):
    mixes = ((50, 0, 45, 5, 0, 0),)


LIVES = {"guests": Guests, "trims": Trims, "qemu": Qemu, "command": Command, "check -r all": CheckAll}


def judged(setup: Setup, history: History, rng: random.Random) -> tuple[int, State]:
    """Look at some of the states; and one of them, often the last."""
    kept: list[State] = []
    states = check(
        setup, history, rng, subsets=2, part=min(1.0, _STATES / (1 + 6 * len(history.world.log))), keep=kept
    )
    if not kept or rng.random() < 0.2:
        last = State("closed", len(history.world.log), dict(history.world.files), True)
        kept = [last]
    return states, kept[0]


def plan(rng: random.Random) -> Iterator[str]:
    """Names of lives, of which QEMU's come early: what it does to a damaged image is its own."""
    if rng.random() < 0.6:
        yield "qemu"
    yield rng.choice(("guests", "guests", "command"))
    yield rng.choice(("guests", "command"))
    if rng.random() < 0.5:
        yield rng.choice(("guests", "command"))


def play(directory: Path, rng: random.Random, lives: Iterable[str] = (), **start: Any) -> int:
    """A history; how many states were looked at.  Raises Violation and QEDError, whose notes tell what led there."""
    setup = first(directory, rng, **start)
    states = 0
    past = [f"{setup.medium}, {'' if setup.backing else 'no '}backing file"]
    for name in lives or plan(rng):
        if name == "qemu" and (setup.damaged or setup.medium.fixed):
            continue  # of no use to either
        past.append(name)
        try:
            more, state = LIVES[name](setup, rng).run()
        except (AssertionError, QEDError) as error:
            raise Violation(f"{', '.join(past)}: {error or repr(error)}") from error
        states += more
        past.append(state.name)
        setup = setup.after(bytes(state.files[IMAGE]), watched(setup, state))
    return states


def watched(setup: Setup, state: State) -> Iterator[int]:
    """The first sectors of all clusters that have an entry, and what was watched before."""
    setup.scratch.write_bytes(state.files[IMAGE])
    per_cluster = setup.shape.cluster_size // SECTOR
    with QedFile(setup.scratch) as image:
        for cluster in image.entries():
            yield from (s for s in (cluster * per_cluster, cluster * per_cluster + 3) if s < setup.sectors)
        yield from (0, setup.sectors - 1)
