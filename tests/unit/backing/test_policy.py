"""What may be opened under an image, and as which format."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.patterns import KiB, MiB, assert_same, stamp
from support.qed_image import Built

import qedcore
from qedcore.backing.foreign import FOREIGN_FORMATS
from qedcore.backing.policy import BackingPolicy
from qedcore.errors import QEDError, RequestError, StorageError, UnsupportedError
from qedcore.storage import Storage
from qedcore.storage.cache_mode import CacheMode
from qedcore.storage.open import open_storage
from unit.backing.test_probe import MAGICS
from unit.fakes import open_fds

Image = Callable[..., Built]


CS = 64 * KiB


def test_backing_none(image: Image, tmp_path: Path) -> None:
    """Refused, not served alone: that would read zeros where there is data."""
    raw(tmp_path / "base.raw")
    built = image(backing="base.raw", no_probe=True)
    nothing = BackingPolicy(follow="none")
    with pytest.raises(UnsupportedError, match="'base.raw'.*backing=none"):
        qedcore.open_image(built.path, policy=nothing)
    with qedcore.open_image(image("alone.qed").path, policy=nothing) as img:
        assert img.backing is None


def confined(path: Path) -> BackingPolicy:
    return BackingPolicy().configured("backing-dir", str(path))


# name in the image -> may it be opened when only `tmp_path/in` is allowed?
INSIDE = {
    "in/base": True,
    "./in/../in/base": True,
    "{tmp}/in/base": True,
    "link-in": True,
    "file:in/base": True,
    'json:{{"driver":"raw","file":{{"filename":"{tmp}/in/base"}}}}': True,
    "out/base": False,
    "in/../out/base": False,
    "{tmp}/out/base": False,
    "/etc/passwd": False,
    "in/link-out": False,
    "in/dir-out/base": False,
    "in2/base": False,
    "in/up/out/base": False,
    "nbd://localhost": False,
    "nbd+unix:///?socket={tmp}/in/s": False,
    "fat:{tmp}/in": False,
    'json:{{"driver":"raw","file":{{"filename":"{tmp}/out/base"}}}}': False,
}


@pytest.mark.parametrize("follow", ["files", "any"])
@pytest.mark.parametrize("name", INSIDE)
def test_backing_dir(image: Image, tmp_path: Path, name: str, follow: str) -> None:
    for directory in ("in", "out", "in2"):
        (tmp_path / directory).mkdir()
        raw(tmp_path / directory / "base")
    (tmp_path / "link-in").symlink_to("in/base")
    (tmp_path / "in" / "link-out").symlink_to("../out/base")
    (tmp_path / "in" / "dir-out").symlink_to("../out")
    (tmp_path / "in" / "up").symlink_to("..")
    built = image(backing=name.format(tmp=tmp_path), no_probe=True)
    opened: list[str] = []

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        opened.append(path)
        return open_storage(path, writable, mode)

    policy = confined(tmp_path / "in").configured("backing", follow)
    before = open_fds()
    if INSIDE[name]:
        with qedcore.open_image(built.path, policy=policy, opener=opener) as img:
            assert_same(img.pread(CS, 0), stamp(9, 0, CS))
        assert opened[1] == f"{tmp_path}/in/base"  # by its real path: no link that may change
    else:
        with pytest.raises(UnsupportedError, match="backing-dir"):
            qedcore.open_image(built.path, policy=policy, opener=opener)
        assert len(opened) == 1  # not even opened
    assert open_fds() == before


def test_backing_dir_confines_the_whole_chain(image: Image, tmp_path: Path) -> None:
    """A guest may have disguised its raw disk as QED, naming any file."""
    (tmp_path / "in").mkdir()
    raw(tmp_path / "secret")
    image("in/base", backing="../secret", no_probe=True)
    built = image(backing="in/base")
    with pytest.raises(UnsupportedError, match="'../secret' .*backing-dir"):
        qedcore.open_image(built.path, policy=confined(tmp_path / "in"))


def test_backing_dir_takes_several_and_files(image: Image, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    raw(tmp_path / "base.raw")
    built = image(backing="base.raw", no_probe=True)
    policy = BackingPolicy().configured("backing-dir", f"{tmp_path}/a:{tmp_path}/base.raw")
    qedcore.open_image(built.path, policy=policy).close()
    with pytest.raises(UnsupportedError):
        qedcore.open_image(built.path, policy=confined(tmp_path / "a"))


@pytest.mark.parametrize("trick", ["directory", "file"])
def test_file_that_is_exchanged_while_it_is_opened(image: Image, tmp_path: Path, trick: str) -> None:
    """Between the look at the path and the open, somebody puts a link in its place, and takes it back."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    raw(tmp_path / "in" / "sub" / "base")
    raw(tmp_path / "out" / "base")
    built = image(backing="in/sub/base", no_probe=True)
    place = tmp_path / "in" / "sub" if trick == "directory" else tmp_path / "in" / "sub" / "base"
    target = tmp_path / "out" if trick == "directory" else tmp_path / "out" / "base"

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        if path.endswith(".qed"):
            return open_storage(path, writable, mode)
        place.rename(tmp_path / "kept")
        place.symlink_to(target)
        try:
            return open_storage(path, writable, mode)
        finally:
            place.unlink()
            (tmp_path / "kept").rename(place)

    before = open_fds()
    with pytest.raises(UnsupportedError, match="being replaced"):
        qedcore.open_image(built.path, policy=confined(tmp_path / "in"), opener=opener)
    assert open_fds() == before


