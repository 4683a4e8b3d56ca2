"""New images: refused before anything is touched, complete or not there at all, and the bytes of qemu-img's."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB, TiB
from support.qed_image import F_BACKING_FILE, F_NO_PROBE, GEOMETRIES, QEMU_GEOMETRIES, Geometry, QedFile, read_header
from support.qemu import qemu_img, qemu_img_ok

import qedcore
from qedcore.errors import QEDError, StorageError
from qedcore.storage.replacing import replacing


def listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# name -> (arguments, errno, words)
REFUSED: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "negative size": ({"size": -1}, errno.EINVAL, ("negative",)),
    "too large for the tables": ({"size": 64 * TiB + 1}, errno.EINVAL, (str(64 * TiB),)),
    "too large for 4K_1": ({"size": 1 << 31, "cluster_size": 4096, "table_size": 1}, errno.EINVAL, (str(1 << 30),)),
    "2**63": ({"size": 2**63, "cluster_size": 2 * MiB, "table_size": 16}, 0, (str(2**63),)),
    "rounded up to 2**63": ({"size": 2**63 - 511, "cluster_size": 64 * MiB, "table_size": 16}, 0, (str(2**63),)),
    "2**64": ({"size": 2**64, "cluster_size": 64 * MiB, "table_size": 16}, 0, (str(2**64),)),
    **{
        f"cluster_size {cs}": ({"cluster_size": cs}, errno.EINVAL, ("cluster size", str(cs)))
        for cs in (0, 512, 2048, 4097, 6144, 128 * MiB, -4096)
    },
    **{f"table_size {ts}": ({"table_size": ts}, errno.EINVAL, ("table size", str(ts))) for ts in (0, 3, 17, 32, -1)},
    # B7: QEMU makes images that it cannot open
    "name too long": ({"backing_file": "x" * 4096}, errno.EINVAL, ("4096", "4095")),
    "name too long for the header": (
        {"backing_file": "x" * 4033, "cluster_size": 4096},
        errno.EINVAL,
        ("4033", "4032"),
    ),
    "name too long in bytes": ({"backing_file": "\u00e4" * 2048}, errno.EINVAL, ("4096", "4095")),
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_touched(tmp_path: Path, name: str, existing: bool) -> None:
    """B10: QEMU truncates the file first."""
    arguments, code, words = REFUSED[name]
    path = tmp_path / "x.qed"
    if existing:
        path.write_bytes(b"precious")
        os.chmod(path, 0o640)
    before = listing(tmp_path), path.stat() if existing else None
    with pytest.raises(QEDError) as caught:
        qedcore.create(path, **{"size": MiB, **arguments})
    text = str(caught.value)
    assert caught.value.errno in ((code,) if code else (errno.EINVAL, errno.ENOTSUP, errno.EFBIG))
    assert not [word for word in words if word not in text] and "\n" not in text
    assert (listing(tmp_path), path.stat() if existing else None) == before


SIZES = {0: 0, 1: 512, 511: 512, 512: 512, 513: 1024, MiB: MiB, MiB + 1: MiB + 512, 64 * TiB: 64 * TiB}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.qed"
    header = qedcore.create(path, size)
    assert header.image_size == read_header(path)["image_size"] == SIZES[size]
    with qedcore.open_image(path, writable=False) as img:
        assert img.size == SIZES[size]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_new_image(tmp_path: Path, geometry: Geometry) -> None:
    """Sound, empty, and a hole but for its header."""
    path = tmp_path / "x.qed"
    header = qedcore.create(path, MiB, cluster_size=geometry.cluster_size, table_size=geometry.table_size)
    assert read_header(path) == {name: getattr(header, name) for name in read_header(path)}
    assert path.stat().st_size == geometry.cluster_size * (1 + geometry.table_size)
    assert path.stat().st_blocks * 512 <= 64 * KiB
    with QedFile(path) as file:
        assert file.verify().clean and not file.l1
    with qedcore.open_image(path) as img:
        assert img.pread(MiB, 0) == bytes(MiB)
        img.pwrite(b"hello", 5000)
        assert img.pread(5, 5000) == b"hello"


@pytest.mark.parametrize("geometry", QEMU_GEOMETRIES, ids=str)
@pytest.mark.parametrize("backing", [None, "raw", "qed"])
def test_same_bytes_as_qemu_img(tmp_path: Path, geometry: Geometry, backing: str | None) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MiB))
    qedcore.create(tmp_path / "base.qed", MiB)
    name = f"base.{backing}" if backing else None
    options = f"cluster_size={geometry.cluster_size},table_size={geometry.table_size}"
    args = ["-b", name, "-F", backing] if name and backing else []
    qemu_img_ok("create", "-q", "-f", "qed", "-o", options, *args, "theirs.qed", "3M", cwd=tmp_path)
    sizes = {"cluster_size": geometry.cluster_size, "table_size": geometry.table_size}
    qedcore.create(tmp_path / "ours.qed", 3 * MiB, backing_file=name, backing_fmt=backing, **sizes)
    ours, theirs = ((tmp_path / f"{who}.qed").open("rb") for who in ("ours", "theirs"))
    with ours, theirs:
        assert ours.read(64 * KiB) == theirs.read(64 * KiB)
        assert os.fstat(ours.fileno()).st_size == os.fstat(theirs.fileno()).st_size
    result = qemu_img("check", "-f", "qed", tmp_path / "ours.qed")
    assert (result.rc, result.out) == (0, "No errors were found on the image.\n")


# (backing_file, backing_fmt) -> features, name in the file
BACKING = {
    (None, None): (0, b""),
    (None, "raw"): (0, b""),
    ("base", None): (F_BACKING_FILE, b"base"),
    ("base", "raw"): (F_BACKING_FILE | F_NO_PROBE, b"base"),
    ("base", "qed"): (F_BACKING_FILE, b"base"),
    ("n\u00e4me", "raw"): (F_BACKING_FILE | F_NO_PROBE, b"n\xc3\xa4me"),
    ("\udcff", None): (F_BACKING_FILE, b"\xff"),
    ("x" * 4095, None): (F_BACKING_FILE, b"x" * 4095),
}


@pytest.mark.parametrize("case", BACKING, ids=lambda case: str(case)[:20].encode("ascii", "replace").decode())
def test_backing_name(tmp_path: Path, case: tuple[str | None, str | None]) -> None:
    features, name = BACKING[case]
    qedcore.create(tmp_path / "x.qed", MiB, backing_file=case[0], backing_fmt=case[1])
    header = read_header(tmp_path / "x.qed")
    assert header["features"] == features
    assert (header["backing_filename_offset"], header["backing_filename_size"]) == (64 if name else 0, len(name))
    assert (tmp_path / "x.qed").read_bytes()[64 : 64 + len(name) + 1] == name + b"\0"
    with qedcore.open_image(tmp_path / "x.qed", writable=False, follow=False) as img:
        assert img.backing_name == case[0]


def test_longest_name_in_the_smallest_header(tmp_path: Path) -> None:
    name = "y" * 4032
    qedcore.create(tmp_path / "x.qed", MiB, cluster_size=4096, backing_file=name)
    with QedFile(tmp_path / "x.qed") as file:
        assert file.backing_name == name
        assert not file.verify().errors


# Atomic


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("call", ["fsync", "replace", "directory", "write"])
def test_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, existing: bool
) -> None:
    """Byte for byte, or none; nothing else is left in the directory."""
    path = tmp_path / "x.qed"
    if existing:
        path.write_bytes(b"precious" * 1000)
    before = listing(tmp_path)
    fail_on(monkeypatch, call)
    with pytest.raises(StorageError, match="cannot create") as caught:
        qedcore.create(path, MiB)
    assert caught.value.errno == errno.ENOSPC
    after = listing(tmp_path)
    if call == "directory":  # the file is complete by then; only its name may be lost
        assert set(after) == {"x.qed"} and after["x.qed"][:4] == b"QED\0"
    else:
        assert after == before


def fail_on(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        is_directory = os.path.isdir(f"/proc/self/fd/{fd}")
        if is_directory is (call == "directory"):
            raise OSError(errno.ENOSPC, "")
        real_fsync(fd)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "")

    if call in ("fsync", "directory"):
        monkeypatch.setattr(os, "fsync", fsync)
    elif call == "replace":
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(os, "rename", fail)
    else:
        real_open = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            result = real_open(file, mode, *args, **kwargs)
            if "b" in mode and mode != "rb":
                result = Full(result)
            return result

        monkeypatch.setattr(builtins, "open", opened)


class Full:
    """A file on a full disk."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def test_readers_see_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing under the final name changes before the one rename."""
    path = tmp_path / "x.qed"
    path.write_bytes(b"old")
    seen: list[bytes] = []
    real = os.replace

    def replace(source: str, target: str) -> None:
        seen.append(path.read_bytes())
        new = Path(source).read_bytes()
        assert new[:4] == b"QED\0" and len(new) == 5 * 64 * KiB
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    qedcore.create(path, MiB)
    assert seen == [b"old"]
    assert path.stat().st_size == 5 * 64 * KiB


