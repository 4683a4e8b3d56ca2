"""Locks: what QEMU's programs see of them, who excludes whom, and that nothing is let go at the wrong moment."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.qed_image import Built

import qedcore
from qedcore.errors import QEDError, RequestError, StorageError, UnsupportedError
from qedcore.format.create import create
from qedcore.server.exports import OneImage
from qedcore.server.parameters import Parameters
from qedcore.server.shared_image import Opener
from qedcore.storage import file_lock
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.file import FileStorage
from qedcore.storage.file_lock import LockedError, Locking, Use, locking
from qedcore.storage.open import open_file
from qedcore.storage.replacing import replacing
from unit.fakes import open_fds

Image = Callable[..., Built]

# As QEMU 7.2 locks the file of a QED image (strace): -U, read-only, writable.
LOCKED = {
    Use.SHARED: {100},
    Use.READ: {100, 201, 203},
    Use.WRITE: {100, 101, 103, 201, 203},
}
FLOCK = "hhqqi0q"
READ_REFUSED = 'Failed to get shared "write" lock'
WRITE_REFUSED = 'Failed to get "write" lock'


def locked_bytes(path: str | os.PathLike[str]) -> set[int]:
    """The bytes near 100 and 200 of a file that anybody has locked."""
    fd = os.open(path, os.O_RDWR)
    try:
        found = set()
        for byte in [*range(90, 110), *range(190, 210)]:
            question = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            if struct.unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))[0] != fcntl.F_UNLCK:
                found.add(byte)
        return found
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file is shorter than the bytes that are locked, and stays so."""
    path = tmp_path / "file"
    path.write_bytes(b"image")
    return path


@pytest.fixture
def use(path: Path) -> Iterator[Callable[..., FileStorage]]:
    """use(Use.READ) opens the file and locks it for that."""
    opened: list[FileStorage] = []

    def make(how: Use, mode: CacheMode = CacheMode(), locking: Locking = Locking.AUTO) -> FileStorage:
        share = how is Use.SHARED
        opened.append(open_file(path, how is Use.WRITE, mode, locking=locking, share=share))
        return opened[-1]

    yield make
    for storage in opened:
        storage.close()


# What others see


@pytest.mark.parametrize("how", Use)
def test_bytes(use: Callable[..., FileStorage], path: Path, how: Use) -> None:
    storage = use(how)
    assert locked_bytes(path) == LOCKED[how]
    storage.close()
    assert locked_bytes(path) == set()
    assert path.read_bytes() == b"image"


def test_direct_storage_is_locked(tmp_path: Path, path: Path, use: Callable[..., FileStorage]) -> None:
    path.write_bytes(bytes(8192))
    try:
        use(Use.WRITE, CacheMode(direct=True))
    except StorageError as error:
        assert error.errno == errno.EINVAL
        pytest.skip("no O_DIRECT here")
    assert locked_bytes(path) == LOCKED[Use.WRITE]


def test_a_chain(image: Image) -> None:
    base = image("base.qed").path
    middle = image("middle.qed", backing="base.qed").path
    top = image("top.qed", backing="middle.qed").path
    with qedcore.open_image(top):
        found = [locked_bytes(path) for path in (top, middle, base)]
        assert found == [LOCKED[Use.WRITE], LOCKED[Use.READ], LOCKED[Use.READ]]
        with qedcore.open_image(image("other.qed", backing="middle.qed").path):  # a base may have many overlays
            pass
        with pytest.raises(LockedError, match=f"{WRITE_REFUSED}. Is another process using the image .*base.qed"):
            qedcore.open_image(base)
    assert locked_bytes(top) == locked_bytes(middle) == locked_bytes(base) == set()


def test_raw_backing_files_too(image: Image, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(4096))
    with qedcore.open_image(image("top.qed", backing="base.raw", no_probe=True).path):
        assert locked_bytes(tmp_path / "base.raw") == LOCKED[Use.READ]