def test_special_files_are_not_opened(image: Image, tmp_path: Path) -> None:
    """Opening a device can have effects; whatever the operator allows."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "/dev/null", "."):
        built = image(backing=name, no_probe=True)
        opened: list[str] = []

        def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
            opened.append(path)  # noqa: B023
            return open_storage(path, writable, mode)

        for policy in (BackingPolicy(), BackingPolicy(follow="any"), confined(Path("/"))):
            with pytest.raises(StorageError, match="not a file or block device"):
                qedcore.open_image(built.path, policy=policy, opener=opener)
        assert opened == [str(built.path)] * 3


@pytest.mark.parametrize("kind", ["block device", "fifo", "character device", "directory"])
def test_file_that_is_exchanged_for_something_else(image: Image, tmp_path: Path, kind: str) -> None:
    """Just before it is opened: what counts is what was opened, and no open hangs."""
    device = next((node for node in Path("/dev").glob("loop[0-9]*")), None)
    if kind == "block device" and (device is None or not os.access(device, os.R_OK)):
        pytest.skip("no block device to read from")
    base = raw(tmp_path / "base")
    built = image(backing="base", no_probe=True)
    stat = os.stat

    def opener(path: str, writable: bool, mode: CacheMode) -> Storage:
        if path.endswith(".qed"):
            return open_storage(path, writable, mode)
        with pytest.MonkeyPatch.context() as patch:
            before = stat(base)
            base.unlink()
            if kind == "fifo":
                os.mkfifo(base)
            elif kind == "directory":
                base.mkdir()
            else:
                base.symlink_to("/dev/null" if kind == "character device" else str(device))
            patch.setattr(os, "stat", lambda path, **options: before if path == str(base) else stat(path, **options))
            return open_storage(path, writable, mode)

    before = open_fds()
    with pytest.raises(QEDError, match="is a block device" if kind == "block device" else "not a file or block"):
        qedcore.open_image(built.path, opener=opener)
    assert open_fds() == before


def test_block_devices_need_permission(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stands for a device: making a real one takes root."""
    base = raw(tmp_path / "base")
    built = image(backing="base", no_probe=True)
    monkeypatch.setattr("qedcore.backing.policy.stat.S_ISBLK", lambda mode: mode == base.stat().st_mode)
    with pytest.raises(UnsupportedError, match=f"block device: .*backing=any, or backing-dir={base}"):
        qedcore.open_image(built.path)
    for policy in (BackingPolicy(follow="any"), confined(base), confined(tmp_path)):
        qedcore.open_image(built.path, policy=policy).close()


