"""Exports and the images behind them: who opens, who closes, who waits for whom."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from support.qed_image import ImageSpec, build, patch_header

from qedcore.engine.image import QEDImage
from qedcore.errors import QEDError, StorageError
from qedcore.format.geometry import Geometry
from qedcore.server.exports import ImageDirectory, make_exports
from qedcore.server.parameters import Parameters
from qedcore.server.shared_image import SharedImage
from unit.fakes import Job, MemoryStorage

LIMIT = 20  # seconds, for what must happen


class FakeImage:
    """Stands for a QEDImage, and tells `world` what happens to it."""

    def __init__(self, world: World, name: str, writable: bool) -> None:
        self.world, self.name, self.writable = world, name, writable

    def start_timer(self) -> None:
        if self.name in self.world.timer_fails:
            raise RuntimeError("can't start new thread")

    geometry = Geometry(4096, 1)
    storage = MemoryStorage()

    def holes(self, search: bool) -> int:
        return 0

    def succeed(self, retired: QEDImage) -> None:
        pass

    def close(self) -> None:
        self.world.close(self)


class World(Parameters):
    """Opens fake images; closing those in `slow` waits for the event there."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        super().__init__(self.lines.append, self.lines.append)
        self.guard = threading.Lock()
        self.open_now: dict[str, int] = {}
        self.events: list[str] = []
        self.slow: dict[str, tuple[threading.Event, threading.Event]] = {}  # name -> (close has begun, may end)
        self.close_fails: set[str] = set()
        self.open_fails: set[str] = set()
        self.timer_fails: set[str] = set()

    def open_image(self, path: str, writable: bool, opener: object, in_flight: object) -> QEDImage:
        name = os.path.basename(path)
        with self.guard:
            self.events.append(f"open {name} {'rw' if writable else 'ro'}")
            if name in self.open_fails:
                raise StorageError("no luck", code=errno.EACCES)
            self.open_now[name] = self.open_now.get(name, 0) + 1
        image: Any = FakeImage(self, name, writable)
        return image  # type: ignore[no-any-return]

    def close(self, image: FakeImage) -> None:
        with self.guard:
            self.events.append(f"close {image.name}")
        if image.name in self.slow:
            begun, may_end = self.slow[image.name]
            begun.set()
            assert may_end.wait(LIMIT)
        with self.guard:
            self.events.append(f"closed {image.name}")
            self.open_now[image.name] -= 1
        if image.name in self.close_fails:
            raise StorageError("cannot flush")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def directory(world: World, tmp_path: Path) -> ImageDirectory:
    for name in "abc":
        build(tmp_path / name, ImageSpec())
    return ImageDirectory(world, str(tmp_path))


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_open_waits_for_the_close_of_the_same_image_only(world: World, directory: ImageDirectory) -> None:
    a = directory.open("a", False)
    begun, may_end = world.slow["a"] = (threading.Event(), threading.Event())
    closer = start(lambda: directory.close(a))
    assert begun.wait(LIMIT)
    b = directory.open("b", False)  # hangs if a's close were in the way
    opened: list[SharedImage] = []
    opener = start(lambda: opened.append(directory.open("a", False)))
    opener.join(0.2)  # time to go wrong
    assert not opened
    may_end.set()
    closer.join(LIMIT)
    opener.join(LIMIT)
    assert world.events == ["open a rw", "close a", "open b rw", "closed a", "open a rw"]
    assert opened[0].image.writable
    del world.slow["a"]
    directory.close(opened[0])
    directory.close(b)
    assert not directory._images and not any(world.open_now.values())


def test_one_open_serves_all(world: World, directory: ImageDirectory) -> None:
    images = [directory.open("a", False) for _ in range(5)]
    assert len(set(map(id, images))) == 1
    for image in images:
        assert world.open_now == {"a": 1}
        directory.close(image)
    assert world.events == ["open a rw", "close a", "closed a"]


def test_a_writer_after_readers_reopens(world: World, directory: ImageDirectory) -> None:
    """The readers' image stays open for the requests that are in flight in it."""
    reader = directory.open("a", True)
    before = reader.image
    writer = directory.open("a", False)
    assert writer is reader and writer.image is not before and writer.image.writable and not before.writable
    assert world.open_now == {"a": 2}
    assert directory.open("a", True).image is writer.image
    for _ in range(3):
        directory.close(reader)
    assert world.open_now == {"a": 0}
    assert world.events[:2] == ["open a ro", "open a rw"]