def test_nothing_is_left_when_opening_fails(image: Image) -> None:
    base = image("base.qed").path
    top = image("top.qed", backing="base.qed").path
    before = open_fds()
    with qedcore.open_image(base):
        with pytest.raises(StorageError, match=f"top.qed: its backing file: {READ_REFUSED}. .*base.qed"):
            qedcore.open_image(top)
    assert open_fds() == before
    assert locked_bytes(top) == set()


def test_a_loop_is_called_a_loop(image: Image) -> None:
    """The image is locked for writing when the chain comes back to it."""
    top = image("top.qed", backing="below.qed").path
    image("below.qed", backing="top.qed")
    for writable in (True, False):
        with pytest.raises(UnsupportedError, match="form a loop"):
            qedcore.open_image(top, writable)


# Who excludes whom


REFUSED = {
    (Use.READ, Use.WRITE): WRITE_REFUSED,
    (Use.WRITE, Use.READ): READ_REFUSED,
    (Use.WRITE, Use.WRITE): WRITE_REFUSED,
}


@pytest.mark.parametrize("second", Use)
@pytest.mark.parametrize("first", Use)
def test_matrix(use: Callable[..., FileStorage], path: Path, first: Use, second: Use) -> None:
    use(first)
    before = open_fds()
    if (first, second) in REFUSED:
        with pytest.raises(LockedError) as caught:
            use(second)
        assert str(caught.value) == f"{REFUSED[first, second]}. Is another process using the image [{path}]?"
        assert caught.value.errno == errno.EAGAIN
        assert locked_bytes(path) == LOCKED[first]
        assert open_fds() == before
    else:
        use(second)
        assert locked_bytes(path) == LOCKED[first] | LOCKED[second]


@pytest.mark.parametrize(
    "byte, refused",
    [
        (200, dict.fromkeys(Use, 'Failed to get "consistent read" lock')),
        (203, {Use.WRITE: 'Failed to get "resize" lock'}),
        (103, {Use.WRITE: 'Failed to get shared "resize" lock', Use.READ: 'Failed to get shared "resize" lock'}),
        (102, {}),
        (202, {}),
    ],
)
def test_each_permission_counts(
    use: Callable[..., FileStorage], path: Path, byte: int, refused: dict[Use, str]
) -> None:
    """Whoever has only one byte, as some of QEMU's users do."""
    with open(path, "rb") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        for how in Use:
            if how in refused:
                with pytest.raises(LockedError, match=refused[how]):
                    use(how)
            else:
                use(how).close()


def test_a_write_lock_of_somebody_else(use: Callable[..., FileStorage], path: Path) -> None:
    """Not QEMU's way, but it must not be overlooked."""
    with open(path, "r+b") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        with pytest.raises(LockedError, match="Failed to lock byte 100. Is another process using the image"):
            use(Use.READ)


# Changing


def test_a_refused_change_changes_nothing(use: Callable[..., FileStorage], path: Path) -> None:
    reader, other = use(Use.READ), use(Use.READ)
    with pytest.raises(LockedError, match=WRITE_REFUSED):
        reader.lock(Use.WRITE)
    other.close()
    assert locked_bytes(path) == LOCKED[Use.READ]
    reader.lock(Use.WRITE)
    assert locked_bytes(path) == LOCKED[Use.WRITE]
    reader.lock(Use.READ)
    assert locked_bytes(path) == LOCKED[Use.READ]


