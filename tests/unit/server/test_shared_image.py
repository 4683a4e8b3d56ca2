"""One image for all of its clients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.qed_image import ImageSpec, build

from qedcore.errors import StorageError
from qedcore.server.exports import ImageDirectory, make_exports
from qedcore.server.parameters import Parameters
from qedcore.server.shared_image import SharedImage
from unit.fakes import Job
from unit.server.world import LIMIT, FakeImage, World, start


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