@pytest.mark.parametrize("replace", [True, False])
def test_file_is_durable_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    log: list[str] = []

    def note(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            kind = "directory" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}") else ""
            log.append(name + kind)
            return real(*args)

        return call

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    qedcore.create(tmp_path / "x.qed", MiB, replace=replace)
    assert log == ["fsync", "replace" if replace else "link", "fsyncdirectory"]


TARGETS: dict[str, tuple[Callable[[Path], object], int | None]] = {
    "directory": (Path.mkdir, None),
    "fifo": (os.mkfifo, None),
    "device": (lambda path: path.symlink_to("/dev/null"), None),
    "missing directory": (lambda path: path.symlink_to("gone/x"), errno.ENOENT),
    "below a file": (lambda path: ((path.parent / "f").touch(), path.symlink_to("f/x")), errno.ENOTDIR),
}


@pytest.mark.parametrize("name", TARGETS)
def test_impossible_targets(tmp_path: Path, name: str) -> None:
    make, code = TARGETS[name]
    path = tmp_path / "x"
    make(path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(QEDError) as caught:
        qedcore.create(path, MiB)
    assert code is None or caught.value.errno == code
    assert sorted(os.listdir(tmp_path)) == before
    assert path.is_symlink() or not path.is_file()


def test_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "x.qed").symlink_to("d/real.qed")
    qedcore.create(tmp_path / "x.qed", MiB)
    assert (tmp_path / "x.qed").is_symlink()
    assert (tmp_path / "d" / "real.qed").read_bytes()[:4] == b"QED\0"


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qedcore.create("x.qed", MiB)
    assert read_header(tmp_path / "x.qed")["image_size"] == MiB


