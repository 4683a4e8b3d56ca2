"""What cannot be opened."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qedcore.errors import StorageError
from qedcore.storage.cache_mode import CACHE_MODES
from qedcore.storage.open import open_storage
from unit.fakes import open_fds
from unit.storage.files import Open, content


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(path))  # the length of such names is limited


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


REFUSED: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "fifo": (make_fifo, {errno.EINVAL}),
    "directory": (Path.mkdir, {errno.EISDIR, errno.EINVAL}),
    "socket": (make_socket, {errno.ENXIO}),
    "character device": (lambda path: path.symlink_to("/dev/null"), {errno.EINVAL}),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), {errno.EINVAL}),
    "absent": (lambda path: None, {errno.ENOENT}),
    "below a file": (lambda path: None, {errno.ENOTDIR}),
    "symlink loop": (make_loop, {errno.ELOOP}),
    "symlink to nothing": (lambda path: path.symlink_to("gone"), {errno.ENOENT}),
}


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize("mode", ["writeback", "none"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path: Path, kind: str, mode: str, writable: bool) -> None:
    """At once, without waiting for a FIFO's other end, and without keeping a descriptor."""
    make, codes = REFUSED[kind]
    path = tmp_path / "x"
    make(path)
    if kind == "below a file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "x"
    before = open_fds()
    with pytest.raises(StorageError) as caught:
        open_storage(path, writable, CACHE_MODES[mode])
    assert caught.value.errno in codes | ({errno.EINVAL} if mode == "none" else set())
    assert str(path) in str(caught.value)
    assert open_fds() == before


def test_permission(tmp_path: Path, open_file: Open) -> None:
    storage = open_file(b"x" * 10, writable=False)
    with pytest.raises(StorageError) as caught:
        storage.pwrite(b"y", 0)
    assert caught.value.errno == errno.EBADF
    assert content(storage) == b"x" * 10