@pytest.mark.parametrize("where", ["open_fails", "timer_fails"])
def test_what_failed_to_open_leaves_nothing(world: World, directory: ImageDirectory, where: str) -> None:
    getattr(world, where).add("a")
    with pytest.raises((StorageError, RuntimeError)):
        directory.open("a", False)
    assert not directory._images and not any(world.open_now.values())
    getattr(world, where).clear()
    directory.close(directory.open("a", False))


def test_a_writer_that_fails_does_not_hurt_readers(world: World, directory: ImageDirectory) -> None:
    reader = directory.open("a", True)
    before = reader.image
    world.open_fails.add("a")
    with pytest.raises(StorageError):
        directory.open("a", False)
    assert reader.image is before and world.open_now == {"a": 1}
    directory.close(reader)
    assert world.open_now == {"a": 0} and not directory._images


def test_a_failed_close_is_told_and_over(world: World, directory: ImageDirectory) -> None:
    image = directory.open("a", False)
    world.close_fails.add("a")
    with pytest.raises(StorageError, match="cannot flush"):
        directory.close(image)
    assert not directory._images
    world.close_fails.clear()
    again = directory.open("a", False)
    assert world.open_now == {"a": 1}
    directory.close(again)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_an_error_in_tidying_leaves_nothing_open(
    world: World, directory: ImageDirectory, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(FakeImage, "holes", Mock(side_effect=error))
    image = directory.open("a", readonly=False)
    with suppress(RuntimeError):  # a bug
        directory.close(image)
    assert world.open_now["a"] == 0
    assert ("out of memory" in "".join(world.lines)) == (error is MemoryError)


def test_who_waits_cuts_tidying_short(
    world: World, directory: ImageDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to stop as soon as somebody wants the image, and not before."""
    told: list[bool] = []
    waiting: list[Job] = []
    here = threading.Event()

    class Queue(list[None]):
        def append(self, item: None) -> None:
            super().append(item)
            here.set()

    def tidy(image: object, stop: Callable[[], bool]) -> int:
        told.append(stop())
        waiting.append(Job(directory.open, "a", False))
        assert here.wait(LIMIT)
        told.append(stop())
        monkeypatch.undo()
        return 0

    monkeypatch.setattr("qedcore.maintenance.tidy.tidy", tidy)
    first = directory.open("a", readonly=False)
    first._waiting = Queue()
    directory.close(first)
    assert told == [False, True]
    again = waiting[0].result()
    assert world.open_now["a"] == 1
    directory.close(again)
    assert not again._waiting


def test_close_all_closes_the_rest_in_spite_of_errors(world: World, directory: ImageDirectory) -> None:
    images = [directory.open(name, False) for name in "abc"]
    world.close_fails.update("ab")
    with pytest.raises(StorageError, match="cannot flush"):
        directory.close_all()
    assert world.open_now == {"a": 0, "b": 0, "c": 0}
    assert world.lines == ["cannot flush"]  # the second one
    world.close_fails.clear()
    for image in images:  # late: nothing is left to do
        directory.close(image)
    assert sum(event.startswith("closed") for event in world.events) == 3


def test_a_read_that_is_late_for_the_reopening(tmp_path: Path) -> None:
    """It has the image that was read-only, and comes after the writer has freed and reused its cluster."""
    path = tmp_path / "image.qed"
    size = 4096
    build(path, ImageSpec(cluster_size=size, table_size=1, layout="DD"))
    parameters = Parameters(lambda line: None, lambda line: None)
    parameters.take("file", str(path))
    parameters.complete()
    exports = make_exports(parameters)
    exports.prepare()
    shared = exports.open("", readonly=True)
    before = shared.image
    assert before.pread(size, 0) != bytes(size)
    exports.open("", readonly=False)
    shared.image.trim(0, size)
    shared.image.flush()
    shared.image.pwrite(b"s" * size, 5 * size)
    assert before.pread(size, 0) == bytes(size)
    shared.image.pwrite(b"t" * size, 0)
    assert before.pread(size, 0) == b"t" * size
    exports.close_all()


def test_names_of_one_file(world: World, directory: ImageDirectory, tmp_path: Path) -> None:
    os.link(tmp_path / "a", tmp_path / "z")
    a, z = directory.open("a", False), directory.open("z", False)
    assert a is z and world.open_now == {"a": 1}
    os.unlink(tmp_path / "a")  # the other name still is one
    directory.close(a)
    assert directory.open("z", True) is z
    directory.close(z)
    directory.close(z)


def test_threads(world: World, directory: ImageDirectory, rng: random.Random) -> None:
    """Each file is open at most once at any time, and not at all in the end."""
    wrong: list[object] = []

    def work(names: list[str]) -> None:
        try:
            for name in names:
                image = directory.open(name, False)
                if world.open_now[name] != 1:
                    wrong.append((name, world.open_now[name]))
                directory.close(image)
        except BaseException as error:  # noqa: BLE001 - the main thread reports it
            wrong.append(error)

    plans = [rng.choices("aab", k=300) for _ in range(6)]
    threads = [start(lambda plan=plan: work(plan)) for plan in plans]  # type: ignore[misc]
    for thread in threads:
        thread.join(LIMIT)
    assert not wrong
    assert not directory._images and not any(world.open_now.values())


class Swapping(Parameters):
    """Changes the directory between the look at a file and its opening."""

    swap: Callable[[], object]

    def open_image(self, path: str, writable: bool, *rest: Any) -> QEDImage:
        self.swap()
        return super().open_image(path, writable, *rest)


@pytest.mark.parametrize("writable", [False, True])
def test_what_is_put_in_the_way_is_not_used(tmp_path: Path, writable: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    built = build(home / "a", ImageSpec())
    outside = build(tmp_path / "outside", ImageSpec(features=2)).path
    content = outside.read_bytes()
    parameters = Swapping(print, print)
    directory = ImageDirectory(parameters, str(home))

    def link() -> None:
        built.path.unlink()
        built.path.symlink_to(outside)

    parameters.swap = link
    with pytest.raises(StorageError, match="replaced meanwhile") as caught:
        directory.open("a", not writable)
    assert caught.value.errno == errno.ESTALE
    assert outside.read_bytes() == content
    assert not directory._images

    built.path.unlink()
    built = build(home / "a", ImageSpec())

    def fifo() -> None:
        built.path.unlink()
        os.mkfifo(built.path)

    parameters.swap = fifo
    with pytest.raises(StorageError, match="not a file"):  # and no wait for its other end
        directory.open("a", not writable)


def test_a_directory_that_is_gone(tmp_path: Path, world: World) -> None:
    directory = ImageDirectory(world, str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="cannot list"):
        directory.prepare()
    assert directory.default() == ""
    with pytest.raises(QEDError):
        directory.open("", True)
    with pytest.raises(StorageError):
        directory.open("a", True)


def test_unreadable_is_unlisted(tmp_path: Path, directory: ImageDirectory) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tmp_path / "b").chmod(0)
    assert [name for name, _ in directory.names()] == ["a", "c"]


def test_descriptions(tmp_path: Path, directory: ImageDirectory) -> None:
    patch_header(tmp_path / "b", table_size=3)
    assert directory.names() == [
        ("a", "QED image, 16 MiB, 64 KiB clusters"),
        ("b", "QED image, damaged"),
        ("c", "QED image, 16 MiB, 64 KiB clusters"),
    ]


def test_one_image_stays_open_between_clients(tmp_path: Path, world: World) -> None:
    world.take("file", str(tmp_path / "x"))
    world.complete()
    exports = make_exports(world)
    exports.prepare()
    for _ in range(2):
        exports.close(exports.open("any", False))
    assert world.events == ["open x ro", "open x rw"]
    exports.close_all()
    assert world.open_now == {"x": 0}
    exports.close_all()


def test_who_creates_second_serves_the_first_ones_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server makes the image after this one looked for it."""
    built = build(tmp_path / "x.qed", ImageSpec(layout="DD"))
    content = built.path.read_bytes()
    lines: list[str] = []
    parameters = Parameters(lines.append, lines.append)
    for name, value in (("file", str(built.path)), ("create", "true"), ("size", "1M")):
        parameters.take(name, value)
    parameters.complete()
    exports = make_exports(parameters)
    with monkeypatch.context() as patch:
        patch.setattr("qedcore.server.exports.os.path.exists", lambda path: False)
        exports.prepare()
    assert built.path.read_bytes() == content
    assert len(lines) == 1 and "exists" in lines[0]
    exports.close_all()
    assert os.listdir(tmp_path) == ["x.qed"]
