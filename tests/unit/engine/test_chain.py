"""Opening images with everything under them: probing, names, loops, depth, and nothing left open after errors."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import F_NEED_CHECK, Built, QedFile

import qedcore
from qedcore.backing.policy import BackingPolicy
from qedcore.errors import QEDError, StorageError, UnsupportedError
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.open import open_storage
from unit.fakes import CHANGES, FailAt, Tap, extents, open_fds

Image = Callable[..., Built]


CS = 64 * KiB


def raw(path: Path, size: int = MiB, start: bytes = b"") -> Path:
    path.write_bytes(start + stamp(9, 0, size)[len(start) :])
    return path


def test_top_image_is_not_probed(tmp_path: Path) -> None:
    with pytest.raises(QEDError, match="not in QED format"):
        qedcore.open_image(raw(tmp_path / "x.raw"))


def test_an_image_that_only_qemu_reaches(image: Image) -> None:
    """What qemu-nbd makes of such a name is guest data, which is not to be taken for an image."""
    name = "json:{'driver':'qed','file':{'driver':'blkdebug','image':{'driver':'file','filename':'x'}}}"
    with pytest.raises(UnsupportedError, match="only QEMU can open it"):
        qedcore.open_image(image(layout="-", backing=name).path, policy=BackingPolicy("any"))


def test_layers(image: Image, tmp_path: Path) -> None:
    """Each layer gives what it has; zero clusters hide what is below; lower files may be shorter."""
    base = raw(tmp_path / "base.raw", 5 * CS + 100)
    low = image("low.qed", layout="-DZ--- ", backing="base.raw", no_probe=True, tag=2, size=6 * CS)
    top = image("top.qed", layout="--- ZD--", backing="low.qed", tag=3, size=8 * CS)
    want = bytearray(8 * CS)
    want[: 5 * CS + 100] = base.read_bytes()
    want[CS : 2 * CS] = stamp(2, CS, CS)
    want[2 * CS : 3 * CS] = bytes(CS)
    want[4 * CS : 5 * CS] = bytes(CS)
    want[5 * CS : 6 * CS] = stamp(3, 5 * CS, CS)
    with qedcore.open_image(top.path, writable=False) as img:
        assert_same(img.pread(8 * CS, 0), bytes(want))
        for pos in (0, CS - 1, 5 * CS - 1, 6 * CS - 1):
            assert_same(img.pread(2 * CS, pos), bytes(want[pos : pos + 2 * CS]), pos)
        kinds = extents(img, 0, 8 * CS)
    assert kinds == [(2 * CS, "FOUND"), (CS, "ZERO"), (CS, "FOUND"), (CS, "ZERO"), (CS, "FOUND"), (2 * CS, "ZERO")]
    with QedFile(low.path) as oracle:
        assert_same(bytes(want[:CS]), oracle.read(0, CS))


def test_lower_images_are_opened_read_only(image: Image, tmp_path: Path) -> None:
    opened: list[tuple[str, bool]] = []

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        opened.append((os.path.basename(path), writable))
        return open_storage(path, writable, mode)

    raw(tmp_path / "base.raw")
    low = image("low.qed", layout="D-", backing="base.raw", features=F_NEED_CHECK, leaks=1)
    top = image("top.qed", backing="low.qed")
    before = low.path.read_bytes()
    for writable in (True, False):
        opened.clear()
        with qedcore.open_image(top.path, writable, opener=opener) as img:
            if writable:
                img.pwrite(b"x" * 1000, 500)
        assert opened == [("top.qed", writable), ("low.qed", False), ("base.raw", False)]
    assert low.path.read_bytes() == before  # a dirty one is not repaired behind its back


def test_name_may_be_a_symlink(image: Image, tmp_path: Path) -> None:
    """Relative names start from the directory of the name that was opened, as in QEMU."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    raw(tmp_path / "b" / "base.raw")
    image("a/top.qed", backing="base.raw")
    (tmp_path / "b" / "link.qed").symlink_to("../a/top.qed")
    with qedcore.open_image(tmp_path / "b" / "link.qed", writable=False) as img:
        assert_same(img.pread(CS, 0), stamp(9, 0, CS))
    with pytest.raises(StorageError) as caught:
        qedcore.open_image(tmp_path / "a" / "top.qed")
    assert caught.value.errno == errno.ENOENT


def test_without_following(image: Image) -> None:
    built = image(backing="gone.raw")
    with qedcore.open_image(built.path, writable=False, follow=False) as img:
        assert img.backing_name == "gone.raw"
    with pytest.raises(ValueError):
        qedcore.open_image(built.path, writable=True, follow=False)


def make_self(image: Image, tmp_path: Path) -> Path:
    return image("a.qed", backing="a.qed").path


def make_two(image: Image, tmp_path: Path) -> Path:
    image("b.qed", backing="a.qed")
    return image("a.qed", backing="b.qed").path


def make_long(image: Image, tmp_path: Path) -> Path:
    for i in range(10):
        image(f"{i}.qed", backing=f"{(i + 1) % 10 or 3}.qed")
    return tmp_path / "0.qed"