def test_what_stays_is_never_let_go(use: Callable[..., FileStorage], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step, a program that wants to write is refused."""
    reader = use(Use.READ)
    calls = 0

    def watched(fd: int, command: int, arg: bytes) -> bytes:
        nonlocal calls
        monkeypatch.undo()
        with pytest.raises(LockedError):
            use(Use.WRITE)
        monkeypatch.setattr(file_lock.fcntl, "fcntl", watched)
        calls += 1
        return real(fd, command, arg)

    real: Any = fcntl.fcntl
    monkeypatch.setattr(file_lock.fcntl, "fcntl", watched)
    reader.lock(Use.WRITE)
    reader.lock(Use.READ)
    monkeypatch.undo()
    assert calls > 5


def test_the_locks_live_as_long_as_the_last_copy_of_the_file(use: Callable[..., FileStorage], path: Path) -> None:
    """nbdkit forks after the image was opened; and kill -9 is enough to free it."""
    storage = use(Use.WRITE)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[storage.fd])
    try:
        storage.close()
        assert locked_bytes(path) == LOCKED[Use.WRITE]
    finally:
        child.kill()
        child.wait()
    assert locked_bytes(path) == set()


# Where there are no locks


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """no_locks(code): every question fails with `code`; a list of the commands that were tried."""

    def arrange(code: int) -> list[int]:
        commands: list[int] = []

        def fail(fd: int, command: int, arg: bytes) -> bytes:
            commands.append(command)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(file_lock.fcntl, "fcntl", fail)
        return commands

    return arrange


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_locks(use: Callable[..., FileStorage], no_locks: Callable[[int], list[int]], code: int) -> None:
    commands = no_locks(code)
    use(Use.WRITE)
    assert fcntl.F_OFD_GETLK not in commands  # found out with the first byte that is locked
    with pytest.raises(StorageError, match="cannot lock .*: its file system has no locks"):
        use(Use.WRITE, locking=Locking.ON)


def test_locks_that_can_only_be_asked_for(use: Callable[..., FileStorage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems answer questions, and refuse the locks."""
    really = file_lock.fcntl.fcntl

    def fail(fd: int, command: int, arg: bytes) -> object:
        if command == fcntl.F_OFD_SETLK:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return really(fd, command, arg)

    monkeypatch.setattr(file_lock.fcntl, "fcntl", fail)
    assert not use(Use.WRITE).has_writer()
    with pytest.raises(StorageError, match="its file system has no locks"):
        use(Use.WRITE, locking=Locking.ON)


def test_a_writer_is_seen(use: Callable[..., FileStorage]) -> None:
    reader = use(Use.SHARED)
    assert not reader.has_writer()
    use(Use.WRITE)
    assert reader.has_writer()


def test_other_errors_are_errors(use: Callable[..., FileStorage], no_locks: Callable[[int], list[int]]) -> None:
    no_locks(errno.EIO)
    before = open_fds()
    with pytest.raises(StorageError, match="cannot lock .*: Input/output error"):
        use(Use.READ)
    assert open_fds() == before


def test_off_asks_nothing(use: Callable[..., FileStorage], no_locks: Callable[[int], list[int]]) -> None:
    commands = no_locks(errno.EIO)
    use(Use.WRITE, locking=Locking.OFF)
    use(Use.WRITE, locking=Locking.OFF)
    assert not commands


def test_names_of_locking() -> None:
    assert [locking(name) for name in ("auto", "on", "off")] == list(Locking)
    with pytest.raises(RequestError, match="lock=maybe is not one of auto, on, off"):
        locking("maybe")


# A server: the image is read first, and written later


def test_opener_raises_the_lock_it_has(path: Path, use: Callable[..., FileStorage]) -> None:
    opener = Opener(Locking.AUTO)
    reader = opener(str(path), False, CacheMode())
    writer = opener(str(path), True, CacheMode())
    assert locked_bytes(path) == LOCKED[Use.WRITE]
    reader.close()
    assert locked_bytes(path) == LOCKED[Use.WRITE]  # both have it
    with pytest.raises(LockedError):
        use(Use.READ)
    writer.close()
    assert locked_bytes(path) == set()


def test_opener_of_a_replaced_file(path: Path, tmp_path: Path, use: Callable[..., FileStorage]) -> None:
    """Readers have the old file: nobody writes to the new one as if it were that."""
    opener = Opener(Locking.AUTO)
    reader = opener(str(path), False, CacheMode())
    (tmp_path / "new").write_bytes(b"new")
    os.replace(tmp_path / "new", path)
    before = open_fds()
    with pytest.raises(StorageError, match="it was replaced since it was first opened"):
        opener(str(path), True, CacheMode())
    assert open_fds() == before
    use(Use.WRITE)  # the new file has no locks of ours
    reader.close()


def one_image(path: Path, **values: str) -> OneImage:
    """What a server has for file=."""
    parameters = Parameters(lambda line: None, lambda line: None)
    for name, value in {"file": str(path), **values}.items():
        parameters.take(name, value)
    parameters.complete()
    exports = OneImage(parameters, str(path))
    exports.prepare()
    return exports


def test_promotion(image: Image) -> None:
    path = image(layout="D").path
    server = one_image(path)
    try:
        assert locked_bytes(path) == LOCKED[Use.READ]
        with qedcore.open_image(path, writable=False):
            with pytest.raises(LockedError, match=WRITE_REFUSED):
                server.open("", readonly=False)
            server.open("", readonly=True)
            assert not server._shared.image.writable
            assert server._shared.image.pread(512, 0)
        assert locked_bytes(path) == LOCKED[Use.READ]
        server.open("", readonly=False)  # the other reader has left
        assert server._shared.image.writable
        assert locked_bytes(path) == LOCKED[Use.WRITE]
    finally:
        server.close_all()
    assert locked_bytes(path) == set()


def test_promotion_that_fails_for_another_reason(image: Image) -> None:
    """Others may go on reading."""
    base = image("base.qed").path
    top = image("top.qed", backing="base.qed").path
    server = one_image(top)
    base.rename(base.with_name("away"))
    with pytest.raises(QEDError, match="No such file"):
        server.open("", readonly=False)
    assert locked_bytes(top) == LOCKED[Use.READ]
    server.close_all()


def test_two_images_of_one_process(image: Image) -> None:
    """As an overlay and its base: the base cannot be written while the overlay uses it."""
    base = image("base.qed").path
    top, below = one_image(image("top.qed", backing="base.qed").path), one_image(base)
    try:
        top.open("", readonly=False)
        with pytest.raises(LockedError, match=WRITE_REFUSED):
            below.open("", readonly=False)
        below.open("", readonly=True)
    finally:
        top.close_all()
        below.close_all()


def test_parameter(image: Image) -> None:
    path = image().path
    with qedcore.open_image(path):
        with pytest.raises(LockedError, match=READ_REFUSED):
            one_image(path)
        with pytest.raises(RequestError, match="lock=share is not one of auto, on, off"):
            one_image(path, lock="share")
        server = one_image(path, lock="off")
        server.open("", readonly=False)
        server.close_all()


# New files


def test_no_file_in_use_is_replaced(path: Path, tmp_path: Path, use: Callable[..., FileStorage]) -> None:
    for how in (Use.READ, Use.WRITE):
        storage = use(how)
        with pytest.raises(LockedError, match=WRITE_REFUSED), replacing(path):
            raise AssertionError("nothing must be made")
        with pytest.raises(LockedError, match=WRITE_REFUSED):
            create(path, 1 << 20)
        storage.close()
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"image"
    with replacing(path) as temporary:
        Path(temporary).write_bytes(b"new")
        with pytest.raises(LockedError):
            use(Use.READ)  # what would vanish under its user
    use(Use.WRITE)
    assert path.read_bytes() == b"new"


def test_a_file_that_is_left_alone_is_not_locked(path: Path, tmp_path: Path, use: Callable[..., FileStorage]) -> None:
    """Of several servers with create=true, one makes the image; those that come too late must not lock it out."""
    with pytest.raises(StorageError) as caught, replacing(path, replace=False):
        use(Use.WRITE)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(StorageError) as caught:
        create(path, 1 << 20, replace=False)  # in use
    assert caught.value.errno == errno.EEXIST
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"image"
