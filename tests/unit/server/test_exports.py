"""Exports and the images behind them: who opens, who closes, who waits for whom."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.qed_image import ImageSpec, build, patch_header

from qedcore.engine.image import QEDImage
from qedcore.errors import NotWritableError, QEDError, StorageError
from qedcore.server.exports import ImageDirectory, make_exports
from qedcore.server.parameters import Parameters
from unit.server.world import LIMIT, World, start


def test_that_an_image_may_only_be_read_is_told_once(
    world: World, directory: ImageDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each image, though it is closed between its clients."""
    really = world.open_image

    def only_read(path: str, writable: bool, opener: object, in_flight: object) -> QEDImage:
        if writable:
            raise NotWritableError(f"cannot open {os.path.basename(path)}", code=errno.EROFS)
        return really(path, writable, opener, in_flight)

    monkeypatch.setattr(world, "open_image", only_read)
    for name in "abab":
        directory.close(directory.open(name, False))
        assert not any(world.open_now.values())
    assert world.lines == [f"cannot open {name}: served read-only, as with -r" for name in "ab"]


@pytest.mark.parametrize("where", ["open_fails", "timer_fails"])
def test_what_failed_to_open_leaves_nothing(world: World, directory: ImageDirectory, where: str) -> None:
    getattr(world, where).add("a")
    with pytest.raises((StorageError, RuntimeError)):
        directory.open("a", False)
    assert not directory._images and not any(world.open_now.values())
    getattr(world, where).clear()
    directory.close(directory.open("a", False))


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