def make_symlink(image: Image, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to("a.qed")
    return image("a.qed", backing="link").path


def make_hard_link(image: Image, tmp_path: Path) -> Path:
    path = image("a.qed", backing="sub/b.qed").path
    (tmp_path / "sub").mkdir()
    os.link(path, tmp_path / "sub" / "b.qed")
    return path


def make_raw_loop(image: Image, tmp_path: Path) -> Path:
    """Read as raw there would be no endless loop, but writes would change what is below."""
    return image("a.qed", backing="a.qed", no_probe=True).path


@pytest.mark.parametrize("writable", [True, False], ids=["rw", "ro"])
@pytest.mark.parametrize(
    "make", [make_self, make_two, make_long, make_symlink, make_hard_link, make_raw_loop], ids=lambda f: f.__name__
)
def test_loops(image: Image, tmp_path: Path, make: Callable[[Image, Path], Path], writable: bool) -> None:
    path = make(image, tmp_path)
    before = open_fds()
    with pytest.raises(UnsupportedError, match="form a loop") as caught:
        qedcore.open_image(path, writable)
    assert "\n" not in str(caught.value)
    assert open_fds() == before


@pytest.mark.parametrize("depth", [60])
def test_deep_chain(image: Image, tmp_path: Path, depth: int) -> None:
    """Every layer owns one cluster; the lowest is read through all of the others."""
    raw(tmp_path / "base.raw", (depth + 1) * 4096)
    name = "base.raw"
    for i in range(depth):
        layout = {i: "data"}
        spec = {"cluster_size": 4096, "table_size": 1, "size": MiB, "tag": i + 1, "layout": layout}
        image(f"{i}.qed", backing=name, **spec)
        name = f"{i}.qed"
    before = open_fds()
    with qedcore.open_image(tmp_path / name) as img:
        assert open_fds() == before + depth + 1
        want = b"".join(stamp(i + 1, i * 4096, 4096) for i in range(depth)) + stamp(9, depth * 4096, 4096)
        assert_same(img.pread(len(want), 0), want)
        assert extents(img, 0, MiB) == [(len(want), "FOUND"), (MiB - len(want), "ZERO")]
        img.pwrite(b"new", depth * 4096 + 100)
        want = want[: depth * 4096 + 100] + b"new" + want[depth * 4096 + 103 :]
        assert_same(img.pread(len(want), 0), want)
    assert open_fds() == before


def test_broken_layer(image: Image, tmp_path: Path) -> None:
    """The message names the file."""
    image("low.qed", header={"table_size": 3})
    top = image("top.qed", backing="low.qed")
    with pytest.raises(QEDError, match="low.qed: QED table size is invalid") as caught:
        qedcore.open_image(top.path)
    assert caught.value.errno == errno.EINVAL


BROKEN: dict[str, dict[str, Any]] = {
    "missing": {"backing": "gone"},
    "directory": {"backing": "."},
    "not a path": {"backing": "nbd://localhost"},
    "bad header": {"header": {"cluster_size": 5}},
    "bad table": {"header": {"l1_table_offset": 12345}},
    "unknown feature": {"features": 8},
    "bad name": {"features": 1, "header": {"backing_filename_offset": CS, "backing_filename_size": 9}},
}


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("name", BROKEN)
def test_descriptors_after_errors(image: Image, tmp_path: Path, name: str, layers: int) -> None:
    image("0.qed", layout="D", **BROKEN[name])
    for i in range(layers):
        image(f"{i + 1}.qed", backing=f"{i}.qed")
    before = open_fds()
    with pytest.raises(QEDError):
        qedcore.open_image(tmp_path / f"{layers}.qed")
    assert open_fds() == before


def test_out_of_descriptors(image: Image, tmp_path: Path) -> None:
    image("0.qed")
    for i in range(1, 6):
        image(f"{i}.qed", backing=f"{i - 1}.qed")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest + 3, limits[0]), limits[1]))
        with pytest.raises(StorageError) as caught:
            for _ in range(highest):  # gaps below the highest are filled first
                opened.append(qedcore.open_image(tmp_path / "5.qed", writable=False))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert open_fds() == before + 6 * len(opened)
    for img in opened:
        img.close()
    assert open_fds() == before


@pytest.mark.parametrize("bottom", ["raw", "qed"])
def test_every_failure_of_an_open_closes_everything(image: Image, tmp_path: Path, bottom: str) -> None:
    """Three files, the top one to be repaired; the n-th call of any storage fails, for every n."""
    raw(tmp_path / "0") if bottom == "raw" else image("0", layout="D")
    image("1.qed", layout="-D", backing="0")
    spec: dict[str, Any] = {"features": F_NEED_CHECK, "leaks": 1, "entries": {3: lambda b: b.end + CS}}
    top = image("2.qed", layout="D", backing="1.qed", autoclear_features=1, **spec)
    original = top.path.read_bytes()
    leaked = []
    for n in range(1, 200):
        top.path.write_bytes(original)
        fault = FailAt(n, [*CHANGES, "pread", "size"], errno.ENOMEM)
        taps: list[Tap] = []

        def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
            taps.append(Tap(open_storage(path, writable, mode), fault))  # noqa: B023
            return taps[-1]  # noqa: B023

        try:
            img = qedcore.open_image(top.path, opener=opener)
        except StorageError as error:
            assert error.errno == errno.ENOMEM
            leaked += [(n, fault.hit, os.path.basename(tap.name)) for tap in taps if not tap.closed]
            for tap in taps:
                tap.inner.close()
        else:
            fault.armed = False
            img.close()
            assert all(tap.closed for tap in taps)
            break
    assert n > 15
    assert not leaked