@pytest.mark.parametrize("name", ["nbd://localhost", "nbd:localhost:1", "http://h/x", "nbd+unix:///?socket=/s"])
def test_servers_need_permission(image: Image, name: str) -> None:
    with pytest.raises(UnsupportedError, match="not a local file: .*backing=any"):
        qedcore.open_image(image(backing=name).path)


WRONG_PARAMETERS = [
    ("backing", "follow"), ("backing", ""), ("backing-format", "luks"), ("backing-format", ""), ("backing-dir", ""),
    ("backing-dir", ":"), ("backing-dir", "/no/such/directory"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_PARAMETERS)
def test_wrong_parameters(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"{name}="):
        BackingPolicy().configured(name, value)


def test_named_format_is_not_probed(image: Image, tmp_path: Path) -> None:
    """json: says raw, whatever the first bytes say; and a name that says QED is believed, too."""
    base = image("base", layout="D")
    name = 'json:{"driver":"%s","file":{"driver":"file","filename":"base"}}'
    with qedcore.open_image(image(backing=name % "raw").path, writable=False) as img:
        assert_same(img.pread(CS, 0), base.path.read_bytes()[:CS])
    with qedcore.open_image(image(backing=name % "qed").path, writable=False) as img:
        assert_same(img.pread(CS, 0), stamp(1, 0, CS))
    # NO_PROBE is stronger, as in QEMU, where it becomes the driver
    with qedcore.open_image(image(backing=name % "qed", no_probe=True).path, writable=False) as img:
        assert_same(img.pread(CS, 0), base.path.read_bytes()[:CS])


def raw(path: Path, size: int = MiB, start: bytes = b"") -> Path:
    path.write_bytes(start + stamp(9, 0, size)[len(start) :])
    return path


@pytest.mark.parametrize("name", MAGICS)
def test_probed_backing_file(image: Image, tmp_path: Path, name: str) -> None:
    """Raw is served; what looks like another format is refused, with the parameter that decides."""
    at, magic, want = MAGICS[name]
    if want == "qed":
        image("base", layout="D")
    else:
        base = raw(tmp_path / "base")
        with base.open("r+b") as f:
            f.seek(at)
            f.write(magic)
    built = image(backing="base")
    if want in ("raw", "qed"):
        with qedcore.open_image(built.path, writable=False) as img:
            expected = (tmp_path / "base").read_bytes() if want == "raw" else stamp(1, 0, CS)
            assert_same(img.pread(CS, 0), expected[:CS])
        return
    before = open_fds()
    with pytest.raises(UnsupportedError, match=f"{tmp_path}/base, .* looks like a {want} image") as caught:
        qedcore.open_image(built.path)
    assert caught.value.errno == errno.ENOTSUP
    assert "backing-format=raw if" in str(caught.value)
    assert (f"backing-format={want} if" in str(caught.value)) == (want in FOREIGN_FORMATS)
    assert open_fds() == before
    with qedcore.open_image(built.path, writable=False, policy=BackingPolicy(format="raw")) as img:
        assert_same(img.pread(CS, 0), (tmp_path / "base").read_bytes()[:CS])


@pytest.mark.parametrize("name", [name for name, row in MAGICS.items() if row[2] != "raw"])
def test_no_probe_means_raw(image: Image, tmp_path: Path, name: str) -> None:
    """A guest can write any magic into the first sector of its raw disk."""
    at, magic, _ = MAGICS[name]
    base = raw(tmp_path / "base")
    with base.open("r+b") as f:
        f.seek(at)
        f.write(magic)
    built = image(backing="base", no_probe=True)
    with qedcore.open_image(built.path, writable=False) as img:
        assert_same(img.pread(MiB, 0), base.read_bytes())