@pytest.mark.parametrize("length", [1, 200, 255])
def test_long_file_name(tmp_path: Path, length: int) -> None:
    qedcore.create(tmp_path / ("n" * length), MiB)
    assert os.listdir(tmp_path) == ["n" * length]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_permissions(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        qedcore.create(tmp_path / "x.qed", MiB)
    finally:
        assert os.umask(before) == umask  # not left changed
    assert (tmp_path / "x.qed").stat().st_mode & 0o777 == 0o666 & ~umask


def test_replacing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o604)
    link = tmp_path / "link"
    link.symlink_to(target)
    with replacing(link) as temporary:
        Path(temporary).write_bytes(b"new")
        assert target.read_bytes() == b"old" and os.path.dirname(temporary) == str(tmp_path)
    assert target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o604
    assert link.is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "target"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_replacing_nothing_when_it_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(error), replacing(target) as temporary:
        Path(temporary).write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["target"]


def test_replacing_only_files(tmp_path: Path) -> None:
    for wrong in (tmp_path, "/dev/null", tmp_path / "missing" / "target"):
        with pytest.raises(StorageError, match="cannot create"), replacing(wrong):
            raise AssertionError


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """FAT, exFAT, SMB: it is made all the same, and still never in the place of a file that is there."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    qedcore.create(tmp_path / "x.qed", MiB, replace=False)
    before = listing(tmp_path)
    assert list(before) == ["x.qed"] and read_header(tmp_path / "x.qed")["image_size"] == MiB
    with pytest.raises(StorageError) as caught:
        qedcore.create(tmp_path / "x.qed", 2 * MiB, replace=False)
    assert caught.value.errno == errno.EEXIST and listing(tmp_path) == before


@pytest.mark.parametrize(("code", "works"), [(errno.EINVAL, True), (errno.EACCES, True), (errno.EIO, False)])
def test_without_fsync_of_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, works: bool
) -> None:
    """Some file systems have none; where it fails otherwise, the name may be lost, which is an error."""
    really = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(code, os.strerror(code))
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if works:
        qedcore.create(tmp_path / "x.qed", MiB)
    else:
        with pytest.raises(StorageError):
            qedcore.create(tmp_path / "x.qed", MiB)
