"""Replacing files: what the new one takes over from the old one, and what cannot be replaced."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from support.tools import PYTHON, REPO, require, unavailable

from qedcore.errors import StorageError
from qedcore.storage.replacing import CreateError, replacing

ROOT = os.geteuid() == 0


def replace(path: Path, content: bytes = b"new", apart: bool = False) -> None:
    with replacing(path, apart=apart) as place:
        Path(place).write_bytes(content)


@pytest.mark.parametrize("apart", [False, True])
def test_permissions_and_attributes_stay(tmp_path: Path, apart: bool) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"old")
    path.chmod(0o640)
    if ROOT:
        os.chown(path, 12345, 23456)
    try:
        os.setxattr(path, "user.note", b"mine")
    except OSError:
        unavailable("no extended attributes here")
    before, inode = os.stat(path), path.stat().st_ino
    replace(path, apart=apart)
    after = os.stat(path)
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert os.getxattr(path, "user.note") == b"mine" and after.st_ino != inode and path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["target"]


_ACL = "system.posix_acl_access"


def acl(*entries: tuple[int, int, int]) -> bytes:
    """(tag, permissions, id) as Linux stores them."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_acls_stay(tmp_path: Path) -> None:
    """Also none, where new files get one from their directory."""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, 6, 12345), (4, 4, nobody), (16, 6, nobody), (32, 0, nobody)]
    for name in ("with", "without"):
        (tmp_path / name).write_bytes(b"old")
    try:
        os.setxattr(tmp_path / "with", _ACL, acl(*entries))
        os.setxattr(tmp_path, "system.posix_acl_default", acl(entries[0], (2, 7, 777), *entries[2:]))
    except OSError:
        unavailable("no ACLs here")
    before = [os.stat(tmp_path / name).st_mode for name in ("with", "without")]
    for name in ("with", "without"):
        replace(tmp_path / name)
    assert os.getxattr(tmp_path / "with", _ACL) == acl(*entries)
    assert _ACL not in os.listxattr(tmp_path / "without")
    assert before == [os.stat(tmp_path / name).st_mode for name in ("with", "without")]


def test_companions_come_along(tmp_path: Path) -> None:
    """Files that were made beside the new one, called after it."""
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    with replacing(path, apart=True) as place:
        assert os.path.basename(place) == "disk"
        Path(place).write_bytes(b"new")
        Path(place + "-1").write_bytes(b"more")
        assert path.read_bytes() == b"old"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"disk": b"new", "disk-1": b"more"}
    with pytest.raises(KeyError), replacing(path, apart=True) as place:
        Path(place + "-2").write_bytes(b"more")
        raise KeyError
    assert path.read_bytes() == b"new" and sorted(os.listdir(tmp_path)) == ["disk", "disk-1"]


def test_loops_of_links(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(CreateError) as caught:
        replace(tmp_path / "one")
    assert caught.value.errno == errno.ELOOP and (tmp_path / "one").is_symlink()


def test_links_to_nothing(tmp_path: Path) -> None:
    """As open() does, the file is made where the link leads."""
    (tmp_path / "link").symlink_to("there")
    replace(tmp_path / "link")
    assert (tmp_path / "there").read_bytes() == b"new" and (tmp_path / "link").is_symlink()


def test_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file is made durable when that is asked for; by default of the commands, one that replaces another."""
    synced: list[int] = []
    monkeypatch.setattr("qedcore.storage.replacing.os.fsync", synced.append)
    for sync, exists, expected in ((None, False, 0), (None, True, 2), (False, True, 0), (True, False, 2)):
        path = tmp_path / f"{sync}{exists}"
        if exists:
            path.touch()
        synced.clear()
        with replacing(path, sync=sync) as place:
            Path(place).write_bytes(b"x")
        assert len(synced) == expected, (sync, exists)


def test_mount_points_are_written_in_place(tmp_path: Path) -> None:
    """A file that is mounted by itself, as into a container: rename() onto it fails."""
    if not ROOT:
        unavailable("not root")
    require("unshare")
    host, target = tmp_path / "host", tmp_path / "target"
    host.write_bytes(b"old and long")
    target.touch()
    code = (
        "import sys\nfrom qedcore.storage.replacing import replacing\n"
        "with replacing(sys.argv[1], apart=True) as place:\n    open(place, 'r+b').write(b'new')\n"
    )
    script = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", host, target, PYTHON, code],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        check=False,
    )
    assert done.returncode == 0 and host.read_bytes() == b"new" and sorted(os.listdir(tmp_path)) == ["host", "target"]


@pytest.mark.skipif(not ROOT, reason="needs root to be somebody else")
@pytest.mark.parametrize("mode", [0o755, 0o1777], ids=["directory of others", "sticky"])
def test_directories_that_forbid_it(mode: int) -> None:
    """The file itself may be written to: it is, in place; nothing else is left there."""
    with tempfile.TemporaryDirectory() as name:  # not in tmp_path, which is for its owner only
        directory = Path(name)
        directory.chmod(mode)
        written_by_somebody_else(directory)


def written_by_somebody_else(directory: Path) -> None:
    target = directory / "target"
    target.write_bytes(b"old")
    target.chmod(0o666)
    code = (
        f"import os, sys\nsys.path.insert(0, {str(REPO)!r})\nfrom qedcore.storage.replacing import replacing\n"
        "os.chdir(sys.argv[1])\nos.setgid(54321)\nos.setuid(54321)\n"
        "with replacing('target') as place:\n    open(place, 'r+b').write(b'new')\n"
    )
    done = subprocess.run([PYTHON, "-c", code, directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == b"new" and target.stat().st_uid == 0 and os.listdir(directory) == ["target"]


def test_read_only_files_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"old")
    monkeypatch.setattr("qedcore.storage.replacing.os.access", lambda path, mode: False)
    with pytest.raises(StorageError) as caught:
        replace(path)
    assert caught.value.errno == errno.EACCES and path.read_bytes() == b"old"
