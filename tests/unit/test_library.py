"""What a program that imports qedcore calls: opening for writing, and what closing gives back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.qed_image import Built, assert_sound

import qedcore
from qedcore.engine import chain
from qedcore.errors import QEDError, StorageError
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.open import open_storage
from unit.fakes import CHANGES, FailAt, Tap

Image = Callable[..., Built]


def test_close_gives_back_what_is_free_inside_the_file(image: Image) -> None:
    """Leaks of another program, and what was freed in this opening."""
    built = image(layout=dict.fromkeys(range(40), "data"), leaks=3)
    with qedcore.open_image(built.path) as img:
        img.trim(2 << 16, 5 << 16)
        want = img.pread(img.size, 0)
    assert_sound(built.path)
    assert built.path.stat().st_size == built.end - (8 << 16)
    with qedcore.open_image(built.path, writable=False) as img:
        assert img.pread(img.size, 0) == want


def test_close_of_a_reader_changes_nothing(image: Image) -> None:
    built = image(layout="DD", leaks=3)
    before = built.path.read_bytes()
    qedcore.open_image(built.path, writable=False).close()
    assert built.path.read_bytes() == before


def test_damage_is_left_alone(image: Image) -> None:
    built = image(layout="DD", leaks=3, entries={2: 0x12345})
    before = built.path.read_bytes()
    lines: list[str] = []
    qedcore.open_image(built.path, log=lines.append).close()
    assert built.path.read_bytes() == before
    assert not lines  # nothing was freed in this opening


@pytest.mark.parametrize("late", [False, True])
def test_error_while_tidying(image: Image, late: bool) -> None:
    """Wherever it happens the image is closed, and nothing of the guest is lost."""
    for n in range(1, 60):
        built = image(layout=dict.fromkeys(range(9), "data"), leaks=3)
        fault = FailAt(n, CHANGES, late=late)

        def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
            return Tap(open_storage(path, writable, mode), fault)  # noqa: B023

        options: dict[str, Any] = {"opener": opener}
        img = qedcore.open_image(built.path, **options)
        want = built.read(0, img.size)
        try:
            img.close()
        except StorageError:
            pass
        with pytest.raises(QEDError):
            img.pread(1, 0)
        with qedcore.open_image(built.path) as img:
            assert img.pread(img.size, 0) == want
        assert_sound(built.path)
        if fault.hit is None:
            break
    assert n > 4


def test_ctrl_c_while_tidying(image: Image) -> None:
    """It gets through, and the image is closed and unlocked."""
    built = image(layout="DD")

    def interrupted(img: object) -> None:
        raise KeyboardInterrupt

    img = qedcore.open_image(built.path)
    img.pwrite(b"x", 2 << 16)
    want = img.pread(img.size, 0)
    img.tidy = interrupted
    with pytest.raises(KeyboardInterrupt):
        img.close()
    with pytest.raises(QEDError):
        img.pread(1, 0)
    with qedcore.open_image(built.path) as img:
        assert img.pread(img.size, 0) == want
    assert_sound(built.path)


@pytest.mark.parametrize("holes", [1, 2, 3])
def test_close_moves_tables_that_leave_no_room_for_each_other(image: Image, tmp_path: Path, holes: int) -> None:
    """Tables of four clusters in a row at the end of the file, and fewer clusters than that before them."""
    cs, reach = 4096, 2048 * 4096
    with (tmp_path / "base").open("wb") as base:
        base.truncate(10 * reach)
    built = image(cluster_size=cs, table_size=4, size=10 * reach, backing="base", features=4)
    with chain.open_image(built.path) as img:
        img.pwrite(b"d" * cs, 0)
        for cluster in range(1, 4):
            img.pwrite(b"e" * cs, cluster * cs)
        for table in range(1, 4):
            img.zero(table * reach, cs)
        img.trim(cs, holes * cs)
        img.flush()
        want = img.pread(4 * reach, 0)
    assert_sound(built.path, leaks=holes)
    with qedcore.open_image(built.path):
        pass
    assert_sound(built.path)
    with qedcore.open_image(built.path, writable=False) as img:
        assert img.pread(4 * reach, 0) == want
