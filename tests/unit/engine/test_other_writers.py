"""Two writers of one image where nothing locks it: what the header tells them of each other (need_check.py, I3)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built, QedFile, assert_sound, read_header

import qedcore
from qedcore.errors import ForeignWriterError, StorageError
from qedcore.maintenance.tidy import tidy
from qedcore.storage.file_lock import Locking
from qedcore.storage.open import open_file

CS = 64 * KiB
NEED_CHECK = 2


@pytest.fixture
def unlocked(image: Callable[..., Built]) -> Iterator[Callable[[], qedcore.QEDImage]]:
    """Each call opens the image once more for writing; layout "D-Z", 64 MiB."""
    path = image(size=64 * MiB, layout="D-Z").path
    opened: list[qedcore.QEDImage] = []

    def open_again(**options: Any) -> qedcore.QEDImage:
        opened.append(qedcore.open_image(path, opener=partial(open_file, locking=Locking.OFF), **options))
        return opened[-1]

    yield open_again
    for img in opened:
        img.close()


def refused(img: qedcore.QEDImage, pos: int) -> None:
    """Whatever would change a table is refused; the rest works."""
    for change in (lambda: img.pwrite(b"x", pos), lambda: img.trim(0, CS), lambda: img.zero(0, CS, may_trim=True)):
        with pytest.raises(ForeignWriterError, match="another program writes to it"):
            change()
    img.pwrite(b"in place", 10)
    assert img.pread(8, 10) == b"in place"
    img.flush()


def test_the_first_who_writes_has_it(unlocked: Callable[[], qedcore.QEDImage]) -> None:
    one, two = unlocked(), unlocked()
    one.pwrite(stamp(2, MiB, CS), MiB)
    refused(two, 2 * MiB)
    one.pwrite(stamp(3, 2 * MiB, CS), 2 * MiB)
    path = one.storage.name
    one.close()
    two.close()
    assert not read_header(path)["features"] & NEED_CHECK
    assert_sound(path)
    with QedFile(path) as file:
        assert_same(file.read(MiB, CS), stamp(2, MiB, CS))
        assert_same(file.read(2 * MiB, CS), stamp(3, 2 * MiB, CS))


def test_one_that_is_repaired_under_its_writer(unlocked: Callable[[], qedcore.QEDImage]) -> None:
    """A second server, or QEMU, takes it for one that was not closed cleanly.  Both stop, and it must be checked."""
    one = unlocked()
    one.pwrite(b"1", MiB)
    two = unlocked()  # clears NEED_CHECK
    with pytest.raises(ForeignWriterError):
        for n in range(600):  # until the file has to grow
            one.pwrite(b"1" * CS, 2 * MiB + n * CS)
    refused(one, 60 * MiB)
    refused(two, 61 * MiB)
    path = one.storage.name
    assert read_header(path)["features"] & NEED_CHECK
    before = os.stat(path).st_size
    one.close()
    two.close()
    assert read_header(path)["features"] & NEED_CHECK
    assert os.stat(path).st_size == before  # nothing is cut off: it may be the other's


def test_noticed_at_the_end_of_a_dirty_period(unlocked: Callable[[], qedcore.QEDImage]) -> None:
    one = unlocked()
    one.pwrite(b"1", MiB)
    two = unlocked()
    with pytest.raises(ForeignWriterError):
        one.close()
    assert read_header(one.storage.name)["features"] & NEED_CHECK
    with pytest.raises(ForeignWriterError):
        two.pwrite(b"2", 2 * MiB)


def test_no_holes_are_punched_into_what_is_another_ones(unlocked: Callable[[], qedcore.QEDImage]) -> None:
    one = unlocked()
    for pos in (MiB, 2 * MiB):
        one.pwrite(b"1" * CS, pos)
    one.trim(MiB, CS)
    one.flush()
    one.pwrite(b"1" * CS, 3 * MiB)
    one.trim(2 * MiB, CS)  # free with the next flush
    two = unlocked()  # repairs: nothing leads there
    two.pwrite(b"2" * CS, 4 * MiB)
    two.pwrite(b"2" * CS, 5 * MiB)
    two.close()
    with pytest.raises(ForeignWriterError):
        tidy(one)
    with qedcore.open_image(one.storage.name, writable=False) as img:
        assert_same(img.pread(2 * CS, 4 * MiB), b"2" * CS + bytes(CS))
        assert_same(img.pread(CS, 5 * MiB), b"2" * CS)


def test_a_failed_header_write_is_not_taken_for_one(image: Callable[..., Built]) -> None:
    from unit.fakes import FailAt, open_tapped

    built = image(size=MiB, layout="D")
    img, tap = open_tapped(built.path)
    tap.hook = FailAt(1, ["pwrite"], late=True)  # it is on disk, and reported as failed
    with pytest.raises(StorageError):
        img.pwrite(b"x", 5 * CS)
    tap.hook = None
    img.pwrite(b"y", 5 * CS)
    img.close()
    assert_sound(built.path)
